"""One of two ranks that share their steps' statistics: ``shared_statistics.py RANK MEETING FOLDER``.

Every scenario is a function of the ranks; what each rank found is left in FOLDER as JSON. With `Ranks()` the
same functions tell what one process finds that sees both ranks' batches.
"""

import json
import math
import os
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import nn
from training_runs import QUIET, seed

from merge_callback import CheckpointMergeCallback, SpikeOptions
from merge_callback.sharding import Ranks
from merge_callback.signals import step_statistics
from merge_callback.signals.snapshot_interval import Interval
from merge_callback.signals.step_statistics import StepStatistics
from merge_callback.signals.token_clock import TokenClock

STEPS, BAD = 24, 9
"""Optimizer steps of a scenario, and the one at which something goes wrong."""

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier"),
    *("broadcast", "broadcast_object_list", "gather", "gather_object", "monitored_barrier", "new_group"),
    *("recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
)


class Recorded(Ranks):
    """Notes when each sum is begun and when it is waited for."""

    def start_sum(self, numbers):
        if not hasattr(self, "events"):
            self.events, self.begun = [], 0
        self.begun += 1
        self.events.append(["begun", self.begun])
        wait, which = super().start_sum(numbers), self.begun

        def noted(*within):
            self.events.append(["read", which])
            return wait(*within)

        return noted


def micro_batches(ranks, step, sizes, share=True):
    """(loss, tokens) of this rank's micro-batches: of both ranks', where it is alone.

    Both have from one to three, not as many, and some return no loss.
    """
    found = []
    for rank in range(2):
        if share and ranks.group is not None and rank != ranks.rank:
            continue
        generator = torch.Generator().manual_seed(2 * step + rank)
        for i in range(1 + (step + rank) % 3):
            loss = torch.rand((), generator=generator)
            found.append((None if (step + i) % 5 == 0 else loss, sizes[step % len(sizes)] + 3 * rank + i))
    return found


def shared(ranks, every=1000, unit="steps", sizes=(8,), spoil=None, share=True, **options):
    """What `STEPS` steps are like: their statistics, and the steps a snapshot is due at with their tokens."""
    clock = TokenClock()
    statistics = StepStatistics(ranks, clock=clock, **options)
    interval = Interval(every, unit, clock, statistics, 0)
    seen, due = [], []
    for step in range(1, STEPS + 1):
        for loss, tokens in micro_batches(ranks, step, sizes, share):
            statistics.add_loss({"loss": loss / 2 if loss is not None else None}, 2)
            statistics.add_tokens(tokens)
        if spoil and step == BAD:
            spoil(statistics)
        seen.append(as_list(statistics.end_step(step, None)))
        if interval.is_over(step):
            due.append([step, clock.tokens if clock.countable is not False else None])
    statistics.flush_to_clock()
    return {"seen": seen[1:], "due": due, "tokens": clock.tokens, "countable": clock.countable}


def as_list(seen):
    return seen and [seen.step, seen.loss, seen.grad_norm, seen.skipped, seen.tokens]


def on_rank(ranks, rank):
    return ranks.group is None or ranks.rank == rank


# --- scenarios --------------------------------------------------------------------------------------------


def uneven(ranks):
    return shared(ranks)


def one_is_nan(ranks):
    """A NaN in one micro-batch of the second rank."""
    return shared(ranks, spoil=lambda s: on_rank(ranks, 1) and s.add_loss(torch.tensor(math.nan), 1))


def one_is_infinite(ranks):
    return shared(ranks, spoil=lambda s: on_rank(ranks, 0) and s.add_loss(torch.tensor(math.inf), 1))


def tensor_parallel(ranks):
    """Both ranks see all batches; the first counts them."""
    return shared(ranks, share=False, counts=ranks.is_first, every=100, unit="tokens")


def tensor_parallel_nan(ranks):
    """A NaN on the rank that does not count its batches."""
    spoil = lambda s: on_rank(ranks, 1) and s.add_loss(torch.tensor(math.nan), 1)  # noqa: E731
    return shared(ranks, share=False, counts=ranks.is_first, spoil=spoil)


def uncountable(ranks):
    """A batch of the second rank whose tokens can't be counted."""
    return shared(ranks, every=3, spoil=lambda s: on_rank(ranks, 1) and s.add_tokens(math.nan))


def by_steps(ranks):
    return shared(ranks, every=5, sizes=(3, 50, 7))


def by_tokens(ranks):
    """Intervals from below one step to many, with steps that grow, shrink and vary."""
    sizes = {
        "even": [10],
        "varied": [7, 11, 9, 8, 12],
        "growing": [*range(10, 60, 3)],
        "wild": [1, 90, 40, 9],
    }
    return {
        f"{name} {every}": shared(ranks, every=every, unit="tokens", sizes=steps)["due"]
        for name, steps in sizes.items()
        for every in (1, 17, 64, 250, 1001)
    }


