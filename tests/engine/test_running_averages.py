"""Running averages in real runs: what they hold, stored and resumed copies, restores, several ranks."""

import copy
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_runs import Features, run_jobs
from lightning.pytorch import Callback
from spiking_runs import FIRES, USED, spiking
from torch import nn
from torch.distributed.fsdp import fully_shard
from training_runs import Classifier, assert_same_bits, emissions, loader, one_thread, seed, train

from merge_callback import (
    CheckpointMergeCallback,
    CheckpointMerger,
    PowerEma,
    RunningEma,
    RunningWsm,
    SmaSince,
    load_merge,
    posthoc_ema,
)
from merge_callback.checkpoints.open import open_checkpoint, verify
from merge_callback.cli.main import main
from merge_callback.merging.posthoc import Profile, solve
from merge_callback.snapshots.running import RunningAverages
from merge_callback.snapshots.running_files import retained

STEPS, SAVED = 22, 10
RUNNING = [
    *(PowerEma(0.05), PowerEma(0.1), RunningEma(half_life=0.05), SmaSince(step=4)),
    *(RunningWsm(horizon=18, start=2), PowerEma(0.08, every_n_steps=3)),
]
OPTIONS = {"window": 3, "every_n_steps": 4, "emit_every": 0}


def batch(step):
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def make(wrap=lambda model: model):
    seed()
    model = nn.Sequential(Features(), nn.BatchNorm1d(6), Features())
    model = wrap(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.02)


class Loop:
    """A plain loop that may stop in between: its weights after each step, and its averages at the end."""

    def __init__(self, folder, wrap=lambda model: model, state=None, steps=STEPS, running=RUNNING, **options):
        self.model, self.optimizer = make(wrap)
        self.weights, self.saved, begin = [], {}, 0
        options = {**OPTIONS, "dirpath": folder, "running": running, **options}
        merger = CheckpointMerger(self.model, self.optimizer, **options)
        if state:
            getattr(self.model, "module", self.model).load_state_dict(state["model"])
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # it would share the tensors
            merger.load_state_dict(state["merger"])
            begin = state["merger"]["step"]
        with one_thread(), merger:
            for step in range(begin, steps):
                loss = ((self.model(batch(step)) - batch(-1)) ** 2).mean()
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                merger.step(loss=loss, tokens=48)
                self.weights.append({n: t.clone() for n, t in self.model.state_dict().items()})
                if step + 1 == SAVED:
                    self.saved = copy.deepcopy(
                        {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
                    )
                    self.saved["merger"] = json.loads(json.dumps(merger.state_dict()))
            self.averages = values(merger._session.running) if running else {}


def values(running):
    """A copy of the averages, by name, with the step of the last update."""
    return {
        name: (one.at, {n: t.clone() for n, t in one.arena.own_tensors().items()} if one.arena else {})
        for name, one in running.by_name.items()
    }


def tracked(average, weights):
    """An average in fp64, from the weights after each step."""
    found, at = {}, None
    for step, now in enumerate(weights, 1):
        if average.is_due(at, step):
            beta = average.beta(average.begins if at is None else at, step)
            wide = {name: tensor.double() for name, tensor in now.items() if tensor.is_floating_point()}
            found = {n: beta * found[n] + (1 - beta) * t if found and beta else t for n, t in wide.items()}
            at = step
    return at, found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("averages")


@pytest.fixture(scope="module")
def unbroken_loop(folder):
    return Loop(folder / "unbroken")


def test_averages_are_those_of_the_weights_after_each_step(unbroken_loop):
    assert len(unbroken_loop.averages) == len(RUNNING)
    for average, (at, found) in zip(RUNNING, unbroken_loop.averages.values(), strict=True):
        last, expected = tracked(average, unbroken_loop.weights)
        assert at == last
        assert found.keys() == expected.keys()  # no integers; the float buffers of the batch norm, too
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=3e-6, msg=name)


def test_training_is_bit_for_bit_what_it_is_without_them(unbroken_loop, tmp_path):
    assert_same_bits(Loop(tmp_path, running=()).weights, unbroken_loop.weights)


def test_nothing_is_called_if_there_are_none(tmp_path, monkeypatch):
    called = []
    for name in ("update", "wait", "copies", "is_due", "__init__"):
        monkeypatch.setattr(RunningAverages, name, lambda *_, name=name: called.append(name))
    Loop(tmp_path, running=(), steps=9)
    assert called == []


