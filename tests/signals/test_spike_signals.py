"""More to see than the loss: watched scalars, drift, the spike score, origins of outliers, own functions."""

import csv
import math
import random

import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from spiking_runs import BURST, FIRES, SPIKE, Batches, Damage, Line, plain, spiking, used
from torch.utils.data import DataLoader, TensorDataset
from training_runs import assert_same_bits

from merge_callback.signals.drift import DRIFT_STEPS, Drift, SpikeScore

pytestmark = pytest.mark.filterwarnings("ignore:merge:")

EVIDENCE = {"evidence": "batch", "rewarm_steps": 10, "cooldown": 128}


def of_kind(run, *kinds):
    return [event for event in run.events if event["event"] in kinds]


# --- watched scalars ----------------------------------------------------------------------------------------


class Heads(Line):
    """Logs the losses of two heads; that of the second leaves its level from batch ``SPIKE`` on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        noise = 0.01 * math.sin(self.global_step)
        jump = 5.0 if SPIKE <= self.global_step + 1 < SPIKE + 8 else 1.0
        self.log("train/mtp1_loss", 2.0 + noise)
        self.log("train/mtp2_loss", torch.tensor((3.0 + noise) * jump))
        self.log("train/epoch_only", 100.0 * jump, on_step=False, on_epoch=True)
        return loss


def test_a_watched_scalar_that_spikes_is_warned_of(tmp_path):
    run = spiking(tmp_path, Batches(), 120, Heads, spike={**EVIDENCE, "watch": ["train/*"]})

    (event,) = of_kind(run, "warn", "hard data", "restore")
    assert (event["event"], event["trigger"]) == ("warn", "train/mtp2_loss")
    assert (event["onset"], event["step"]) == (SPIKE, SPIKE + 4)
    assert event["baseline"] == pytest.approx(3.0, abs=0.01)
    assert_same_bits(run.watch.weights, plain(Batches(), 120, Heads).watch.weights)


def test_a_watched_scalar_restores_only_weights_that_do_worse_on_the_batch(tmp_path):
    watch = {"train/mtp2*": "restore"}
    sound = spiking(tmp_path / "a", Batches(), 120, Heads, spike={**EVIDENCE, "watch": watch})
    assert [e["event"] for e in sound.events] == ["hard data"]
    assert not sound.restores

    def wreck(module):
        module.net[2].bias += 30

    broken = spiking(
        tmp_path / "b",
        Batches(),
        120,
        Heads,
        callbacks=[Damage({SPIKE - 1: wreck})],
        spike={**EVIDENCE, "action": "warn", "watch": watch},
    )
    assert [(e["trigger"], e["step"]) for e in broken.restores] == [("train/mtp2_loss", SPIKE + 4)]


def test_a_scalar_that_is_not_logged_any_more_is_not_read_again(tmp_path):
    class Once(Line):
        def training_step(self, batch, batch_idx):
            if self.global_step < 100:
                self.log("norm", 1.0 if self.global_step < 99 else 50.0)
            return super().training_step(batch, batch_idx)

    run = spiking(tmp_path, Batches(), 150, Once, spike={**EVIDENCE, "watch": "norm"})

    assert not of_kind(run, "warn")  # one outlier, however long its value stands in Lightning's results
    (state,) = [
        s for name, _, s, _ in run.callback.state_dict()["spikes"]["numbers"]["detectors"] if name == "norm"
    ]
    assert len(state["clean"]) <= 99


# --- drift --------------------------------------------------------------------------------------------------


def drifts(values, margin=0.2):
    drift, found = Drift(), []
    for step, value in enumerate(values):
        if (told := drift.observe(float(value), lambda: margin)) is not None:
            found.append((step, *told))
    return found


def test_a_loss_that_creeps_up_is_told_of_at_each_further_rise():
    rng = np.random.default_rng(0)
    curve = np.concatenate([np.full(1000, 2.0), np.linspace(2.0, 2.5, 2000), np.full(500, 2.5)])
    found = drifts(curve + 0.02 * rng.standard_normal(len(curve)))
    assert 3 <= len(found) <= 4
    step, best, level = found[0]
    assert 1300 < step < 1700
    assert best == pytest.approx(2.0, abs=0.01)
    assert 2.1 < level < 2.15  # more than 5 %


@pytest.mark.parametrize(
    "curve",
    [
        lambda rng, n: 2 + 0.3 * rng.standard_normal(n),
        lambda rng, n: 2 + 8 / np.sqrt(1 + np.arange(n) / 50) + 0.02 * rng.standard_normal(n),
        lambda rng, n: np.where(rng.random(n) < 0.05, 50.0, 2.0),  # spikes
        lambda rng, n: -3 + 0.1 * rng.standard_t(3, n),
        lambda rng, n: np.full(n, math.nan),
    ],
)
def test_noise_spikes_and_a_falling_loss_are_no_drift(curve):
    for seed in range(5):
        assert not drifts(curve(np.random.default_rng(seed), 4000), margin=6 * 0.3)


class Creeping(Line):
    """Its loss rises by 0.7 in a hundred steps, a standard deviation, whatever the weights."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + 0.007 * max(0, self.global_step - 400)


