"""Buffers that have no mean: singular vectors, which are found again, and what holds NaN at first."""

import json
from itertools import product

import pytest
import torch
from safetensors.torch import save_file
from slow_cases import mostly_slow
from torch import nn
from torch.nn.utils import parametrizations
from training_runs import Classifier, Probe, assert_same_bits, emissions, loader, mean_of, seed, train

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.cli.main import main

KINDS = {
    "hook": (nn.utils.spectral_norm, lambda layer: (layer.weight_orig, layer.weight_u, layer.weight_v)),
    "parametrization": (
        parametrizations.spectral_norm,
        lambda layer: (
            layer.parametrizations.weight.original,
            layer.parametrizations.weight[0]._u,
            layer.parametrizations.weight[0]._v,
        ),
    ),
}


class Bounded(Classifier):
    """Two layers with spectral norm, of which one has its outputs in the second dimension."""

    def __init__(self, norm, lr: float = 0.3) -> None:
        super().__init__(lr)
        convolution = norm(nn.ConvTranspose1d(2, 2, 2), dim=1)
        self.net = nn.Sequential(
            nn.Unflatten(1, (2, 4)), convolution, nn.Flatten(), nn.Tanh(), norm(nn.Linear(10, 4))
        )


def sigma_errors(kind: str, tensors) -> list[float]:
    """How much σ differs from the largest singular value in each layer, relative to it."""
    norm, parts = KINDS[kind]
    module, errors = Bounded(norm), []
    module.load_state_dict(tensors)
    for layer in (module.net[1], module.net[4]):
        weight, u, v = (tensor.detach().double() for tensor in parts(layer))
        matrix = (weight.movedim(1, 0) if weight.dim() == 3 else weight).flatten(1)
        errors.append(abs(float(u @ matrix @ v / torch.linalg.matrix_norm(matrix, 2)) - 1))
    return errors


def spectral_run(kind: str, folder, **options) -> Probe:
    seed()
    probe = Probe(every=4)
    merging = CheckpointMergeCallback(window=5, every_n_steps=4, dirpath=folder / "merges", **options)
    train(Bounded(KINDS[kind][0]), merging, probe, data=loader(), max_steps=40)
    return probe


WAYS = [{}, {"storage": "cpu", "method": "slerp"}, {"snapshot_codec": "delta-fp16"}]


@pytest.mark.parametrize(("options", "kind"), mostly_slow(product(WAYS, KINDS), daily=[0, 1, 2, 5]))
def test_spectral_norm_divides_a_merged_weight_by_its_own_norm(kind, options, tmp_path):
    probe = spectral_run(kind, tmp_path, **options)
    latest = tmp_path / "merges" / "latest"
    assert max(sigma_errors(kind, load_merge(latest))) < 1e-3
    record = json.loads((latest / "merge.json").read_text())
    assert len(record["recomputed"]) == 4
    assert not {*record["recomputed"]} & {*record["copied"]}
    # What the mean of the vectors would do, which was published before.
    assert max(sigma_errors(kind, mean_of([probe.weights[step] for step in (24, 28, 32, 36, 40)]))) > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_singular_vectors_are_the_newest_ones(kind, tmp_path):
    probe = spectral_run(kind, tmp_path, exclude=["*_u", "*_v"])
    merged = load_merge(tmp_path / "merges" / "latest")
    vectors = {name for name in merged if name.endswith(("_u", "_v"))}
    assert len(vectors) == 4
    for name in vectors:
        assert torch.equal(merged[name], probe.weights[40][name])


@pytest.mark.parametrize(
    ("arguments", "kind"), mostly_slow(product([[], ["--method", "ties"]], KINDS), daily=[0, 3])
)
def test_a_merge_of_files_finds_the_singular_vectors_of_its_weights(kind, arguments, tmp_path):
    probe = spectral_run(kind, tmp_path)
    for step in (24, 32, 40):
        save_file(probe.weights[step], tmp_path / f"step-{step}.safetensors")
    files = sorted(map(str, tmp_path.glob("step-*")))
    assert main(["merge", *files, *arguments, "--output", str(tmp_path / "m"), "--quiet"]) == 0
    assert max(sigma_errors(kind, load_merge(tmp_path / "m"))) < 1e-3
    record = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert len(record["recomputed"]) == 4


# Statistics that are not finite


class Thresholded(Classifier):
    """Has a threshold that the first validation sets."""

    def __init__(self, value: float = torch.nan) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.full((2,), value))
        self.register_buffer("mean", torch.zeros(()))

    def training_step(self, batch, batch_idx):
        self.mean += 1
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_):
        if self.global_step >= 5:  # after the callback's hook
            self.threshold.fill_(self.global_step)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{}, {"method": "ties"}], ids=["linear", "ties"])
def test_a_buffer_that_once_was_not_finite_is_the_newest_one(value, options, tmp_path):
    merging = CheckpointMergeCallback(
        window=3, every_n_steps=2, keep_last=None, dirpath=tmp_path / "merges", **options
    )
    train(Thresholded(value), merging, data=loader(), max_steps=12)
    merges = {int(path.name[5:13]): load_merge(path) for path in emissions(tmp_path / "merges")}
    assert torch.equal(merges[6]["threshold"], torch.full((2,), 5.0))
    assert merges[6]["mean"] != 6  # which has a mean
    if not options:
        assert torch.equal(merges[12]["threshold"], torch.full((2,), 9.0))  # of 7, 9 and 11


FILL = {"mask": torch.tensor([0.0, -torch.inf]), "threshold": torch.tensor(torch.nan)}


@pytest.mark.parametrize("arguments", [[], ["--method", "ties"], ["--method", "dare"]], ids=" ".join)
def test_what_is_not_finite_in_the_same_bits_everywhere_is_copied_in_files(arguments, tmp_path, capsys):
    for step in (1, 2, 3):
        save_file({"w": torch.full((4,), float(step)), **FILL}, tmp_path / f"step-{step}.safetensors")
    files = sorted(map(str, tmp_path.glob("step-*")))
    assert main(["merge", *files, *arguments, "--output", str(tmp_path / "m"), "--quiet"]) == 0
    merged = open_checkpoint(tmp_path / "m").tensors
    assert_same_bits(
        {n: merged[n].view(torch.int32) for n in FILL}, {n: t.view(torch.int32) for n, t in FILL.items()}
    )
    record = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert record["not_finite"] == record["copied"] == ["mask", "threshold"]
    assert "the same NaN or Inf in all checkpoints: mask, threshold" in capsys.readouterr().err


def test_other_values_that_are_not_finite_are_refused_in_files(tmp_path, capsys):
    for step, value in ((1, torch.nan), (2, 1.0)):
        save_file({"w": torch.full((4,), value)}, tmp_path / f"step-{step}.safetensors")
    files = sorted(map(str, tmp_path.glob("step-*")))
    assert main(["merge", *files, "--output", str(tmp_path / "m"), "--quiet"]) == 1
    assert "tensor 'w' of" in capsys.readouterr().err
