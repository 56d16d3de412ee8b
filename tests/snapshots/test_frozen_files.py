"""The file of what is frozen: read with the snapshots that need it, and only as it was written."""

import json
import os
import shutil
import warnings
from itertools import product

import pytest
import torch
from distributed_runs import UnevenModule, run_jobs
from frozen_runs import BASE, SHORT, Adapted, Exact, same_bits, whole
from resumed_runs import stopped
from sharded_runs import merged_fit, published, resumed_fit, saved_fit, snapshots, window_folder
from slow_cases import mostly_slow
from spiking_runs import USED, Damage, Line, spiking, used
from tiny_run import At, Keeper, fit
from training_runs import assert_same_bits
from window_runs import CODEC, steps

from merge_callback import load_merge
from merge_callback.checkpoints.open import open_checkpoint, verify
from merge_callback.cli.main import main
from merge_callback.sharding import Sharding
from merge_callback.snapshots.safetensors_file import CorruptFileError


def flip(path):
    """One bit of its last tensor."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def cut(path):
    os.truncate(path, 200)


def head(path):
    content = bytearray(path.read_bytes())
    content[9:12] = b"\0\0\0"
    path.write_bytes(content)


def gone(path):
    path.unlink()


def frozen(window):
    (path,) = window.glob("frozen-*")
    return path


# --- by the commands ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Windows of finished runs by codec, and the live weights of every step."""
    found = {}
    for name, codec in (("whole", {}), ("differences", CODEC)):
        folder, keeper = tmp_path_factory.mktemp(name), Keeper()
        options = {"storage": "disk", "method": "sma", "emit_every": 1, **codec, **SHORT}
        fit(folder, module=Adapted, callbacks=[keeper], **options)
        found[name] = folder / "merges", keeper.weights
    return found


@pytest.fixture
def window(runs, tmp_path):
    """A copy of a window of whole snapshots, to be meddled with."""
    return shutil.copytree(runs["whole"][0] / "window", tmp_path / "window")


@pytest.mark.parametrize("kind", ["whole", "differences"])
def test_a_snapshot_is_opened_with_what_is_frozen(runs, kind):
    merges, weights = runs[kind]
    for path in (merges / "window").glob("step=*"):
        found = open_checkpoint(path)
        live = weights[found.step]
        assert found.tensors.keys() == live.keys()
        for name, tensor in live.items():
            assert found.tensors[name].dtype == tensor.dtype
            if kind == "whole" or name in BASE:
                assert same_bits(found.tensors[name].reshape(-1), tensor.view(-1)), name
        assert frozen(merges / "window") in found.files
        assert verify(found) == []


@pytest.mark.parametrize("given", ["window", "window/step=*", "window/*.safetensors"])
def test_the_command_merges_a_window_as_the_run_did(runs, tmp_path, given):
    merges, _ = runs["whole"]
    command = ["merge", str(merges / given), "--method", "sma", "--output", str(tmp_path / "out"), "--quiet"]
    assert main(command) == 0
    emitted, merged = load_merge(merges / "latest"), load_merge(tmp_path / "out")
    assert merged.keys() == emitted.keys()
    # The last emission is of all four snapshots, if they are of one phase: here the decay is not reached.
    for name in BASE:
        assert same_bits(merged[name].view(-1), emitted[name].view(-1))
    for name, tensor in emitted.items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("command", ["inspect", "diversity", "interference"])
def test_the_other_commands_read_it_too(runs, capsys, command):
    window = runs["whole"][0] / "window"
    paths = sorted(map(str, window.glob("step=*")))
    assert main([command, *(paths[:1] if command == "inspect" else paths)]) == 0
    if command == "inspect":
        told = capsys.readouterr().out
        assert "verified" in told
        assert frozen(window).name in told


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip, "the checksum differs from the one that the snapshots name"),
        (cut, "the checksum differs"),
        (gone, "its frozen tensors are in frozen-step=00000002-.* which is not in"),
    ],
)
def test_snapshots_without_their_frozen_tensors_are_refused_in_one_line(window, capsys, damage, told):
    damage(frozen(window))
    (newest,) = window.glob("step=00000014*")
    with pytest.raises(CorruptFileError, match=told):
        open_checkpoint(newest)
    for command in (["merge", str(window), "--output", str(window.parent / "out")], ["inspect", str(newest)]):
        assert main(command) != 0
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (window.parent / "out").exists()


