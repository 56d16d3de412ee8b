"""After a restore: the learning rate, the next spike, the end of the run, and what is told and kept of it."""

import csv
import math
from functools import cache

import pytest
import torch
import torch.nn.utils.prune as prune
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from slow_cases import some_slow
from spiking_runs import BURST, FIRES, RULES, SPIKE, USED, Batches, Line, bursts, events, plain, spiking, used
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR, OneCycleLR
from training_runs import assert_same_bits

from merge_callback import SpikeOptions, TrainingDivergedError, load_merge
from merge_callback import merge_state_dicts as merge
from merge_callback.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore:merge:")

REWARM = 10
"""Of the runs here, unless told otherwise."""

SCHEDULES = {
    "exponential": lambda optimizer: ExponentialLR(optimizer, 0.999),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 150),
    "one cycle": lambda optimizer: OneCycleLR(optimizer, 0.02, total_steps=151, pct_start=0.2),
    "function": lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20)),
}


def slow():
    """A model that a burst hardly harms, so that each streak is as long as its burst."""
    return Line(lr=1e-3)


# --- the learning rate --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """The run without a spike, by its schedule."""

    @cache
    def run_of(name):
        return spiking(
            tmp_path_factory.mktemp("calm"), Batches(), 150, lambda: Line(schedule=SCHEDULES[name])
        )

    return run_of


@pytest.mark.parametrize("name", some_slow(SCHEDULES, ["exponential", "cosine"]))
def test_the_learning_rate_warms_up_again_and_then_is_the_schedule_s_to_the_bit(tmp_path, calm, name):
    def build():
        return Line(schedule=SCHEDULES[name])

    run = spiking(tmp_path, module=build, steps=150)

    undisturbed = calm(name).module.applied
    ramp = [(i + 1) / REWARM for i in range(REWARM)]
    assert run.watch.scheduled == undisturbed
    assert run.module.applied[:FIRES] == undisturbed[:FIRES]
    assert run.module.applied[FIRES : FIRES + REWARM] == pytest.approx(
        [rate * factor for rate, factor in zip(undisturbed[FIRES:], ramp, strict=False)], rel=1e-12
    )
    assert run.module.applied[FIRES + REWARM :] == undisturbed[FIRES + REWARM :]


@pytest.mark.parametrize("name", some_slow(SCHEDULES, ["exponential", "cosine"]))
def test_the_phase_does_not_notice_the_second_warm_up(tmp_path, calm, name):
    def build():
        return Line(schedule=SCHEDULES[name])

    run = spiking(tmp_path, module=build, steps=150, spike={"lr_factor": 0.1})

    assert run.restores
    known = {s["step"]: (s["phase"], s["since"], s["lr_ratio"]) for s in calm(name).window}
    assert {s["step"]: (s["phase"], s["since"], s["lr_ratio"]) for s in run.window} == known


def test_a_lasting_factor_lasts_and_adds_up(tmp_path):
    run = spiking(tmp_path, Batches(bad=bursts(80, 110)), 140, slow, spike={"lr_factor": 0.5})

    assert [event["lr_factor"] for event in run.restores] == [0.5, 0.25]
    assert run.watch.scheduled == [1e-3] * 140
    assert run.module.applied[FIRES + REWARM : 114] == [0.5e-3] * (114 - FIRES - REWARM)
    assert run.module.applied[115 + REWARM :] == [0.25e-3] * (140 - 115 - REWARM)
    assert run.window[-1]["lr"] == 0.25e-3  # what was applied, not what was scheduled


def test_after_the_run_the_optimizer_has_the_schedule_s_rate(tmp_path):
    run = spiking(tmp_path, steps=FIRES + 3)

    assert run.module.applied[-1] < 0.02
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.02


def test_the_clocks_go_on(tmp_path):
    options = {"every_n_steps": None, "every_n_tokens": 80, "count_tokens": lambda batch: len(batch[0])}
    run = spiking(tmp_path, **options)

    assert used(run.restores[0]) == USED
    assert list(run.watch.weights) == list(range(1, 101))
    assert [s["tokens"] for s in run.window] == [16 * s["step"] for s in run.window]
    assert [s["step"] for s in run.window][-4:] == [70, 90, 95, 100]


