"""What the user is told when a run is resumed, or comes to nothing, and which state a resumed run finds."""

import pytest
import torch
from training_runs import Classifier, loader, train

from merge_callback import CheckpointMergeCallback


def merging(folder, **options) -> CheckpointMergeCallback:
    return CheckpointMergeCallback(
        **{"window": 3, "every_n_steps": 2, "dirpath": folder / "merges", **options}
    )


@pytest.fixture
def checkpoint(tmp_path):
    """Of a run of 8 steps."""
    trainer = train(Classifier(), merging(tmp_path), data=loader(), max_steps=8)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def resumed(checkpoint, *callbacks):
    return train(Classifier(), *callbacks, data=loader(), max_steps=10, ckpt_path=checkpoint)


def test_a_resume_says_what_it_took_over(checkpoint, caplog):
    with caplog.at_level("INFO"):
        resumed(checkpoint, merging(checkpoint.parent))
    [line] = [r.message for r in caplog.records if "resumed at" in r.message]
    assert line == (
        "merge: resumed at step 8: the snapshots of steps 4, 6, 8 are back, 3 merges were published, the "
        "learning rate is in its stable phase since step 0"
    )


def test_a_checkpoint_from_before_there_was_advice_resumes(checkpoint, caplog):
    saved = torch.load(checkpoint, weights_only=False)
    (own,) = (key for key in saved["callbacks"] if key.startswith("CheckpointMergeCallback"))
    for key in ("advice", "emissions"):
        del saved["callbacks"][own][key]
    torch.save(saved, checkpoint)
    with caplog.at_level("INFO"):
        resumed(checkpoint, merging(checkpoint.parent))
    assert "merge: 4 merges published" in caplog.text


def test_a_changed_dtype_is_called_that(checkpoint):
    said = r"a window in another dtype .*: 'net\.0\.weight' is F32 there and here BF16 \(4 tensors\)"
    with pytest.raises(ValueError, match=said):
        resumed(checkpoint, merging(checkpoint.parent, snapshot_dtype="bf16"))


def test_a_changed_codec_is_called_that(checkpoint):
    said = "a window in another snapshot_codec .*: snapshot_codec=None there and 'delta-fp16' here"
    with pytest.raises(ValueError, match=said):
        resumed(checkpoint, merging(checkpoint.parent, snapshot_codec="delta-fp16"))


def test_another_model_is_called_that(checkpoint):
    state = torch.load(checkpoint, weights_only=False)
    wider = Classifier()
    wider.net[2] = torch.nn.Linear(16, 5)
    state["state_dict"] = wider.state_dict()
    torch.save(state, checkpoint)
    with pytest.raises(ValueError, match="a window of another model"):
        train(wider, merging(checkpoint.parent), data=loader(), max_steps=10, ckpt_path=checkpoint)


def steps_found(callback) -> list[int]:
    return [record["step"] for record in callback._resume["window"]["snapshots"]]


def renamed(checkpoint, *keys) -> None:
    """Gives the callback's state other keys, each with as many tokens as its place."""
    saved = torch.load(checkpoint, weights_only=False)
    (own,) = (key for key in saved["callbacks"] if key.startswith("CheckpointMergeCallback"))
    state = saved["callbacks"].pop(own)
    for number, key in enumerate(keys):
        saved["callbacks"][f"CheckpointMergeCallback{key}"] = {**state, "taken": 100 + number}
    torch.save(saved, checkpoint)


OLD = "{{'dirpath': {!r}, 'every': {}, 'stable': 'sma', 'decay': 'ties'}}"


@pytest.mark.parametrize("moved", [False, True])
def test_the_state_of_an_older_version_is_found_among_several(moved, checkpoint):
    folder = checkpoint.parent
    here = str(folder / "merges")
    renamed(checkpoint, OLD.format(str(folder / "other"), 5), OLD.format("elsewhere" if moved else here, 2))
    callback = merging(folder, method={"decay": "ties"})  # the default then
    resumed(checkpoint, callback)
    assert callback._resume["taken"] == 102  # one more snapshot
    assert steps_found(callback) == [6, 8, 10]


def test_of_older_states_that_only_a_dirpath_tells_apart_it_is_that_ones(checkpoint):
    folder = checkpoint.parent
    renamed(checkpoint, OLD.format(str(folder / "other"), 2), OLD.format(str(folder / "merges"), 2))
    callback = merging(folder, method={"decay": "ties"})  # the default then
    resumed(checkpoint, callback)
    assert callback._resume["taken"] == 102


def test_states_that_nobody_can_tell_apart_are_told_of(checkpoint):
    renamed(checkpoint, OLD.format("a", 2), OLD.format("b", 2))
    with pytest.warns(UserWarning, match="the window begins empty: .* unclear which of them"):
        resumed(checkpoint, merging(checkpoint.parent / "new"))


def test_a_state_is_found_in_a_folder_of_another_name(checkpoint):
    moved = checkpoint.parent / "moved"
    (checkpoint.parent / "merges").rename(moved)
    callback = merging(checkpoint.parent, dirpath=moved)
    resumed(checkpoint, callback)
    assert steps_found(callback)[-1] == 10


class SteppingAround(Classifier):
    """Steps its optimizer so that Lightning does not count it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))
        self.optimizers(use_pl_optimizer=False).step()


class Warming(Classifier):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=1000)
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]


@pytest.mark.parametrize(
    ("make", "every", "said"),
    [
        (Classifier, 50, "no snapshot was kept in 12 steps.* shorter interval than every_n_steps=50"),
        (
            Classifier,
            8,
            "1 snapshot in 12 steps .* two of one phase .* interval than every_n_steps=8",
        ),
        (Warming, 2, "3 snapshots in 12 steps, all of the warm-up, which is never merged; train longer"),
    ],
)
def test_nothing_published_says_why_and_what_to_do(make, every, said, tmp_path):
    with pytest.warns(UserWarning, match=f"nothing was published: {said}"):
        train(make(), merging(tmp_path, every_n_steps=every), data=loader())


def test_a_module_that_steps_around_lightning_is_told_how_to_step(tmp_path):
    with pytest.warns(UserWarning, match="no optimizer step was counted; .* that self.optimizers.. returns"):
        train(SteppingAround(), merging(tmp_path), data=loader(), max_epochs=1)