def test_a_snapshot_that_was_copied_out_alone_is_refused_and_with_the_file_opened(window, tmp_path):
    (newest,) = window.glob("step=00000014*")
    (tmp_path / "alone").mkdir()
    copied = shutil.copy(newest, tmp_path / "alone")
    with pytest.raises(CorruptFileError, match="put both files there"):
        open_checkpoint(copied)
    shutil.copy(frozen(window), tmp_path / "alone")
    assert open_checkpoint(copied).tensors.keys() >= BASE


def test_what_is_frozen_is_no_checkpoint_of_its_own(window, capsys):
    with pytest.raises(ValueError, match="no whole model: give one of those"):
        open_checkpoint(frozen(window))


@pytest.mark.parametrize(
    "name", ["../frozen-step=00000002-aaaaaaaaaaaa.safetensors", "/etc/passwd", "step=2"]
)
def test_a_snapshot_leads_nowhere_else(window, name):
    (newest,) = window.glob("step=00000014*")
    length = int.from_bytes(newest.read_bytes()[:8], "little")
    header = json.loads(newest.read_bytes()[8 : 8 + length])
    header["__metadata__"]["frozen"] = name
    text = json.dumps(header).encode().ljust(length)
    newest.write_bytes(length.to_bytes(8, "little") + text + newest.read_bytes()[8 + length :])
    with pytest.raises(CorruptFileError, match="as the file of what is frozen"):
        open_checkpoint(newest)


