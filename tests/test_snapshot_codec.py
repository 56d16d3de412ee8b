"""Snapshots kept as differences in 16 bits: how far they are off, and that what builds on them is right."""

import math
import operator
import os
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from killed_run import (
    EVERY,
    WINDOW,
    At,
    Keeper,
    SaveAt,
    StopError,
    Tiny,
    checksum,
    damage,
    emissions,
    fit,
    metrics,
    wait_for_snapshots,
)
from killed_run import window as manifest_of
from lightning.pytorch import Callback
from safetensors import safe_open
from test_arena import mixed_tensors
from torch import nn
from training_runs import assert_same_bits
from window_runs import (
    LAST,
    Full,
    assert_nothing_is_half_there,
    quiet,
    steps,
    unlimited,  # noqa: F401 (a fixture)
)

from merge_callback import load_merge
from merge_callback.merging import METHODS, Dare, LinearMethod, MergeMethod, Slerp, Ties, resolve_method
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.deltas import Decoded, flat_tensors
from merge_callback.snapshots.layout import Layout
from merge_callback.snapshots.merge import WindowMerger, merge_arenas
from merge_callback.snapshots.storage import NonFiniteSnapshotError, Snapshot, SnapshotStore
from merge_callback.snapshots.window import Window

CODEC = "delta-fp16"

RELATIVE = {"delta-fp16": 2.0**-11, "delta-bf16": 2.0**-8}
"""The largest relative error of a difference: fp16 has 11 significant bits, bf16 has 8."""

TINY = {"delta-fp16": 2.0**-35, "delta-bf16": 2.0**-134}
"""The largest error below the normal numbers; those of fp16 count in units of 2⁻¹⁰."""

both_codecs = pytest.mark.parametrize("codec", RELATIVE)

ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
"""The largest relative error of a sum in that dtype."""


def new_window(tensors, size=10, folder=None, still=(), codec=CODEC):
    """An empty window for such tensors, in memory or, given a folder, on disk."""
    layout = Layout.of(tensors, still=still)
    store = SnapshotStore(layout, "disk" if folder else "cpu", folder, codec=codec)
    return Window(size, store, "run")


def take(window, step, tensors):
    window.add(Snapshot(step, step, 0.1, 1.0, "stable", 0, step), window.capture(tensors))


def decoded(window):
    """Copies of every snapshot's tensors, flat, by its step."""
    arenas = [snapshot.arena for snapshot in window.snapshots]
    return {
        snapshot.step: {name: flat[:].clone() for name, flat in flat_tensors(arenas[: i + 1]).items()}
        for i, snapshot in enumerate(window.snapshots)
    }


def assert_decoded(window, expected):
    """Every snapshot but the oldest is a difference, and the window holds just these bits."""
    assert [s.difference_to for s in window.snapshots] == [None, *(s.step for s in window.snapshots[:-1])]
    assert_same_bits(decoded(window), expected)


