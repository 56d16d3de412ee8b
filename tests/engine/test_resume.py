"""Runs that are stopped, and resumed from Lightning's checkpoints."""

import shutil

import pytest
import torch
from killed_run import (
    STEPS,
    At,
    Held,
    SaveAt,
    StopError,
    Tiny,
    Tokens,
    emission,
    emissions,
    fit,
    metrics,
    outcome,
    window,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from resumed_runs import (
    CODEC,
    KEPT,
    STOPPED,
    STORAGES,
    StopAtStart,
    assert_same,
    decoded_files,
    kept_id,
    live_files,
    steps,
    stopped,
)
from safetensors.torch import load_file

from merge_callback import CheckpointMergeCallback

# --- stopped ------------------------------------------------------------------------------------------------


def kept_at(number):
    """Ways to keep a window; every other stop in memory, every fourth on a device is of the default run."""
    every = {"disk": 1, "cpu": 2, "device": 4}
    return [
        pytest.param(kept, id=kept_id(kept), marks=[pytest.mark.slow] * bool(number % every[kept["storage"]]))
        for kept in KEPT
    ]


STOPS = {
    "at a snapshot": (14, 14, False),
    "between snapshots": (13, 13, False),
    # Lightning does not make up for a validation due after the checkpoint, so let it come before.
    "at a snapshot and before a validation": (12, 17, False),
    "at the end of an epoch": (10, 10, False),
    "from before the newest snapshots": (9, 17, False),
    "after a validation": (12, 12, True),
    "before the first snapshot": (1, 2, False),
    "in the decay": (22, 23, False),
}
"""The batches after which a checkpoint is saved and the run stops, and whether after a validation."""


@pytest.mark.parametrize(
    ("when", "kept"),
    [
        pytest.param(when, *kept.values, id=f"{when}-{kept.id}", marks=kept.marks)
        for n, when in enumerate(STOPS)
        for kept in kept_at(n)
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, unbroken, when, kept):
    saved, stop, after_validation = STOPS[when]
    checkpoint = stopped(tmp_path, saved, stop, after_validation=after_validation, **kept)

    _, module, _ = fit(tmp_path, checkpoint, **kept)

    assert_same(outcome(tmp_path, module), unbroken(**kept))


@pytest.mark.parametrize("codec", [{}, CODEC], ids=kept_id)
def test_storages_hold_the_same_bytes(unbroken, codec):
    disk, cpu, device = (unbroken(storage=storage, **codec) for storage in STORAGES)
    assert disk == cpu == device


@pytest.mark.parametrize("saved", [13, 14, 16, 18], ids="batch {}".format)
def test_a_run_that_accumulates_gradients_resumes_with_the_same_clock(tmp_path, saved):
    options = {"accumulate_grad_batches": 3, "max_steps": 12, "val_check_interval": 10}
    fit(tmp_path / "unbroken", trainer=options)
    checkpoint = stopped(tmp_path / "merging", saved, trainer=options)
    plain = stopped(tmp_path / "plain", saved, trainer=options, callback=False)

    _, module, _ = fit(tmp_path / "merging", checkpoint, trainer=options)
    _, expected, _ = fit(tmp_path / "plain", plain, trainer=options, callback=False)

    # Lightning loses the gradients accumulated before the checkpoint, so the weights are those of a
    # run that was resumed without us; clock, phases and steps are those of the unbroken run.
    known = ("step", "tokens", "lr", "phase", "since")
    found = [[r[k] for k in known] for r in window(tmp_path / "merging/merges")["snapshots"]]
    assert found == [[r[k] for k in known] for r in window(tmp_path / "unbroken/merges")["snapshots"]]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_an_interval_in_tokens_survives_a_stop(tmp_path, unbroken):
    interval = {"every_n_steps": None, "every_n_tokens": 55}  # 24 tokens a step: no multiple of it

    checkpoint = stopped(tmp_path, **interval)
    _, module, _ = fit(tmp_path, checkpoint, **interval)

    assert_same(outcome(tmp_path, module), unbroken(**interval))


@pytest.mark.parametrize("codec", [{}, CODEC], ids=kept_id)
def test_a_run_stopped_and_resumed_again_and_again_ends_the_same(tmp_path, unbroken, codec):
    checkpoint = None
    for batch in (5, 3, 6, 2, 3):
        save = SaveAt(tmp_path / "last.ckpt", batch, stop=batch)
        with pytest.raises(StopError):
            fit(tmp_path, checkpoint, [save], **codec)
        checkpoint = tmp_path / "last.ckpt"
        shutil.copy(checkpoint, tmp_path / "resume.ckpt")
        checkpoint.unlink()
        checkpoint = tmp_path / "resume.ckpt"

    _, module, _ = fit(tmp_path, checkpoint, **codec)

    assert_same(outcome(tmp_path, module), unbroken(**codec))


@pytest.mark.parametrize("codec", [{}, CODEC], ids=kept_id)
def test_a_resume_that_fails_early_can_be_repeated(tmp_path, unbroken, codec):
    checkpoint = stopped(tmp_path, **codec)
    for batch in (1, 4):  # each saves once more before it fails
        with pytest.raises(StopError):
            fit(tmp_path, checkpoint, [SaveAt(tmp_path / f"{batch}.ckpt", batch, stop=batch)], **codec)

    _, module, _ = fit(tmp_path, checkpoint, **codec)

    assert_same(outcome(tmp_path, module), unbroken(**codec))


def test_a_finished_run_that_is_resumed_changes_nothing(tmp_path, unbroken):
    checkpoint = tmp_path / "last.ckpt"
    fit(tmp_path, callbacks=[SaveAt(checkpoint, STEPS)])

    _, module, _ = fit(tmp_path, checkpoint)

    assert_same(outcome(tmp_path, module), unbroken())


def test_a_phase_that_is_recognised_late_gives_the_same_merge_after_a_resume(tmp_path, unbroken):
    # The decay since step 20 is known at step 22, after snapshot 21 passed for a stable one.
    options = {"every_n_steps": 3, "trainer": {"val_check_interval": 23}}
    fit(tmp_path / "unbroken", **options)
    checkpoint = stopped(tmp_path / "resumed", 22, **options)

    fit(tmp_path / "resumed", checkpoint, **options)

    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "unbroken")


def test_the_checkpoint_written_on_an_exception_resumes_bit_for_bit(tmp_path, unbroken):
    class Fails(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == STOPPED:
                raise StopError

    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[Fails(), OnExceptionCheckpoint(tmp_path, "rescue")])

    _, module, _ = fit(tmp_path, tmp_path / "rescue.ckpt")

    assert_same(outcome(tmp_path, module), unbroken())


def test_an_exception_inside_the_merged_validation_saves_the_live_weights(tmp_path):
    class Interrupted(BaseException):
        pass

    batches = []

    class Fragile(Tiny):
        def validation_step(self, batch, batch_idx):
            batches.append(self.trainer.global_step)
            if batches.count(12) == 5:  # the second of the three with the merged weights
                raise Interrupted
            super().validation_step(batch, batch_idx)

    with pytest.raises(Interrupted):
        fit(tmp_path, module=Fragile, callbacks=[OnExceptionCheckpoint(tmp_path, "rescue")])

    saved = torch.load(tmp_path / "rescue.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    trained = load_file(live_files(tmp_path / "merges")[12])
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, trained[name]), name


def test_a_checkpoint_saved_by_an_ordinary_callback_resumes_bit_for_bit(tmp_path, unbroken):
    class Saves(Callback):  # no `Checkpoint`, so Lightning does not run it last
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 13:  # Lightning skips a validation due at the step it resumes from
                trainer.save_checkpoint(tmp_path / "own.ckpt")
                raise StopError

    with pytest.raises(StopError):
        fit(tmp_path, before=[Saves()])

    _, module, _ = fit(tmp_path, tmp_path / "own.ckpt")

    assert_same(outcome(tmp_path, module), unbroken())


class TwoOptimizers(Tiny):
    """Steps its optimizers in turn, each with its own learning rate."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[self.trainer.global_step % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()

    def configure_optimizers(self):
        first, *others = self.parameters()
        return [torch.optim.AdamW([first], lr=0.01), torch.optim.AdamW(others, lr=0.01)]


@pytest.mark.parametrize("batch", [13, 14])
def test_optimizers_that_step_in_turn_resume_in_the_same_phase(tmp_path, batch):
    fit(tmp_path / "unbroken", module=TwoOptimizers)
    checkpoint = stopped(tmp_path / "resumed", batch, module=TwoOptimizers)

    fit(tmp_path / "resumed", checkpoint, module=TwoOptimizers)

    found, expected = window(tmp_path / "resumed/merges"), window(tmp_path / "unbroken/merges")
    assert found["snapshots"] == expected["snapshots"]


def test_an_optimizer_that_loads_its_own_state_stays_in_its_phase(tmp_path, unbroken):
    def reload(module):
        optimizer = module.optimizers().optimizer
        optimizer.load_state_dict(optimizer.state_dict())

    _, module, _ = fit(tmp_path, callbacks=[At(step11=reload)])

    assert_same(outcome(tmp_path, module), unbroken())


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_the_older_of_two_checkpoints_finds_all_that_its_differences_build_on(tmp_path, unbroken, storage):
    options = {**CODEC, "storage": storage}
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    fit(tmp_path, callbacks=[save], **options)
    kept = {path.name for path in live_files_by_name(tmp_path / "merges")}

    needed = set()
    for name in ("step=20", "step=25"):
        (state,) = (
            s
            for key, s in torch.load(tmp_path / f"c/{name}.ckpt", weights_only=True)["callbacks"].items()
            if key.startswith("CheckpointMergeCallback")
        )
        needed |= {record["file"] for record in state["window"]["snapshots"]}
    needed |= {record["file"] for record in window(tmp_path / "merges")["snapshots"]}
    assert kept == needed  # a snapshot that was made whole since has both its files there

    _, module, _ = fit(tmp_path, tmp_path / "c/step=20.ckpt", **options)

    assert_same(outcome(tmp_path, module), unbroken(**CODEC))


def live_files_by_name(merges):
    return list((merges / "window").glob("step=*.safetensors"))


# --- other places, other options ----------------------------------------------------------------------------


def test_a_run_resumed_into_another_folder_has_its_window_there(tmp_path, unbroken):
    checkpoint = stopped(tmp_path / "old")
    before = window(tmp_path / "old/merges")

    _, module, _ = fit(tmp_path / "new", checkpoint)

    found = outcome(tmp_path / "new", module)
    assert found["window"]["snapshots"] == unbroken()["window"]["snapshots"]
    assert found["weights"] == unbroken()["weights"]
    newest = unbroken()["latest"]
    assert found["emissions"][newest] == unbroken()["emissions"][newest]
    assert window(tmp_path / "old/merges") == before


def test_a_run_whose_folder_was_moved_resumes_bit_for_bit(tmp_path, unbroken):
    checkpoint = stopped(tmp_path / "old")
    shutil.move(tmp_path / "old", tmp_path / "new")

    _, module, _ = fit(tmp_path / "new", tmp_path / "new" / checkpoint.name)

    assert_same(outcome(tmp_path / "new", module), unbroken())
    assert not (tmp_path / "old").exists()


def test_a_run_resumed_without_a_folder_goes_on_where_it_was(tmp_path, unbroken):
    checkpoint = stopped(tmp_path / "old")

    _, module, _ = fit(tmp_path / "new", checkpoint, dirpath=None)

    expected = unbroken()
    found = outcome(tmp_path / "old", module)
    assert_same(found, expected, but=["metrics"])
    assert not (tmp_path / "new/merges").exists()


def test_a_half_copied_snapshot_in_the_new_folder_is_taken_from_the_old_one(tmp_path, unbroken):
    # Between two file systems a resume copies; this is one that was killed while it copied.
    checkpoint = stopped(tmp_path / "old")
    (tmp_path / "new/merges/window").mkdir(parents=True)
    for path in live_files(tmp_path / "old/merges").values():
        (tmp_path / "new/merges/window" / path.name).write_bytes(path.read_bytes()[:4500])

    fit(tmp_path / "new", checkpoint, trainer={"max_steps": 14})

    assert steps(tmp_path / "new/merges") == [8, 10, 12, 14]


def test_a_resume_from_a_checkpoint_older_than_the_kept_windows_says_so_and_goes_on(tmp_path, unbroken):
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=6, save_top_k=-1, filename="{step}")
    fit(tmp_path, callbacks=[save])

    with pytest.warns(UserWarning, match=r"left out of the restored window: snapshot of step 2"):
        _, module, _ = fit(tmp_path, tmp_path / "c/step=6.ckpt")

    found, expected = outcome(tmp_path, module), unbroken()
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]
    assert found["weights"] == expected["weights"]
    assert found["emissions"][expected["latest"]] == expected["emissions"][expected["latest"]]


def test_a_resume_from_a_too_old_checkpoint_leaves_the_windows_of_the_newest_ones_alone(tmp_path, unbroken):
    save = ModelCheckpoint(tmp_path / "c", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[save, SaveAt(tmp_path / "last.ckpt", 21, stop=21)])
    with pytest.raises(StopError), pytest.warns(UserWarning, match="left out"):  # a slip, noticed at once
        fit(tmp_path, tmp_path / "c/step=8.ckpt", [SaveAt(tmp_path / "slip.ckpt", 99, stop=1), StopAtStart()])

    _, module, _ = fit(tmp_path, tmp_path / "last.ckpt")

    found, expected = outcome(tmp_path, module), unbroken()
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]


@pytest.mark.parametrize("kept", KEPT, ids=kept_id)
@pytest.mark.parametrize("size", [2, 7])
def test_a_run_resumes_with_another_window_size(tmp_path, size, kept):
    checkpoint = stopped(tmp_path, **kept)

    fit(tmp_path, checkpoint, window=size, **kept, trainer={"max_steps": 18})

    assert steps(tmp_path / "merges") == [6, 8, 10, 12, 14, 16, 18][-size:]


@pytest.mark.parametrize(("before", "after"), [("disk", "cpu"), ("cpu", "disk"), ("device", "disk")])
@pytest.mark.parametrize("codec", [{}, CODEC], ids=kept_id)
def test_a_run_resumes_with_another_storage(tmp_path, unbroken, before, after, codec):
    checkpoint = stopped(tmp_path, storage=before, **codec)

    _, module, _ = fit(tmp_path, checkpoint, storage=after, **codec)

    assert_same(outcome(tmp_path, module), unbroken(**codec))


@pytest.mark.parametrize("size", [2, 3])
def test_a_window_of_differences_that_is_resumed_smaller_holds_the_same_weights(tmp_path, unbroken, size):
    checkpoint = stopped(tmp_path, **CODEC)
    before = decoded_files(tmp_path / "merges")

    with pytest.raises(StopError):
        fit(tmp_path, checkpoint, [StopAtStart()], window=size, **CODEC)

    found = decoded_files(tmp_path / "merges")
    assert list(found) == [6, 8, 10, 12][-size:]
    for step, tensors in found.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[step][name]), (step, name)


@pytest.mark.parametrize(("before", "after"), [({}, CODEC), (CODEC, {})], ids=["on", "off"])
def test_a_resume_with_another_codec_is_an_error_that_names_the_option(tmp_path, before, after):
    checkpoint = stopped(tmp_path, **before)
    known = window(tmp_path / "merges")

    with pytest.raises(ValueError, match=r"snapshot_codec='?\w+.* there and '?\w+.* here"):
        fit(tmp_path, checkpoint, **after)
    assert window(tmp_path / "merges") == known


def test_a_resume_with_another_codec_into_another_folder_begins_with_an_empty_window(tmp_path):
    checkpoint = stopped(tmp_path / "old")

    with pytest.warns(UserWarning, match="the window begins empty.*snapshot_codec"):
        fit(tmp_path / "new", checkpoint, trainer={"max_steps": 18}, **CODEC)

    assert steps(tmp_path / "new/merges") == [14, 16, 18]


def test_a_window_that_was_never_durable_is_named_when_it_is_gone(tmp_path):
    checkpoint = stopped(tmp_path, durable=False, storage="cpu")

    with pytest.warns(UserWarning, match="snapshot of step 12: it lived in memory only"):
        fit(tmp_path, checkpoint, durable=False, storage="cpu", trainer={"max_steps": 18})


class Deeper(Tiny):
    """Has a tensor more than the checkpoint, and accepts that."""

    def __init__(self):
        super().__init__()
        self.strict_loading = False
        self.gain = torch.nn.Parameter(torch.ones(3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint):
        checkpoint["optimizer_states"], checkpoint["lr_schedulers"] = [], []


def test_a_resume_into_a_model_with_another_layout_is_an_error_that_names_the_tensor(tmp_path):
    checkpoint = stopped(tmp_path)
    before = window(tmp_path / "merges")

    with pytest.raises(ValueError, match="gain"):
        fit(tmp_path, checkpoint, module=Deeper)
    assert window(tmp_path / "merges") == before


def test_a_resume_with_another_snapshot_dtype_is_an_error_that_names_the_option(tmp_path):
    checkpoint = stopped(tmp_path)

    with pytest.raises(ValueError, match="snapshot_dtype"):
        fit(tmp_path, checkpoint, snapshot_dtype="bf16")


# --- one callback, several fits -----------------------------------------------------------------------------


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
        fit(tmp_path, module=module, callback=callback, callbacks=[FailsAt(15)])
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


class FailsAt(Callback):
    """Raises at a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise StopError
