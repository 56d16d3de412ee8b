"""What is frozen is kept once a window, and each snapshot still is the model at its step."""

import json
import warnings
from itertools import product

import pytest
import torch
from frozen_runs import BASE, SHORT, Adapted, Exact, same_bits, whole
from resumed_runs import KEPT, assert_same, stopped
from run_outcomes import outcome
from slow_cases import mostly_slow
from tiny_run import EVERY, WINDOW, At, Tiny, fit
from torch import nn
from window_runs import CODEC, largest_file, quiet, steps

from merge_callback import load_merge
from merge_callback.snapshots import frozen
from merge_callback.snapshots.frozen import _BLOCK, fingerprint, same_bytes
from merge_callback.snapshots.live_copy import LiveCopy
from merge_callback.snapshots.safetensors_header import read_header

PARAMETERS = 2 * 32 * 2 + 2 * 32
"""Elements of the adapter and of the norm's parameters."""

TRAINED = 4 * (PARAMETERS + 2 * 32) + 8
"""Their bytes, and those of the norm's statistics and its count of batches."""

FROZEN = 4 * (16 * 32 + 16 * 32 + 16)


def frozen_files(merges):
    return sorted(path.name for path in (merges / "window").glob("frozen-*"))


def data_bytes(path):
    return path.stat().st_size - read_header(path).start


def buffers(module):
    """Bytes of all memory that the window's snapshots lie in, each once."""
    arenas = [snapshot.arena for snapshot in module.trainer.callbacks[0].session.window.snapshots]
    held = {a.buffer.data_ptr(): a.buffer.nbytes for arena in arenas for a in (arena, arena.frozen.arena)}
    return sum(held.values())


@pytest.mark.parametrize("kept", [*KEPT, {"storage": "cpu", "durable": False}], ids=str)
def test_a_window_takes_what_trains_for_each_snapshot_and_what_is_frozen_once(tmp_path, kept):
    taken = []
    look = At(step13=lambda module: taken.append(buffers(module)))
    fit(tmp_path, module=Adapted, before=[look], **SHORT, **kept)

    if kept["storage"] != "disk":
        assert taken == [FROZEN + WINDOW * TRAINED]
    if kept.get("durable", True):
        window = tmp_path / "merges/window"
        later = TRAINED - 2 * PARAMETERS if "snapshot_codec" in kept else TRAINED
        sizes = [data_bytes(path) for path in sorted(window.glob("step=*"))]
        assert sizes == [TRAINED, *[later] * (WINDOW - 1)]
        assert [data_bytes(path) for path in window.glob("frozen-*")] == [FROZEN]


