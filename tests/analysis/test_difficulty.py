"""EL2N, bins, what a merge forgets, and the measures of memorisation, against values worked out by hand."""

import math

import pytest
import torch
from safetensors.torch import save_file

from merge_callback.analysis.difficulty import by_bin, difficulty_bins, el2n, forgotten, memorisation
from merge_callback.analysis.difficulty_file import read_examples, save_examples
from merge_callback.analysis.el2n import El2n


def logits(*probabilities):
    return torch.tensor(probabilities).log()


def test_el2n_is_the_distance_from_the_label():
    found = el2n(logits([0.5, 0.3, 0.2], [1e-9, 1.0, 1e-9], [1e-9, 1.0, 1e-9]), torch.tensor([0, 1, 0]))
    expected = [math.sqrt(0.25 + 0.09 + 0.04), 0.0, math.sqrt(2)]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_bins_are_equal_and_the_first_is_the_easiest():
    scores = torch.tensor([0.9, 0.1, 0.5, 0.2, 0.5, 0.0])
    assert difficulty_bins(scores, 3).tolist() == [3, 1, 2, 2, 3, 1]  # of equal scores the first is easier
    sizes = torch.bincount(difficulty_bins(torch.rand(104)))[1:]
    assert (len(sizes), sizes.min(), sizes.max(), sizes.sum()) == (10, 10, 11, 104)
    for wrong in (torch.rand(9), torch.full((20,), math.nan)):
        with pytest.raises(ValueError, match="10 bins need"):
            difficulty_bins(wrong)


def test_what_was_right_and_is_wrong_after_the_merge_is_forgotten():
    labels = torch.tensor([0, 0, 0, 0])
    right, wrong = [0.8, 0.2], [0.2, 0.8]
    lost = forgotten(logits(right, right, wrong, wrong), logits(right, wrong, right, wrong), labels)
    assert lost.tolist() == [False, True, False, False]
    assert by_bin(lost, torch.tensor([1, 2, 2, 1])).tolist() == [0.0, 0.5]


def test_memorisation_is_measured_in_margin_loss_and_shift():
    found = memorisation(logits([0.3, 0.5, 0.2]), logits([0.7, 0.1, 0.2]), torch.tensor([0]))
    assert found.margin.item() == pytest.approx(0.5 - -0.2, abs=1e-6)
    assert found.loss.item() == pytest.approx(math.log(0.7 / 0.3), abs=1e-6)
    assert found.shift.item() == pytest.approx(0.8, abs=1e-6)


def test_scores_are_means_over_seeds_of_examples_known_by_their_ids():
    torch.manual_seed(0)
    first, second, labels = torch.randn(6, 3), torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    ids = torch.tensor([50, 10, 40, 20, 30, 60])
    metric = El2n()
    for seed, found in enumerate((first, second)):
        for part in (slice(0, 4), slice(4, 6)):
            metric.update(found[part], labels[part], ids[part], seed)
    metric.update(first[:2], labels[:2], ids[:2], 0)  # again, as a padded sampler of another rank
    seen, scores = metric.compute()
    assert seen.tolist() == [10, 20, 30, 40, 50, 60]
    expected = (el2n(first, labels) + el2n(second, labels))[ids.argsort()] / 2
    torch.testing.assert_close(scores, expected)


def test_the_ranks_of_a_distributed_run_add_up():
    torch.manual_seed(0)
    logits_of, labels, ids = torch.randn(7, 3), torch.arange(7) % 3, torch.arange(7)
    other = El2n()
    states = iter(["ids", "seeds", "scores"])

    def gather(own, group=None):
        return [own, getattr(other, next(states))[0]]

    one = El2n(dist_sync_fn=gather, distributed_available_fn=lambda: True)
    one.update(logits_of[::2], labels[::2], ids[::2])
    other.update(logits_of[1::2], labels[1::2], ids[1::2])
    seen, scores = one.compute()
    assert torch.equal(seen, ids)
    torch.testing.assert_close(scores, el2n(logits_of, labels))