def walk(steps, size=4096, dtype=torch.float32, scale=1e-3, seed=0):
    """Weights that move a little from one snapshot to the next."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(size, generator=draw, dtype=dtype)
    for step in range(1, steps + 1):
        yield step, {"w": weights.clone()}
        weights += scale * torch.randn(size, generator=draw, dtype=dtype)


def assert_rounded_once(found, weights, before, codec=CODEC):
    """``found`` is off by one rounding of the way from ``before``, and one of the sum."""
    error, way = (found.double() - weights.double()).abs(), (weights.double() - before.double()).abs()
    # The way is itself rounded before it is, hence a little more than one rounding of it.
    relative = RELATIVE[codec] * (1 + RELATIVE[codec])
    bound = relative * way + 1.01 * ROUNDING[found.dtype] * found.double().abs() + TINY[codec]
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@both_codecs
def test_an_error_is_one_rounding_of_the_own_step_and_does_not_add_up(tmp_path, dtype, on_disk, codec):
    window, worst = None, []
    for step, tensors in walk(60, dtype=dtype):
        window = window or new_window(tensors, folder=tmp_path if on_disk else None, codec=codec)
        before = decoded(window)[step - 1]["w"] if step > 1 else tensors["w"]
        take(window, step, tensors)
        found = decoded(window)[step]["w"]
        assert_rounded_once(found, tensors["w"], before, codec)
        worst.append(float((found - tensors["w"]).abs().max()))

    assert len(window) == 10
    assert worst[0] == 0
    # 49 snapshots on, and 50 oldest ones made whole: no larger but for the luck of the draw.
    assert max(worst[-10:]) < 1.5 * max(worst[1:11])
    # Of a step of four or five sigma, as 4096 normal draws have; in raw bf16 it would be one of a weight.
    assert max(worst) < RELATIVE[codec] * 6e-3 + ROUNDING[dtype] * 6


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@both_codecs
def test_an_eviction_changes_no_bit_of_the_snapshots_that_stay(tmp_path, on_disk, codec):
    window = None
    for step, tensors in walk(25, size=1000):
        window = window or new_window(tensors, 4, tmp_path if on_disk else None, codec=codec)
        known = decoded(window)
        take(window, step, tensors)
        known[step] = decoded(window)[step]
        assert_decoded(window, {s: known[s] for s in list(known)[-4:]})


def test_a_jump_of_thirty_powers_of_ten_is_forgotten_with_the_next_snapshot():
    small = {"w": torch.tensor([1.0, -3.0, 0.1, 0.0])}
    huge = {"w": torch.tensor([1e30, 2e30, -1e30, 1e-30])}
    window = new_window(small, size=6, codec="delta-bf16")
    for step, tensors in enumerate([small, huge, small, small, small], 1):
        before = decoded(window)[step - 1]["w"] if step > 1 else small["w"]
        take(window, step, tensors)
        assert_rounded_once(decoded(window)[step]["w"], tensors["w"], before, "delta-bf16")

    # Two steps after the way back, whatever the jump cost is mended bit for bit: three bf16 hold a weight.
    take(window, 6, small)
    assert_same_bits(decoded(window)[6], small)


@pytest.mark.parametrize(("codec", "size"), [("delta-bf16", 1e-40), ("delta-fp16", 1e-9)])
def test_a_step_below_the_normal_numbers_is_off_by_no_more_than_their_spacing(codec, size):
    start = torch.full((64,), size)
    window = new_window({"w": start}, size=4, codec=codec)
    for step in range(1, 8):
        weights = start + step * 0.3 * size * torch.linspace(-1, 1, 64)
        before = decoded(window)[step - 1]["w"] if step > 1 else weights
        take(window, step, {"w": weights})
        assert_rounded_once(decoded(window)[step]["w"], weights, before, codec)


@both_codecs
def test_weights_that_stay_are_kept_and_merged_bit_for_bit(codec):
    weights = {"w": torch.randn(1000, generator=torch.Generator().manual_seed(1))}
    window = new_window(weights, size=7, codec=codec)
    merger = merging(window)
    for step in range(1, 12):
        take(window, step, weights)
    merger.measure(ModelTensors(dict(weights)), merge=True)

    assert_decoded(window, dict.fromkeys(range(5, 12), weights))
    assert all(not s.arena.buffer.any() for s in window.snapshots[1:])
    assert_same_bits(merger.current(ModelTensors()).arena.tensors(), weights)
    assert merger.diversity["rms"] == 0


@both_codecs
def test_weights_that_come_to_rest_are_exact_three_snapshots_later(codec):
    window, steps = None, list(walk(6, scale=1.0))
    last = steps[-1][1]
    for step, tensors in [*steps, (7, last), (8, last)]:
        window = window or new_window(tensors, size=4, codec=codec)
        take(window, step, tensors)

    # Each difference holds the next 8 or 11 of an error's bits, and what is left of a step of size 1 is below
    # them: nothing in bf16, and in fp16 what is smaller than its spacing.
    found = decoded(window)[8]["w"]
    large = last["w"].abs() >= (2.0**-11 if codec == "delta-fp16" else 0)
    assert_same_bits(found[large], last["w"][large])
    assert float((found - last["w"]).abs().max()) <= TINY[codec]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_snapshot_that_is_not_finite_is_refused_and_the_next_builds_on_the_last_good_one(value):
    (_, first), (_, second), (_, third) = walk(3, size=100)
    window = new_window(first)
    take(window, 1, first)
    second["w"][17] = value

    with pytest.raises(NonFiniteSnapshotError, match="w hold NaN or Inf"):
        take(window, 2, second)
    take(window, 3, third)

    assert [(s.step, s.difference_to) for s in window.snapshots] == [(1, None), (3, 1)]
    assert_rounded_once(decoded(window)[3]["w"], third["w"], first["w"])


@pytest.mark.parametrize(
    ("codec", "dtype", "before", "after"),
    [
        ("delta-bf16", torch.float32, -3e38, 3e38),
        ("delta-bf16", torch.float64, 1.0, 1e40),
        ("delta-fp16", torch.float32, -32.0, 32.0),
    ],
)
def test_a_step_that_no_difference_can_hold_is_refused_and_spoils_nothing(codec, dtype, before, after):
    small = {"w": torch.full((5,), before, dtype=dtype)}
    large = {"w": torch.tensor([after, *small["w"][1:].tolist()], dtype=dtype)}
    window = new_window(small, codec=codec)
    take(window, 1, small)

    with pytest.raises(
        NonFiniteSnapshotError, match=f"to that of step 1 w hold .* moved too far for .*{codec}"
    ):
        take(window, 2, large)
    take(window, 3, small)

    assert_decoded(window, {1: small, 3: small})


# --- what is kept as it is ----------------------------------------------------------------------------------


def test_only_wide_floats_that_train_are_kept_as_differences():
    tensors = {**mixed_tensors(), "scalar": torch.tensor(2.5), "frozen": torch.randn(3)}
    window = new_window(tensors, size=3, still={"frozen"})
    later = {n: t + torch.ones_like(t) * 2**-6 if t.is_floating_point() else t for n, t in tensors.items()}
    take(window, 1, tensors)
    take(window, 2, later)

    stored = {n: t.dtype for n, t in window.snapshots[1].arena.tensors().items()}
    as_differences = {"weight", "bias", "precise", "scalar", "empty"}
    assert stored == {n: torch.float16 if n in as_differences else t.dtype for n, t in tensors.items()}
    found = decoded(window)
    assert_same_bits(found[1], {name: tensor.reshape(-1) for name, tensor in tensors.items()})
    for name in tensors.keys() - as_differences:
        assert torch.equal(found[2][name], later[name].reshape(-1)), name
    for name in as_differences:
        assert_rounded_once(found[2][name], later[name].reshape(-1), tensors[name].reshape(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_sixteen_bits_leaves_the_files_it_leaves_without_the_codec(tmp_path, dtype):
    class Half(Tiny):
        """Trains in 16 bits, beside buffers in 32."""

        def __init__(self):
            super().__init__()
            for parameter in self.parameters():
                parameter.data = parameter.data.to(dtype)
            self.register_buffer("frequencies", torch.rand(5, generator=torch.Generator().manual_seed(1)))

        def loss(self, batch):
            hidden = self.embed(batch["input_ids"][:, :-1]).flatten(0, 1)
            return nn.functional.cross_entropy(self.head(hidden).float(), batch["input_ids"][:, 1:].flatten())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    options = {"module": Half, "trainer": {"max_steps": 12, "logger": False}}
    fit(tmp_path / "with", snapshot_codec=CODEC, **options)
    fit(tmp_path / "without", **options)

    found, expected = (manifest_of(tmp_path / name / "merges") for name in ("with", "without"))
    assert found == expected
    assert len(found["files"]) == WINDOW


# --- sums over what is stored -------------------------------------------------------------------------------


def merging(window, method="sma", exclude=()):
    return WindowMerger(window, {"stable": resolve_method(method)}, 2, exclude)


def plain_twin(window):
    """A window without the codec that holds the decoded snapshots."""
    twin, shapes = None, {s.name: s.shape for group in window.store.layout.groups for s in group.segments}
    for step, flat in decoded(window).items():
        tensors = {name: flat[name].view(shape) for name, shape in shapes.items()}
        twin = twin or new_window(tensors, size=window.size, codec="")
        take(twin, step, tensors)
    return twin


@pytest.fixture(scope="module")
def pair():
    """A window whose oldest have gone, and its twin; the tensors span several blocks of every reader."""
    window = None
    for step, tensors in walk(9, size=300_000, scale=0.05):
        w = tensors["w"]
        model = {"large": w[:280_000].view(700, 400), "small": w[280_000:299_999], "one": w[299_999:]}
        window = window or new_window(model, size=5)
        take(window, step, model)
    return window, plain_twin(window)


@pytest.mark.parametrize("weights", [[0.2] * 5, [0.1, 0.2, 0.3, 0.25, 0.15], [0, 0, 0.5, 0, 0.5]], ids=str)
def test_a_weighted_sum_of_what_is_stored_is_that_of_the_snapshots(pair, weights):
    window, twin = pair
    arenas = [s.arena for s in window.snapshots]
    out = type(arenas[0]).empty(window.store.layout.native)
    merge_arenas(weights, arenas, out)

    for name, found in out.tensors().items():
        stack = torch.stack([s.arena.tensors()[name].double() for s in twin.snapshots])
        expected = (torch.tensor(weights).double().view(-1, *[1] * found.dim()) * stack).sum(0)
        # Five factors and five sums rounded to fp32 on either side, of the largest snapshot at most.
        bound = 20 * ROUNDING[torch.float32] * stack.abs().max(0).values
        assert bool(((found.double() - expected).abs() <= bound).all()), name


@pytest.mark.parametrize(("a", "b"), [(0, 4), (2, 4), (3, 4), (0, 1)])
def test_a_distance_of_what_is_stored_is_that_of_the_snapshots(pair, a, b):
    window, twin = pair
    contrast = [float(i == b) - float(i == a) for i in range(5)]

    found = merge_arenas(None, [s.arena for s in window.snapshots], contrast=contrast)

    for name, squares in found.items():
        older, newer = (twin.snapshots[i].arena.tensors()[name].double() for i in (a, b))
        # Decoding rounds what the sum of differences does not: once a step, each weight.
        bound = 2 * (b - a) * ROUNDING[torch.float32] * float(newer.norm() + older.norm())
        assert math.sqrt(squares) == pytest.approx(float((newer - older).norm()), abs=bound), name


@dataclass(frozen=True)
class Median(MergeMethod):
    """As the docstring of `MergeMethod` has it."""

    def merge(self, inputs, out, trajectory, survey=None):
        out.copy_(torch.stack(list(inputs.tensors)).float().median(0).values)


@dataclass(frozen=True)
class ByHand(MergeMethod):
    """A trimmed mean as somebody would write it who knows nothing of the codec."""

    def merge(self, inputs, out, trajectory, survey=None):
        tensors = inputs.tensors
        total = sum(tensors)
        for extreme in (torch.maximum, torch.minimum):
            trimmed = tensors[0]
            for tensor in tensors[1:]:
                trimmed = extreme(trimmed, tensor)
            total = total - trimmed
        spread = (tensors[-1] - tensors[0]).abs() > 0.5 * tensors[0].std()
        out.copy_(torch.where(spread, tensors[-1], total / (len(tensors) - 2)))


OWN = {"median": Median(), "by hand": ByHand()}
GLOBAL = {
    "ties, global": Ties(scope="global"),
    "slerp, global": Slerp(scope="global"),
    "dare, 0.5": Dare(0.5),
}
LINEAR = sorted(name for name, method in METHODS.items() if issubclass(method, LinearMethod))


@pytest.mark.parametrize("name", [*sorted(METHODS.keys() - {*LINEAR}), *GLOBAL, *OWN])
def test_a_method_reads_the_decoded_snapshots_bit_for_bit(pair, name):
    method = OWN.get(name) or GLOBAL.get(name) or name

    found, expected = (merging(w, method).current(ModelTensors()).arena.tensors() for w in pair)

    assert_same_bits(found, expected)


@pytest.mark.parametrize("name", [name for name in LINEAR if name != "weighted"])
def test_a_linear_method_weighs_the_decoded_snapshots(pair, name):
    found, expected = (merging(w, name).current(ModelTensors()) for w in pair)

    assert found.weights == expected.weights
    for name, tensor in expected.arena.tensors().items():
        scale = max(float(s.arena.tensors()[name].abs().max()) for s in pair[1].snapshots)
        torch.testing.assert_close(found.arena.tensors()[name], tensor, rtol=0, atol=20 * 2.0**-24 * scale)


OPERATIONS = {
    **{f.__name__: f for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow)},
    **{f.__name__: f for f in (operator.lt, operator.ge, operator.eq, operator.ne, operator.floordiv)},
    "matmul": operator.matmul,
    "from the right": lambda a, b: 2.0 - a + 3.0 * b / (1.0 + a) + 2.0**b,
    "negative": lambda a, b: -a,
    "absolute": lambda a, b: abs(a),
    "sum of both": lambda a, b: sum([a, b]),
    "as an index": lambda a, b: a[b > 0],
    "an element": lambda a, b: a[3] + b[-1],
    "every other element": lambda a, b: a[::2] * b[1::2],
    "assigned": lambda a, b: torch.zeros(64).index_put_((torch.arange(64),), a[:]).copy_(b),
    "filled in": lambda a, b: _filled(torch.zeros(64), a),
    "a function": lambda a, b: torch.lerp(a, b, 0.25),
    "a method": lambda a, b: a.double().sub(b).norm(),
    "a list": lambda a, b: torch.tensor(a.tolist()) + torch.stack([a, b]).sum(0),
    "its elements": lambda a, b: torch.stack(list(a)) * len(b),
    "numpy": lambda a, b: torch.from_numpy(a.numpy() + b.numpy()),
    "its shape": lambda a, b: torch.zeros(a.shape) + a.ndim + b.dim(),
}


def _filled(tensor, values):
    tensor[:] = values
    return tensor


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_decoded_tensor_is_worked_with_like_a_tensor(operation):
    draw = torch.Generator().manual_seed(0)
    wholes = [torch.rand(64, generator=draw) - 0.5 for _ in range(2)]
    differences = [torch.randn(64, generator=draw).half() for _ in range(2)]
    lazy = [Decoded([w, d], [1.0, 2.0**-10]) for w, d in zip(wholes, differences, strict=True)]
    plain = [w + 2.0**-10 * d.float() for w, d in zip(wholes, differences, strict=True)]

    found, expected = OPERATIONS[operation](*lazy), OPERATIONS[operation](*plain)

    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert_same_bits([t[:] for t in lazy], plain)  # never written to


# --- real fits ----------------------------------------------------------------------------------------------


class Calm(Tiny):
    """A wider model that moves slowly, as models of any size do: its weights by about 0.002 a snapshot."""

    def __init__(self):
        super().__init__(width=64)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


TRAINED = {name for name, _ in Calm().named_parameters()}

PLACES = {
    "disk": {"storage": "disk"},
    "cpu": {"storage": "cpu"},
    "device": {"storage": "device"},
    "cpu, lost with the process": {"storage": "cpu", "durable": False},
    "device, lost with the process": {"storage": "device", "durable": False},
}


@dataclass
class Fitted:
    """What a fit left behind: the last merge, the diversities, the window's bytes, the live weights."""

    merge: dict
    diversities: list
    nbytes: int
    weights: dict

    @property
    def update(self):
        """RMS distance of consecutive snapshots: of what trains, over the last window."""
        taken = [self.weights[step] for step in range(8, 27, EVERY)]
        return rms([distance(a, b) for a, b in pairwise(taken)])

    def merge_error(self, exact):
        return distance(self.merge, exact.merge) / exact.update

    def diversity_error(self, exact):
        pairs = zip(self.diversities, exact.diversities, strict=True)
        return max(abs(found / expected - 1) for found, expected in pairs)