# --- the next spike -----------------------------------------------------------------------------------------


def test_each_further_spike_within_the_cooldown_asks_for_more(tmp_path):
    data = Batches(bad=bursts(80, 110, 140, 170))
    run = spiking(tmp_path, data, 190, slow, window=30)

    assert [event["in_a_row"] for event in run.restores] == [1, 2, 3, 4]
    # A window older, then the same again: what came since the first restore did not help.
    assert [used(event) for event in run.restores] == [USED, *[[45, 50, 55]] * 3]
    assert [event["lr_factor"] for event in run.restores] == [1.0, 1.0, 0.5, 0.25]
    for event in run.restores:
        expected = merge([run.watch.weights[step] for step in used(event)])
        assert_same_bits(run.watch.weights[event["restored_at"]], expected)


def test_where_nothing_is_older_the_learning_rate_falls_at_once(tmp_path):
    def build():  # the snapshots of the first 60 steps are of the warm-up
        return Line(lr=1e-3, schedule=lambda o: LambdaLR(o, lambda step: min(1.0, (step + 1) / 60)))

    run = spiking(tmp_path, Batches(bad=bursts(80, 110)), 120, build)

    assert [(used(e), e["lr_factor"]) for e in run.restores] == [(USED, 1.0), (USED, 0.5)]


def test_a_spike_after_the_cooldown_starts_over(tmp_path):
    run = spiking(tmp_path, Batches(bad=bursts(80, 130)), 150, slow, spike={"cooldown": 30})

    assert [(e["in_a_row"], used(e)) for e in run.restores] == [(1, USED), (1, [110, 115, 120])]
    assert [event["lr_factor"] for event in run.restores] == [1.0, 1.0]


def test_a_run_that_cannot_be_helped_stops_and_says_what_to_try(tmp_path):
    data = Batches(bad=bursts(80, 110, 140))
    options = {"durable": True, "emit_every": 2, "spike": {"max_restores": 2}}
    with pytest.raises(TrainingDivergedError) as stopped:
        spiking(tmp_path, data, 160, slow, **options)

    last = events(tmp_path)[-1]
    good = last["last_good_merge"]
    assert [event["event"] for event in events(tmp_path)] == ["restore", "restore", "stop"]
    for part in ("at step 140", "2 restores in a row did not help", good, "spikes.jsonl", "learning rate"):
        assert part in str(stopped.value)
    Line().load_state_dict(load_merge(good))
    assert all(tensor.isfinite().all() for tensor in load_merge(good).values())


def test_a_stop_names_no_folder_that_is_not_there(tmp_path):
    with pytest.raises(TrainingDivergedError) as stopped:
        spiking(tmp_path, Batches(bad=bursts(80, 110)), 160, slow, spike={"max_restores": 1})

    assert not (tmp_path / "window").exists()
    assert str(tmp_path / "window") not in str(stopped.value)


def test_before_there_is_a_snapshot_a_run_goes_on_with_a_warning(tmp_path):
    data = {"bad": BURST}
    with pytest.warns(UserWarning, match="no clean snapshot is older than step 70.*training goes on"):
        run = spiking(tmp_path, Batches(**data), every_n_steps=75)

    (event,) = run.events
    assert (event["event"], event["onset"]) == ("warn", SPIKE)
    assert_same_bits(run.watch.weights, plain(Batches(**data)).watch.weights)


def test_before_there_is_a_snapshot_a_run_stops_if_asked(tmp_path):
    with pytest.raises(TrainingDivergedError, match="no clean snapshot is older than step 70"):
        spiking(tmp_path, every_n_steps=75, spike={"no_snapshot": "stop"})

    assert [event["event"] for event in events(tmp_path)] == ["stop"]


def test_a_second_spike_is_survived_though_the_window_has_rolled_on_since_the_first(tmp_path):
    run = spiking(tmp_path, Batches(bad=bursts(80, 200)), 210, slow, spike=SpikeOptions(evidence="rules"))

    assert [event["event"] for event in run.events] == ["restore", "restore"]


