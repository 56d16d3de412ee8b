"""The demo: its text, its model, its data that resumes exactly, and the command that runs it."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from checkpoint_files import ROOT
from distributed_runs import fit, run_ranks
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from training_runs import QUIET, seed

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.cli import main as command_line
from merge_callback.cli.main import main
from merge_callback.demo import (
    GPT,
    DemoData,
    DemoModule,
    GPTConfig,
    TokenKindModule,
    WSDSchedule,
    load_corpus,
    wsd_factor,
)
from merge_callback.demo.crops import RandomCrops
from merge_callback.demo.expert import KINDS, token_kinds
from merge_callback.demo.experts import BIAS_STEP, Experts
from merge_callback.demo.record import Row, format_table
from merge_callback.demo.run import DemoPlan, run_demo
from merge_callback.demo.text import SKIPPED_FOLDERS, split_files

CONFIGS = ROOT / "example_configs"
DENSE, MOE = GPTConfig(), GPTConfig(experts=4)
EXPERT = {"width": 8, "hidden": 16, "experts": 4, "experts_per_token": 2}


# Text


def write_sources(root: Path, names: list[str], size: int = 20_000) -> Path:
    """Writes files that each consist of their own name, over and over."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text((name + "\n") * (size // len(name)))
    return root


def test_text_does_not_depend_on_the_order_of_the_folder(tmp_path):
    names = [f"package{i % 3}/module{i}.py" for i in range(200)]
    first = load_corpus(root=write_sources(tmp_path / "a", names))
    second = load_corpus(root=write_sources(tmp_path / "b", names[::-1]))
    assert torch.equal(first.train, second.train)
    assert torch.equal(first.validation, second.validation)


def test_every_file_is_in_one_half_only(tmp_path):
    names = [f"module_{i:03}.py" for i in range(200)]
    corpus = load_corpus(root=write_sources(tmp_path, names))
    halves = [bytes(part.tolist()).decode().splitlines() for part in corpus]
    train, validation = (set(lines) & set(names) for lines in halves)
    assert train | validation == set(names)
    assert not train & validation


def test_text_is_the_library_s_own_and_capped():
    root = Path(json.__file__).parent.parent
    folders = {part for path, _ in split_files(root) for part in path.relative_to(root).parts[:-1]}
    assert folders
    assert not folders & SKIPPED_FOLDERS
    corpus = load_corpus(max_bytes=3_000_000)
    assert 3_000_000 <= sum(map(len, corpus)) < 4_000_000


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"found 0 bytes .* ships its standard library"):
        load_corpus(root=tmp_path)


# Model


def test_default_model_is_the_pilot_s_size():
    assert sum(p.numel() for p in GPT().parameters()) == 123_328


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_future_bytes_do_not_change_earlier_logits(config):
    torch.manual_seed(0)
    gpt = GPT(config).eval()
    seen = torch.randint(256, (2, 64))
    changed = seen.clone()
    changed[:, 40:] = torch.randint(256, (2, 24))
    before, after = gpt(seen), gpt(changed)
    # Not bitwise: experts see other numbers of tokens, so their matrix products are blocked differently.
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 40:], after[:, 40:], atol=1e-2)


def test_flags_add_and_remove_parameters():
    names = {name for name, _ in GPT(DENSE).named_parameters()}
    assert "head.weight" not in names
    assert "head.weight" in dict(GPT(GPTConfig(tied_head=False)).named_parameters())
    plain = {name for name, _ in GPT(GPTConfig(qk_norm=False)).named_parameters()}
    assert names - plain == {
        f"blocks.{i}.attention.{part}_norm.weight" for i in range(2) for part in ("query", "key")
    }


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"heads": 3}, "heads=3 must divide width=64"),
        ({"experts": 2, "experts_per_token": 3}, "=3 must lie in"),
    ],
)
def test_impossible_shapes_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**shape)


