"""The demo: how its model trains, resumes and is trained by two processes, and what its run shows."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from distributed_runs import fit, run_ranks
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from training_runs import seed

from merge_callback.demo import DemoData, DemoModule, GPTConfig, WSDSchedule, wsd_factor
from merge_callback.demo.record import Row, format_table
from merge_callback.demo.run import DemoPlan, run_demo


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
    assert_loads(DemoModule(GPTConfig(experts=4)), result.merges / "latest" / "model.safetensors")


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