def test_bad_data_now_and_then_never_stops_a_run(tmp_path):
    spike = SpikeOptions(cooldown=40, **RULES)
    every = spike.rewarm_steps + spike.cooldown + 20
    data = Batches(bad=bursts(*range(80, 80 + 7 * every, every)))
    run = spiking(tmp_path, data, 90 + 6 * every, slow, spike=spike)

    assert [(event["in_a_row"], event["lr_factor"]) for event in run.restores] == [(1, 1.0)] * 7


def test_a_run_without_a_second_warm_up_escalates_too(tmp_path):
    spike = SpikeOptions(rewarm_steps=0, evidence="rules")
    run = spiking(tmp_path, Batches(bad=bursts(80, 110)), 120, slow, spike=spike, window=30)

    assert [event["in_a_row"] for event in run.restores] == [1, 2]


def test_a_change_of_the_data_is_no_reason_to_restore_twice_let_alone_to_stop(tmp_path):
    run = spiking(tmp_path, Batches(shift=90), 300, spike=SpikeOptions(evidence="rules"))

    assert [event["event"] for event in run.events] in (["restore"], ["restore", "shift"], ["shift"])


def test_a_change_of_the_data_that_is_far_above_the_noise_is_accepted(tmp_path):
    class Level(Batches):
        def draw(self, index):
            x, y = super().draw(index)
            return x, y + (100.0 if index >= 90 and index % 2 else -100.0 if index >= 90 else 0.0)

    run = spiking(tmp_path, Level(), 240, slow, spike={"action": "warn"}, fit={"log_every_n_steps": 20})

    assert [event["event"] for event in run.events] == ["warn", "shift"]
    assert run.watch.metrics[240]["merge_spike/is_spiking"] == 0
    assert run.watch.metrics[240]["merge_spike/baseline"] > 5000
    assert not any(snapshot["in_spike"] for snapshot in run.window)  # they are of healthy weights after all


# --- what is told and kept ----------------------------------------------------------------------------------


def test_the_record_says_all_in_plain_json(tmp_path):
    run = spiking(tmp_path, Batches(bad=BURST, broken=[110]), 130, durable=True)

    first, second = run.events
    for event in (first, second):
        assert {"time", "event", "trigger", "onset", "step", "baseline", "threshold"} <= event.keys()
        assert event["event"] == "restore"
        assert event["method"] == "sma"
        assert event["optimizer"] == "keep"
        assert event["rewarm_steps"] == REWARM
        assert 0 <= event["seconds"] < 60
        assert math.fsum(snapshot["weight"] for snapshot in event["snapshots"]) == pytest.approx(1)
    assert first["values"] == pytest.approx([run.watch.losses[step] for step in BURST], rel=1e-6)
    assert all(value > first["threshold"] > first["baseline"] for value in first["values"])
    assert [s["file"][:13] for s in first["snapshots"]] == [f"step={step:08d}" for step in USED]
    assert (second["trigger"], second["values"]) == ("non-finite loss", ["nan"])


def test_a_logger_that_fails_does_not_end_the_run(tmp_path, caplog):
    class Full(CSVLogger):
        @property
        def experiment(self):
            experiment = super().experiment

            def add_text(*_):
                raise OSError("no space left")

            experiment.add_text = add_text
            return experiment

    run = spiking(tmp_path / "merges", fit={"logger": Full(tmp_path), "log_every_n_steps": 5})

    assert len(run.restores) == 1
    assert run.trainer.global_step == 100
    assert "Full could not show the event" in caplog.text