def distance(a, b):
    """RMS distance of what trains."""
    return rms([(a[name].double() - b[name].double()).flatten() for name in sorted(TRAINED)])


def rms(numbers):
    return float(
        torch.cat([torch.as_tensor(n, dtype=torch.float64).view(-1) for n in numbers]).square().mean().sqrt()
    )


def fitted(folder, **options):
    keeper = Keeper()
    options = {"window": 10, "method": "sma", "emit_every": 1, "evaluate": False, **options}
    fit(folder, module=Calm, callbacks=[keeper], **options)
    merges, logged = folder / "merges", metrics(folder)
    files = (merges / "window").glob("step=*.safetensors")
    return Fitted(
        load_merge(merges / "latest"),
        [value for key, value in logged.items() if "diversity_rms" in key],
        sum(path.stat().st_size for path in files),
        keeper.weights,
    )


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    """The same training with a window in fp32."""
    return fitted(tmp_path_factory.mktemp("exact"))


@pytest.mark.parametrize(
    ("codec", "place"), [*((CODEC, place) for place in PLACES), ("delta-bf16", "disk"), ("delta-bf16", "cpu")]
)
def test_merges_and_diversity_of_a_real_run_are_those_of_fp32_snapshots(tmp_path, exact, codec, place):
    found = fitted(tmp_path, snapshot_codec=codec, **PLACES[place])

    assert_same_bits(found.weights, exact.weights)
    # A rounding is off by 0.4 of the largest error (RMS), the mean of ten by 0.13; twice that, for luck.
    assert 0 < found.merge_error(exact) < RELATIVE[codec] / 4 < 1e-3
    assert found.diversity_error(exact) < 1e-2
    for name in exact.merge.keys() - TRAINED:
        assert torch.equal(found.merge[name], exact.merge[name]), name