def test_a_run_that_drifts_is_warned_and_never_restored(tmp_path):
    run = spiking(tmp_path, Batches(), 1100, Creeping, spike=EVIDENCE)

    assert not run.restores
    first = of_kind(run, "drift")[0]
    assert first["level"] > 1.05 * first["best"]
    assert first["step"] - first["onset"] == DRIFT_STEPS - 1


# --- the spike score ----------------------------------------------------------------------------------------


def score_by_numpy(values, scored=10_000, averaged=1_000, deviations=7.0, least=64):
    """The definition, value by value."""
    seen, off = [], []
    for value in values:
        if not math.isfinite(value):
            off.append(True)
            continue
        last = np.asarray(seen[-averaged:])
        off.append(len(last) >= least and abs(value - last.mean()) >= deviations * last.std())
        seen.append(value)
    return np.mean(off[-scored:])


def test_the_spike_score_is_the_share_of_steps_far_off_the_mean_of_the_last_thousand():
    rng = np.random.default_rng(1)
    values = 1e4 + 0.1 * rng.standard_normal(13_000)
    values[rng.integers(100, 13_000, 40)] += 3
    values[[5, 700]] = math.nan
    score = SpikeScore()
    for step, value in enumerate(values, 1):
        score.observe(float(value))
        if step in (100, 2_000, 9_999, 12_999, 13_000):
            assert score.value == pytest.approx(score_by_numpy(values[:step]), abs=1e-12)
    resumed = SpikeScore()
    resumed.load_state_dict(score.state_dict())
    for detector in (score, resumed):
        detector.observe(1e5)
    assert resumed.value == score.value > 0


def test_the_spike_score_is_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="csv")
    spiking(tmp_path / "m", spike=EVIDENCE, fit={"logger": logger, "log_every_n_steps": 5})

    with open(tmp_path / "csv/version_0/metrics.csv") as file:
        scores = [float(row["merge_spike/score"]) for row in csv.DictReader(file) if row["merge_spike/score"]]
    assert scores[0] == 0
    assert 0 < scores[-1] <= 5 / 99


# --- where outliers come from -------------------------------------------------------------------------------


def test_the_record_names_the_batches_of_the_outliers(tmp_path):
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1))
    y = x.sum(1, keepdim=True)
    bad = slice(16 * 80, 16 * 85)
    y[bad] = 20 - 5 * y[bad]
    loader = DataLoader(TensorDataset(x, y), batch_size=16)

    run = spiking(tmp_path, loader, 100, spike=EVIDENCE)

    (event,) = of_kind(run, "hard data")
    assert [(b["step"], b["epoch"], b["batch_idx"]) for b in event["batches"]] == [
        (81 + i, 0, 80 + i) for i in range(5)
    ]
    indices = [index for batch in event["batches"] for index in batch["sample_indices"]]
    assert indices == list(range(bad.start, bad.stop))


def test_a_sampler_that_cannot_tell_again_is_not_asked(tmp_path):
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 16, shuffle=True, generator=generator)

    class Bursting(Line):
        def training_step(self, batch, batch_idx):
            x, y = batch
            return super().training_step((x, 20 - 5 * y if batch_idx in range(80, 85) else y), batch_idx)

    run = spiking(tmp_path, loader, 100, Bursting, spike=EVIDENCE)

    (event,) = of_kind(run, "hard data")
    assert all("sample_indices" not in batch for batch in event["batches"])
    assert [batch["batch_idx"] for batch in event["batches"]] == [80, 81, 82, 83, 84]


# --- an own function ----------------------------------------------------------------------------------------


def test_an_own_function_is_handed_each_event_and_may_stop_the_run(tmp_path):
    seen = []

    def on_spike(event):
        seen.append((event["event"], event["step"]))
        return "stop"

    run = spiking(tmp_path, spike={"on_spike": on_spike}, steps=200)

    assert seen == [("restore", FIRES - 1)]
    assert run.trainer.global_step == FIRES  # after the step in which it was restored
    assert used(run.restores[0])


