"""Loss spikes in a Hugging Face ``Trainer``."""

import json

import pytest
import torch
from hugging_face_runs import LONG, OPTIONS, SGD, SPIKE, Break, Fail, history, own_log, train, trainer_of
from training_runs import assert_same_bits, seed, weights_of
from transformers import TrainerCallback

from merge_callback.snapshots.live_merge import HalfRestoredError
from merge_callback.transformers import CheckpointMergeTrainerCallback


class Regression(torch.nn.Module):
    """A small net whose training loss is higher than what it can learn by as much as a batch says."""

    def __init__(self):
        super().__init__()
        seed()
        self.net = torch.nn.Linear(8, 1)

    def forward(self, x, labels, harder=None):
        loss = torch.nn.functional.mse_loss(self.net(x), labels) + 1
        return {"loss": loss if harder is None else loss + harder.mean()}


def numbers(count, hard=()):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    return [
        {"x": row, "labels": row.sum(0, keepdim=True), "harder": torch.tensor(90.0 * (i in hard))}
        for i, row in enumerate(x)
    ]


@pytest.mark.parametrize("evidence", ["batch", "validation"])
def test_a_run_is_restored_after_a_spike(evidence, tmp_path):
    spike = {**SPIKE, "evidence": evidence, "grad_norm": True}
    callback = CheckpointMergeTrainerCallback(every_n_steps=5, window=4, spike=spike)
    with pytest.warns(UserWarning, match="restored the sma"):
        run = train(
            tmp_path, callback, Break(), model=Regression(), data=numbers(64), **LONG, eval_strategy="epoch"
        )
    (event,) = map(json.loads, (tmp_path / "merges" / "spikes.jsonl").read_text().splitlines())
    losses = {entry["step"]: entry["loss"] for entry in history(run) if "loss" in entry}
    steps = range(event["onset"], event["step"] + 1)
    assert event["event"] == "restore"
    assert event["evidence"]["source"] == evidence
    assert event["values"] == pytest.approx([losses[step] for step in steps], rel=1e-5)
    assert event["batches"][0] == {"step": 71, "epoch": 8, "batch_idx": 13}  # the last of two micro-batches
    assert losses[100] < 1.1  # and 1 is the least there is


def test_hard_data_leaves_the_run_as_it_is(tmp_path):
    data = numbers(400, hard=range(280, 320))
    callback = CheckpointMergeTrainerCallback(every_n_steps=5, window=4, spike=SPIKE)
    kinds = {"model": Regression(), "data": data, "max_steps": 90, **SGD}
    with pytest.warns(UserWarning, match="spike"):
        run = train(tmp_path, callback, **kinds)
    (event,) = map(json.loads, (tmp_path / "merges" / "spikes.jsonl").read_text().splitlines())
    assert event["event"] != "restore"
    assert event["evidence"]["source"] == "batch"
    alone = train(tmp_path / "alone", **{**kinds, "model": Regression()})
    assert_same_bits(weights_of(run.model), weights_of(alone.model))
    assert own_log(run) == own_log(alone)


def test_a_mixture_is_never_saved(tmp_path):
    run = trainer_of(tmp_path, CheckpointMergeTrainerCallback(**OPTIONS), Fail(3, HalfRestoredError))
    with pytest.raises(HalfRestoredError, match="machine"):
        run.train()
    with pytest.raises(HalfRestoredError, match="not saved"):
        run.save_model(tmp_path / "rescued")
    run.remove_callback(Fail)
    run.train()
    run.save_model(tmp_path / "sound")


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_gradient_norm_of_an_fp16_run_is_unscaled(tmp_path, monkeypatch, optim):
    def norms(scaler):
        seen = []

        class Reads(TrainerCallback):
            def on_step_end(self, *_, **__):
                seen.append(merging.session.progress.statistics._last.read().norm)

        merging = CheckpointMergeTrainerCallback(
            every_n_steps=100, dirpath=tmp_path / "merges", spike={"grad_norm": True}
        )
        run = trainer_of(tmp_path, merging, Reads(), max_steps=5, optim=optim)
        if scaler:  # as fp16=True on a GPU
            monkeypatch.setattr(type(run.accelerator), "mixed_precision", "fp16")
            run.accelerator.scaler, run.accelerator.native_amp = scaler, True
        run.train()
        return seen

    plain = norms(None)
    assert norms(torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)) == pytest.approx(
        plain, 0.02
    )
    assert len(plain) == 5
