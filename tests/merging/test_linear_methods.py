"""The linear family against the golden numbers of its sources."""

import math
import re

import pytest
import torch
from checkpoint_files import ROOT

from merge_callback import METHODS, merge_state_dicts, register_method
from merge_callback.merging import Ema, Extrapolate, LinearMethod, Sma, Weighted, Wma, Wsm, resolve_method

EVEN = [1.0, 2.0, 3.0, 4.0, 5.0]

# Goldens: arXiv 2505.12082 eq. 3-5 (sma, wma, ema), arXiv 2507.17634 (wsm), worked out by hand to 6 digits.
GOLDENS = [
    (Sma(), [0.0, 1, 2, 3], [0.25, 0.25, 0.25, 0.25]),
    (Wma(), [0.0, 1, 2, 3], [0.1, 0.2, 0.3, 0.4]),
    (Ema(alpha=0.2), [0.0, 1, 2, 3], [0.17344173, 0.21680217, 0.27100271, 0.33875339]),
    (Ema(alpha=0.2, init="recursive"), [0.0, 1, 2, 3], [0.512, 0.128, 0.16, 0.2]),
    (Wsm(), EVEN, [0.447214, 0.185242, 0.142141, 0.119831, 0.105573]),
    (Wsm(decay="linear"), EVEN, [0.2] * 5),
    (Wsm(decay="cosine"), EVEN, [0.095492, 0.25, 0.309017, 0.25, 0.095492]),
    # arXiv 2605.26484: m_k + λ (m_k - m_{k-1}), of means of two; the fifth, the oldest, is in neither.
    (Extrapolate(scale=0.5), EVEN, [0, -0.25, -0.25, 0.75, 0.75]),
    (Extrapolate(scale=2.0, window=1), EVEN, [0, 0, 0, -2, 3]),
    (Extrapolate(scale=0.5, window=4), [0.0, 1, 2, 3], [-0.25, -0.25, 0.75, 0.75]),
    (Extrapolate(), [0.0], [1.0]),
    (Weighted([0.25, 0.25, 0.5]), [0.0, 1, 2], [0.25, 0.25, 0.5]),
]


@pytest.mark.parametrize(("method", "positions", "golden"), GOLDENS, ids=lambda v: getattr(v, "name", ""))
def test_weights_are_the_published_ones(method, positions, golden):
    # The goldens are given to 6-8 digits.
    assert method.normalised_weights(positions) == pytest.approx(golden, abs=5e-7)


def test_extrapolation_warns_of_nothing_and_goes_one_way(recwarn):
    Extrapolate(scale=1.0).normalised_weights(EVEN)
    assert not recwarn
    with pytest.raises(ValueError, match="order='reversed' has no meaning"):
        resolve_method("extrapolate", order="reversed")


def test_recursive_ema_is_the_recursion_of_the_paper():
    theta = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merged = theta[0]
    for snapshot in theta[1:]:
        merged = 0.3 * snapshot + 0.7 * merged
    weights = torch.tensor(Ema(alpha=0.3, init="recursive").normalised_weights(range(6)), dtype=torch.float64)
    torch.testing.assert_close(weights @ theta, merged, rtol=1e-14, atol=1e-14)


def test_wsm_scales_each_update_by_the_decay_at_its_beginning():
    """θ = θ_1 + Σ s(x_i) (θ_{i+1} − θ_i): the definition the weights come from, on uneven spacing."""
    positions, s = [10.0, 14.0, 15.0, 22.0], lambda x: 1 - math.sqrt(x)
    theta = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gap = (22 - 10) / 3
    x = [(p - 10 + gap) / (12 + gap) for p in positions]
    emulated = theta[0] + sum(s(x[i]) * (theta[i + 1] - theta[i]) for i in range(3))
    weights = torch.tensor(Wsm().normalised_weights(positions), dtype=torch.float64)
    torch.testing.assert_close(weights @ theta, emulated, rtol=1e-13, atol=1e-13)


def test_wsm_takes_any_decay_curve():
    assert Wsm(decay=lambda x: 1 - x).normalised_weights(EVEN) == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("method", [Sma(), Wma(), Ema(), Ema(init="recursive"), Wsm(), Wsm(decay="cosine")])
def test_weights_sum_to_one_from_one_snapshot_on(method):
    for n in (1, 2, 3, 17):
        weights = method.normalised_weights([float(i) for i in range(n)])
        assert len(weights) == n
        assert math.fsum(weights) == pytest.approx(1, abs=1e-12)