def test_every_logger_shows_the_spike(tmp_path):
    loggers = [CSVLogger(tmp_path, name="csv"), TensorBoardLogger(tmp_path, name="board")]
    run = spiking(tmp_path / "merges", fit={"logger": loggers, "log_every_n_steps": 5})

    with open(tmp_path / "csv/version_0/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["merge_spike/is_spiking"]]
    spikes = {int(row["step"]) + 1: float(row["merge_spike/is_spiking"]) for row in rows}
    assert [step for step, spike in spikes.items() if spike] == [FIRES]
    assert {step: spikes[step] for step in (75, 80, 90, 100)} == {75: 0, 80: 0, 90: 0, 100: 0}
    assert float(rows[-1]["merge_spike/restores"]) == 1
    known = [row for row in rows if row["merge_spike/threshold"]]
    assert all(float(row["merge_spike/threshold"]) > float(row["merge_spike/baseline"]) > 0 for row in known)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board/version_0"))
    board.Reload()
    assert [e.value for e in board.Scalars("merge_spike/restores")][-1] == 1
    assert {"merge_spike/is_spiking", "merge_spike/baseline", "merge_spike/threshold"} <= set(
        board.Tags()["scalars"]
    )
    (text,) = board.Tensors("merge_spike/events/text_summary")
    said = text.tensor_proto.string_val[0].decode()
    assert f"5 outliers from step {SPIKE} to {FIRES - 1}" in said
    assert "steps 60, 65, 70" in said
    assert run.restores


def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "spikes.jsonl").mkdir()

    run = spiking(tmp_path)

    assert run.trainer.global_step == 100
    assert_same_bits(run.watch.weights[FIRES], merge([run.watch.weights[step] for step in USED]))
    assert '"onset": 80' in caplog.text  # so the log has it


class Shrunk(Line):
    """Renames its last weight before the spike, as pruning does: no snapshot fits the model any more."""

    def on_train_batch_start(self, batch, batch_idx):
        if self.trainer.global_step == 72:
            prune.identity(self.net[2], "weight")


def test_a_restore_that_fails_leaves_the_run_as_it_was(tmp_path):
    unwatched = plain(Batches(bad=BURST), module=Shrunk).watch
    run = spiking(tmp_path, module=Shrunk)

    assert not run.restores
    assert_same_bits(run.watch.weights, unwatched.weights)
    assert_same_bits(run.watch.states, unwatched.states)


def test_a_restore_that_fails_does_not_end_the_run(tmp_path):
    def fails(optimizer):
        raise RuntimeError("no such state")

    run = spiking(tmp_path, spike={"optimizer": fails})

    assert run.trainer.global_step == 100
    assert not run.restores
    assert run.trainer.optimizers[0].param_groups[0]["lr"] == 0.02
    assert_same_bits(run.watch.weights, plain(Batches(bad=BURST)).watch.weights)


def test_a_restore_that_fails_stops_the_run_if_asked(tmp_path):
    spike = {"optimizer": lambda optimizer: 1 / 0, "no_snapshot": "stop"}
    with pytest.raises(TrainingDivergedError, match=r"the restore failed \(ZeroDivisionError"):
        spiking(tmp_path, spike=spike)


def test_a_restore_that_fails_is_in_the_record(tmp_path):
    run = spiking(tmp_path, spike={"optimizer": lambda optimizer: 1 / 0})

    assert [(event["event"], event["onset"]) for event in run.events] == [("warn", SPIKE)]


def test_a_checkpoint_saved_at_the_restore_holds_the_restored_weights(tmp_path):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=FIRES)
    run = spiking(tmp_path, callbacks=[saves], fit={"enable_checkpointing": True})

    checkpoint = torch.load(tmp_path / f"step={FIRES}.ckpt", weights_only=True)
    assert_same_bits(dict(checkpoint["state_dict"]), run.watch.weights[FIRES])
    assert_same_bits(run.watch.weights[FIRES], merge([run.watch.weights[step] for step in USED]))


# --- options ------------------------------------------------------------------------------------------------


def test_a_configuration_file_builds_the_options(tmp_path, capsys):
    callback = {
        "class_path": "merge_callback.CheckpointMergeCallback",
        "init_args": {"every_n_steps": 10, "spike": {"action": "warn", "patience": 3}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", str(tmp_path / "config.yaml"), "--print_config"])

    printed = yaml.safe_load(capsys.readouterr().out)
    (found,) = printed["trainer"]["callbacks"]
    assert SpikeOptions(**found["init_args"]["spike"]) == SpikeOptions(action="warn", patience=3)