# --- while a run goes on, and when it is resumed -----------------------------------------------------------


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_run_whose_file_changed_goes_on_with_a_new_one(tmp_path, caplog, damage):
    """On a CPU the live tensors are compared with it at every snapshot: so it is noticed at once."""
    exact = Exact(first=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        spoil = At(step7=lambda module: damage(frozen(tmp_path / "merges/window")))
        fit(tmp_path, module=Adapted, before=[spoil], callbacks=[exact], storage="disk", **SHORT)
    told = caplog.text + " ".join(str(warning.message) for warning in caught)
    assert "left out of the window: snapshot of step 6: frozen-step=00000002" in told
    assert "no snapshot at step 8" in told
    assert steps(tmp_path) == [10, 12, 14]
    assert frozen(tmp_path / "merges/window").name.startswith("frozen-step=00000010")
    assert exact.seen == {10, 12, 14}
    for path in (tmp_path / "merges").glob("step=*"):
        merged = load_merge(path)
        assert all(same_bits(merged[name].view(-1), exact.weights[14][name].view(-1)) for name in BASE)


def test_a_file_that_was_removed_is_written_again_for_the_next_snapshot(tmp_path):
    exact = Exact()
    remove = At(step7=lambda module: frozen(tmp_path / "merges/window").unlink())
    fit(tmp_path, module=Adapted, before=[remove], callbacks=[exact], storage="disk", **SHORT)
    assert exact.seen == set(range(2, 15, 2))
    assert frozen(tmp_path / "merges/window").name.startswith("frozen-step=00000002")
    for path in (tmp_path / "merges/window").glob("step=*"):
        assert open_checkpoint(path).tensors.keys() >= BASE


class FrozenLine(Line):
    """Its first layer is frozen."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)


@pytest.mark.parametrize("damage", [flip, gone])
def test_nothing_is_restored_from_a_file_that_changed(tmp_path, damage):
    """One that was only removed is still what was written, through its map."""

    def spoil(module):
        damage(frozen(tmp_path / "window"))

    def run():
        options = {"durable": True, "storage": "disk", "emit_every": 0, "module": FrozenLine}
        return spiking(tmp_path, callbacks=[Damage({USED[2] + 12: spoil})], **options)

    if damage is gone:
        (restore,) = run().restores
        assert used(restore) == USED
        return
    with pytest.warns(
        UserWarning, match="frozen-step=.*, which it has in common with others, is not what was"
    ):
        assert run().restores == []


@pytest.mark.parametrize(
    ("damage", "storage"), mostly_slow(product([flip, cut, head, gone], ["disk", "cpu"]), daily=[0, 3, 6])
)
def test_a_window_whose_file_is_spoilt_is_left_out_when_a_run_is_resumed(tmp_path, damage, storage):
    checkpoint = stopped(tmp_path, batch=9, module=Adapted, storage=storage)
    damage(frozen(tmp_path / "merges/window"))
    exact = Exact()
    with pytest.warns(
        UserWarning, match="left out of the restored window: snapshot of step 8: .*frozen-step="
    ):
        fit(tmp_path, checkpoint, module=Adapted, callbacks=[exact], storage=storage, **SHORT)
    assert steps(tmp_path) == [10, 12, 14]
    assert exact.seen == {10, 12, 14}


# --- several ranks -----------------------------------------------------------------------------------------


class Shifted(UnevenModule):
    """One row of what is frozen changes, which one rank alone keeps."""

    def on_train_batch_start(self, *_):
        if self.trainer.global_step == 7:
            self.frozen.weight.data[0] += 1


def shifted_fit(strategy, folder):
    return merged_fit(strategy, folder, module=Shifted(), trainer={"max_steps": 10})


def former_fit(strategy, folder):
    """As a version did that kept nothing once, and shared all out in one go."""
    share_out = Sharding._share_out
    with pytest.MonkeyPatch.context() as patch:
        whole(patch)
        patch.setattr(Sharding, "_share_out", lambda self, *given: share_out(self, *given[:-1], frozen=()))
        return saved_fit(strategy, folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    given = {"strategy": "ddp"}
    jobs = {
        "shifted": (shifted_fit, {**given, "folder": folder / "shifted"}),
        "former": (former_fit, {**given, "folder": folder / "former"}),
        "resumed": (resumed_fit, {**given, "folder": folder / "former-stopped"}),
    }
    return folder, run_jobs(2, jobs)


def test_a_window_of_whole_snapshots_is_gone_on_with_by_several_ranks(ranks):
    folder, outcomes = ranks
    assert {outcome.told == [] for outcome in outcomes["resumed"]} == {True}
    for name, record in published(folder / "former").items():
        found, expected = (load_merge(folder / run / "merges" / name) for run in ("former-stopped", "former"))
        assert_same_bits(found, expected)
        assert published(folder / "former-stopped")[name]["diversity"] == record["diversity"]
    assert not list(window_folder(folder / "former").glob("frozen-*"))
    assert frozen(window_folder(folder / "former-stopped"))


def test_all_ranks_keep_a_tensor_themselves_that_changed_on_one(ranks):
    folder, outcomes = ranks[0] / "shifted", ranks[1]["shifted"]
    live = outcomes[0].run.weights
    names = {n: t for n, t in outcomes[0].run.final.items() if n != "head.weight"}  # which is tied
    found = snapshots(folder, names)
    assert sorted(found) == [4, 6, 8, 10]
    assert torch.equal(found[4]["frozen.weight"], live[4]["frozen.weight"])
    assert torch.equal(found[6]["frozen.weight"], live[4]["frozen.weight"])
    for step in (8, 10):
        assert torch.equal(found[step]["frozen.weight"], live[8]["frozen.weight"])
    assert not torch.equal(live[4]["frozen.weight"], live[8]["frozen.weight"])
    assert all(outcome.told == [] for outcome in outcomes)


def test_a_snapshot_of_several_ranks_is_refused_without_what_is_frozen(ranks, tmp_path):
    window = shutil.copytree(window_folder(ranks[0] / "shifted"), tmp_path / "window")
    (snapshot,) = window.glob("step=00000006-*")
    assert "frozen.weight" in open_checkpoint(snapshot).tensors
    with pytest.raises(ValueError, match="no whole model"):
        open_checkpoint(frozen(window))
    flip(frozen(window) / "rank-00001-of-00002.safetensors")
    with pytest.raises(CorruptFileError, match=r"rank-00001.*the checksum differs"):
        open_checkpoint(snapshot)
    shutil.rmtree(frozen(window))
    with pytest.raises(CorruptFileError, match="its frozen tensors are in frozen-step=00000002"):
        open_checkpoint(snapshot)
