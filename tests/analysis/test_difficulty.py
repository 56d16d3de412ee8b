"""EL2N, bins, what a merge forgets, and the measures of memorisation, against values worked out by hand."""

import math

import pytest
import torch

from merge_callback.analysis.difficulty import by_bin, difficulty_bins, el2n, forgotten, memorisation
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