def test_raw_bf16_snapshots_are_too_coarse_for_that(tmp_path, exact):
    found = fitted(tmp_path, snapshot_dtype="bf16")

    assert_same_bits(found.weights, exact.weights)
    assert found.merge_error(exact) > 1e-2
    assert found.diversity_error(exact) > 1e-2


def data_and_header(path):
    """Bytes of the data and of the header of a safetensors file."""
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return path.stat().st_size - header, header


def test_a_full_window_takes_a_little_more_than_half_the_bytes(tmp_path, exact):
    found = fitted(tmp_path, snapshot_codec=CODEC)

    model = Calm()
    trained = sum(p.numel() * p.element_size() for p in model.parameters())
    native = sum(b.numel() * b.element_size() for b in model.buffers())
    sizes = [data_and_header(path) for path in sorted((tmp_path / "merges/window").glob("step=*"))]
    assert len(sizes) == 10
    assert sum(data for data, _ in sizes) == trained + 9 * trained / 2 + 10 * native
    # 55 % of what trains; the rest are the headers, which are long beside so small a model, and the buffers.
    headers = sum(header for _, header in sizes)
    assert found.nbytes == headers + 10 * (0.55 * trained + native)
    assert headers < 0.5 * found.nbytes
    assert found.nbytes < exact.nbytes