def sudden(ranks):
    """At step `BAD` ten times the tokens of any step before, across the interval."""
    spoil = lambda s: on_rank(ranks, 0) and s.add_tokens(600)  # noqa: E731
    return shared(ranks, every=600, unit="tokens", spoil=spoil)


def waits(ranks):
    """When each step's sum is begun and waited for; an interval is some eight steps."""
    if ranks.group is None:
        return None
    recorded = Recorded(ranks.group)
    return {**shared(recorded, every=400, unit="tokens"), "events": recorded.events}


def gradients(ranks):
    """Norms of gradients of which each rank has a part, and one of them all of one; then a NaN in a part."""
    parameters = [nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(4))]
    generator = torch.Generator().manual_seed(0)

    def own_part(parameter):
        if ranks.group is None:
            return parameter.grad
        if parameter is parameters[1]:
            return parameter.grad if ranks.rank == 1 else None
        return parameter.grad[:2] if ranks.rank == 0 else parameter.grad[2:]

    statistics, found = StepStatistics(ranks, own_part=own_part), []
    for step in range(1, 6):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if step == 4:
            parameters[0].grad[4, 2] = math.nan
        if step != 5:
            statistics.add_gradients(parameters)
        found.append(as_list(statistics.end_step(step, None)))
    return [*found[1:], as_list(statistics.end_step(6, None))]


def scaled(ranks):
    """A loss scale that falls: skipped steps."""
    statistics, found = StepStatistics(ranks), []
    for step, scale in enumerate([64.0, 64.0, 32.0, 32.0, 64.0, 16.0, 16.0], 1):
        found.append(as_list(statistics.end_step(step, torch.tensor(scale))))
    return found[1:]


def restored(ranks):
    """A restore at step `BAD`: nothing of it is left but its tokens."""
    clock, found = TokenClock(), []
    statistics = StepStatistics(ranks, clock=clock)
    for step in range(1, BAD + 3):
        for loss, tokens in micro_batches(ranks, step, [8]):
            statistics.add_loss(loss, 1)
            statistics.add_tokens(tokens)
        found.append(as_list(statistics.end_step(step, None)))
        if step == BAD:
            statistics.forget()
            found.append(clock.tokens)
    return found[1:]


def resumed(ranks, state=None, save=True):
    """A run that rank 0 saves and all load after every step.

    Args:
        ranks: of the run.
        state: what to begin with, at step `BAD`.
        save: whether to.
    """
    parts, found = part(ranks), []
    if state:
        load(parts, state)
    for step in range(BAD if state else 1, STEPS):
        for loss, tokens in micro_batches(ranks, step, [8, 9, 14]):
            parts[0].add_loss(loss, 1)
            parts[0].add_tokens(tokens)
        found.append(end(parts, step))
        if save:
            state = ranks.from_first(saved(parts) if ranks.is_first else None)
            parts = part(ranks)
            load(parts, json.loads(json.dumps(state)))
    return found


def state_at(ranks):
    """What rank 0 saves before step `BAD`."""
    parts = part(ranks)
    for step in range(1, BAD):
        for loss, tokens in micro_batches(ranks, step, [8, 9, 14]):
            parts[0].add_loss(loss, 1)
            parts[0].add_tokens(tokens)
        end(parts, step)
    return ranks.from_first(saved(parts) if ranks.is_first else None)


def part(ranks):
    clock = TokenClock()
    statistics = StepStatistics(ranks, clock=clock)
    return statistics, clock, Interval(150, "tokens", clock, statistics, 0)


def end(parts, step):
    statistics, clock, interval = parts
    seen = as_list(statistics.end_step(step, torch.tensor(64.0)))
    due = interval.is_over(step)
    return [seen, clock.tokens if due else None]


def saved(parts):
    statistics, clock, interval = parts
    return {"s": statistics.state_dict(), "t": clock.tokens, "largest": clock.largest, "mark": interval.mark}


def load(parts, state):
    statistics, clock, interval = parts
    statistics.load_state_dict(state["s"])
    clock.tokens, clock.largest, interval.mark = state["t"], state["largest"], state["mark"]


def one_saves(ranks):
    """Rank 0 alone asks for its state now and then, and nobody loads it."""
    parts, found = part(ranks), []
    for step in range(1, STEPS):
        for loss, tokens in micro_batches(ranks, step, [8, 9, 14]):
            parts[0].add_loss(loss, 1)
            parts[0].add_tokens(tokens)
        found.append(end(parts, step))
        if ranks.is_first and step % 3 == 0:
            saved(parts)
    return found


