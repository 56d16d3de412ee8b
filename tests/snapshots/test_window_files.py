"""The window's files: what is in them, which stay, and what happens where they can't be read."""

import ctypes
import gc
import json
import os
import resource
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from run_outcomes import checksum, damage, emissions, window
from safetensors import safe_open
from safetensors.torch import load_file
from slow_cases import mostly_slow
from tiny_run import STEPS, At, Keeper, SaveAt, StopError, StopsAt, Tiny, Tokens, fit
from torch import nn
from window_runs import (
    CODEC,
    LAST,
    WAYS,
    assert_nothing_is_half_there,
    files,
    steps,
    unlimited,  # noqa: F401 (a fixture)
)

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.merging import LinearMethod, Weighted

# --- content ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run with a checkpoint every 5 steps, and its weights after each step."""
    folder, keeper = tmp_path_factory.mktemp("finished"), Keeper()
    save = ModelCheckpoint(folder / "c", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    fit(folder, callbacks=[keeper, save])
    return folder, keeper.weights


def test_no_storage_of_a_mapped_file_is_shown_to_python(monkeypatch, tmp_path):
    # Its memory would be given back under the interpreter's lock, for a millisecond with every 4 MB.
    shown, own = [], torch.Tensor.untyped_storage
    monkeypatch.setattr(
        torch.Tensor, "untyped_storage", lambda tensor: shown.append(tensor.dtype) or own(tensor)
    )
    fit(tmp_path)
    assert torch.uint8 not in shown


def test_a_snapshot_file_holds_the_live_weights_of_its_step(finished):
    folder, weights = finished
    for step, path in files(folder).items():
        found = load_file(path)
        assert found.keys() == weights[step].keys()
        for name, tensor in weights[step].items():
            assert torch.equal(found[name], tensor), (step, name)
            assert found[name].dtype == tensor.dtype


def test_a_snapshot_file_says_what_it_is(finished):
    folder, _ = finished
    manifest = window(folder / "merges")
    for record in manifest["snapshots"]:
        with safe_open(files(folder)[record["step"]], "pt") as file:
            metadata = file.metadata()
        assert metadata["format"] == "pt"
        assert metadata["layout"] == manifest["layout"]
        for key in ("step", "tokens"):
            assert metadata[key] == str(record[key])
        assert float(metadata["lr"]) == record["lr"]


def test_the_manifest_names_the_checksum_of_every_file(finished):
    folder, _ = finished
    for record in window(folder / "merges")["snapshots"]:
        assert checksum(folder / "merges/window" / record["file"]) == record["checksum"]


class Zoo(Tiny):
    """Tensors of every kind that a module may save."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            self.register_buffer(f"a_{str(dtype)[6:]}", torch.randn(3, 5, generator=draw).to(dtype))
        for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
            self.register_buffer(f"a_{str(dtype)[6:]}", torch.randint(2, (7,), generator=draw).to(dtype))
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            self.register_buffer(f"a_{str(dtype)[6:]}", torch.randn(11, generator=draw).to(dtype))
        self.register_buffer("a_scalar", torch.tensor(2.5))
        self.register_buffer("transposed", torch.randn(4, 3, generator=draw).T)
        self.register_buffer("not_saved", torch.ones(2), persistent=False)
        self.frozen = nn.Parameter(torch.randn(2, 2, generator=draw), requires_grad=False)


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_every_kind_of_tensor_survives_in_a_snapshot_file(tmp_path, storage):
    keeper = Keeper()
    fit(tmp_path, module=Zoo, callbacks=[keeper], storage=storage, trainer={"max_steps": 8})

    for step, path in files(tmp_path).items():
        found = load_file(path)
        assert found.keys() == keeper.weights[step].keys()
        for name, tensor in keeper.weights[step].items():
            assert found[name].dtype == tensor.dtype, name
            assert found[name].shape == tensor.shape, name
            assert torch.equal(
                found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)
            ), name


def test_an_empty_tensor_is_kept_and_spoils_no_number(tmp_path):
    class WithNothing(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("nothing", torch.empty(0, 3))
            self.no_weights = nn.Parameter(torch.empty(0))

    fit(tmp_path, module=WithNothing)

    assert load_file(files(tmp_path)[26])["nothing"].shape == (0, 3)
    assert load_merge(tmp_path / "merges/latest")["no_weights"].shape == (0,)
    record = json.loads((tmp_path / "merges/latest/merge.json").read_text())
    assert 0 < record["diversity"]["rms"] < 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp64"])
def test_a_snapshot_dtype_casts_what_trains_only(tmp_path, dtype):
    keeper = Keeper()
    fit(tmp_path, callbacks=[keeper], snapshot_dtype=dtype, trainer={"max_steps": 6})

    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}[dtype]
    trained = dict(Tiny().named_parameters())
    for name, tensor in load_file(files(tmp_path)[6]).items():
        live = keeper.weights[6][name]
        assert torch.equal(tensor, live.to(wanted) if name in trained else live), name


# --- which files stay ---------------------------------------------------------------------------------------


def needed_by(checkpoint):
    """The window files that a checkpoint names."""
    states = torch.load(checkpoint, weights_only=True)["callbacks"]
    (state,) = (states[key] for key in states if key.startswith("CheckpointMergeCallback"))
    return {record["file"] for record in state["window"]["snapshots"]}


def test_files_of_the_last_two_checkpoints_and_of_the_window_stay_and_others_go(finished):
    folder, _ = finished
    current = {record["file"] for record in window(folder / "merges")["snapshots"]}
    older, newer = needed_by(folder / "c/step=20.ckpt"), needed_by(folder / "c/step=25.ckpt")

    assert {path.name for path in files(folder).values()} == current | older | newer


def test_without_checkpoints_only_the_window_stays(tmp_path):
    fit(tmp_path)

    assert sorted(files(tmp_path)) == LAST


def test_after_a_resume_the_files_of_the_last_two_checkpoints_stay(tmp_path):
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[save, SaveAt(tmp_path / "unused.ckpt", 99, stop=16), StopsAt(16)])

    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "c/step=15.ckpt", [StopsAt(18)])

    kept = {path.name for path in files(tmp_path).values()}
    assert needed_by(tmp_path / "c/step=15.ckpt") <= kept
    assert needed_by(tmp_path / "c/step=10.ckpt") <= kept


@WAYS
def test_checkpoints_between_two_snapshots_count_once(tmp_path, codec):
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=1, save_top_k=-1, filename="{step}")
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[save, StopsAt(15)], **codec)

    # When snapshot 14 came, the last two windows saved were those of steps 12, 13 and of steps 10, 11.
    assert sorted(files(tmp_path)) == [4, 6, 8, 10, 12, 14]
    # Of 6 and 8 the older window has the difference to the one before, and a newer one the whole.
    assert len(list((tmp_path / "merges/window").glob("step=*"))) == (8 if codec else 6)


# --- snapshots that are no use ------------------------------------------------------------------------------


def poison(value, name="head.weight"):
    """Puts a value into a tensor's first element."""

    def put(module):
        with torch.no_grad():
            tensor = module.get_parameter(name) if name.endswith("weight") else module.get_buffer(name)
            module.healthy = tensor.flatten()[0].clone()
            tensor.view(-1)[0] = value

    return put


def heal(name="head.weight"):
    """Puts the value back that `poison` replaced."""

    def put(module):
        with torch.no_grad():
            tensor = module.get_parameter(name) if name.endswith("weight") else module.get_buffer(name)
            tensor.view(-1)[0] = module.healthy

    return put


@pytest.mark.parametrize(
    ("value", "storage"),
    mostly_slow(
        product([float("nan"), float("inf"), -float("inf")], ["disk", "cpu", "device"]), daily=[0, 4, 8]
    ),
)
def test_a_snapshot_with_a_number_that_is_none_is_named_and_not_admitted(tmp_path, value, storage):
    with pytest.warns(UserWarning, match=r"no snapshot at step 20: head.weight hold NaN or Inf"):
        fit(
            tmp_path,
            before=[At(step20=poison(value))],
            callbacks=[At(step20=heal())],
            storage=storage,
        )

    assert steps(tmp_path) == [18, 22, 24, 26]
    assert sorted(files(tmp_path)) == [18, 22, 24, 26]


def test_a_run_that_stays_broken_keeps_its_last_good_window(tmp_path):
    with pytest.warns(UserWarning, match="step 26"):
        fit(tmp_path, before=[At(step15=poison(float("nan")))], trainer={"limit_val_batches": 0})

    assert steps(tmp_path) == [8, 10, 12, 14]
    assert not damage(tmp_path / "merges")


def test_a_mask_of_minus_infinities_does_not_keep_snapshots_out(tmp_path):
    class Masked(Tiny):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

    fit(tmp_path, module=Masked)

    assert steps(tmp_path) == LAST
    merged = load_merge(tmp_path / "merges/latest")
    assert torch.equal(merged["mask"], torch.full((4, 4), -torch.inf).triu(1))
    record = json.loads((tmp_path / "merges/latest/merge.json").read_text())
    assert 0 < record["diversity"]["rms"] < 1


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