def test_excluded_tensors_and_buffers_are_bitwise_those_of_a_run_without_the_codec(tmp_path):
    exclude = ["head.*"]
    keeper = Keeper()
    fit(tmp_path / "with", callbacks=[keeper], exclude=exclude, snapshot_codec=CODEC)
    fit(tmp_path / "without", exclude=exclude)

    native = {"head.weight", "head.bias", *dict(Tiny().named_buffers())}
    for path in (tmp_path / "with/merges/window").glob("step=*.safetensors"):
        step = int(path.name[5:13])
        with safe_open(path, "pt") as file:
            for name in native:
                assert torch.equal(file.get_tensor(name), keeper.weights[step][name]), name
            assert file.get_tensor("embed.weight").dtype == (torch.float32 if step == 20 else torch.float16)
    for path in emissions(tmp_path / "without/merges"):
        found, expected = load_merge(tmp_path / "with/merges" / path.name), load_merge(path)
        assert_same_bits({n: found[n] for n in native}, {n: expected[n] for n in native})


def freeze(name, frozen=True):
    return lambda module: module.get_parameter(name).requires_grad_(not frozen)


def test_a_tensor_frozen_while_the_run_goes_on_is_soon_merged_to_its_own_bits(tmp_path):
    _, module, _ = fit(tmp_path, callbacks=[At(step11=freeze("embed.weight"))], snapshot_codec=CODEC)

    merged = load_merge(tmp_path / "merges/latest")
    assert torch.equal(merged["embed.weight"], module.embed.weight)
    assert not torch.equal(merged["head.weight"], module.head.weight)


