"""Several merges of one window: each is what it is alone, the best one is published, with what all scored."""

import json
import math
import re

import pytest
import torch
from evaluation_runs import Case, Watching, fit, merging
from lightning.pytorch.callbacks import ModelCheckpoint
from training_runs import Classifier, assert_same_bits, emissions, loader, seed, weights_of

from merge_callback import CheckpointMerger, load_merge
from merge_callback.engine.candidates import Candidates
from merge_callback.engine.charts import Charts
from merge_callback.merging import Ema, Wsm
from merge_callback.snapshots.storage import DeviceMemory

CANDIDATES = {"wsm-back": Wsm(order="reversed"), "ema-2": Ema(last=2), "ties": "ties"}
OPTIONS = {"window": 4, "method": "sma", "spike": "off"}
NAMES = ["sma", *CANDIDATES]


def record(path):
    return json.loads((path / "merge.json").read_text())


def compared(folder, **options):
    return fit(Case(), merging(folder, candidates=CANDIDATES, **OPTIONS, **options), max_epochs=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def together(folder):
    return compared(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """By name: the curves of a run that merges by this method only, and its emissions by step."""
    found = {}
    for name, method in {"sma": "sma", **CANDIDATES}.items():
        place = tmp_path_factory.mktemp(name)
        run = fit(Case(), merging(place, **{**OPTIONS, "method": method}), max_epochs=3)
        found[name] = run.curves, {record(p)["step"]: load_merge(p) for p in emissions(place / "merges")}
    return found


@pytest.fixture(scope="module")
def chosen(folder, together):
    """The emissions that were chosen, by step."""
    found = {record(path)["step"]: path for path in emissions(folder / "merges")}
    return {step: path for step, path in found.items() if "candidates" in record(path)}


@pytest.mark.parametrize("name", NAMES)
def test_each_candidate_scores_what_it_scores_alone(together, alone, name):
    curves, _ = alone[name]
    assert together.curves.of(f"merged/{name}/val_loss") == curves.of("merged/val_loss")
    assert together.curves.of(f"merge_gain/{name}/val_loss") == curves.of("merge_gain/val_loss")
    assert len(curves.of("merged/val_loss")) == 3


def test_the_best_one_is_what_callbacks_monitor(together):
    best = together.curves.of("merged/val_loss")
    every = [together.curves.of(f"merged/{name}/val_loss") for name in NAMES]
    assert best == {step: min(curve[step] for curve in every) for step in best}
    assert len({min(NAMES, key=lambda n: together.curves.of(f"merged/{n}/val_loss")[s]) for s in best}) > 1
    shown = {step: seen["merged/val_loss"] for step, seen in together.metrics.seen.items()}
    assert [*shown.values()] == [*best.values()]


def test_the_best_one_is_published_with_what_all_scored(together, alone, chosen):
    assert [*chosen] == [8, 16, 24]
    for step, path in chosen.items():
        found = record(path)["candidates"]
        scores = {one["name"]: one["metrics"]["val_loss"] for one in found["scores"]}
        assert [*scores] == NAMES
        assert found["selected"] == min(scores, key=scores.get)
        assert (found["select"], found["lower_is_better"]) == ("val_loss", True)
        assert_same_bits(load_merge(path), alone[found["selected"]][1][step])
        metrics = record(path)["metrics"]["val_loss"]
        assert metrics["merged"] == min(scores.values())
        gains = {one["name"]: one["gains"]["val_loss"] for one in found["scores"]}
        assert gains[found["selected"]] == pytest.approx(metrics["live"] - metrics["merged"])
        assert f"chosen among {len(NAMES)} merges by val_loss" in (path / "README.md").read_text()


def test_emissions_between_validations_are_those_of_the_default_method(folder, alone, chosen):
    others = [path for path in emissions(folder / "merges") if path not in chosen.values()]
    assert len(others) > 3
    for path in others:
        assert_same_bits(load_merge(path), alone["sma"][1][record(path)["step"]])


def test_training_is_bitwise_that_without(together):
    plain = fit(Case(), max_epochs=3)
    assert_same_bits(together.probe.outputs, plain.probe.outputs)
    assert_same_bits(weights_of(together.module), weights_of(plain.module))


def test_one_by_one_they_are_the_same_where_there_is_no_room_for_all(tmp_path, together, chosen, monkeypatch):
    monkeypatch.setattr(DeviceMemory, "free_bytes", lambda *_: 0)
    run = compared(tmp_path)
    assert [row for row in run.curves.rows if "merged/val_loss" in row[1]] == [
        row for row in together.curves.rows if "merged/val_loss" in row[1]
    ]
    for step, path in chosen.items():
        (same,) = (tmp_path / "merges").glob(f"step={step:08d}*")
        assert same.name == path.name
        assert_same_bits(load_merge(same), load_merge(path))


def test_the_best_and_the_newest_are_loaded_by_their_pointers(folder, together, chosen):
    merges, best = folder / "merges", together.curves.of("merged/val_loss")
    step = min(chosen, key=lambda step: best[step - 1])  # Lightning draws it one step to the left
    assert_same_bits(load_merge(merges, "best"), load_merge(chosen[step]))
    assert_same_bits(load_merge(merges, which="latest"), load_merge(emissions(merges)[-1]))
    assert_same_bits(load_merge(merges, together.module, "best"), load_merge(merges, "best"))
    with pytest.raises(ValueError, match="which='newest'"):
        load_merge(merges, "newest")


def test_another_metric_and_its_direction_choose(tmp_path):
    class Rated(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("rating", self.loss(batch))

    options = {"select": "rating", "higher_is_better": ["rating"]}
    fit(Case(Rated), merging(tmp_path, candidates=CANDIDATES, **OPTIONS, **options))
    for found in [
        record(p)["candidates"] for p in emissions(tmp_path / "merges") if "candidates" in record(p)
    ]:
        scores = {one["name"]: one["metrics"]["rating"] for one in found["scores"]}
        assert found["selected"] == max(scores, key=scores.get)


def test_without_a_metric_of_that_name_the_default_is_published(tmp_path, caplog):
    fit(Case(), merging(tmp_path, candidates=["wsm"], select="acc", **OPTIONS))
    assert "each validation compares it with wsm" in caplog.text
    assert "select='acc' names no metric" in caplog.text
    assert all("-sma" in path.name for path in emissions(tmp_path / "merges"))


def test_on_a_part_of_the_batches_the_best_and_the_default_are_validated_in_full(tmp_path, together):
    seen = []

    class Counting(Classifier):
        def on_validation_start(self) -> None:
            seen.append(0)

        def validation_step(self, batch, batch_idx):
            seen[-1] += 1
            super().validation_step(batch, batch_idx)

    run = fit(Case(Counting), merging(tmp_path, candidates=CANDIDATES, evaluate_batches=1, **OPTIONS))
    first = seen[: len(seen) // 2]
    # The live weights in full; all four and the live weights on a part; one or two in full.
    assert first[:6] == [4, 1, 1, 1, 1, 1]
    assert first[6:] in ([4], [4, 4])
    for path in emissions(tmp_path / "merges"):
        if found := record(path).get("candidates"):
            assert found["batches"] == 1
            merged, step = record(path)["metrics"]["val_loss"]["merged"], record(path)["step"] - 1
            name = found["selected"]
            assert merged == run.curves.of("merged/val_loss")[step]
            assert merged == together.curves.of(f"merged/{name}/val_loss")[step]  # in full
            assert merged <= together.curves.of("merged/sma/val_loss")[step]
            assert merged != run.curves.of(f"merged/{name}/val_loss")[step]


def test_a_candidate_whose_validation_fails_is_left_out(tmp_path, caplog):
    calls = []

    class Failing(Classifier):
        def on_validation_start(self) -> None:
            calls.append(self.trainer.global_step)
            if calls.count(16) == 3:  # of the live weights, of sma, of this one
                raise RuntimeError("on purpose")

    stopping = [Watching(monitor=f"merged/{name}/val_loss") for name in ("wsm-back", "sma")]
    options = {"callbacks": lambda: stopping}
    run = fit(
        Case(Failing, trainer=options), merging(tmp_path, candidates=CANDIDATES, **OPTIONS), max_epochs=3
    )
    assert "on purpose" in caplog.text
    assert stopping[0].judged == [*run.curves.of("merged/wsm-back/val_loss").values()]
    assert stopping[1].judged == [*run.curves.of("merged/sma/val_loss").values()]
    assert run.curves.of("merged/wsm-back/val_loss").keys() == {7, 23}
    assert run.curves.of("merged/ties/val_loss").keys() == {7, 15, 23}
    plain = fit(Case(), max_epochs=3)
    assert_same_bits(weights_of(run.module), weights_of(plain.module))
    (path,) = (tmp_path / "merges").glob("step=00000016*")
    assert [one["name"] for one in record(path)["candidates"]["scores"]] == ["sma", "ema-2", "ties"]


def test_if_the_best_one_can_not_be_made_again_the_record_names_the_default(tmp_path, alone, monkeypatch):
    compare, merge, under_way = Candidates.compare, Candidates.merge, []

    def comparing(self, *args):
        under_way.append(self)
        found = compare(self, *args)
        under_way.clear()
        return found

    monkeypatch.setattr(Candidates, "compare", comparing)
    monkeypatch.setattr(Candidates, "merge", lambda *args: merge(*args) if under_way else None)
    compared(tmp_path)
    found = {path: record(path) for path in emissions(tmp_path / "merges") if "candidates" in record(path)}
    assert len(found) == 3
    for path, content in found.items():
        assert content["candidates"]["selected"] == "sma"
        assert_same_bits(load_merge(path), alone["sma"][1][content["step"]])


def test_early_stopping_and_checkpoints_follow_the_best_one_or_any(tmp_path, together):
    curve, ties = (together.curves.of(name) for name in ("merged/val_loss", "merged/ties/val_loss"))
    stopping = Watching()
    saving = ModelCheckpoint(tmp_path / "c", monitor="merged/ties/val_loss", save_top_k=-1)
    options = {"callbacks": lambda: [stopping, saving], "enable_checkpointing": True}
    fit(Case(trainer=options), merging(tmp_path, candidates=CANDIDATES, **OPTIONS), max_epochs=3)
    assert stopping.judged == [*curve.values()]
    assert sorted(map(float, saving.best_k_models.values())) == sorted(ties.values())


def test_before_the_first_merge_the_live_metrics_stand_in_for_all(tmp_path):
    # Snapshots at 6, 12, …: the first merge comes after the first validation.
    run = fit(Case(), merging(tmp_path, candidates=CANDIDATES, **OPTIONS, every_n_steps=6))
    first, second = run.metrics.seen.values()
    assert all(
        first[f"merged/{name}/val_loss"] == first["val_loss"] == first["merged/val_loss"] for name in NAMES
    )
    assert all(second[f"merged/{name}/val_loss"] != second["val_loss"] for name in NAMES)


def test_the_noise_of_the_live_metric_is_told(tmp_path, capsys):
    live = fit(Case(trainer={"val_check_interval": 2}), merging(tmp_path, candidates=["ema"], **OPTIONS))
    values = [*live.curves.of("val_loss").values()]
    (last,) = (tmp_path / "merges").glob(f"step={2 * len(values):08d}*")
    found = record(last)["candidates"]["spread"]
    assert 0 < found < max(values) - min(values)
    assert found == pytest.approx(_noise(values))


def _noise(values):
    off = sorted(abs(b - (a + c) / 2) for a, b, c in zip(values, values[1:], values[2:], strict=False))
    middle = (off[(len(off) - 1) // 2] + off[len(off) // 2]) / 2
    return middle / 0.6745 / math.sqrt(1.5)


@pytest.mark.parametrize("merged", ["merged/", "merged_"])
def test_tensorboard_draws_all_of_them_on_the_chart_of_the_live_metric(merged):
    names = ["eval_loss", "eval_acc", f"wsm-5{merged[-1]}eval_loss", f"wsm-5{merged[-1]}eval_acc"]
    layout = Charts(merged=merged).layout(names)
    assert layout["Live and merged"].keys() == layout["Gain of the merge"].keys() == {"eval_loss", "eval_acc"}
    (_, curves), (_, gains) = (chart["eval_loss"] for chart in [*layout.values()][:2])
    drawn = ["eval_loss", f"{merged}eval_loss", f"{merged}wsm-5{merged[-1]}eval_loss"]
    assert all(any(re.match(pattern, name) for pattern in curves) for name in drawn)
    assert any(re.match(pattern, "merge_gain/wsm-5/eval_loss") for pattern in gains)


# When a merge is published


def test_the_record_of_a_single_method_has_its_metrics_too(tmp_path):
    run = fit(Case(), merging(tmp_path, every_n_steps=4, window=2))
    curve = run.curves.of("merged/val_loss")
    found = {record(p)["step"]: record(p).get("metrics") for p in emissions(tmp_path / "merges")}
    assert found.keys() == {8, 12, 16}
    assert found[12] is None
    assert [found[step]["val_loss"]["merged"] for step in (8, 16)] == [curve[7], curve[15]]


def test_a_merge_that_is_held_back_is_published_when_the_run_ends_by_an_exception(tmp_path):
    class Ending(Classifier):
        def on_validation_start(self) -> None:
            if self.trainer.global_step == 16:
                raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Case(Ending), merging(tmp_path, candidates=CANDIDATES, **OPTIONS))
    newest = emissions(tmp_path / "merges")[-1]
    assert record(newest)["step"] == 16
    assert "candidates" not in record(newest)


def test_a_merge_published_before_its_comparison_does_not_pass_for_the_best_one(tmp_path):
    class Decaying(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (24.5 - step) / 9))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    # The snapshot of step 18 is the first of the decay, so the validation there is of the merge of step 16.
    callback = merging(tmp_path, candidates=CANDIDATES, **OPTIONS)
    every = {"val_check_interval": 6, "check_val_every_n_epoch": None}
    fit(Case(Decaying, trainer=every), callback, max_epochs=3)
    events = [json.loads(line) for line in (tmp_path / "merges/events.jsonl").open()]
    (event,) = [e for e in events if e["event"] == "validation" and e["step"] == 18]
    (row,) = [row for row in callback.history if row["event"] == "validation" and row["step"] == 18]
    assert event["candidates"]["selected"] != "sma"
    assert row["merge_step"] is event["merge"] is None
    assert row["merged/val_loss"] < row["merged/sma/val_loss"]


def test_a_checkpoint_between_snapshot_and_validation_lets_the_merge_be_published(tmp_path, together, chosen):
    class Ending(Classifier):
        def on_validation_start(self) -> None:
            if self.trainer.global_step == 16:
                self.trainer.save_checkpoint(tmp_path / "held.ckpt")
                raise KeyboardInterrupt

    def merger(**more):
        return merging(tmp_path, candidates=CANDIDATES, **OPTIONS, **more)

    with pytest.raises(BaseException):  # noqa: B017 - Lightning turns it into its own
        fit(Case(Ending), merger())
    for path in emissions(tmp_path / "merges"):
        if record(path)["step"] == 16:  # as if the process had been killed in the validation
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    fit(Case(), merger(), max_epochs=3, ckpt_path=tmp_path / "held.ckpt")
    steps = [record(path)["step"] for path in emissions(tmp_path / "merges")]
    assert 16 in steps
    assert len(steps) == len(set(steps))
    (last,) = (tmp_path / "merges").glob("step=00000024*")
    assert record(last)["candidates"]["selected"] in NAMES


# The other training loops


def loop(folder, **options):
    """A run of twelve steps with a validation every fourth; returns what was logged, and the live weights."""
    seed()
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    logged = []

    def loss_of(batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def validate():
        with torch.no_grad():
            return {"loss": sum(float(loss_of(batch)) for batch in loader(32)) / 4}

    given = {
        "dirpath": folder,
        "window": 3,
        "every_n_steps": 2,
        "keep_last": None,
        "method": "sma",
        **options,
    }
    with CheckpointMerger(model, optimizer, log=lambda *row: logged.append(row), **given) as merger:
        for step, batch in enumerate([*loader(96)], 1):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            merger.step(loss=loss, tokens=8)
            if step % 4 == 0:
                scores = {}
                for name in merger.candidates:
                    with merger.merged_weights(name):
                        scores[name] = validate()
                merger.log_validation(validate(), candidates=scores)
        with pytest.raises(ValueError, match="no candidate is called 'x'"), merger.merged_weights("x"):
            pass
    return logged, weights_of(model)


def test_a_loop_of_ones_own_compares_them_too(tmp_path):
    logged, weights = loop(tmp_path / "all", candidates={"ema-2": Ema(last=2), "ties": "ties"})
    alone, plain = loop(tmp_path / "one")
    assert_same_bits(weights, plain)
    assert [v["merged/sma/loss"] for v, _ in logged if "merged/sma/loss" in v] == [
        v["merged/loss"] for v, _ in alone if "merged/loss" in v
    ]
    for values in [v for v, _ in logged if "merged/loss" in v]:
        every = {name: values[f"merged/{name}/loss"] for name in ("sma", "ema-2", "ties")}
        assert values["merged/loss"] == min(every.values())
    found = [record(path) for path in emissions(tmp_path / "all") if "candidates" in record(path)]
    assert [one["step"] for one in found] == [4, 8, 12]
    for one in found:
        (chosen,) = [s for s in one["candidates"]["scores"] if s["name"] == one["candidates"]["selected"]]
        assert one["method"]["name"] == chosen["method"]
        assert one["metrics"]["loss"]["merged"] == chosen["metrics"]["loss"]
