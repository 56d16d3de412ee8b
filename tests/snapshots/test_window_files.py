"""The window's files: what is in them, which stay, and which snapshots are not admitted."""

import json
from itertools import product

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from run_outcomes import checksum, damage, window
from safetensors import safe_open
from safetensors.torch import load_file
from slow_cases import mostly_slow
from tiny_run import At, Keeper, SaveAt, StopError, StopsAt, Tiny, fit
from torch import nn
from window_runs import (
    LAST,
    WAYS,
    files,
    steps,
    unlimited,  # noqa: F401 (a fixture)
)

from merge_callback import load_merge

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