class HeadFirst(Tiny):
    """Begins with a frozen embedding, which Adam knows of all the same."""

    def __init__(self):
        super().__init__()
        self.embed.weight.requires_grad_(False)


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_run_that_unfroze_a_tensor_resumes_bit_for_bit(tmp_path, storage):
    def unfreeze():
        return At(step9=freeze("embed.weight", frozen=False), step14=freeze("embed.weight", frozen=False))

    def resumed():
        module = HeadFirst()  # as a fine-tuning callback leaves it before the fit: past that moment
        module.embed.weight.requires_grad_(True)
        return module

    options = {"snapshot_codec": CODEC, "storage": storage}
    fit(tmp_path / "unbroken", module=HeadFirst, callbacks=[unfreeze()], **options)
    save = SaveAt(tmp_path / "run.ckpt", 13, stop=13)
    with pytest.raises(StopError):
        fit(tmp_path / "run", module=HeadFirst, callbacks=[unfreeze(), save], **options)

    fit(tmp_path / "run", tmp_path / "run.ckpt", module=resumed, **options)

    found, expected = (manifest_of(tmp_path / name / "merges") for name in ("run", "unbroken"))
    assert found["snapshots"] == expected["snapshots"]
    assert len(expected["snapshots"]) == WINDOW


def test_what_builds_on_a_file_cut_off_while_the_run_goes_on_goes_with_it(tmp_path):
    keeper, left = Keeper(), {}

    def cut(module):
        (path,) = (tmp_path / "merges/window").glob("step=00000006*")
        os.truncate(path, 100)

    def look(module):
        window = module.trainer.callbacks[0].session.window
        left.update({s.step: s.difference_to for s in window.snapshots})
        found, live = decoded(window), keeper.weights[10]
        for name in dict(module.named_parameters()):
            assert_rounded_once(found[10][name], live[name].flatten(), found[4][name])

    looks = [keeper, At(step9=cut, step10=look)]
    with pytest.warns(UserWarning, match="left out of the window") as told:
        fit(tmp_path, callbacks=looks, snapshot_codec=CODEC)

    lines = [str(w.message) for w in told if "left out of the window" in str(w.message)]
    assert ["step 6" in lines[0], "step 8" in lines[1], len(lines)] == [True, True, 2]
    assert left == {2: None, 4: 2, 10: 4}
    assert steps(tmp_path) == LAST


