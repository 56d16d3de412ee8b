"""Between snapshots the callback waits for no device: shown without one, by tensors that have no values.

A fake CUDA tensor refuses whatever needs its value (``item``, ``bool``, ``nonzero``, …): a hook handed
such tensors and comes through has waited for none. What that can't show is that the one small copy of a step
to the host is asynchronous, and what the sum over several ranks does; ``test_step_statistics.py`` does, on a
GPU. Learning rates that are tensors on a device are waited for, as ``AppliedLR`` says.
"""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import Classifier, loader, train

from merge_callback import CheckpointMergeCallback, SpikeOptions
from merge_callback.signals import async_scalars, step_statistics


class NoWayToTheHost(TorchDispatchMode):
    """Refuses every copy from the device to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        given, got = (_devices(leaves) for leaves in ((args, kwargs), results))
        if "cuda" in given and "cpu" in got:
            raise AssertionError(f"{func} brings a tensor to the host")
        return results


def _devices(tree):
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


class StepsOnADevice(Callback):
    """At the end of the first real step, takes the session through steps of two micro-batches on a device."""

    def __init__(self, merging, monkeypatch, steps=4):
        self.merging, self.steps = merging, steps
        self.sent, self.read, self.over = 0, 0, False
        monkeypatch.setattr(async_scalars, "_copy", self._copy)

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step > 1:
            return
        session = self.merging.session
        with FakeTensorMode(allow_non_fake_inputs=True), NoWayToTheHost():
            session.spikes.policy.recovery.scaler = SimpleNamespace(
                _scale=torch.ones((), device="cuda"), _per_optimizer_states={}
            )
            weight = nn.Parameter(torch.ones(4, 4, device="cuda"))
            weight.grad = torch.ones(4, 4, device="cuda")
            optimizer = torch.optim.SGD([weight], lr=0.1)
            for _ in range(self.steps):
                self._step(trainer, optimizer)
        session.spikes.policy.recovery.scaler, self.over = None, True

    def _step(self, trainer, optimizer):
        micro_batch = {"input_ids": torch.ones(2, 8, dtype=torch.long, device="cuda")}
        outputs = {"loss": torch.ones((), dtype=torch.bfloat16, device="cuda")}
        for last in (False, True):
            self.merging.on_train_batch_start(trainer, None, micro_batch, 0)
            if last:
                self.merging.on_before_optimizer_step(trainer, None, optimizer)
                trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.increment_completed()
            self.merging.on_train_batch_end(trainer, None, outputs, micro_batch, 0)

    def _copy(self, vector):
        """Stands in for the copy of a step's numbers: not to be waited for before the next is sent."""
        assert vector.is_cuda
        self.sent += 1
        number = self.sent

        def read(within):
            assert self.sent > number or self.over
            self.read += not self.over
            return [1.0] * len(vector)

        return read


def steps_on_a_device(tmp_path, monkeypatch):
    merging = CheckpointMergeCallback(
        every_n_tokens=10**9,
        count_tokens=lambda batch: batch["input_ids"].numel() if isinstance(batch, dict) else 1,
        dirpath=tmp_path,
        evaluate=False,
        spike=SpikeOptions(grad_norm=True),
    )
    probe = StepsOnADevice(merging, monkeypatch)
    train(Classifier(), merging, probe, data=loader(), max_steps=1, log_every_n_steps=0)
    return probe


def test_the_hooks_between_snapshots_need_no_value_of_a_tensor_on_a_device(tmp_path, monkeypatch):
    probe = steps_on_a_device(tmp_path, monkeypatch)
    assert (probe.sent, probe.read) == (probe.steps, probe.steps - 1)  # each is read when the next one ends


@pytest.mark.parametrize(
    ("wait", "refused"),
    [
        (lambda loss, _: loss.item(), DataDependentOutputException),
        (lambda loss, _: float(bool(loss)), DataDependentOutputException),
        (lambda loss, _: loss.cpu().double(), AssertionError),
    ],
)
def test_a_hook_that_waits_would_be_found_out(tmp_path, monkeypatch, wait, refused):
    monkeypatch.setattr(step_statistics, "_own", wait)
    with pytest.raises(refused):
        steps_on_a_device(tmp_path, monkeypatch)
