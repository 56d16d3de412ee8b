"""The hooks of a step wait for no device: shown without one, over whole fits on a pretended one.

What a pretended GPU can't show is the order between streams, and what the sum over several ranks does there.
"""

import json
import threading

import pytest
import torch
from lightning.pytorch import Callback
from pretend_gpu import GPU, OneGpu, OnGpu, RefusedError, Stream, plain, pretend_gpu, put_on
from spiking_runs import Batches, Line
from training_runs import Classifier, assert_same_bits, loader, seed, train

from merge_callback import CheckpointMergeCallback, PowerEma, RunningEma, SmaSince, SpikeOptions
from merge_callback.signals import step_statistics
from merge_callback.signals.applied_lr import AppliedLR
from merge_callback.signals.step_statistics import Statistics, StepStatistics
from merge_callback.signals.token_clock import TokenClock

STEPS = 12
HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class Watched(CheckpointMergeCallback):
    """Raises if a hook of a step waits for the device, but for the numbers of the step before."""

    gpu = None


def _watched(name):
    hook = getattr(CheckpointMergeCallback, name)

    def watched(self, trainer, *args):
        if self.gpu is None or trainer.global_step == 0:
            return hook(self, trainer, *args)
        with self.gpu.refusing("event"):
            return hook(self, trainer, *args)

    return watched


for name in HOOKS:
    setattr(Watched, name, _watched(name))