def test_each_token_goes_to_its_top_k_experts():
    torch.manual_seed(0)
    layer, tokens = Experts(**EXPERT), torch.randn(50, 8)
    chosen, weights = layer.route(tokens)
    scores = layer.router(tokens).sigmoid()
    assert torch.equal(chosen.sort(-1).values, scores.topk(2).indices.sort(-1).values)
    torch.testing.assert_close(weights.sum(-1), torch.ones(50))
    by_hand = torch.stack(
        [
            sum(w * layer.experts[e](token) for e, w in zip(es.tolist(), ws, strict=True))
            for token, es, ws in zip(tokens, chosen, weights, strict=True)
        ]
    )
    torch.testing.assert_close(layer(tokens), by_hand)


def test_router_bias_steers_the_choice_but_not_the_weights():
    torch.manual_seed(0)
    layer, tokens = Experts(**EXPERT), torch.randn(50, 8)
    layer.router_bias[3] = 10.0
    chosen, weights = layer.route(tokens)
    assert (chosen == 3).any(-1).all()
    scores = layer.router(tokens).sigmoid().gather(-1, chosen)
    torch.testing.assert_close(weights, scores / scores.sum(-1, keepdim=True))


def test_balancing_lowers_the_bias_of_overloaded_experts():
    torch.manual_seed(0)
    layer = Experts(**EXPERT)
    layer.router_bias[0] = 10.0
    layer(torch.randn(5, 20, 8))
    before, load = layer.router_bias.clone(), layer.load.clone()
    assert load.sum() == 200
    assert load[0] == 100
    layer.balance()
    assert (layer.router_bias - before)[0].item() == pytest.approx(-BIAS_STEP, rel=1e-3)  # fp32 beside 10
    assert not layer.load.any()


def test_evaluation_leaves_the_loads_alone():
    layer = Experts(**EXPERT).eval()
    layer(torch.randn(10, 8))
    assert not layer.load.any()


# Schedule


def test_schedule_rises_holds_and_decays():
    factors = [wsd_factor(step, warmup=4, stable=3, decay=4, shape="linear") for step in range(12)]
    assert factors == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize(
    ("shape", "quarter"),
    [("1-sqrt", 0.5), ("linear", 0.75), ("cosine", (1 + math.sqrt(0.5)) / 2)],
)
def test_decay_shapes_follow_their_formulas(shape, quarter):
    assert wsd_factor(1, warmup=0, stable=0, decay=4, shape=shape) == pytest.approx(quarter)
    assert wsd_factor(10, warmup=0, stable=0, decay=4, shape=shape) == pytest.approx(0)


def test_unknown_decay_shape_is_refused_before_training():
    with pytest.raises(ValueError, match="Unknown decay shape 'exp'"):
        WSDSchedule(shape="exp")


# Data


def small_loader(**changes) -> RandomCrops:
    options = {"batch_size": 3, "context": 8, "batches": 5, "key": (0, 0)}
    return RandomCrops(torch.arange(256, dtype=torch.uint8).repeat(4), **{**options, **changes})


def test_labels_are_the_inputs_one_byte_later():
    batch = next(iter(small_loader()))
    assert batch["input_ids"].shape == (3, 8)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal((batch["input_ids"] + 1) % 256, batch["labels"])


def test_loader_continues_where_it_was_saved():
    loader = small_loader()
    unbroken = [batch["input_ids"] for _ in range(2) for batch in loader]
    loader = small_loader()
    for _, _ in zip(range(3), loader, strict=False):
        state = loader.state_dict()
    resumed = small_loader()
    resumed.load_state_dict(state)
    assert len(unbroken) == 10
    for expected, batch in zip(unbroken[3:], resumed, strict=False):
        assert torch.equal(expected, batch["input_ids"])


def of_two_processes(rank: int) -> DemoData:
    data = DemoData(batch_size=4, validation_batches=3)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
    data.setup("fit")
    return data


