"""What a run makes of window files that go, of methods, memory and folders that fail; what it leaves open."""

import ctypes
import gc
import os
import resource
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from run_outcomes import checksum, emissions
from slow_cases import mostly_slow
from tiny_run import STEPS, At, Keeper, Tiny, Tokens, fit
from window_runs import (
    CODEC,
    LAST,
    assert_nothing_is_half_there,
    files,
    steps,
    unlimited,  # noqa: F401 (a fixture)
)

from merge_callback import CheckpointMergeCallback
from merge_callback.merging import LinearMethod, Weighted

# --- files that go while the run goes on --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "codec"), mostly_slow(product(["disk", "cpu"], [{}, CODEC]), daily=[0, 3])
)
def test_a_snapshot_file_deleted_while_the_run_goes_on_changes_no_merge(tmp_path, storage, codec):
    fit(tmp_path / "unbroken", storage=storage, keep_last=None, **codec)

    fit(
        tmp_path,
        callbacks=[At(step11=lambda module: files(tmp_path)[10].unlink())],
        storage=storage,
        keep_last=None,
        **codec,
    )

    for path in emissions(tmp_path / "unbroken/merges"):
        again = tmp_path / "merges" / path.name
        assert checksum(again / "model.safetensors") == checksum(path / "model.safetensors")


@pytest.mark.parametrize(
    ("storage", "what", "codec"),
    mostly_slow(product(["disk", "cpu"], ["merges/window", "merges"], [{}, CODEC]), daily=[0, 3, 5, 6]),
)
def test_a_folder_deleted_while_the_run_goes_on_is_made_again(tmp_path, storage, what, codec):
    gone = At(step11=lambda module: shutil.rmtree(tmp_path / what))
    fit(tmp_path, callbacks=[gone], storage=storage, **codec)

    assert steps(tmp_path) == LAST
    assert_nothing_is_half_there(tmp_path)


# --- what else may fail -------------------------------------------------------------------------------------


class Fails(LinearMethod):
    """Raises on the third merge."""

    def raw_weights(self, positions):
        if len(positions) == 4:
            raise ZeroDivisionError
        return [1.0] * len(positions)


class Nameless(LinearMethod):
    """Raises when a merge is to say how it was made."""

    def raw_weights(self, positions):
        return [1.0] * len(positions)

    def options(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("method", [Fails, Nameless])
def test_a_method_that_fails_costs_its_merges_only(tmp_path, method):
    trainer, _, _ = fit(tmp_path, method=method())

    assert trainer.global_step == STEPS
    assert steps(tmp_path) == LAST


@pytest.mark.filterwarnings("ignore:weights")
@pytest.mark.parametrize("weights", [(0.4, 0.6), (1.0, 1.0, 1.0, -1.0)], ids=str)
def test_weights_that_can_not_serve_the_window_are_refused_before_the_first_step(tmp_path, weights):
    keeper = Keeper()

    with pytest.raises(ValueError, match="weight"):
        fit(tmp_path, method=Weighted(weights), callbacks=[keeper])
    assert not keeper.weights, "it trained before it was refused"


def test_memory_that_runs_out_costs_a_snapshot_only(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)

    class Heavy(Tiny):
        def __init__(self):
            super().__init__()
            # 160 MB that only a snapshot asks for: no freed gradient is large enough to hold it.
            self.register_buffer("ballast", torch.zeros(40_000_000))

    def tighten(module):
        gc.collect()  # what earlier tests have left would make room later
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (60 << 20), before[1]))  # room for a thread's stack

    def loosen(module):
        resource.setrlimit(resource.RLIMIT_AS, before)

    with pytest.warns(UserWarning, match="no snapshot at step 4"):
        trainer, _, callback = fit(
            tmp_path,
            module=Heavy,
            before=[At(step4=tighten)],
            callbacks=[At(step4=loosen)],
            storage="cpu",
            durable=False,
            evaluate=False,
            emit_every=0,
            trainer={"max_steps": 8, "limit_val_batches": 0},
        )

    assert trainer.global_step == 8
    assert [s["step"] for s in callback.state_dict()["window"]["snapshots"]] == [2, 6, 8]


def test_batches_that_lose_their_tokens_do_not_end_a_run_whose_interval_is_in_steps(tmp_path):
    class Mixed(Tokens):
        def draw(self, index):
            batch = super().draw(index)
            return batch if index % 7 else {"pixels": batch["input_ids"].float()}

    class OnMixed(Tiny):
        def loss(self, batch):
            batch = batch if "input_ids" in batch else {"input_ids": batch["pixels"].long()}
            return super().loss(batch)

    trainer, _, _ = fit(tmp_path, module=OnMixed, data=Mixed())

    assert trainer.global_step == STEPS
    assert steps(tmp_path) == LAST


# --- memory -------------------------------------------------------------------------------------------------


class Footprint(Callback):
    """Notes the resident memory and the open files after each of some steps."""

    def __init__(self):
        self.memory, self.files = {}, {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % 2:
            trainer.callbacks[0].session.background.drain()  # a merge being written is an open file
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator holds back for later is no leak
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            self.memory[trainer.global_step] = resident
            self.files[trainer.global_step] = len(os.listdir("/proc/self/fd"))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("codec", [{}, CODEC], ids=["whole", "differences"])
def test_memory_and_open_files_do_not_grow_with_the_snapshots_taken(tmp_path, storage, codec):
    seen = Footprint()

    fit(
        tmp_path,
        module=lambda: Tiny(width=1 << 16),  # 9 MB a snapshot
        callbacks=[seen],
        window=2,
        emit_every=4,
        keep_last=1,
        storage=storage,
        **codec,
        trainer={"max_steps": 50, "val_check_interval": 25, "max_epochs": -1},
    )

    snapshot = 9 << 20
    early, late = (max(seen.memory[step] for step in steps) for steps in (range(13, 22, 2), range(41, 50, 2)))
    assert late - early < 4 * snapshot  # the 14 snapshots in between would be 126 MB
    assert seen.files[49] == seen.files[13]
    assert len(files(tmp_path)) == 2


def test_a_run_leaves_no_file_open(tmp_path):
    fit(tmp_path / "first")
    before = len(os.listdir("/proc/self/fd"))

    fit(tmp_path / "second")

    assert len(os.listdir("/proc/self/fd")) == before


# --- folders ------------------------------------------------------------------------------------------------


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
    (tmp_path / "merges").write_text("")

    with pytest.raises(ValueError, match=r"dirpath='.*merges': .* is a file"):
        CheckpointMergeCallback(dirpath=tmp_path / "merges")


def test_a_file_where_the_window_should_be_is_moved_aside(tmp_path):
    (tmp_path / "merges").mkdir()
    (tmp_path / "merges/window").write_text("a note")

    fit(tmp_path)

    assert steps(tmp_path) == LAST
    notes = [p.read_text() for p in (tmp_path / "merges").glob("window*") if p.is_file()]
    assert notes == ["a note"]
