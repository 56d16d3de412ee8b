"""`merge-callback diversity` and `interference`: what they print, write and draw."""

import csv
import math
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from merge_callback.analysis.interference import interference, overlap, pair_mean, sign_conflict, variance
from merge_callback.analysis.pairwise import changes, consecutive, pairwise_distances
from merge_callback.cli import measures
from merge_callback.cli.main import main
from merge_callback.diversity.features import Call, features_of
from merge_callback.diversity.functional import cosine_distance, functional_distances

LAYERS = ("embed", "head", "layers.0", "layers.1")  # in the order of a safetensors file


@pytest.fixture
def run(tmp_path):
    """The states of a run's five checkpoints, and their paths."""
    generator = torch.Generator().manual_seed(0)
    state = {f"{layer}.w": torch.randn(8, 5, generator=generator) for layer in LAYERS}
    states, paths = [], []
    for i in range(1, 6):
        state = {n: t + 0.05 / i * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        states.append(state)
        paths.append(str(tmp_path / f"step={100 * i}.safetensors"))
        save_file(state, paths[-1])
    return states, paths


def section(text, title):
    """The lines of the table under a title."""
    _, _, rest = text.partition(title)
    return rest.split("\n\n")[0].splitlines()[1:]


def png_size(path):
    """Width and height in a PNG's header (ISO/IEC 15948, 11.2.2)."""
    start = path.read_bytes()[:24]
    assert start[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", start[16:24])


def test_the_matrix_is_printed_with_its_unit(run, capsys):
    states, paths = run
    assert main(["diversity", *paths]) == 0
    printed = capsys.readouterr().out
    matrix = pairwise_distances(states).model()
    assert 0.01 < float(matrix.max()) < 0.1
    lines = section(printed, "RMS distance in 1e-02, in the unit of the weights")
    assert lines[0].split() == ["[1]", "[2]", "[3]", "[4]"]
    for i, line in enumerate(lines[1:], start=1):
        label, *cells = line.split()
        assert label == f"[{i + 1}]"
        assert cells == [f"{100 * value:.3f}" for value in matrix[i, :i].tolist()]


def test_the_checkpoints_are_listed_with_their_steps(run, capsys):
    _, paths = run
    main(["diversity", *paths])
    lines = section(capsys.readouterr().out, "averaged over 4 tensors\n")
    assert [line.split() for line in lines[1:]] == [
        [f"[{i}]", str(100 * i), "-", path] for i, path in enumerate(paths, start=1)
    ]


def test_the_curves_are_of_neighbours_and_of_the_callbacks_lag(run, capsys):
    states, paths = run
    main(["diversity", *paths])
    matrix = pairwise_distances(states).model()
    near, far = consecutive(matrix, 1), consecutive(matrix, 2)
    lines = section(capsys.readouterr().out, "distance to an earlier checkpoint in 1e-02")
    assert lines[0].split() == ["1", "before", "change", "2", "before", "change"]
    assert lines[1].split() == ["[2]", f"{100 * near[0]:.3f}", "-"]
    assert lines[2].split() == [
        "[3]",
        f"{100 * near[1]:.3f}",
        f"{changes(near)[1]:+.1f}",
        f"{100 * far[0]:.3f}",
        "-",
    ]
    assert lines[4].split()[-2:] == [f"{100 * far[2]:.3f}", f"{changes(far)[2]:+.1f}"]


def test_ten_checkpoints_fit_a_screen_of_100_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        save_file({"model.layers.0.w": torch.full((3,), 1e-7 * 3**i)}, f"step={i}.safetensors")
    main(["diversity", *(f"step={i}.safetensors" for i in range(10)), "--by-layer"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "model.layers.0" in printed


def test_two_checkpoints_are_neighbours_only(run, capsys):
    _, paths = run
    assert main(["diversity", *paths[:2]]) == 0
    printed = capsys.readouterr().out
    assert "1 before" in printed
    assert "2 before" not in printed


def test_equal_checkpoints_print_zeros(tmp_path, capsys):
    paths = [str(tmp_path / f"step={i}.safetensors") for i in range(3)]
    for path in paths:
        save_file({"w": torch.ones(3)}, path)
    assert main(["diversity", *paths]) == 0
    lines = section(capsys.readouterr().out, "RMS distance in 1e+00")
    assert [line.split()[1:] for line in lines[1:]] == [["0.000"], ["0.000", "0.000"]]


def test_every_layer_has_a_line(run, capsys):
    states, paths = run
    main(["diversity", *paths, "--by-layer", "--lag", "3"])
    lines = section(capsys.readouterr().out, "distance to the checkpoint 3 before in 1e-02")
    assert lines[0].split() == ["[4]", "[5]", "change"]
    for line, (layer, matrix) in zip(lines[1:], pairwise_distances(states).by_layer().items(), strict=True):
        curve = consecutive(matrix, 3)
        assert line.split() == [layer, *(f"{100 * v:.3f}" for v in curve), f"{changes(curve)[-1]:+.1f}"]


def test_the_csv_holds_every_pair_exactly(run, tmp_path):
    states, paths = run
    main(["diversity", *paths, "--by-layer", "--csv", str(tmp_path / "d.csv")])
    with open(tmp_path / "d.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = pairwise_distances(states)
    groups = {"whole model": found.model(), **found.by_layer()}
    assert len(rows) == len(groups) * 10
    for row in rows:
        i, j = paths.index(row["first"]), paths.index(row["second"])
        assert int(row["lag"]) == j - i > 0
        assert (row["first_step"], row["second_step"]) == (str(100 * (i + 1)), str(100 * (j + 1)))
        assert row["first_tokens"] == ""
        matrix = groups[row["group"]]
        assert float(row["rms"]) == matrix[i, j].item()
        assert float(row["change_percent"]) == changes(consecutive(matrix, j - i))[i]


def test_without_by_layer_the_csv_holds_the_model_alone(run, tmp_path):
    main(["diversity", *run[1], "--csv", str(tmp_path / "d.csv")])
    with open(tmp_path / "d.csv", newline="") as file:
        assert {row["group"] for row in csv.DictReader(file)} == {"whole model"}


def test_the_plot_is_a_png_of_its_stated_size(run, tmp_path):
    main(["diversity", *run[1], "--plot", str(tmp_path / "d.png")])
    assert png_size(tmp_path / "d.png") == (1650, 720)
    main(["diversity", *run[1], "--plot", str(tmp_path / "layers.png"), "--by-layer"])
    assert png_size(tmp_path / "layers.png") == (1650, 1380)


def test_a_missing_matplotlib_is_told_in_one_line_before_any_work(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measures, "find_spec", lambda name: None)
    assert main(["diversity", *run[1], "--plot", str(tmp_path / "d.png")]) == 1
    told = capsys.readouterr()
    assert told.err == "--plot: matplotlib is missing: pip install 'merge-callback[demo]'\n"
    assert told.out == ""


def test_last_and_every_choose_among_the_checkpoints(run, capsys):
    _, paths = run
    main(["diversity", *paths, "--last", "2", "--every", "2"])
    lines = section(capsys.readouterr().out, "averaged over 4 tensors\n")
    assert [line.split()[-1] for line in lines[1:]] == [paths[2], paths[4]]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lag", "5"], "--lag 5 must lie in 1 … 4: there are 5 checkpoints"),
        (["--lag", "0"], "--lag 0 must lie in 1 … 4"),
        (["--last", "1"], "distances need at least two checkpoints, got 1"),
    ],
)
def test_a_wrong_lag_or_a_single_checkpoint_is_told(run, capsys, arguments, told):
    assert main(["diversity", *run[1], *arguments]) == 1
    assert told in capsys.readouterr().err


def test_a_tensor_in_one_checkpoint_only_is_told_with_the_files(run, tmp_path, capsys):
    states, paths = run
    other = str(tmp_path / "other.safetensors")
    save_file({**states[0], "extra.w": torch.zeros(1)}, other)
    for command in ("diversity", "interference"):
        assert main([command, *paths[:2], other]) == 1
        assert f"'extra.w' is in {other} but not in {paths[0]}" in capsys.readouterr().err


def numbers(line, start):
    assert line.startswith(start)
    return line.removeprefix(start).split()


def test_the_four_measures_are_printed(run, capsys):
    states, paths = run
    assert main(["interference", *paths, "--top", "30"]) == 0
    printed = capsys.readouterr().out
    counts = interference(states[1:], states[0], 30)
    assert f"task vectors from {paths[0]}, the 30 % of largest magnitude of each tensor" in printed
    *_, conflict, shared, ratio, spread = printed.splitlines()
    matrix = sign_conflict(counts)
    mean, least, *_, by_chance = numbers(conflict, "sign conflict (%)")
    assert mean == f"{pair_mean(matrix):.2f}"
    assert least == f"{float(matrix[~torch.eye(4, dtype=torch.bool)].min()):.2f}"
    assert by_chance == f"{100 * 0.3 / (4 - 2 * 0.3):.2f}"
    matrix = overlap(counts).fill_diagonal_(-1)
    most = int(matrix.argmax())
    _, _, _, highest, *pair, by_chance = numbers(shared.replace(", ", ","), "overlap (%)")
    assert (highest, pair) == (f"{float(matrix.max()):.2f}", [f"[{most // 4 + 1},{most % 4 + 1}]"])
    assert by_chance == "30.00"
    assert float(numbers(ratio, "magnitude ratio")[0]) > 1
    assert numbers(spread, "variance")[0] == f"{variance(counts):.3e}"


def test_a_base_of_its_own_leaves_every_checkpoint_a_task_vector(run, capsys):
    states, paths = run
    main(["interference", *paths[1:], "--base", paths[0]])
    with_base = capsys.readouterr().out
    main(["interference", *paths])
    assert capsys.readouterr().out == with_base
    main(["interference", str(Path(paths[0]).parent), "--base", paths[0]])  # a run's folder, the base in it
    assert capsys.readouterr().out == with_base
    main(["interference", *paths[1:], "--base", paths[0], "--scope", "global"])
    mean = pair_mean(overlap(interference(states[1:], states[0], scope="global")))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("overlap (%)"))
    assert numbers(line, "overlap (%)")[0] == f"{mean:.2f}"


def copy_of(path):
    return str(shutil.copy(path, Path(path).with_name("copy.safetensors")))


@pytest.mark.parametrize(
    ("choose", "told"),
    [
        (lambda paths: paths[:2], "at least two checkpoints besides the base"),
        (lambda paths: [*paths, "--base", copy_of(paths[2])], "step=300.safetensors equals the base"),
        (lambda paths: [*paths, "--top", "0"], "top=0 must be a percentage"),
    ],
)
def test_what_gives_no_interference_is_told(run, capsys, choose, told):
    assert main(["interference", *choose(run[1])]) == 1
    assert told in capsys.readouterr().err


# Functional diversity

PROBE = """
import torch
from torch import nn


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids):
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def build():
    return Language(), {"input_ids": torch.arange(8).view(2, 4)}


def wrong():
    return Language()


def refused():
    return Language(), torch.zeros(2, 4)
"""


@pytest.fixture
def probed(tmp_path, monkeypatch):
    """Checkpoints of a LightningModule that holds the probe's model; its module; its features in each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_probe", raising=False)
    Path("my_probe.py").write_text(PROBE)
    namespace = {}
    exec(PROBE, namespace)
    torch.manual_seed(0)
    model, batch = namespace["build"]()
    paths, found = [], []
    for step in (100, 200, 300, 400):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        state = {f"model.{name}": tensor.clone() for name, tensor in model.named_parameters()}
        paths.append(f"step={step}.safetensors")
        save_file(state, paths[-1])
        layers = {name: model.get_submodule(name) for name in ("blocks.0", "blocks.1")}
        found.append(features_of(model, Call.of(model, batch), layers))
    return paths, found


def test_functional_distances_are_printed_written_and_drawn(probed, capsys):
    paths, found = probed
    arguments = ["--probe", "my_probe:build", "--csv", "pairs.csv", "--plot", "plot.png"]
    assert main(["diversity", *paths, *arguments]) == 0
    printed = capsys.readouterr().out
    pairs = [(functional_distances(found[j], found[i]), j, i) for i in range(4) for j in range(i)]
    with open("pairs.csv") as file:
        rows = {(row["first"], row["second"]): row for row in csv.DictReader(file)}
    for right, older, newer in pairs:
        row = rows[paths[older], paths[newer]]
        assert {name: float(row[name]) for name in right} == pytest.approx(right, rel=1e-6)
    for title in ("cosine distance of the logits", "cosine distance of the activations"):
        assert f"{title} in 1e-0" in printed
    lines = section(printed, "KL divergence of the probabilities in 1e-0")
    assert len(lines) == 1 + 3
    width, height = png_size(Path("plot.png"))
    assert (width, height) == (1650, 1380)


def test_layers_of_the_probe_can_be_named(probed, capsys):
    paths, found = probed
    assert main(["diversity", *paths[:2], "--probe", "my_probe:build", "--probe-layers", "blocks.0"]) == 0
    right = cosine_distance(found[1].activations["blocks.0"], found[0].activations["blocks.0"])
    lines = section(capsys.readouterr().out, "cosine distance of the activations")
    assert float(lines[1].split()[1]) == pytest.approx(right / 10 ** math.floor(math.log10(right)), abs=5e-4)


def test_a_probe_whose_module_is_missing_is_refused(probed, capsys):
    assert main(["diversity", *probed[0], "--probe", "no_probe:build"]) == 1
    assert capsys.readouterr().err == "merge-callback: --probe no_probe:build: No module named 'no_probe'\n"


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("my_probe", "name a function as MODULE:FUNCTION, e.g. my_probe:build"),
        ("my_probe:built", "the module has no function 'built'"),
        ("my_probe:wrong", "must return (model, batch), not a Language"),
        ("my_probe:refused", "RuntimeError"),
    ],
)
def test_a_probe_that_can_not_be_used_is_refused(probed, probe, reason, capsys):
    assert main(["diversity", *probed[0], "--probe", probe]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"merge-callback: --probe {probe}: ")
    assert reason in told


def test_a_checkpoint_of_another_model_is_refused(probed, capsys):
    paths, _ = probed
    for path in paths:
        save_file({"model.tokens.weight": torch.zeros(11, 6)}, path)
    assert main(["diversity", *paths, "--probe", "my_probe:build"]) == 1
    assert "has no tensor 'model.blocks.0.weight' of the probe's Language" in capsys.readouterr().err
    save_file({"model.tokens.weight": torch.zeros(12, 6)}, paths[-1])
    assert main(["diversity", paths[-1], paths[-1], "--probe", "my_probe:build"]) == 1