@pytest.mark.parametrize("crops", [DemoData.train_dataloader, DemoData.val_dataloader])
def test_processes_share_the_batches_of_one_process_evenly(crops):
    alone = DemoData(batch_size=4, validation_batches=3)
    alone.setup("fit")
    whole, *shares = (
        [crop.tolist() for batch in islice(crops(data), 6) for crop in batch["input_ids"]]
        for data in (alone, of_two_processes(0), of_two_processes(1))
    )
    first, second = (share[: len(whole) // 2] for share in shares)
    assert [crop for pair in zip(first, second, strict=True) for crop in pair] == whole


def test_validation_is_the_same_every_time():
    data = DemoData(validation_batches=3)
    data.setup("fit")
    loader = data.val_dataloader()
    assert len(loader) == 3
    for once, again in zip(loader, loader, strict=True):
        assert torch.equal(once["input_ids"], again["input_ids"])


class Killed(Exception):  # noqa: N818
    pass


class BatchLog(Callback):
    """Notes the first bytes of every batch; raises in the middle of step `until`."""

    def __init__(self, until: int = -1) -> None:
        self.until = until
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen[trainer.global_step] = batch["input_ids"][:, 0].tolist()
        if trainer.global_step == self.until:
            raise Killed


def train(folder: Path, experts: int, log: BatchLog, resume: Path | None = None) -> dict[str, torch.Tensor]:
    """Trains 60 steps in epochs of 25, with validation and checkpoints in their midst."""
    torch.manual_seed(0)
    module = DemoModule(GPTConfig(width=16, context=16, experts=experts), WSDSchedule(10, 30, 20))
    checkpoint = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=60,
        val_check_interval=10,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[log, checkpoint],
    )
    trainer.fit(module, DemoData(4, 16, epoch_batches=25, validation_batches=2), ckpt_path=resume)
    return module.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "moe"])
def test_killed_and_resumed_training_is_bitwise_the_unbroken_one(tmp_path, experts):
    unbroken = BatchLog()
    expected = train(tmp_path / "unbroken", experts, unbroken)
    # Steps 30 and 45 lie within an epoch and on or between validations, 25 and 50 end one.
    for saved in (25, 30, 45, 50):
        killed, resumed = BatchLog(until=saved + 3), BatchLog()
        with pytest.raises(Killed):
            train(tmp_path / f"killed-{saved}", experts, killed)
        weights = train(
            tmp_path / f"resumed-{saved}", experts, resumed, tmp_path / f"killed-{saved}/step={saved}.ckpt"
        )
        assert resumed.seen == {step: batch for step, batch in unbroken.seen.items() if step >= saved}
        for name, tensor in expected.items():
            assert torch.equal(weights[name], tensor), (saved, name)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_experts_train_in_lower_precision(precision):
    module = DemoModule(GPTConfig(width=16, context=16, experts=4))
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=3,
        gradient_clip_val=1.0,
        limit_val_batches=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DemoData(2, 16, epoch_batches=3))
    assert trainer.callback_metrics["val_loss"].isfinite()


def fit_demo(strategy: str, experts: int):
    """Trains eight steps with gradient clipping."""
    seed()
    module = DemoModule(GPTConfig(width=16, context=32, experts=experts), WSDSchedule(100, 100, 100))
    data = DemoData(batch_size=4, context=32, epoch_batches=8, validation_batches=4)
    return fit(strategy, module, data=data, max_steps=8, gradient_clip_val=1.0, val_check_interval=4)


