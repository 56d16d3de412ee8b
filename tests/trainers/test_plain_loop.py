"""The merger of plain loops: wrapped models and optimizers, resumes, what is refused."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_runs import Features, run_jobs
from torch import nn
from torch.distributed.fsdp import fully_shard
from training_runs import assert_same_bits, one_thread, seed

from merge_callback import CheckpointMerger, load_merge
from merge_callback.recovery.spike_policy import TrainingDivergedError
from merge_callback.report.history import read_history

STEPS = 16
OPTIONS = {"window": 3, "every_n_steps": 4, "keep_last": None}


def batch(step):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def make(wrap=lambda model: model, **optimizer):
    seed()
    model = wrap(nn.Sequential(Features(), Features()))
    return model, torch.optim.AdamW(model.parameters(), **{"lr": 0.02, **optimizer})


def take_step(model, optimizer, step):
    loss = ((model(batch(step)) - batch(-1)) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def run(folder, wrap=lambda model: model, steps=STEPS, **options):
    """The live weights at the end, on every rank; the merges are in the folder."""
    model, optimizer = make(wrap)
    with one_thread(), CheckpointMerger(model, optimizer, dirpath=folder, **OPTIONS, **options) as merger:
        for step in range(steps):
            merger.step(loss=take_step(model, optimizer, step), tokens=48)
            if step == 9:
                with merger.merged_weights() as merge:
                    assert merge.step == 8
                    merged = {name: t.clone() for name, t in _plain(model).items()}
    return merged, _plain(model), {k: v for k, v in merger.metrics.items() if "tokens" not in k}


def _plain(model):
    found = {name.removeprefix("module."): tensor for name, tensor in model.state_dict().items()}
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in found.items()}


def shard(model):
    for part in model:
        fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


WRAPS = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": shard}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("loops")


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder / "alone")


@pytest.fixture(scope="module")
def ranks(folder):
    jobs = {name: (run, {"folder": str(folder / name), "wrap": wrap}) for name, wrap in WRAPS.items()}
    return run_jobs(2, jobs)


@pytest.mark.parametrize("kind", WRAPS)
def test_several_ranks_merge_like_one(kind, ranks, alone, folder):
    for rank in ranks[kind]:
        for found, expected in zip(rank[:2], alone[:2], strict=True):
            assert_same_bits(found, expected)
        assert rank[2] == pytest.approx(alone[2], rel=1e-6)
    assert_same_merges(folder / kind, folder / "alone")


@pytest.mark.parametrize("kind", WRAPS)
def test_several_ranks_write_one_event_file(kind, ranks, alone, folder):
    found, expected = read_history(folder / kind), read_history(folder / "alone")
    assert found.run["ranks"] == 2
    assert found.run["snapshot_bytes"] == expected.run["snapshot_bytes"]
    for events in ("snapshot", "emission", "phase", "end"):
        steps = [event["step"] for event in expected.of(events)]
        assert [event["step"] for event in found.events if event["event"] == events] == steps


def assert_same_merges(found, expected):
    mine, theirs = (
        {path.name[:13]: load_merge(path) for path in f.glob("step=*")} for f in (found, expected)
    )
    assert mine.keys() == theirs.keys()
    assert len(mine) == 3
    for name in mine:
        assert_same_bits(mine[name], theirs[name])


def compiled(model):
    return torch.compile(model, backend="eager")


def fabric(model):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    return fabric.setup_module(model)


@pytest.mark.parametrize("wrap", [compiled, fabric])
def test_a_wrapped_model_is_merged_under_its_own_names(wrap, alone, folder, tmp_path):
    run(tmp_path, wrap)
    assert_same_merges(tmp_path, folder / "alone")


def test_the_optimizer_that_fabric_returns_is_seen_through(alone, folder, tmp_path):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(*make())
    with one_thread(), CheckpointMerger(model, optimizer, dirpath=tmp_path, **OPTIONS) as merger:
        for step in range(STEPS):
            merger.step(loss=take_step(model, optimizer, step))
    assert merger.metrics["merge/lr_ratio"] == 1.0
    assert_same_merges(tmp_path, folder / "alone")


def test_a_resumed_loop_goes_on_bit_for_bit(alone, folder, tmp_path):
    model, optimizer = make()
    merger = CheckpointMerger(model, optimizer, dirpath=tmp_path, **OPTIONS)
    with one_thread():
        for step in range(10):
            merger.step(loss=take_step(model, optimizer, step), tokens=48)
        saved = json.loads(json.dumps(merger.state_dict()))  # primitives only
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        states = torch.utils._pytree.tree_map(lambda x: x.clone() if hasattr(x, "clone") else x, states)
        merger.step(loss=take_step(model, optimizer, 10), tokens=48)
        merger._session.close()  # as a process that is killed gives its folder back
        model, optimizer = make()
        model.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])
        merger = CheckpointMerger(model, optimizer, dirpath=tmp_path, **OPTIONS)
        merger.load_state_dict(saved)
        with merger:
            for step in range(10, STEPS):
                merger.step(loss=take_step(model, optimizer, step), tokens=48)
    assert_same_bits(_plain(model), alone[1])
    assert_same_merges(tmp_path, folder / "alone")
    assert merger.metrics["merge/tokens"] == STEPS * 48


def interrupted(merger):
    torch.rand(3)
    for call in (merger.step, merger.state_dict, merger._host.optimizers[0].step):
        with pytest.raises(RuntimeError, match="holds a merge"):
            call()
    raise KeyboardInterrupt


def test_an_exception_within_merged_weights_brings_the_live_ones_back(tmp_path):
    model, optimizer = make()
    with one_thread(), CheckpointMerger(model, optimizer, dirpath=tmp_path, **OPTIONS) as merger:
        for step in range(9):
            merger.step(loss=take_step(model, optimizer, step))
        live, random = _plain(model), torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt), merger.merged_weights():
            interrupted(merger)
        assert_same_bits(_plain(model), live)
        assert torch.equal(torch.get_rng_state(), random)


def test_without_snapshots_there_is_no_merge(tmp_path):
    model, optimizer = make()
    with CheckpointMerger(model, optimizer, dirpath=tmp_path, **OPTIONS) as merger:
        with merger.merged_weights() as merge:
            assert merge is None
        merger.step(loss=take_step(model, optimizer, 0))
        with pytest.warns(UserWarning, match="nothing was published"):
            merger.close()


def test_a_decay_is_seen_by_the_rates_that_the_optimizer_steps_with(tmp_path):
    model, optimizer = make()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0 if s < 12 else 1 - (s - 12) / 12)
    logged = []
    merger = CheckpointMerger(
        model, optimizer, total_steps=24, log=lambda *line: logged.append(line), dirpath=tmp_path, **OPTIONS
    )
    with one_thread(), merger:
        for step in range(24):
            loss = take_step(model, optimizer, step)
            schedule.step()  # before our step: the rate it was taken with is known all the same
            merger.step(loss=loss)
    phases = {step: metrics["merge/phase"] for metrics, step in logged if "merge/phase" in metrics}
    assert phases[12] == 1  # stable
    assert phases[24] == 2  # decay


def diverge(model, optimizer, merger):
    for step in range(8):
        take_step(model, optimizer, step)
        if step == 2:
            with torch.no_grad():
                next(model.parameters()).fill_(torch.nan)
        merger.step(loss=torch.tensor(torch.nan if step > 2 else 1.0))


def test_a_run_ends_if_nothing_can_be_restored(tmp_path):
    model, optimizer = make()
    spike = {"patience": 1, "no_snapshot": "stop"}
    merger = CheckpointMerger(model, optimizer, dirpath=tmp_path, spike=spike, **OPTIONS)
    with merger, pytest.raises(TrainingDivergedError, match="nothing to restore"):
        diverge(model, optimizer, merger)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"windows": 3}, TypeError, "did you mean 'window'"),
        ({"evaluate": False}, TypeError, "merged_weights"),
        ({"window": 1}, ValueError, "window=1"),
    ],
)
def test_wrong_options_are_refused_at_once(options, error, says):
    model, optimizer = make()
    with pytest.raises(error, match=says):
        CheckpointMerger(model, optimizer, **options)


def test_tokens_have_to_be_told_if_they_are_the_interval(tmp_path):
    model, optimizer = make()
    merger = CheckpointMerger(model, optimizer, dirpath=tmp_path, every_n_tokens=100)
    with pytest.raises(ValueError, match=r"step\(tokens=…\)"):
        merger.step(loss=take_step(model, optimizer, 0))
    merger.close()


def test_an_optimizer_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
        CheckpointMerger(nn.Linear(1, 1), [object()])


def test_each_run_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        model, optimizer = make()
        with one_thread(), CheckpointMerger(model, optimizer, **OPTIONS) as merger:
            for step in range(8):
                merger.step(loss=take_step(model, optimizer, step))
    assert [*load_merge(Path("merges/latest"))] == [*load_merge("merges-1/latest")]


def test_gains_are_positive_where_the_merge_is_better(tmp_path):
    model, optimizer = make()
    merger = CheckpointMerger(model, optimizer, dirpath=tmp_path, higher_is_better=["mine"], **OPTIONS)
    merger.log_validation(live={"loss": 2, "mine": 1.0, "odd": 1}, merged={"loss": 1.5, "mine": 3, "odd": 2})
    assert merger.metrics == {
        "merged/loss": 1.5,
        "merged/mine": 3,
        "merged/odd": 2,
        "merge_gain/loss": 0.5,
        "merge_gain/mine": 2,
    }


def test_a_summary_writer_shows_live_and_merged_on_one_chart_and_gains_are_noted(tmp_path):
    class Writer:
        layouts = ()

        def add_scalar(self, *_): ...

        def add_custom_scalars(self, layout):
            self.layouts = (*self.layouts, layout)

    (model, optimizer), writer = make(), Writer()
    with one_thread(), CheckpointMerger(model, optimizer, log=writer, dirpath=tmp_path, **OPTIONS) as merger:
        for step in range(12):
            merger.step(loss=take_step(model, optimizer, step))
        for metric in ("loss", "loss", "x"):
            with merger.merged_weights():
                pass
            merger.log_validation(live={metric: 2}, merged={metric: 1})
        pipeline = merger._session.pipeline
        assert [v.gains for v in pipeline.advice.validations.recent] == [{"loss": 1}]
    assert [[*layout["Live and merged"]] for layout in writer.layouts] == [["loss"], ["loss", "x"]]
    assert writer.layouts[0]["Live and merged"]["loss"] == [
        "Multiline",
        ["loss$", "merged/loss$", "merge/forecast/loss$"],
    ]


def test_what_the_callback_and_the_merger_take_by_default_is_the_same():
    import inspect

    from merge_callback import CheckpointMergeCallback
    from merge_callback.options import DEFAULTS

    signature = inspect.signature(CheckpointMergeCallback).parameters
    assert {name: parameter.default for name, parameter in signature.items()} == dict(DEFAULTS)


def test_a_loop_may_step_in_hooks_of_its_own(alone, folder, tmp_path):
    model, optimizer = make(foreach=False)
    update = type(optimizer).step.__wrapped__  # the update alone: nobody is told of it
    with one_thread(), CheckpointMerger(model, optimizer, dirpath=tmp_path, **OPTIONS) as merger:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = ((model(batch(step)) - batch(-1)) ** 2).mean()
            loss.backward()
            with torch.no_grad():
                update(optimizer)
            merger.step(loss=loss)
    assert merger.metrics["merge/lr_ratio"] == 1.0
    assert_same_merges(tmp_path, folder / "alone")


def test_a_loop_may_have_several_optimizers_and_a_scaler(tmp_path):
    model, _ = make()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in model]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    merger = CheckpointMerger(model, optimizers, scaler=scaler, dirpath=tmp_path, **OPTIONS)
    with one_thread(), merger:
        for step in range(STEPS):
            loss = ((model(batch(step)) - batch(-1)) ** 2).mean()
            scaler.scale(loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            merger.step(loss=loss)
    assert merger.metrics["merge/window"] == 3
    assert len([*tmp_path.glob("step=*")]) == 3


def test_a_gradient_norm_can_be_handed_over(tmp_path):
    model, optimizer = make()
    merger = CheckpointMerger(model, optimizer, dirpath=tmp_path, spike={"grad_norm": True}, **OPTIONS)
    seen = []
    with one_thread(), merger:
        for step in range(3):
            loss = take_step(model, optimizer, step)
            merger.step(loss=loss, grad_norm=torch.tensor(7.0))
            read = partial(merger._session.progress.statistics._last.read)
            seen.append(read().norm)
    assert seen == [7.0] * 3
