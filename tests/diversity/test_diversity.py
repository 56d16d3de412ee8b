"""RMS diversity: the definition, the metric, and its bookkeeping."""

import pytest
import torch

from merge_callback import RMSDiversity
from merge_callback.diversity import rms_diversity, squared_distances


def pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    a = {"w": torch.randn(30, 40, generator=generator), "b": torch.randn(7, generator=generator)}
    return a, {name: t + 0.01 * torch.randn(t.shape, generator=generator) for name, t in a.items()}


def by_definition(a, b):
    """Mean over tensors of √(mean squared difference): "Practical Guidelines", App. C.2, eq. 4 and 5."""
    return torch.stack([(a[n].double() - b[n].double()).square().mean().sqrt() for n in a]).mean().item()


def metric_for(tensors):
    return RMSDiversity({name: t.numel() for name, t in tensors.items()})


def test_it_is_the_papers_definition():
    a, b = pair()
    # fp32 differences of values near 1 carry an error of 2^-24 against a distance of 0.01: 1e-5 relative.
    assert rms_diversity(a, b) == pytest.approx(by_definition(a, b), rel=1e-5)


def test_the_model_value_is_the_mean_over_tensors_not_over_elements():
    a = {"large": torch.zeros(1000), "small": torch.zeros(2)}
    b = {"large": torch.zeros(1000), "small": torch.ones(2)}
    assert rms_diversity(a, b) == 0.5


def test_each_tensor_has_its_own_value():
    a, b = (
        {"x": torch.zeros(4), "y": torch.zeros(9)},
        {"x": torch.full((4,), 3.0), "y": torch.full((9,), 5.0)},
    )
    metric = metric_for(a)
    metric.update(squared_distances(a, b))
    assert metric.per_tensor() == {"x": 3.0, "y": 5.0}


def test_change_is_measured_from_the_first_value_across_resets():
    a, metric = {"w": torch.zeros(4)}, RMSDiversity({"w": 4})
    changes = []
    for distance in (2.0, 1.0, 3.0):
        metric.reset()
        metric.update(squared_distances(a, {"w": torch.full((4,), distance)}))
        metric.compute()
        changes.append(metric.change())
    assert changes == [0.0, -50.0, 50.0]


def test_shards_of_a_pair_add_up():
    a, b = pair()
    whole = metric_for(a)
    whole.update(squared_distances(a, b))
    # What two ranks hold: half of every tensor each. torchmetrics sums their states.
    ranks = []
    for half in (0, 1):
        mine, other = ({n: t.flatten().tensor_split(2)[half] for n, t in d.items()} for d in (a, b))
        ranks.append(metric_for(mine))
        ranks[-1].update(squared_distances(mine, other))
    ranks[0].squares += ranks[1].squares
    ranks[0].numel += ranks[1].numel
    # The same squares, summed in fp32 in another order.
    assert ranks[0].compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)


def test_integers_do_not_count():
    a = {"w": torch.zeros(3), "steps": torch.tensor(1)}
    assert squared_distances(a, {"w": torch.ones(3), "steps": torch.tensor(9)}) == {"w": 3.0}


def test_names_or_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="'b'"):
        squared_distances({"a": torch.zeros(1)}, {"a": torch.zeros(1), "b": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"'a'.*\(1,\).*\(2,\)"):
        squared_distances({"a": torch.zeros(1)}, {"a": torch.zeros(2)})
