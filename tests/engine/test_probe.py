"""Functional diversity of runs: what is measured, that it disturbs nothing, and what a resumed run does."""

import logging
from types import SimpleNamespace

import pytest
import torch
from evaluation_runs import Case, Curves, fit, merging
from tiny_run import SaveAt, StopError
from tiny_run import fit as resumable_fit
from torch import nn
from torchmetrics import MeanMetric
from training_runs import Classifier, assert_same_bits, loader, one_thread, rows, seed, train, weights_of

from merge_callback import CheckpointMerger, ProbeOptions
from merge_callback.diversity.features import Call, features_of, layers_of
from merge_callback.diversity.functional import functional_distances

NAMES = ("logits", "probabilities", "activations")
LAG = 2


class Restless(Classifier):
    """Its forward pass draws, counts, logs, fills a metric and writes to buffers, in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4))
        self.calls, self.mean = 0, MeanMetric()
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.mean.update(x.mean())
        self.total += 1
        self.replaced = self.replaced + 1
        if self.trainer.training:
            self.log("seen", self.total)
        noise = 0.01 * torch.randn(()) * self.total
        return self.net(x * (1 + noise)) + 0.01 * self.calls


def distances(curves: Curves) -> dict[str, dict[int, float]]:
    return {name: curves.of(f"merge/diversity_{name}") for name in NAMES}


def features(module, batch):
    module.eval()
    layers = layers_of(dict(module.named_modules()))
    return features_of(module, Call.of(module, batch), layers)


def expected(make, weights, batch):
    """The distances by the definition, from the weights of every second step."""
    module, found = make(), {}
    for step in weights:
        module.load_state_dict(weights[step])
        found[step] = features(module, batch)
    steps = sorted(found)
    return {
        newer: functional_distances(found[older], found[newer])
        for older, newer in zip(steps, steps[LAG:], strict=False)
    }


class Compiled(Classifier):
    """Its net is compiled, so hooks on the parts are not called unless it runs eagerly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