def test_a_run_may_stop_after_a_restore_and_not_after_hard_data(tmp_path):
    spike = {**EVIDENCE, "on_spike": "stop_after_restore"}
    assert spiking(tmp_path / "a", spike=spike).trainer.global_step == 100
    wreck = Damage({SPIKE - 1: lambda module: module.net[2].bias.add_(30)})
    stopped = spiking(tmp_path / "b", Batches(), callbacks=[wreck], spike=spike)
    assert stopped.trainer.global_step == FIRES


def test_an_own_function_that_fails_does_not_end_the_run(tmp_path, caplog):
    run = spiking(tmp_path, spike={"on_spike": lambda event: 1 / 0})

    assert run.trainer.global_step == 100
    assert "spike.on_spike failed" in caplog.text


# --- a trial leaves nothing behind --------------------------------------------------------------------------


class World:
    """What an agent acts on: Python objects of its own, and generators."""

    def __init__(self):
        self.position, self.visited, self.map = 0, [], np.zeros(8)
        self.random, self.numpy = random.Random(3), np.random.default_rng(4)
        self.torch = torch.Generator().manual_seed(5)
        self.memory = torch.zeros(4)

    def step(self):
        self.position += self.random.randrange(9)
        self.visited.append(self.position)
        self.map[self.position % 8] += self.numpy.random()
        self.memory += torch.randn(4, generator=self.torch)
        return float(self.map.sum() + self.memory.sum()) * 1e-3


class Everything(Line):
    """Keeps all sorts of state in its training step, and draws from all generators."""

    def __init__(self):
        super().__init__()
        self.world, self.count, self.history = World(), 0, {"losses": []}
        self.metric = torchmetrics.MeanMetric()
        self.collection = torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()])
        self.register_buffer("queue", torch.zeros(4), persistent=False)
        self.plain_tensor = torch.zeros(3)

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch.pop("y")  # takes it out
        self.count += 1
        prediction = self.net(torch.nn.functional.dropout(x, 0.1))
        loss = torch.nn.functional.mse_loss(prediction, y) + self.world.step()
        x += random.random() * np.random.rand()  # writes to its batch
        self.history["losses"].append(float(loss))
        self.metric(loss)
        self.collection(prediction, y)
        self.queue += 1
        self.plain_tensor.add_(loss.detach())
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_epoch=True)
        self.log_dict(self.collection)
        return {"loss": loss}


class Dicts(Batches):
    def draw(self, index):
        x, y = super().draw(index)
        return {"x": x, "y": y}


def test_a_trial_leaves_nothing_behind(tmp_path):
    fit = {"accumulate_grad_batches": 2, "log_every_n_steps": 10}
    bad = range(160, 172)  # six steps of two
    logged = {}

    def train_with(name, run):
        logger = CSVLogger(tmp_path, name=name)
        found = run({**fit, "logger": logger})
        with open(tmp_path / name / "version_0/metrics.csv") as file:
            rows = [
                {k: v for k, v in row.items() if not k.startswith(("merge/", "merge_"))}
                for row in csv.DictReader(file)
            ]
        logged[name] = [row for row in rows if row["loss_step"] or row["loss_epoch"]]
        return found

    run = train_with(
        "a", lambda f: spiking(tmp_path / "m", Dicts(bad=bad), 120, Everything, spike=EVIDENCE, fit=f)
    )
    alone = train_with("b", lambda f: plain(Dicts(bad=bad), 120, Everything, fit=f))

    assert [event["event"] for event in of_kind(run, "hard data", "restore")] == ["hard data"]
    assert_same_bits(run.watch.weights, alone.watch.weights)
    assert_same_bits(run.watch.states, alone.watch.states)
    one, two = run.module, alone.module
    assert one.count == two.count == 240
    assert one.history == two.history
    assert (one.world.position, one.world.visited) == (two.world.position, two.world.visited)
    assert np.array_equal(one.world.map, two.world.map)
    assert torch.equal(one.world.memory, two.world.memory)
    assert torch.equal(one.world.torch.get_state(), two.world.torch.get_state())
    assert torch.equal(one.queue, two.queue)
    assert torch.equal(one.plain_tensor, two.plain_tensor)
    for kept, expected in zip(
        one.metric.metric_state.values(), two.metric.metric_state.values(), strict=True
    ):
        assert torch.equal(kept, expected)
    assert one.collection["MeanSquaredError"].total == two.collection["MeanSquaredError"].total
    key = [{k: v for k, v in row.items() if k not in ("epoch",)} for row in logged["b"]]
    assert [{k: row.get(k, "") for k in key[0]} for row in logged["a"]] == key
    assert BURST