def test_the_arena_that_a_snapshot_is_copied_to_holds_what_trains(tmp_path, monkeypatch):
    sizes = []
    copy = LiveCopy._copy
    monkeypatch.setattr(LiveCopy, "_copy", lambda *a: sizes.append(a[1].nbytes) or copy(*a))
    fit(tmp_path, module=Adapted, **SHORT)
    assert sizes == [FROZEN, *[TRAINED] * (14 // EVERY)]


METHODS = [
    {"method": "sma"},
    {"method": "noise", "storage": "cpu"},
    {"method": "ema", **CODEC},
    {"method": "ties", "snapshot_dtype": "bf16"},
    {"method": "dare", "exclude": ["up.*", "embed.*"]},
    {"method": "dropout"},
    {"method": "slerp"},
]


@pytest.mark.parametrize(
    ("thaw", "options"), mostly_slow(product([False, True], METHODS), daily=[0, 1, 2, 10, 11])
)
def test_merges_and_diversities_are_those_of_whole_snapshots_bit_for_bit(
    tmp_path, monkeypatch, options, thaw
):
    def run(folder):
        calls = [At(step7=lambda module: module.head.requires_grad_(True))] if thaw else []
        _, module, _ = fit(
            folder, module=Adapted, callbacks=calls, evaluate=True, emit_every=1, **SHORT, **options
        )
        return outcome(folder, module)

    found = run(tmp_path / "found")
    whole(monkeypatch)
    expected = run(tmp_path / "expected")

    assert (frozen_files(tmp_path / "found/merges") != [], frozen_files(tmp_path / "expected/merges")) == (
        True,
        [],
    )
    assert found["metrics"] == expected["metrics"]
    assert found["weights"] == expected["weights"]
    assert found["emissions"].keys() == expected["emissions"].keys()
    for name, emission in expected["emissions"].items():
        merged, before = (load_merge(tmp_path / run / "merges" / name) for run in ("found", "expected"))
        assert merged.keys() == before.keys()
        assert all(same_bits(merged[n].view(-1), tensor.view(-1)) for n, tensor in before.items())
        assert found["emissions"][name]["record"]["diversity"] == emission["record"]["diversity"]
        assert found["emissions"][name]["record"]["copied"] == emission["record"]["copied"]


# --- tensors that turn out to change -----------------------------------------------------------------------


class WithTarget(Adapted):
    """A target network, which follows by writes that no version counter tells of."""

    def __init__(self):
        super().__init__()
        self.target = nn.Linear(32, 16).requires_grad_(False)

    def on_train_batch_start(self, *_):
        self.target.weight.data.lerp_(self.head.weight.data + self.up.weight.data.sum(), 0.1)


def freeze(name, frozen=True):
    return lambda module: module.get_parameter(name).requires_grad_(not frozen)


def replace(module):
    module.head.weight.data = module.head.weight.data + 1


def negate_zeros(module):
    module.head.bias.data.copy_(torch.zeros(16) if module.trainer.global_step < 7 else -torch.zeros(16))


CHANGES = {
    "unfrozen": (Adapted, {"step7": freeze("head.weight", False)}),
    "unfrozen layer by layer": (
        Adapted,
        {"step5": freeze("head.weight", False), "step9": freeze("embed.weight", False)},
    ),
    "unfrozen and frozen": (Adapted, {"step5": freeze("head.weight", False), "step8": freeze("head.weight")}),
    "frozen later": (Adapted, {"step7": freeze("down.weight"), "step9": freeze("up.weight")}),
    "frozen from nothing": (Tiny, {"step5": freeze("embed.weight"), "step11": freeze("head.weight")}),
    "a target network": (WithTarget, {}),
    "other memory": (Adapted, {"step9": replace}),
    "only a sign of zero": (Adapted, {"step1": negate_zeros, "step9": negate_zeros}),
}


@pytest.mark.parametrize(
    ("kept", "change"),
    mostly_slow(product([{"storage": "disk"}, {"storage": "cpu", "durable": False}], CHANGES), range(10)),
)
def test_every_snapshot_is_the_model_at_its_step(tmp_path, change, kept):
    module, calls = CHANGES[change]
    exact = Exact()
    fit(tmp_path, module=module, before=[At(**calls)], callbacks=[exact], **SHORT, **kept)
    assert exact.seen == set(range(EVERY, 15, EVERY))


@pytest.mark.parametrize("change", mostly_slow(product(CHANGES), daily=[0, 5, 7]))
def test_on_a_device_fingerprints_tell_what_changed(tmp_path, monkeypatch, change):
    """As for a live model that is on a GPU."""
    monkeypatch.setattr(frozen, "_is_near", lambda tensor: False)
    module, calls = CHANGES[change]
    exact = Exact()
    fit(tmp_path, module=module, before=[At(**calls)], callbacks=[exact], storage="cpu", **SHORT)
    assert exact.seen == set(range(EVERY, 15, EVERY))


def test_what_changed_once_is_kept_with_every_snapshot_from_then_on(tmp_path):
    fit(tmp_path, module=WithTarget, storage="disk", **SHORT)
    held = [set(read_header(path).entries) for path in sorted((tmp_path / "merges/window").glob("step=*"))]
    assert all("target.weight" in names and not BASE & names for names in held)


def test_the_file_goes_once_no_snapshot_needs_it(tmp_path):
    def move(module):
        for name in BASE:
            module.get_parameter(name).data.add_(1)

    fit(tmp_path, module=Adapted, before=[At(step5=move)], storage="disk", **SHORT)
    assert frozen_files(tmp_path / "merges") == []
    assert steps(tmp_path) == [8, 10, 12, 14]


def test_a_small_frozen_part_is_kept_with_each_snapshot(tmp_path):
    def build():
        module = Tiny(width=32)
        module.head.bias.requires_grad_(False)  # 64 bytes of 4,552
        return module

    fit(tmp_path, module=build, storage="disk", **SHORT)
    assert frozen_files(tmp_path / "merges") == []


# --- resuming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "kept"),
    mostly_slow(product(["nothing", "unfrozen", "a target network"], KEPT), daily=[1, 4, 11]),
)
def test_a_resumed_run_is_the_unbroken_one(tmp_path, kept, change):
    module, calls = {**CHANGES, "nothing": (Adapted, {})}[change]

    def resumed():
        built = module()  # as a fine-tuning callback leaves it before the fit: past that moment
        built.head.weight.requires_grad_(change == "unfrozen")
        return built

    def run(folder, *path):
        build = resumed if path else module
        _, trained, _ = fit(folder, *path, module=build, before=[At(**calls)], **kept)
        return outcome(folder, trained)

    expected = run(tmp_path / "unbroken")
    (tmp_path / "run").mkdir()
    checkpoint = stopped(tmp_path / "run", batch=9, module=module, before=[At(**calls)], **kept)
    assert_same(run(tmp_path / "run", checkpoint), expected)


@pytest.mark.parametrize("kept", mostly_slow(product(KEPT), daily=[0, 3]))
def test_a_window_of_whole_snapshots_is_gone_on_with(tmp_path, monkeypatch, kept):
    """Those of a version that kept nothing once."""
    with monkeypatch.context() as before:
        whole(before)
        _, module, _ = fit(tmp_path / "unbroken", module=Adapted, **kept)
        expected = outcome(tmp_path / "unbroken", module)
        checkpoint = stopped(tmp_path, batch=9, module=Adapted, **kept)
        assert frozen_files(tmp_path / "merges") == []

    _, module, _ = fit(tmp_path, checkpoint, module=Adapted, **kept)
    found = outcome(tmp_path, module)
    for what in ("metrics", "weights"):
        assert found[what] == expected[what]
    assert len(frozen_files(tmp_path / "merges")) == 1
    for name in expected["emissions"]:
        merged, before = (
            load_merge(folder / "merges" / name) for folder in (tmp_path, tmp_path / "unbroken")
        )
        assert all(same_bits(merged[n].view(-1), tensor.view(-1)) for n, tensor in before.items())


def test_a_window_that_was_moved_is_taken_over_with_what_is_frozen(tmp_path):
    checkpoint = stopped(tmp_path / "run", batch=9, module=Adapted, storage="disk")
    fit(tmp_path / "run", checkpoint, module=Adapted, dirpath=tmp_path / "other", storage="disk", **SHORT)
    assert [
        r["step"] for r in json.loads((tmp_path / "other/window/manifest.json").read_text())["snapshots"]
    ] == [
        8,
        10,
        12,
        14,
    ]
    assert len(list((tmp_path / "other/window").glob("frozen-*"))) == 1


# --- full disks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("size", [2000, 7000], ids=["nothing can be written", "only what trains can"])
def test_a_disk_too_full_for_what_is_frozen_costs_the_files_of_that_time(tmp_path, storage, size):
    limit, left = largest_file(size), []

    def look(module):
        left.extend(path.name for path in (tmp_path / "merges/window").glob("*step=*"))

    def enter(module):
        limit.__enter__()

    def leave(module):
        look(module)
        limit.__exit__(None, None, None)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        calls = At(step1=enter, step7=leave)
        fit(tmp_path, module=Adapted, before=[calls], storage=storage, trainer=quiet(max_steps=14))
    assert left == []
    assert "the snapshot of step 6 could not be kept in a file" in " ".join(str(w.message) for w in told)
    assert steps(tmp_path) == [8, 10, 12, 14]
    assert len(frozen_files(tmp_path / "merges")) == 1


# --- comparing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.bool])
def test_a_fingerprint_tells_tensors_apart_that_differ_in_a_bit(dtype):
    tensor = (torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 50).to(dtype)
    for change in range(0, tensor.nbytes, 97):
        other = tensor.clone()
        other.view(torch.uint8)[change] ^= 1
        assert not torch.equal(fingerprint(tensor), fingerprint(other))
        assert not same_bytes(tensor, other)
    assert torch.equal(fingerprint(tensor), fingerprint(tensor.clone()))
    assert same_bytes(tensor, tensor.clone())


def test_a_fingerprint_tells_changes_apart_that_cancel_out_in_a_sum():
    zeros = torch.zeros(_BLOCK + 8)
    flips, swapped, moved = zeros.clone(), torch.arange(8.0), zeros.clone()
    flips[[1, 2]] = -0.0  # two sign bits: 2**31 twice
    assert not torch.equal(fingerprint(flips), fingerprint(zeros))
    assert not torch.equal(fingerprint(swapped), fingerprint(swapped.flip(0)))
    zeros[3], moved[_BLOCK + 3] = 1, 1  # the same place of the next block
    assert not torch.equal(fingerprint(zeros), fingerprint(moved))


def test_fingerprints_do_not_depend_on_how_a_tensor_lies_in_memory():
    tensor = torch.randn(2, 3, 4, 5)
    other = tensor.contiguous(memory_format=torch.channels_last)
    assert torch.equal(fingerprint(tensor), fingerprint(other))
    assert same_bytes(tensor, other)
    assert torch.equal(fingerprint(torch.empty(0)), torch.zeros(2, dtype=torch.int64))