@pytest.mark.parametrize("make", [Classifier, Restless, pytest.param(Compiled, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sanity", [0, 1])
def test_training_is_bit_for_bit_what_it_is_without(make, sanity, tmp_path):
    options = {"val_check_interval": 3, "num_sanity_val_steps": sanity}
    with_probe = fit(Case(make), merging(tmp_path / "with", probe=True), **options)
    random = torch.get_rng_state()
    without = fit(Case(make), **options)
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_bits(weights_of(with_probe.module), weights_of(without.module))
    assert_same_bits(with_probe.probe.outputs, without.probe.outputs)
    assert with_probe.curves.live() == without.curves.live()
    if make is Restless:
        assert with_probe.module.calls == without.module.calls
        assert torch.equal(with_probe.module.mean.compute(), without.module.mean.compute())
    assert all(len(found) > 2 for found in distances(with_probe.curves).values())


def test_what_is_logged_is_the_distance_of_the_snapshots(tmp_path):
    run = fit(Case(), merging(tmp_path, probe=True), num_sanity_val_steps=1)
    batch = rows(32)[:8]
    found, right = distances(run.curves), expected(Classifier, run.probe.weights, batch)
    for name in NAMES:
        assert found[name].keys() == {step - 1 for step in right}
        for step, values in right.items():
            assert found[name][step - 1] == pytest.approx(values[name], rel=1e-6, abs=1e-12)
            assert found[name][step - 1] == float(found[name][step - 1]) > 0
    assert run.metrics.seen[16]["merge/diversity_logits"] == pytest.approx(found["logits"][15], rel=1e-6)


def test_without_a_sanity_check_it_begins_after_the_first_validation(tmp_path):
    run = fit(Case(), merging(tmp_path, probe=True))  # validates after 8 and 16 steps
    assert [*distances(run.curves)["logits"]] == [13, 15]


@pytest.mark.parametrize(
    "probe",
    [
        rows(32)[:8],
        lambda: (torch.randn(3), rows(32)[:8])[1],
        ProbeOptions(rows(32)[:8][0], layers=("net.0", "net.2")),
    ],
    ids=["batch", "function", "options"],
)
def test_a_batch_may_be_given(probe, tmp_path):
    run = fit(Case(), merging(tmp_path, probe=probe))
    found, right = distances(run.curves), expected(Classifier, run.probe.weights, rows(32)[:8])
    assert found["activations"] == pytest.approx(
        {step - 1: values["activations"] for step, values in right.items()}, rel=1e-6
    )
    assert_same_bits(weights_of(run.module), weights_of(fit(Case()).module))


class Formless(Classifier):
    """Has no forward of its own: its steps call a part."""

    forward = Classifier.__mro__[1].forward

    def loss(self, batch):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_a_module_without_forward_has_its_largest_part_called(tmp_path):
    run = fit(Case(Formless), merging(tmp_path, probe=rows(32)[:8]))
    plain = fit(Case(), merging(tmp_path / "plain", probe=rows(32)[:8]))
    assert distances(run.curves) == distances(plain.curves)
    assert distances(run.curves)["logits"]


def test_a_batch_that_forward_does_not_take_is_told_of_once(tmp_path, caplog, recwarn):
    with caplog.at_level(logging.WARNING):
        run = fit(Case(), merging(tmp_path, probe={"image": torch.zeros(2, 8)}))
    told = [str(w.message) for w in recwarn] + [record.getMessage() for record in caplog.records]
    told = {line for line in told if "functional diversity is not measured" in line}
    assert len(told) == 1
    assert "a batch that Classifier.forward takes" in told.pop()
    assert not distances(run.curves)["logits"]
    assert_same_bits(weights_of(run.module), weights_of(fit(Case()).module))


@pytest.mark.parametrize("probe", ["train", 3, b"batch"])
def test_what_is_no_batch_is_refused(probe, tmp_path):
    with pytest.raises(ValueError, match=r"probe=.* must be 'validation', a batch, or a function"):
        merging(tmp_path, probe=probe)


def test_a_pattern_that_matches_nothing_is_refused_when_fit_begins(tmp_path):
    callback = merging(tmp_path, probe=ProbeOptions(rows(8)[:8], layers="nett.*"))
    with pytest.raises(ValueError, match=r"'nett\.\*' matches no module"):
        train(Classifier(), callback, data=loader())


# Resumes

PROBE = {"input_ids": torch.arange(24).view(4, 6) % 16}


def readable(tiny):
    """`tiny_run.Tiny`, with a forward pass."""

    class Readable(tiny):
        def forward(self, input_ids):
            hidden = self.norm(self.embed(input_ids).flatten(0, 1)).view(*input_ids.shape, -1)
            return self.head(hidden)

    return Readable


def test_a_resumed_run_measures_the_same(tmp_path):
    from run_outcomes import metrics
    from tiny_run import Tiny

    module, options = readable(Tiny), {"probe": PROBE, "durable": True}
    resumable_fit(tmp_path / "whole", module=module, **options)
    save = SaveAt(tmp_path / "after.ckpt", 13, stop=15)
    with pytest.raises(StopError):
        resumable_fit(tmp_path / "stopped", module=module, callbacks=[save], **options)
    options["probe"] = {"input_ids": PROBE["input_ids"] + 1}  # the one before goes on
    resumable_fit(tmp_path / "stopped", ckpt_path=tmp_path / "after.ckpt", module=module, **options)
    whole, resumed = metrics(tmp_path / "whole"), metrics(tmp_path / "stopped")
    assert resumed == whole
    assert "merge/diversity_logits" in str(whole)


# Plain loops


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 4))

    def forward(self, x):
        return self.net(x)


def loop(folder, **options):
    seed()
    model, logged = Normed(), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options = {
        "every_n_steps": 2,
        "window": 3,
        "log": lambda m, s: logged.setdefault(s, {}).update(m),
        **options,
    }
    with one_thread(), CheckpointMerger(model, optimizer, dirpath=folder, **options) as merger:
        for x, y in loader(96):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            merger.step(loss=loss)
    return SimpleNamespace(
        weights=weights_of(model), random=torch.get_rng_state(), logged=logged, model=model
    )


def test_a_plain_loop_is_bit_for_bit_what_it_is_without(tmp_path):
    with_probe, without = loop(tmp_path / "with", probe=rows(8)[:8]), loop(tmp_path / "without")
    assert_same_bits(with_probe.weights, without.weights)
    assert torch.equal(with_probe.random, without.random)
    assert with_probe.model.training
    assert all(f"merge/diversity_{name}" in with_probe.logged[12] for name in NAMES)
    assert "merge/diversity_logits" not in without.logged[12]


def test_a_plain_loop_does_not_know_its_validation(tmp_path):
    with pytest.raises(ValueError, match="probe=True: the loop's validation is its own; pass a batch"):
        loop(tmp_path, probe=True)