# --- no room to make a snapshot whole -----------------------------------------------------------------------


def wide():
    """A model whose snapshots take 13.4 kB whole and 9 kB as a difference."""
    return Tiny(width=64)


class Lengths(Callback):
    """How many snapshots the window holds after each step; put it after the merging callback."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        wait_for_snapshots(trainer)
        self.seen[trainer.global_step] = len(trainer.callbacks[0].session.window.snapshots)


ROOM_FOR_A_DIFFERENCE = 11_000


def small_emissions(folder):
    """The checksums of all emissions' files, by name."""
    return {
        p.name: [checksum(f) for f in sorted(p.glob("*.safetensors"))] for p in emissions(folder / "merges")
    }


def test_a_window_that_could_not_let_its_oldest_go_catches_up_and_its_merges_are_right(tmp_path):
    options = {"module": wide, "snapshot_codec": CODEC, "keep_last": None, "max_shard_size": 5000}
    fit(tmp_path / "unbroken", **options)
    full, lengths = Full(ROOM_FOR_A_DIFFERENCE, 12, 18), Lengths()

    with pytest.warns(UserWarning, match="step 14 could not be kept .*step 4 can't go yet"):
        fit(tmp_path, before=[full], callbacks=[lengths], trainer=quiet(), **options)

    assert [lengths.seen[step] for step in (10, 12, 14, 16, 18)] == [4, 5, 5, 5, 4]
    assert steps(tmp_path) == LAST
    assert_nothing_is_half_there(tmp_path)
    found, expected = small_emissions(tmp_path), small_emissions(tmp_path / "unbroken")
    # Of the five snapshots then four were merged.
    assert found["step=00000012-tokens=288-sma"] == expected["step=00000012-tokens=288-sma"]