def test_memory_that_runs_out_costs_a_copy_only(unbroken_loop, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr(RunningAverages, "_copy", refuse)
    assert_same_bits(Loop(tmp_path).weights, unbroken_loop.weights)
    assert "no copy of running average" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "kept", "atol"), [(torch.bfloat16, torch.float32, 3e-6), (torch.float64, torch.float64, 1e-14)]
)
def test_averages_are_never_narrower_than_fp32(dtype, kept, atol, tmp_path):
    """In bf16, an average would stand still once β is above 1 − 2⁻⁹."""
    weights = []
    model = nn.Linear(6, 6).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    running = [PowerEma(0.05), RunningEma(decay=0.999)]
    with CheckpointMerger(model, optimizer, dirpath=tmp_path, running=running, **OPTIONS) as merger:
        for step in range(6):
            optimizer.zero_grad()
            model(batch(step).to(dtype)).square().mean().backward()
            optimizer.step()
            merger.step()
            weights.append({n: t.clone() for n, t in model.state_dict().items()})
        found = values(merger._session.running)
    for average, (_, tensors) in zip(running, found.values(), strict=True):
        for name, tensor in tracked(average, weights)[1].items():
            assert tensors[name].dtype == kept
            torch.testing.assert_close(tensors[name].double(), tensor, rtol=0, atol=atol)


def test_a_resumed_run_goes_on_bit_for_bit(unbroken_loop):
    resumed = Loop(Path(unbroken_loop.saved["merger"]["dirpath"]), state=unbroken_loop.saved)
    assert resumed.averages.keys() == unbroken_loop.averages.keys()
    for name, (at, found) in resumed.averages.items():
        assert at == unbroken_loop.averages[name][0]
        assert_same_bits(found, unbroken_loop.averages[name][1])


def moved(loop, folder):
    """The state of a checkpoint whose run's folder was copied."""
    shutil.copytree(loop.saved["merger"]["dirpath"], folder)
    state = copy.deepcopy(loop.saved)
    state["merger"]["dirpath"] = str(folder)
    state["merger"]["window"]["folder"] = str(folder / "window")
    return state


def test_a_stored_copy_that_was_altered_is_not_gone_on_from(unbroken_loop, tmp_path):
    """The checkpoint's own copy is damaged: the average goes on from the one of the last snapshot."""
    state = moved(unbroken_loop, tmp_path / "run")
    name = "power_ema-0.05"
    (file,) = (tmp_path / "run/window" / state["merger"]["running"]["averages"][name]["file"]).glob("rank-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"power_ema-0.05 goes on from step 8: .*checksum differs"):
        resumed = Loop(tmp_path / "run", state=state)
    average, at = RUNNING[0], 8
    expected = {n: t.double() for n, t in at_step(unbroken_loop, name, 8).items()}
    for step in range(SAVED + 1, STEPS + 1):
        beta, at = average.beta(at, step), step
        now = unbroken_loop.weights[step - 1]
        expected = {n: beta * t + (1 - beta) * now[n].double() for n, t in expected.items()}
    for tensor, found in resumed.averages[name][1].items():
        torch.testing.assert_close(found.double(), expected[tensor], rtol=0, atol=3e-6)


def at_step(loop, name, step):
    """What an unbroken run tracked up to a step."""
    return tracked(dict(zip(loop.averages, RUNNING, strict=True))[name], loop.weights[:step])[1]


def test_new_and_changed_averages_begin_where_the_run_is_resumed(unbroken_loop, tmp_path):
    state = moved(unbroken_loop, tmp_path / "run")
    running = {"power_ema-0.05": PowerEma(0.06)}
    with pytest.warns(
        UserWarning,
        match="power_ema-0.05 is new, or has other options or tensors now",
    ):
        resumed = Loop(tmp_path / "run", state=state, running=running, steps=SAVED + 1)
    for name, tensor in resumed.averages["power_ema-0.05"][1].items():
        assert torch.equal(tensor, resumed.weights[-1][name])


def test_an_average_may_be_updated_more_rarely_from_a_resume_on(unbroken_loop, tmp_path):
    state = moved(unbroken_loop, tmp_path / "run")
    average = PowerEma(0.05, every_n_steps=4, offload=True)
    resumed = Loop(tmp_path / "run", state=state, running=[average], steps=12)
    beta = average.beta(SAVED, 12)
    before = tracked(RUNNING[0], unbroken_loop.weights[:SAVED])[1]
    for name, tensor in resumed.averages["power_ema-0.05"][1].items():
        expected = beta * before[name] + (1 - beta) * unbroken_loop.weights[11][name].double()
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=3e-6)