class Logging(Classifier):
    """Logs to the progress bar, and a number of each step."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("shown", loss.detach(), prog_bar=True)
        self.log("aux", loss.detach() * 2, on_step=True, on_epoch=True)
        return loss


class Capturable(Classifier):
    """Its learning rate is a tensor on the device of the weights."""

    def configure_optimizers(self):
        device = self.net[0].weight.device
        rate = torch.tensor(0.01, device=device)
        return torch.optim.Adam(self.parameters(), lr=rate, capturable=device.type == "cuda", foreach=False)


def tokens_on_the_device(batch):
    return (batch[1] >= 0).sum() * 8


RUNS = {
    "default": {},
    "every option of the step path": {
        "spike": SpikeOptions(grad_norm=True, watch=["aux"]),
        "module": Logging,
        "fit": {"accumulate_grad_batches": 2, "log_every_n_steps": 3},
    },
    "metrics in the progress bar": {"module": Logging, "fit": {"log_every_n_steps": 2}},
    "tokens that are counted on the device": {
        "count_tokens": tokens_on_the_device,
        "every_n_tokens": 4 * 64,
        "every_n_steps": None,
    },
    "a learning rate on the device": {"module": Capturable},
    "running averages": {"running": [PowerEma(0.1), RunningEma(decay=0.9, offload=True), SmaSince(step=5)]},
}


def fit(*callbacks, module=Classifier, fit=(), data=None):
    """A fit on the device; the weights it ends with."""
    seed()
    model = put_on(module())
    train(model, *callbacks, data=data or loader(128), strategy=OneGpu(), **{"max_steps": STEPS, **dict(fit)})
    return {name: plain(tensor) for name, tensor in model.state_dict().items()}


def watched(gpu, folder, **options):
    callback = Watched(**{"every_n_steps": 4, "window": 3, "evaluate": False, "dirpath": folder, **options})
    callback.gpu = gpu
    return callback


@pytest.mark.parametrize("run", RUNS)
def test_no_hook_of_a_step_waits_for_the_device(tmp_path, monkeypatch, run):
    of_fit = {name: RUNS[run][name] for name in ("module", "fit") if name in RUNS[run]}
    options = {name: value for name, value in RUNS[run].items() if name not in of_fit}
    with pretend_gpu(monkeypatch) as gpu:
        callback = watched(gpu, tmp_path, **options)
        assert_same_bits(fit(callback, **of_fit), fit(**of_fit))
    assert [snapshot.step for snapshot in callback.window] == [4, 8, 12]


def test_an_average_in_pinned_host_memory_is_the_one_on_the_device(tmp_path, monkeypatch):
    seen = {}

    class Copies(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            if trainer.global_step == STEPS - 1:
                for copy in callback.session.running.copies(STEPS - 1):
                    seen[copy.name] = copy.step, {n: plain(t) for n, t in copy.arena.own_tensors().items()}

    running = {"device": PowerEma(0.1), "host": PowerEma(0.1, offload=True)}
    with pretend_gpu(monkeypatch) as gpu:
        callback = watched(gpu, tmp_path, running=running)
        fit(callback, Copies())
    assert seen["host"][0] == STEPS - 1
    assert_same_bits(list(seen["host"][1].values()), list(seen["device"][1].values()))


@pytest.mark.parametrize(
    ("module", "steps"),
    [(Line, ["forward", "wait"] * 4), (Classifier, ["forward", *["forward", "wait"] * 3, "wait"])],
    ids=["batch norm", "no buffers"],
)
def test_the_device_waits_for_the_averages_before_what_they_read_is_overwritten(
    tmp_path, monkeypatch, module, steps
):
    """Batch norm writes to its buffers in the forward pass, the optimizer to all else."""
    told = []

    class Forward(Callback):
        def on_train_batch_start(self, *args):
            told.append("forward")

    def wait_event(stream, event):
        if threading.current_thread() is threading.main_thread():
            told.append("wait")

    monkeypatch.setattr(Stream, "wait_event", wait_event)
    with pretend_gpu(monkeypatch) as gpu:
        callback = watched(gpu, tmp_path, running=[RunningEma(decay=0.9)], every_n_steps=100)
        data = Batches() if module is Line else None
        fit(callback, Forward(), module=module, fit={"max_steps": 4}, data=data)
    assert told == steps


@pytest.mark.parametrize(
    "wait",
    [
        lambda loss: loss.item(),
        lambda loss: float(bool(loss)),
        lambda loss: loss.cpu().double(),
        lambda loss: torch.empty(()).copy_(loss),
        lambda loss: loss * torch.tensor(1.0, device=GPU),
    ],
)
def test_a_hook_that_waits_would_be_found_out(tmp_path, monkeypatch, wait):
    monkeypatch.setattr(
        step_statistics, "own_copy", lambda loss: wait(loss) if isinstance(loss, OnGpu) else 0.0
    )
    with pretend_gpu(monkeypatch) as gpu, pytest.raises(RefusedError, match="waits for the device"):
        fit(watched(gpu, tmp_path))


def test_rates_on_the_device_are_known_one_step_late_across_a_resume_too(monkeypatch):
    with pretend_gpu(monkeypatch) as gpu:
        rate, weight = torch.full((), 1.0, device=GPU), torch.ones(3, device=GPU)
        optimizer = torch.optim.SGD([{"params": [weight], "lr": rate}, {"params": [], "lr": 0.5}])
        unbroken, resumed, seen = AppliedLR([optimizer]), AppliedLR([optimizer]), []
        for step in range(6):
            rate.fill_(2.0**-step)
            for applied in (unbroken, resumed):
                with gpu.refusing("event"):
                    applied.note(optimizer)
            seen.append(unbroken.rates[0])
            assert (
                (resumed.rates, resumed.total)
                == (unbroken.rates, unbroken.total)
                == ([seen[-1], 0.5], 3 * seen[-1])
            )
            state, resumed = json.loads(json.dumps(resumed.state_dict())), AppliedLR([optimizer])
            resumed.load_state_dict(state)
    assert seen == [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]


def test_tokens_on_the_device_are_summed_there_and_counted_one_step_late(monkeypatch):
    clock = TokenClock()
    with pretend_gpu(monkeypatch) as gpu:
        statistics = StepStatistics(device=GPU, clock=clock)
        for step in range(1, 4):
            with gpu.refusing("event"):
                for tokens in (3, 4):
                    statistics.add_tokens(torch.full((), tokens, dtype=torch.long, device=GPU))
                seen = statistics.end_step(step, None)
            assert clock.tokens == 7 * (step - 1)
            assert seen is None or seen.tokens == 7
        statistics.flush_to_clock()
        statistics.forget()
    assert clock.tokens == 21


VIEWS = {"detach", "reshape", "view", "is_sparse", "numel"}
"""What the device hears nothing of."""


@pytest.mark.parametrize(("micro_batches", "norms", "launches"), [(1, 0, 2), (4, 0, 6), (4, 1, 7)])
def test_a_step_takes_a_launch_for_each_number_and_one_to_gather_and_send_them(
    monkeypatch, micro_batches, norms, launches
):
    with pretend_gpu(monkeypatch) as gpu:
        statistics, loss = StepStatistics(device=GPU), torch.full((), 2.0, device=GPU)
        for step in range(1, 4):
            gpu.launches.clear()
            for _ in range(micro_batches):
                statistics.add_loss({"loss": loss}, micro_batches)
            if norms:
                statistics.set_gradient_norm(loss)
            seen = statistics.end_step(step, None)
            loss.mul_(2)  # as a replayed CUDA graph overwrites its results
            made = [name for _, name in gpu.launches[:-1] if name not in VIEWS and "__" not in name]
            assert len(made) == launches, made
    assert seen == Statistics(2, 4.0 * micro_batches, 4.0 if norms else None, False)
