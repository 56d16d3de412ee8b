"""Running averages are those of every step's weights, and candidates the merges that they are alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from benchmarks.gpu_check.checks import Outcome, Section
from benchmarks.gpu_check.machines import Machine
from benchmarks.gpu_check.runs import Classifier, first_difference, fit, folder, plain
from merge_callback import CheckpointMergeCallback, RunningEma, SmaSince, load_merge
from merge_callback.merging import Ema, Sma, Ties, Wma
from merge_callback.snapshots.staging import has_room

SECTION = Section("averages", 45)

STEPS, EVERY, DECAY = 24, 8, 0.75

READ = range(7, STEPS, EVERY)
"""Steps after which the averages are compared; none at which the callback itself copies them."""


class Averaged(Callback):
    """The same averages of the smaller tensors, made in fp64 on training's own stream, without a wait."""

    def __init__(self) -> None:
        self.ema: dict[str, Tensor] = {}
        self.sma: dict[str, Tensor] = {}
        self.at: dict[int, dict[str, dict[str, Tensor]]] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        for name, tensor in pl_module.state_dict().items():
            if tensor.is_floating_point() and tensor.numel() <= 1 << 16:
                value = tensor.double()
                self.ema[name] = value.lerp(self.ema.get(name, value), DECAY)
                self.sma[name] = self.sma.get(name, value).lerp(value, 1 / step)
        if step in READ:
            self.at[step] = {"ema": dict(self.ema), "sma": dict(self.sma)}


class Metrics(Callback):
    """What the validations have found."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seen |= {name: float(plain(value)) for name, value in trainer.callback_metrics.items()}


@SECTION.check("running averages with batch norm", "those of every step's weights, summed in fp64", 6)
def running(machine: Machine) -> Outcome:
    # Matrices of this size keep the averages' stream busy while the next forward pass begins with its norm.
    width = 64 if machine.is_dry else 4096
    module = partial(Classifier, width=width, layers=4, norm=nn.BatchNorm1d)
    averages = {
        "decayed": RunningEma(decay=DECAY),
        "offloaded": RunningEma(decay=DECAY, offload=True),
        "since0": SmaSince(step=0),
    }
    copies, expected, worst = dict[Any, dict[str, Tensor]](), Averaged(), dict[str, float]()

    class Copies(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
            if (step := trainer.global_step) in READ and merging.session is not None:
                assert merging.session.running is not None
                for copy in merging.session.running.copies(step):
                    copies[copy.name, step] = {n: plain(t) for n, t in copy.arena.own_tensors().items()}

    with folder() as path, machine.trains():
        merging = CheckpointMergeCallback(
            every_n_steps=EVERY, dirpath=path, window=3, evaluate=False, emit_every=0, running=averages
        )
        fit(machine, merging, expected, Copies(), module=module, steps=STEPS, width=width)
    assert {name for name, _ in copies} == {*averages}, f"there are copies of {[*copies]}"
    for (name, step), found in copies.items():
        for tensor, value in expected.at[step]["sma" if name == "since0" else "ema"].items():
            exact = plain(value)
            off = float((found[tensor].double() - exact).abs().max() / exact.abs().max().clamp(min=1e-3))
            assert off <= 2e-6, f"{name} after step {step}: {tensor} is off by {off:.1e}"
            worst[name] = max(worst.get(name, 0.0), off)
    return Outcome(", ".join(f"{name} off by {value:.1e}" for name, value in worst.items()), figures=worst)


@SECTION.check(
    "candidates and their validations", "each is the merge that it is by itself; the best is published", 8
)
def candidates(machine: Machine) -> Outcome:
    default, chosen = Ema(alpha=0.3), {"mean": Sma(), "three": Wma(last=3), "elected": Ties(density=0.6)}
    merges: list[dict[str, Tensor]] = []

    def validated(**options: Any) -> dict[str, float]:
        with folder() as path, machine.trains():
            metrics = Metrics()
            given = {"every_n_steps": 4, "window": 4, "dirpath": path, "storage": "device", **options}
            merging = CheckpointMergeCallback(**given)
            fit(machine, merging, metrics, steps=STEPS, validates=True, val_check_interval=8)
            merges.append(load_merge(path / "latest"))
        return metrics.seen

    together = validated(method=default, candidates=chosen, select="val_loss")
    scores = {
        name: validated(method=method)["merged/val_loss"]
        for name, method in {"ema": default, **chosen}.items()
    }
    for name, score in scores.items():
        key = next(key for key in together if key.startswith(f"merged/{name}") and key.count("/") == 2)
        assert together[key] == score, f"{key} is {together[key]}, but {score} alone"
    best = min(scores, key=lambda name: scores[name])
    if name := first_difference(merges[0], merges[1 + [*scores].index(best)]):
        raise AssertionError(f"what was published is not {best}: {name}")
    return Outcome(f"{scores}; {best} is published", figures=scores)


@SECTION.check("the room for a copy", "is judged by what training has taken at most", on_gpu=True)
def room(machine: Machine) -> Outcome:
    free, total = torch.cuda.mem_get_info()
    assert has_room(machine.device, 1 << 20)
    assert not has_room(machine.device, total)
    return Outcome(f"{free / 1e9:.0f} of {total / 1e9:.0f} GB are free")