def test_given_weights_serve_a_window_that_is_still_filling_from_the_newest_on():
    with pytest.warns(UserWarning, match="normalised"):
        assert Weighted([1, 2, 3]).normalised_weights([0.0, 1]) == pytest.approx([0.4, 0.6])


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Ema(alpha=0), "alpha=0"),
        (lambda: Extrapolate(scale=-1), "scale=-1"),
        (lambda: Extrapolate(window=0), "window=0"),
        (lambda: Ema(alpha=1.5), "alpha=1.5"),
        (lambda: Ema(init="newest"), "init='newest'"),
        (lambda: Wsm(decay="exp"), "decay='exp'"),
        (lambda: Wsm(decay=lambda x: 1.0), r"s\(0\)=1 to s\(1\)=0"),
        (lambda: Weighted([]), "weights"),
        (lambda: Weighted([1.0, float("nan")]), "not all finite"),
        (lambda: Weighted([1.0, -1.0]), "sum to 0"),
        (lambda: Sma().normalised_weights([]), "at least one snapshot"),
        (lambda: Wsm().normalised_weights([3.0, 3.0]), "must ascend"),
        (lambda: resolve_method("median"), "'median'.*sma"),
        (lambda: resolve_method("ema", beta=1), "'ema'.*beta"),
        (lambda: resolve_method(Sma(), alpha=1), "alpha"),
    ],
)
def test_wrong_options_name_themselves(build, named):
    with pytest.raises(ValueError, match=named):
        build()


def test_negative_weights_are_allowed_with_a_warning():
    with pytest.warns(UserWarning, match="negative weights extrapolate"):
        merged = merge_state_dicts([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], weights=[-1, 2])
    assert merged["w"].item() == 2


def test_a_method_is_registered_in_five_lines_and_used_by_name(monkeypatch):
    monkeypatch.setattr("merge_callback.merging.method.METHODS", METHODS)
    try:

        @register_method("newest", reference="this test")
        class Newest(LinearMethod):
            def raw_weights(self, positions):
                return [0.0] * (len(positions) - 1) + [1.0]

        merged = merge_state_dicts([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], method="newest")
        assert merged["w"].tolist() == [1, 1]
        with pytest.raises(ValueError, match="already registered"):
            register_method("newest", reference="again")(Newest)
        assert resolve_method("newest").options() == {}
    finally:
        METHODS.pop("newest", None)


def test_what_is_not_decorated_is_not_taken_for_registered():
    with pytest.raises(TypeError, match=r"a decorator: @register_method\('newest'\) before the class"):
        register_method("newest", LinearMethod)  # type: ignore[arg-type]


def test_annotated_attributes_of_a_method_are_its_options():
    try:

        @register_method("last few", reference="this test")
        class LastFew(LinearMethod):
            count: int = 1

            def raw_weights(self, positions):
                return [float(i < self.count) for i in reversed(range(len(positions)))]

        method = resolve_method("last few", count=2)
        assert method.normalised_weights([1, 2, 3]) == [0, 0.5, 0.5]
        assert method.options() == {"count": 2}
        with pytest.raises(ValueError, match="'last few' has no option number; its options are count"):
            resolve_method("last few", number=2)
    finally:
        METHODS.pop("last few", None)


def test_options_that_could_not_be_recorded_are_refused():
    class Hidden(LinearMethod):
        def __init__(self, count):
            self.count = count

        def raw_weights(self, positions):
            return [1.0] * len(positions)

    with pytest.raises(TypeError, match="Hidden has an __init__ of its own"):
        register_method("hidden", reference="this test")(Hidden)
    assert "hidden" not in METHODS
    given = resolve_method(Hidden(1))  # an object serves as it is
    assert (given.name, given.options()) == ("hidden", {"count": 1})
    with pytest.raises(ValueError, match=r"Sma'> is not a method: give a name, or an object"):
        resolve_method(Sma)


class Unfinished(LinearMethod):
    """Says no weights."""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda tensors: tensors[0], "can't be registered .* a subclass of LinearMethod"),
        (dict, "'dict' can't be registered"),
        (Sma(), "can't be registered"),
        (Unfinished, "Unfinished lacks raw_weights"),
    ],
)
def test_what_can_be_no_method_is_not_registered(what, said):
    with pytest.raises(TypeError, match=said):
        register_method("impossible")(what)
    assert "impossible" not in METHODS


def test_a_method_is_registered_under_a_name():
    with pytest.raises(ValueError, match=r"needs a name, e\.g\. @register_method"):
        register_method(Unfinished)


def test_the_own_method_of_the_readme_runs(monkeypatch):
    monkeypatch.setattr("merge_callback.merging.method.METHODS", dict(METHODS))
    readme = (ROOT / "README.md").read_text()
    code = re.search(r"<!-- own method -->\n```python\n(.*?)```", readme, re.DOTALL)[1]
    names: dict = {}
    exec(code, names)
    newest = names["Newest"](count=1)
    assert newest.reference == ""
    merged = merge_state_dicts([{"w": torch.tensor([float(i)])} for i in (1, 2, 3)], method=newest)
    assert merged["w"].item() == 3.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_state_dicts_that_are_not_finite_are_not_merged(value, dtype):
    good, bad = {"w": torch.ones(3, dtype=dtype)}, {"w": torch.tensor([1, value, 1], dtype=dtype)}
    kind = "NaN" if math.isnan(value) else "infinite"
    with pytest.raises(ValueError, match=f"tensor 'w' of state dict 1 holds 1 values that are {kind}"):
        merge_state_dicts([good, bad, good])
    assert torch.equal(merge_state_dicts([bad, good], exclude=["w"])["w"], good["w"])
