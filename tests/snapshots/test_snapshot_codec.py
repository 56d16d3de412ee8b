"""Snapshots kept as differences in 16 bits: how far they are off, and that what builds on them is right."""

import math
import operator
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from codec_windows import CODEC, RELATIVE, ROUNDING, TINY, assert_rounded_once, decoded, new_window, take
from run_outcomes import window as manifest_of
from slow_cases import mostly_slow
from test_arena import mixed_tensors
from tiny_run import WINDOW, Tiny, fit
from torch import nn
from training_runs import assert_same_bits

from merge_callback.merging import METHODS, Dare, LinearMethod, MergeMethod, Slerp, Ties, resolve_method
from merge_callback.snapshots.arena_merge import Sum, merge_arenas
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.deltas import Decoded
from merge_callback.snapshots.snapshot import NonFiniteSnapshotError
from merge_callback.snapshots.window_merger import WindowMerger

both_codecs = pytest.mark.parametrize("codec", RELATIVE)


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


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "on_disk", "dtype"),
    mostly_slow(product(RELATIVE, [False, True], [torch.float32, torch.float64]), daily=[0, 3, 5, 6]),
)
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
    window = new_window(tensors, size=3, static={"frozen"})
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
    merge_arenas(arenas, [Sum(weights, out)])

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

    found = merge_arenas([s.arena for s in window.snapshots], contrast=contrast)

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
