"""One callback, or one folder, and several fits."""

import shutil

import pytest
from lightning.pytorch import Trainer
from resumed_runs import assert_same, steps, stopped
from run_outcomes import emission, emissions, outcome
from tiny_run import Held, StopError, StopsAt, Tiny, Tokens, fit

from merge_callback import CheckpointMergeCallback


@pytest.mark.parametrize("format", ["safetensors", "dcp"])
def test_merges_that_a_resumed_run_makes_again_are_those_that_are_there(tmp_path, format):
    options = {"format": format, "emit_every": 1, "keep_last": None, "evaluate": False}
    checkpoint = stopped(tmp_path, batch=9, stop=13, **options)
    before = {path.name: emission(path) for path in emissions(tmp_path / "merges")}
    assert len(before) > 3

    fit(tmp_path, checkpoint, trainer={"max_steps": 13}, **options)

    assert {path.name: emission(path) for path in emissions(tmp_path / "merges")} == before


def test_one_callback_serves_two_runs(tmp_path, unbroken):
    _, _, callback = fit(tmp_path)
    shutil.rmtree(tmp_path / "merges")
    (tmp_path / "metrics.jsonl").unlink()

    _, module, _ = fit(tmp_path, callback=callback)

    assert_same(outcome(tmp_path, module), unbroken())


def test_a_second_fit_of_one_trainer_goes_on_with_the_window(tmp_path):
    trainer, module, _ = fit(tmp_path, trainer={"max_steps": 13})
    assert steps(tmp_path / "merges") == [6, 8, 10, 12]
    trainer.fit_loop.epoch_loop.max_steps = 17

    trainer.fit(module, Tokens(offset=500))

    assert steps(tmp_path / "merges") == [10, 12, 14, 16]
    assert not list((tmp_path / "merges").glob("window.old*"))


def test_one_callback_goes_on_from_a_checkpoint_that_knows_nothing_of_it_with_an_empty_window(tmp_path):
    _, _, callback = fit(tmp_path / "first")
    foreign = stopped(tmp_path / "foreign", callback=False)

    fit(tmp_path / "second", foreign, callback=callback, trainer={"max_steps": 16})

    # Both runs live in the callback's own folder; the first one's weights must not enter the second's merges.
    assert steps(tmp_path / "first/merges") == [14, 16]


def test_one_callback_survives_two_fits_on_batches_without_tokens(tmp_path):
    class Floats(Tokens):
        def draw(self, index):
            return {"values": super().draw(index)["input_ids"].float()}

    class OnFloats(Tiny):
        def loss(self, batch):
            if "values" in batch:
                batch = {"input_ids": batch["values"].long()}
            return super().loss(batch)

    _, _, callback = fit(tmp_path, module=OnFloats, data=Floats())

    fit(tmp_path, module=OnFloats, data=Floats(), callback=callback)

    assert steps(tmp_path / "merges") == [20, 22, 24, 26]


def test_a_failed_fit_leaves_a_later_validation_alone(tmp_path, caplog):
    batches = []

    class Counts(Tiny):
        def validation_step(self, batch, batch_idx):
            batches.append(batch_idx)
            super().validation_step(batch, batch_idx)

    module, callback = Counts(), merging(tmp_path)
    with pytest.raises(StopError):
        fit(tmp_path, module=module, callback=callback, callbacks=[StopsAt(15)])
    batches.clear()
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )

    trainer.validate(module, Held(2), verbose=False)

    assert batches == [0, 1]
    assert list(trainer.callback_metrics) == ["val_loss"]
    assert "merged weights" not in caplog.text


def merging(folder, **options):
    """A callback as in `fit`."""
    given = {"window": 4, "every_n_steps": 2, "dirpath": folder / "merges", "emit_every": 2}
    return CheckpointMergeCallback(**{**given, **options})