@pytest.mark.parametrize(
    ("strategy", "experts"),
    [
        pytest.param("ddp", 4, id="ddp-moe", marks=pytest.mark.slow),
        pytest.param("fsdp2", 0, id="fsdp2-dense"),
        pytest.param("ddp", 0, id="ddp-dense", marks=pytest.mark.slow),
        pytest.param("fsdp2", 4, id="fsdp2-moe", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one(strategy, experts):
    alone = fit_demo("alone", experts)
    ranks = run_ranks(2, fit_demo, strategy=strategy, experts=experts)
    losses = torch.tensor([rank.losses for rank in ranks]).mean(0)
    # Sums over half a batch round differently, and training amplifies that; by 1e-6 in so few steps.
    torch.testing.assert_close(losses, torch.tensor(alone.losses), rtol=1e-5, atol=0)
    for rank in ranks:
        assert rank.validations == pytest.approx(alone.validations, rel=1e-5)
        for name, bias in alone.final.items():
            if name.endswith("router_bias"):
                assert bias.any()
                assert torch.equal(rank.final[name], bias)


# Run


def row(step: int, **changes) -> Row:
    values = {"tokens": step * 2048, "phase": "stable", "learning_rate": 8e-3, "live_loss": 1.5}
    empty = dict.fromkeys(("merged_loss", "gain", "diversity_rms", "diversity_change", "snapshots"))
    return Row(step=step, **{**values, **empty, **changes})


def test_table_shows_a_dash_until_there_is_a_merge():
    lines = format_table([row(200), row(400, merged_loss=1.4, gain=0.1, diversity_rms=0.034)]).splitlines()
    assert lines[2].split() == ["0.41", "M", "stable", "8.0e-03", "1.500", *["–"] * 3]  # noqa: RUF001
    assert lines[3].split() == ["0.82", "M", "stable", "8.0e-03", "1.500", "1.400", "+0.100", "0.0340"]


def test_long_tables_are_thinned_to_the_last_row():
    lines = format_table([row(step) for step in range(1, 101)], limit=30).splitlines()[2:]
    assert len(lines) <= 30
    assert lines[-1].split()[0] == f"{100 * 2048 / 1e6:.2f}"


def assert_loads(module: DemoModule, weights: Path) -> None:
    missing, unexpected = module.load_state_dict(load_file(weights), strict=False)
    assert missing == ["model.head.weight"]  # tied to the embedding, and stored once
    assert not unexpected


def test_demo_leaves_table_picture_logs_and_merged_weights(tmp_path, capsys):
    plan = DemoPlan(WSDSchedule(warmup=2, stable=7, decay=3), validate_every=6, snapshot_every=1)
    result = run_demo(tmp_path, plan)
    printed = capsys.readouterr().out
    assert [r.step for r in result.rows] == [6, 12]
    assert [Row(**r) for r in json.loads(result.table.read_text())] == result.rows
    assert result.rows[-1].gain == pytest.approx(result.rows[-1].live_loss - result.rows[-1].merged_loss)
    assert result.rows[-1].learning_rate == pytest.approx(8e-3 * wsd_factor(11, 2, 7, 3))
    assert format_table(result.rows) in printed
    assert result.picture.read_bytes().startswith(b"\x89PNG")
    assert list(result.folder.glob("events.out.tfevents.*"))
    weights = result.merges / "latest" / "model.safetensors"
    for path in (f"--logdir {tmp_path}", str(result.picture), str(weights)):
        assert path in printed
    assert_loads(DemoModule(), weights)


@pytest.mark.slow
def test_second_demo_lands_beside_the_first(tmp_path):
    (tmp_path / "version_0").mkdir()
    plan = DemoPlan(WSDSchedule(warmup=1, stable=4, decay=1), validate_every=6, snapshot_every=1)
    result = run_demo(tmp_path, plan, moe=True)
    assert result.folder == tmp_path / "version_1"
    assert not list((tmp_path / "version_0").iterdir())
    assert_loads(DemoModule(MOE), result.merges / "latest" / "model.safetensors")


MODULE = [sys.executable, "-m", "merge_callback"]
SCRIPT = [str(Path(sys.executable).with_name("merge-callback"))]


def rows_of(command: list[str], output: Path, *options: str) -> list[Row]:
    """Runs the demo for 22 steps, as a user would; Lightning starts the other processes the same way."""
    subprocess.run(
        [*command, "demo", "--steps-scale", "0.004", "--output", str(output), *options],
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    (folder,) = output.iterdir()
    return [Row(**row) for row in json.loads((folder / "rows.json").read_text())]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("command", "strategy"), [(MODULE, "ddp"), (SCRIPT, "fsdp2")])
def test_demo_on_two_processes_shows_the_table_of_one(tmp_path, command, strategy):
    processes = ["--strategy", strategy, "--devices", "2"]
    rows = rows_of(command, tmp_path / "two", *processes)
    alone = rows_of(MODULE, tmp_path / "one")
    assert [(r.step, r.tokens, r.phase, r.snapshots) for r in rows] == [
        (r.step, r.tokens, r.phase, r.snapshots) for r in alone
    ]
    # A run this short has no warm-up, and amplifies the rounding of sums: by step 11, to 2 % of the loss.
    for row, expected in zip(rows[:6], alone, strict=False):
        for name, value in asdict(expected).items():
            near = pytest.approx(value, rel=1e-3, abs=1e-3) if isinstance(value, float) else value
            assert getattr(row, name) == near, (expected.step, name)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_merging_gains_in_the_stable_phase_and_not_after_decay(tmp_path):
    rows = run_demo(tmp_path).rows
    stable, last = [r for r in rows if r.phase == "stable"], rows[-1]
    # The pilot: gain .126 at the end of the stable phase, -.001 at the end of decay; RMS .034, then .0025.
    assert stable[-1].gain >= 0.08
    assert last.phase == "decay"
    assert last.gain < 0.01
    late = [r.diversity_rms for r in stable[len(stable) // 2 :]]
    assert max(late) < 1.5 * min(late)
    assert last.diversity_rms < 0.2 * min(late)


# Command line


def test_devices_that_cannot_share_the_batches_are_refused_at_once(tmp_path, capsys):
    for option in ([], ["--spike"]):
        assert main(["demo", *option, "--devices", "3", "--output", str(tmp_path / "run")]) == 1
        assert "3 processes can't share batches of 16 sequences evenly" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def printed_config(capsys, *arguments: str) -> dict:
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["wsd_gpt", "moe_gpt"])
def test_example_configs_train(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.callbacks.every_n_steps=1"]
    small = ["--data.validation_batches=1", "--model.schedule.warmup=1"]
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *short, *small]) == 0
    assert (tmp_path / f"demo_run/{name}/version_0/merges/latest/model.safetensors").is_file()


@pytest.mark.parametrize(
    "name", [pytest.param("expert_v0", marks=pytest.mark.slow), "expert_v1", "expert_adaptive"]
)
def test_example_configs_of_experts_train(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=10", "--trainer.val_check_interval=5", "--data.max_bytes=60_000"]
    assert main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), *short]) == 0
    (expert,) = (tmp_path / f"demo_run/{name}/version_0/checkpoints").iterdir()
    assert re.fullmatch(r"step=(5|10)-val_acc=0\.\d{4}\.ckpt", expert.name)


@pytest.mark.slow
def test_the_config_of_an_expert_that_its_merge_stops_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("demo_run").mkdir()
    for name in ("base", "expert0", "expert1"):
        save_file(TokenKindModule().state_dict(), f"demo_run/{name}.safetensors")
    short = ["--trainer.max_steps=5", "--trainer.val_check_interval=5", "--data.max_bytes=40_000"]
    config = str(CONFIGS / "expert_merged.yaml")
    assert main(["fit", "--config", config, *short]) == 0
    (expert,) = Path("demo_run/expert_merged/version_0/checkpoints").iterdir()
    assert expert.name == "step=5.ckpt"


def test_every_byte_of_source_has_the_kind_of_its_token():
    source = "def f(x):  # no\n    return '''a\nb''' + 10\n"
    found = "".join(KINDS[kind][0] for kind in token_kinds(source))
    assert found == "kkksnonoosscccc" + "sssss" + "kkkkkk" + "s" + "sssssssss" + "sosnns"


def test_an_expert_begins_with_a_merge_of_the_demo(tmp_path):
    merging = CheckpointMergeCallback(every_n_steps=1, dirpath=tmp_path, evaluate=False)
    demo = DemoModule(schedule=WSDSchedule(warmup=0)), DemoData(max_bytes=2_000_000)
    Trainer(**QUIET, max_steps=2, callbacks=[merging]).fit(*demo)
    merge = load_merge(tmp_path / "latest")
    module = TokenKindModule(base=str(tmp_path / "latest"))
    assert torch.equal(module.model.tokens.weight, merge["model.tokens.weight"])
    assert module(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, len(KINDS))


@pytest.mark.parametrize(("name", "gpt"), [("wsd_gpt", DENSE), ("moe_gpt", MOE)])
def test_example_configs_are_the_demo(name, gpt, capsys):
    config = printed_config(capsys, "--config", str(CONFIGS / f"{name}.yaml"))
    module = config["model"]["init_args"]
    assert GPTConfig(**module["gpt"]) == gpt
    assert WSDSchedule(**module["schedule"]) == DemoPlan().schedule
    assert config["trainer"]["max_steps"] == DemoPlan().schedule.steps
    merging = config["trainer"]["callbacks"][-1]
    assert merging["class_path"] == "merge_callback.CheckpointMergeCallback"
    assert merging["init_args"]["every_n_steps"] == DemoPlan().snapshot_every


def test_fit_takes_any_module_and_data(capsys):
    classes = "lightning.pytorch.demos.boring_classes.BoringModel", "BoringDataModule"
    config = printed_config(capsys, "--model", classes[0], "--data", classes[1])
    assert config["model"]["class_path"] == classes[0]
    assert config["data"]["class_path"].endswith(classes[1])
    assert printed_config(capsys)["model"]["class_path"] == "merge_callback.demo.DemoModule"


OWN_MODULE = """
from lightning.pytorch.demos.boring_classes import BoringModel

class Own(BoringModel):
    def __init__(self, fails: bool = False):
        super().__init__()
        self.fails = fails

    def on_train_start(self):
        if self.fails:
            raise ValueError("of the module's own")
"""


def test_fit_finds_modules_of_the_current_folder_and_tells_wrong_options_in_a_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("own_module_of_fit.py").write_text(OWN_MODULE)
    own = [
        "--model",
        "own_module_of_fit.Own",
        "--data",
        "lightning.pytorch.demos.boring_classes.BoringDataModule",
    ]
    quiet = [f"--trainer.{name}=false" for name in ("logger", "enable_progress_bar", "enable_checkpointing")]
    options = ["fit", *own, *quiet, "--trainer.max_steps=2", "--trainer.callbacks=CheckpointMergeCallback"]
    every = "--trainer.callbacks.every_n_steps=1"

    assert main([*options, every]) == 0
    assert Path("merges/latest/model.safetensors").is_file()
    for path in Path().glob("*.yaml"):
        path.unlink()
    for wrong, said in {
        "--trainer.callbacks.window=0": "window=0 must be a positive whole number",
        "--trainer.max_steps=-5": "`max_steps` must be a non-negative integer",
    }.items():
        capsys.readouterr()
        assert main([*options, every, wrong]) == 1
        assert [
            line
            for line in capsys.readouterr().err.splitlines()
            if line.startswith(f"merge-callback: {said}")
        ]
    with pytest.raises(ValueError, match="of the module's own"):
        main([*options, every, "--model.fails=true"])
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize("command", ["demo", "fit"])
def test_missing_extras_are_named_with_the_command_that_installs_them(command, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "find_spec", lambda name: None)
    assert main([command]) == 1
    assert capsys.readouterr().err.endswith("is missing: pip install 'merge-callback[demo]'\n")


def test_command_line_loads_neither_torch_nor_lightning():
    check = "import sys, merge_callback.cli.main; print({'torch', 'lightning'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", check], text=True).strip() == "set()"