def scored(count=12):
    """What the metric found over two seeds; ids, labels and logits in the order in which they were seen."""
    torch.manual_seed(0)
    ids, labels = torch.randperm(count) * 10, torch.randint(3, (count,))
    seeds = torch.randn(2, count, 3)
    metric = El2n()
    for seed, found in enumerate(seeds):
        metric.update(found, labels, ids, seed)
    return metric.compute(), ids, labels, seeds


def test_a_file_brings_what_models_said_into_the_order_of_the_scores(tmp_path):
    scores, ids, labels, _ = scored()
    more = torch.cat([ids, torch.tensor([7])])  # an example that has no score
    rows = {name: torch.randn(13, 3) for name in ("expert", "merged", "early")}
    for _ in range(2):  # the second file replaces the first
        save_examples(tmp_path / "law.safetensors", scores, more, torch.cat([labels, labels[:1]]), **rows)
    found = read_examples(tmp_path / "law.safetensors")
    order = ids.argsort()
    assert torch.equal(found.ids, ids[order])
    assert torch.equal(found.scores, scores.scores)
    assert torch.equal(found.labels, labels[order])
    assert all(torch.equal(found.logits[name], logits[:12][order]) for name, logits in rows.items())
    measures = found.by_example()
    expert, merged, early = (logits[:12][order] for logits in rows.values())
    assert torch.equal(measures["forgotten"], forgotten(expert, merged, labels[order]))
    assert torch.equal(measures["shift"], memorisation(early, expert, labels[order]).shift)
    bins = difficulty_bins(scores.scores)
    assert torch.equal(found.by_bin()["el2n"], by_bin(scores.scores, bins))


def test_scores_are_computed_from_the_logits_of_seeds(tmp_path):
    scores, ids, labels, seeds = scored()
    save_file({"seeds": seeds, "labels": labels, "ids": ids}, tmp_path / "law.safetensors")
    found = read_examples(tmp_path / "law.safetensors")
    torch.testing.assert_close(found.scores[ids.argsort()], scores.scores)
    assert [*found.by_example()] == ["el2n"]


@pytest.mark.parametrize(
    ("ids", "changes", "message"),
    [
        (lambda ids: ids[:-1], {}, "an example that has a score has no row"),
        (lambda ids: ids[:0], {}, "an example that has a score has no row"),
        (lambda ids: torch.cat([ids, ids[3:4]]), {}, "occurs twice"),
        (lambda ids: ids, {"expert": torch.zeros(9, 3)}, "expert: has 9 rows, and there are 12 ids"),
        (lambda ids: ids, {"expert": torch.zeros(12, 2)}, "labels: must lie in 0 … 1, by the 2 classes of"),
        (lambda ids: ids, {"early": torch.full((12, 3), math.nan)}, "early: holds NaN or Inf"),
    ],
)
def test_what_does_not_belong_together_is_not_written(ids, changes, message, tmp_path):
    scores, own, labels, _ = scored()
    labels[0] = 2
    with pytest.raises(ValueError, match=message):
        save_examples(tmp_path / "law.safetensors", scores, ids(own), labels, **changes)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no scores, nor seeds and labels"),
        ({"seeds": torch.zeros(2, 12, 3)}, "holds no scores, nor seeds and labels"),
        ({"scores": torch.zeros(12), "merge": torch.zeros(12, 3)}, "'merge' is not one of scores"),
        ({"scores": torch.zeros(12), "expert": torch.zeros(12, 3)}, "holds expert, but no labels"),
        ({"scores": torch.zeros(9)}, "10 bins need at least as many scores"),
        ({"scores": torch.zeros(12, 1)}, r"scores: is \[12, 1\], expected \[12\]"),
        ({"scores": torch.zeros(12), "ids": torch.zeros(12)}, "ids: is torch.float32, expected int64"),
        (
            {"labels": torch.tensor(3), "seeds": torch.zeros(2, 12, 3)},
            r"labels: is \[\], expected \[1\]|seeds: is \[2, 12, 3\], expected \[any, 1, any\]",
        ),
    ],
    ids=range(8),
)
def test_a_file_of_something_else_is_refused_by_its_name(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "law.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        read_examples(tmp_path / "law.safetensors")
    assert str(error.value).startswith(str(tmp_path))