def late(ranks):
    """Rank 0 saves while the other has not ended the step; the run goes on as if it had not tried to."""
    statistics, found, patience = StepStatistics(ranks), [], step_statistics._PATIENCE
    for step in range(1, 5):
        statistics.add_loss(float(step), 1)
        if step == 3 and not on_rank(ranks, 0):
            ranks.exchange(None)
        found.append(as_list(statistics.end_step(step, None)))
        if step == 3 and ranks.group is not None and ranks.rank == 0:
            step_statistics._PATIENCE = timedelta(seconds=0.1)
            start = time.monotonic()
            found[-1] = [found[-1], statistics.state_dict()["last"], time.monotonic() - start < 5]
            step_statistics._PATIENCE = patience
            ranks.exchange(None)
    return found


# --- real fits --------------------------------------------------------------------------------------------


class Loader:
    """Token batches of both ranks: each has its own, of its own and ever changing sizes."""

    def __init__(self, ranks):
        self.ranks = ranks

    def __len__(self):
        return 100

    def __iter__(self):
        for i in range(100):
            both = [torch.full((3 + (i + r) % 4, 5 + r), i % 7) for r in range(2)]
            if self.ranks.group is not None:
                yield {"input_ids": both[self.ranks.rank]}
            else:
                yield {"input_ids": torch.cat([b.flatten() for b in both])[None]}


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 1)

    def training_step(self, batch, batch_idx):
        return self.table(batch["input_ids"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counts(Callback):
    """Counts what Python sends to other ranks, from batch to batch: name and bytes."""

    def __init__(self):
        self.steps, self.sent, self.functions = [], [], {}

    def on_train_start(self, trainer, module):
        for name in COLLECTIVES:
            self.functions[name] = getattr(dist, name)
            setattr(dist, name, self.counted(name))

    def counted(self, name):
        def send(*args, **options):
            first = args[0] if args else None
            self.sent.append([name, first.nbytes if isinstance(first, torch.Tensor) else None])
            return self.functions[name](*args, **options)

        return send

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(self.sent)
        self.sent = []

    def on_train_end(self, trainer, module):
        for name, function in self.functions.items():
            setattr(dist, name, function)


def fit(ranks, folder, *others, trainer=None, spike=None, **options):
    """A DDP fit of twenty steps: the window's records, all tokens, and the last step."""
    callback = CheckpointMergeCallback(
        dirpath=folder,
        storage="cpu",
        durable=False,
        emit_every=0,
        evaluate=False,
        spike=SpikeOptions(**(spike or {"action": "warn"})),
        **options,
    )
    train(ranks, callback, *others, **(trainer or {}))
    state = callback.state_dict()
    records = [[r["step"], r["tokens"]] for r in state["window"]["snapshots"]]
    return {"records": records, "tokens": state["tokens"]}


def train(ranks, *callbacks, **options):
    seed()
    several = {"devices": 2, "strategy": "ddp", "plugins": [TorchElasticEnvironment()]}
    chosen = {**QUIET, "max_steps": 20, "use_distributed_sampler": False, **options}
    trainer = Trainer(**{**chosen, **(several if ranks.group is not None else {})}, callbacks=[*callbacks])
    trainer.fit(Model(), Loader(ranks))


def counter(ranks):
    """Counts no batch of the second rank."""

    def count(batch):
        if on_rank(ranks, 1):
            raise ValueError("no tokens here")
        return 1

    return count


def refused(ranks, folder):
    try:
        fit(ranks, folder, every_n_tokens=10, count_tokens=counter(ranks))
    except Exception as error:
        return [type(error).__name__, str(error)]


def fits(ranks, folder):
    without, merging = Counts(), Counts()
    train(ranks, without)
    return {
        "quiet": fit(ranks, folder / "1", merging, every_n_steps=1000, spike={"grad_norm": True}),
        "by_tokens": fit(ranks, folder / "2", every_n_tokens=130),
        "accumulated": fit(ranks, folder / "3", every_n_tokens=333, trainer={"accumulate_grad_batches": 3}),
        "stopped": fit(ranks, folder / "4", every_n_steps=8, count_tokens=counter(ranks)),
        "refused": refused(ranks, folder / "5"),
        "sent": merging.steps,
        "sent_without": without.steps,
    }


SCENARIOS = [
    *(uneven, one_is_nan, one_is_infinite, tensor_parallel, tensor_parallel_nan, uncountable, by_steps),
    *(by_tokens, sudden, waits, gradients, scaled, restored, state_at, resumed, one_saves, late),
]


def all_of_them(folder, alone):
    """What a rank of two finds in all scenarios, after ``alone``, the state of a process without others."""
    elastic = {"RANK": os.environ["LOCAL_RANK"], "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ.update(elastic)
    ranks = Ranks.of_run()
    found = {scenario.__name__: scenario(ranks) for scenario in SCENARIOS}
    found["unbroken"] = resumed(ranks, save=False)
    found["from_one"] = resumed(ranks, json.loads(alone))
    found["fits"] = fits(ranks, folder)
    return json.loads(json.dumps(found))
