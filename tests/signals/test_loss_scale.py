"""The watched gradient norm is that of the loss, whatever fp16 scales it by, and whoever unscales it."""

from functools import partial

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from spiking_runs import Batches, Line, plain, spiking
from torch import nn
from training_runs import assert_same_bits, one_thread

from merge_callback import CheckpointMerger
from merge_callback.signals.step_statistics import StepStatistics

FUSED = {"optimizer": torch.optim.AdamW, "fused": True}


@pytest.fixture
def norms(monkeypatch):
    """The gradient norms that runs read, of every step."""
    seen, read = [], StepStatistics._read

    def note(self, pending):
        statistics = read(self, pending)
        seen.append(statistics.grad_norm)
        return statistics

    monkeypatch.setattr(StepStatistics, "_read", note)
    return seen


def scaled_fit(folder, steps=150, scaler=None, run=spiking, **module):
    fit = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)] if scaler else []}
    options = {"spike": {"grad_norm": True}} if run is spiking else {}
    where = (folder,) if run is spiking else ()
    return run(*where, Batches(), steps, partial(Line, **module), fit=fit, **options)


def growing(**options):
    return torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=40, **options)


def test_a_healthy_fp16_run_is_not_restored_when_its_loss_scale_grows(tmp_path, norms):
    run = scaled_fit(tmp_path, scaler=growing(), **FUSED)
    assert run.trainer.precision_plugin.scaler.get_scale() == 16 * 2.0**3
    assert not run.events
    fused = norms[:]
    norms.clear()
    scaled_fit(tmp_path / "other", scaler=growing(), optimizer=torch.optim.AdamW)  # unscales them before
    assert fused[:20] == pytest.approx(norms[:20], rel=1e-3)
    without = scaled_fit(tmp_path, scaler=growing(), run=plain, **FUSED)
    assert_same_bits(run.watch.weights, without.watch.weights)


def test_a_disabled_scaler_is_like_none(tmp_path, norms):
    off = torch.amp.GradScaler("cpu", enabled=False)
    run = scaled_fit(tmp_path, 20, off, **FUSED)
    assert run.trainer.global_step == len(norms) + 1 == 20
    assert not run.events


@pytest.mark.parametrize("told", [True, False], ids=["scaler=", "no scaler="])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_a_loop_may_leave_it_to_the_optimizer_to_unscale(tmp_path, norms, fused, unscale, told):
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    options = {"scaler": scaler} if told else {}
    batches, true = torch.randn(8, 16, 4, generator=torch.Generator().manual_seed(0)), []
    merger = CheckpointMerger(
        model, optimizer, dirpath=tmp_path, every_n_steps=100, spike={"grad_norm": True}, **options
    )
    with one_thread(), merger:
        for batch in batches:
            optimizer.zero_grad()
            loss = model(batch).square().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            true.append(float(nn.utils.get_total_norm(gradients)))
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            merger.step(loss=loss)
    assert norms == pytest.approx(true[:-1], rel=1e-6)
