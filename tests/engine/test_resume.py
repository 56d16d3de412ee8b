"""Runs that are stopped, and resumed from Lightning's checkpoints."""

import shutil

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from resumed_runs import CODEC, KEPT, STOPPED, STORAGES, assert_same, kept_id, live_files, stopped
from run_outcomes import metrics, outcome, window
from safetensors.torch import load_file
from tiny_run import STEPS, At, SaveAt, StopError, StopsAt, Tiny, fit

# --- stopped ------------------------------------------------------------------------------------------------


def kept_at(number):
    """Ways to keep a window; the default run has all stops on disk, and some of them in each other way."""
    every = {"disk": 1, "cpu": 4, "device": 8, "disk delta-fp16": 2}
    return [
        pytest.param(kept, id=kept_id(kept), marks=[pytest.mark.slow] * bool(number % every[kept_id(kept)]))
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
    with pytest.raises(StopError):
        fit(tmp_path, callbacks=[StopsAt(STOPPED), OnExceptionCheckpoint(tmp_path, "rescue")])

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