def test_an_update_that_was_interrupted_is_not_saved(unbroken_loop, tmp_path, monkeypatch):
    """As by Ctrl-C: the resumed run goes on from the copy of the last snapshot."""
    mergers, blend, end = [], RunningAverages._blend, CheckpointMerger._end

    def interrupted(self, running, sources, beta):
        if running.at == SAVED:
            raise KeyboardInterrupt
        blend(self, running, sources, beta)

    def ending(self, *args):
        mergers.append(self)
        end(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(RunningAverages, "_blend", interrupted)
        patched.setattr(CheckpointMerger, "_end", ending)
        with pytest.raises(KeyboardInterrupt):
            Loop(tmp_path, running=[PowerEma(0.05)])
    state = {**unbroken_loop.saved, "merger": mergers[0].state_dict()}
    with pytest.warns(UserWarning, match=r"goes on from step 8: an update of it was interrupted"):
        Loop(tmp_path, state=state, running=[PowerEma(0.05)], steps=SAVED + 2)


# --- several ranks ------------------------------------------------------------------------------------------


KINDS = ("ddp", "fsdp2")


def shard(model):
    for part in model:
        fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def on_ranks(folder, kind="", state=None):
    """A loop without a batch norm, whose statistics would differ between ranks; what each rank keeps."""
    wraps = {"": lambda model: model, "ddp": nn.parallel.DistributedDataParallel, "fsdp2": shard}
    loop = Loop(folder, lambda model: wraps[kind](nn.Sequential(model[0], model[2])), state=state)
    sizes = {name: {n: t.numel() for n, t in found.items()} for name, (_, found) in loop.averages.items()}
    return sizes, loop.saved


@pytest.fixture(scope="module")
def alone(folder):
    return on_ranks(folder / "alone")


@pytest.fixture(scope="module")
def ranks(folder, alone):
    jobs = {kind: (on_ranks, {"folder": str(folder / kind), "kind": kind}) for kind in KINDS}
    shutil.copytree(folder / "alone", folder / "resumed")
    state = copy.deepcopy(alone[1])
    state["merger"]["dirpath"] = str(folder / "resumed")
    state["merger"]["window"]["folder"] = str(folder / "resumed/window")
    jobs["resumed"] = (on_ranks, {"folder": str(folder / "resumed"), "kind": "ddp", "state": state})
    return run_jobs(2, jobs)


@pytest.mark.parametrize("kind", [*KINDS, "resumed"])
def test_several_ranks_keep_an_average_in_parts_and_store_it_whole(kind, ranks, alone, folder):
    """The same bits as in one process; also if that one has begun the run, and two ranks have ended it."""
    first, second = (sizes for sizes, _ in ranks[kind])
    for name, whole in alone[0].items():
        assert {n: first[name][n] + second[name][n] for n in whole} == whole
        expected, found = (
            open_checkpoint(max((folder / run / "window").glob(f"running-{name}-*"), key=_age))
            for run in ("alone", kind)
        )
        assert found.step == expected.step > 20
        assert len(found.files) == 2
        assert verify(found) == []
        assert_same_bits({n: found.tensors[n] for n in whole}, {n: expected.tensors[n] for n in whole})


def _age(path):
    return path.stat().st_mtime_ns


# --- validated and published --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:merge:", "ignore:.*num_workers")
def test_averages_are_validated_and_published_like_candidates(tmp_path):
    seen, names = {}, ("power_ema-0.1", "sma_since-9")

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen[trainer.global_step] = values(merging.session.running)

    running = [PowerEma(0.1), SmaSince(step=9)]
    merging = CheckpointMergeCallback(
        dirpath=tmp_path, window=3, every_n_steps=4, running=running, select="val_loss"
    )
    trainer = train(
        Classifier(), merging, Watch(), data=loader(), val=loader(16), max_steps=12, val_check_interval=4
    )
    for name in names:
        assert f"merged/{name}/val_loss" in trainer.callback_metrics
        assert f"merge_gain/{name}/val_loss" in trainer.callback_metrics
    records = [json.loads((path / "merge.json").read_text()) for path in emissions(tmp_path)]
    compared = [{entry["name"] for entry in record["candidates"]["scores"]} for record in records]
    assert compared == [{"sma", "power_ema-0.1"}, {"sma", *names}]  # the other had not begun
    assert records[-1]["candidates"]["selected"] in names
    for path, record in zip(emissions(tmp_path), records, strict=True):
        if (selected := record["candidates"]["selected"]) in names:
            at, tensors = seen[record["step"]][selected]
            assert at == record["step"]
            assert_same_bits(load_merge(path), tensors)
            assert record["method"]["name"] == running[names.index(selected)].name


# --- restores -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:merge:")
@pytest.mark.parametrize("durable", [True, False])
def test_a_restored_run_does_not_keep_the_diverged_weights_in_its_averages(durable, tmp_path):
    seen = {}

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            (merging,) = (c for c in trainer.callbacks if hasattr(c, "session"))
            seen[trainer.global_step] = values(merging.session.running)

    average = PowerEma(0.1)
    run = spiking(tmp_path, running=[average], durable=durable, callbacks=[Watch()], steps=FIRES + 3)
    assert len(run.restores) == 1
    (at, found) = seen[FIRES]["power_ema-0.1"]
    if durable:  # what was stored with the newest snapshot that was restored
        assert at == USED[-1]
        assert_same_bits(found, seen[USED[-1]]["power_ema-0.1"][1])
    else:
        assert at == FIRES
        assert_same_bits(found, {name: run.watch.weights[FIRES][name] for name in found})
    beta = average.beta(at, FIRES + 1)
    for name, tensor in seen[FIRES + 1]["power_ema-0.1"][1].items():
        expected = beta * found[name] + (1 - beta) * run.watch.weights[FIRES + 1][name]
        torch.testing.assert_close(tensor, expected)
    if durable:
        listed = json.loads((tmp_path / "window/manifest.json").read_text())["running"]
        steps = {record["step"] for record in listed}
        assert not steps & set(range(USED[-1] + 1, FIRES + 1))  # of weights that the run has left


# --- what stays, and any width afterwards -------------------------------------------------------------------


def test_what_stays_once_is_not_missing_later():
    kept = set()
    for step in range(40, 40_001, 40):
        kept = retained(sorted({*kept, step}), 10, 1.07, 8)
    ordered = sorted(kept)
    assert ordered[-10:] == [*range(39_640, 40_001, 40)]
    older = [step for step in ordered if step >= 5_500]
    assert max(b / a for a, b in pairwise(older)) < 1.07**2
    assert len(ordered) <= 42
    assert solve([Profile(s, g) for s in ordered for g in (0.05, 0.1)], Profile(40_000, 0.15)).residual < 0.01


@pytest.fixture(scope="module")
def long(folder):
    """A run that has stored two widths and, as the truth, tracked a third."""
    running = [PowerEma(0.05), PowerEma(0.1), PowerEma(0.08)]
    loop = Loop(folder / "long", running=running, steps=60, every_n_steps=1)
    manifest = folder / "long/window/manifest.json"
    content = json.loads(manifest.read_text())
    content["running"] = [r for r in content["running"] if r["average"]["sigma"] != 0.08]
    manifest.write_text(json.dumps(content))
    return loop


def test_a_width_that_was_not_tracked_is_made_afterwards(long, folder, tmp_path, capsys):
    record = posthoc_ema(folder / "long", 0.08, tmp_path / "ema")
    merged = load_merge(tmp_path / "ema")
    at, truth = long.averages["power_ema-0.08"]
    live = long.weights[-1]
    assert (at, record["step"]) == (60, 60)
    apart, missed = (
        sum(float((one[n] - truth[n]).double().square().sum()) for n in truth) for one in (live, merged)
    )
    assert missed < 0.02**2 * apart
    assert merged.keys() == live.keys()
    assert torch.equal(merged["1.num_batches_tracked"], live["1.num_batches_tracked"])
    assert record["method"]["name"] == "posthoc-ema"
    assert record["method"]["options"]["residual"] < 0.01
    assert min(record["weights"]) < 0
    assert sum(record["weights"]) == pytest.approx(1)
    command = ["merge", str(folder / "long"), "--method", "posthoc-ema", "--sigma", "0.08", "--quiet"]
    assert main([*command, "--output", str(tmp_path / "same")]) == 0
    assert_same_bits(load_merge(tmp_path / "same"), merged)
    assert "posthoc-ema of" in capsys.readouterr().err


def test_a_width_that_was_tracked_is_itself(long, folder, tmp_path):
    posthoc_ema(folder / "long/window", 0.1, tmp_path / "ema", step=60)
    merged = load_merge(tmp_path / "ema")
    for name, tensor in long.averages["power_ema-0.1"][1].items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-6)


def test_a_sum_that_would_miss_is_refused(long, folder, tmp_path):
    with pytest.raises(ValueError, match=r"sigma=0.25 at step 60: .* would miss .* more than 0.01: choose"):
        posthoc_ema(folder / "long", 0.25, tmp_path / "ema")
    with pytest.raises(ValueError, match="step 61: averages were stored up to step 60"):
        posthoc_ema(folder / "long", 0.1, tmp_path / "ema", step=61)
    with pytest.raises(FileNotFoundError, match="no stored averages of power functions"):
        posthoc_ema(tmp_path, 0.1, tmp_path / "ema")
    assert not (tmp_path / "ema").exists()


def test_the_command_says_what_it_takes(folder, tmp_path, capsys):
    command = ["merge", str(folder / "long"), "--method", "posthoc-ema", "--output", str(tmp_path / "ema")]
    assert main(command) == 1
    assert "--method posthoc-ema takes the folder of one run, --sigma" in capsys.readouterr().err