def test_a_window_in_memory_lets_its_oldest_go_without_a_file_and_writes_files_again_later(tmp_path):
    options = {"module": wide, "snapshot_codec": CODEC, "storage": "cpu", "keep_last": None}
    options |= {"max_shard_size": 5000}
    fit(tmp_path / "unbroken", **options)
    full, lengths = Full(ROOM_FOR_A_DIFFERENCE, 10, 14), Lengths()

    fit(tmp_path, before=[full], callbacks=[lengths], trainer=quiet(), **options)

    assert max(lengths.seen.values()) == 4
    assert steps(tmp_path) == LAST
    assert_nothing_is_half_there(tmp_path)
    assert all(record["file"] for record in manifest_of(tmp_path / "merges")["snapshots"])
    assert small_emissions(tmp_path) == small_emissions(tmp_path / "unbroken")


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_disk_that_stays_full_makes_no_window_longer(tmp_path, storage):
    full, lengths = Full(3000, 10, 99), Lengths()

    with pytest.warns(UserWarning, match="step 26 could not be kept in a file"):
        fit(
            tmp_path,
            before=[full],
            callbacks=[lengths],
            module=wide,
            snapshot_codec=CODEC,
            storage=storage,
            trainer=quiet(),
        )

    assert max(lengths.seen.values()) == 4
    assert not damage(tmp_path / "merges")


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_a_snapshot_that_found_no_room_is_not_built_on(tmp_path, storage):
    full = Full(3000, 12, 14)

    with pytest.warns(UserWarning, match="step 12 could not be kept in a file"):
        fit(tmp_path, before=[full], window=10, snapshot_codec=CODEC, storage=storage, trainer=quiet())

    records = manifest_of(tmp_path / "merges")["snapshots"]
    builds_on = {r["step"]: r["difference_to"] for r in records}
    if storage == "disk":
        assert builds_on[14] == 10
    else:
        assert builds_on[12] == 10
        assert builds_on[14] is None
    assert_nothing_is_half_there(tmp_path)
