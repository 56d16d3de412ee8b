"""Copies of the callback and checkpoints of a run that are made while it trains and publishes."""

import copy
import pickle
import threading

import pytest
import torch
from lightning.pytorch import Callback
from training_runs import Classifier, assert_same_bits, emissions, loader, seed, train

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.publish import Publisher

OPTIONS = {"every_n_steps": 2, "window": 3, "evaluate": False}


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action, self.found = step, action, None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            self.found = self.action(trainer)


def fit(folder, *others, max_steps=12, merge=None, **options):
    seed()
    merge = merge or CheckpointMergeCallback(dirpath=folder / "merges", **OPTIONS)
    return train(Classifier(), merge, *others, data=loader(), max_steps=max_steps, **options)


# --- copies -------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda callback: pickle.loads(pickle.dumps(callback)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_in_mid_fit_resumes_like_a_checkpoint(tmp_path, how):
    def both(trainer):
        trainer.callbacks[0].session.background.drain()  # what is published is in the state, too
        trainer.save_checkpoint(tmp_path / "at6.ckpt")
        return COPIES[how](trainer.callbacks[0])

    copied = At(6, both)
    fit(tmp_path, copied)
    assert copied.found.session is None
    assert copied.found.options == CheckpointMergeCallback(dirpath=tmp_path / "merges", **OPTIONS).options

    saved = torch.load(tmp_path / "at6.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for key, state in saved.items() if key == copied.found.state_key)
    assert copied.found.state_dict() == state


def test_the_original_goes_on_as_if_it_had_not_been_copied(tmp_path):
    fit(tmp_path / "alone")
    fit(tmp_path / "copied", At(6, lambda trainer: copy.deepcopy(trainer.callbacks[0])))

    alone, copied = (emissions(tmp_path / name / "merges") for name in ("alone", "copied"))
    assert [path.name for path in alone] == [path.name for path in copied] != []
    for one, other in zip(alone, copied, strict=True):
        assert_same_bits(load_merge(one), load_merge(other))


def test_copies_are_no_checkpoints_that_a_window_is_kept_for(tmp_path):
    at6 = tmp_path / "at6.ckpt"
    save = At(6, lambda trainer: trainer.save_checkpoint(at6))
    fit(tmp_path, save, *(At(step, lambda trainer: copy.deepcopy(trainer.callbacks[0])) for step in (8, 10)))

    held = At(7, lambda trainer: [s.step for s in trainer.callbacks[0].session.window.snapshots])
    fit(tmp_path, held, ckpt_path=at6)
    assert held.found == [2, 4, 6]


# --- checkpoints while a merge is published -----------------------------------------------------------------


class Slow:
    """Holds up the publishing of the merge of one step until it is let go."""

    def __init__(self, monkeypatch, step):
        self.reached, self.go = threading.Event(), threading.Event()
        publish = Publisher.publish

        def waits(publisher, name, *args, **kwargs):
            if name.startswith(f"step={step:08d}"):
                self.reached.set()
                assert self.go.wait(60)
            return publish(publisher, name, *args, **kwargs)

        monkeypatch.setattr(Publisher, "publish", waits)

    def save(self, path):
        def action(trainer):
            assert self.reached.wait(60)
            trainer.save_checkpoint(path)
            self.go.set()

        return action


def test_a_checkpoint_does_not_wait_for_the_merge_that_is_published(tmp_path, monkeypatch):
    slow = Slow(monkeypatch, 8)
    fit(tmp_path, At(8, slow.save(tmp_path / "at8.ckpt")))  # would time out, if it waited

    assert (tmp_path / "at8.ckpt").exists()
    assert [path.name[:13] for path in emissions(tmp_path / "merges")] == [
        f"step={s:08d}" for s in (8, 10, 12)
    ]


@pytest.mark.parametrize("published", [False, True], ids=["killed before", "killed after"])
def test_a_run_that_was_killed_while_it_published_publishes_that_merge_again(
    tmp_path, monkeypatch, published
):
    """What a kill right after the checkpoint leaves, with and without the merge of step 8."""
    with monkeypatch.context() as patch:
        slow = Slow(patch, 8)
        stop = At(9, lambda trainer: setattr(trainer, "should_stop", True))
        fit(tmp_path, At(8, slow.save(tmp_path / "at8.ckpt")), stop)
    names = [path.name for path in emissions(tmp_path / "merges")]
    assert [name[:13] for name in names] == ["step=00000004", "step=00000006", "step=00000008"]
    expected = load_merge(tmp_path / "merges" / names[-1])
    if not published:
        (tmp_path / "merges" / names[-1]).rename(tmp_path / "lost")

    def names_there(trainer):
        trainer.callbacks[0].session.background.drain()
        return [path.name for path in emissions(tmp_path / "merges")]

    handed_in = At(9, names_there)

    fit(tmp_path, handed_in, ckpt_path=tmp_path / "at8.ckpt")

    assert handed_in.found == names
    assert [path.name[:13] for path in emissions(tmp_path / "merges")] == [
        f"step={s:08d}" for s in (8, 10, 12)
    ]
    assert_same_bits(load_merge(tmp_path / "merges" / names[-1]), expected)


def test_folders_that_somebody_else_has_named_are_not_taken_for_the_runs_own(tmp_path):
    fit(tmp_path, At(8, lambda trainer: trainer.save_checkpoint(tmp_path / "at8.ckpt")), max_steps=8)
    (mine,) = (path for path in emissions(tmp_path / "merges") if path.name.startswith("step=00000008"))
    kept = mine.with_name("step=00000008-the one that I like")
    kept.mkdir()
    for file in mine.iterdir():
        (kept / file.name).write_bytes(file.read_bytes())

    fit(tmp_path, ckpt_path=tmp_path / "at8.ckpt", max_steps=20)

    names = [path.name for path in emissions(tmp_path / "merges")]
    assert kept.name in names
    assert [n[:13] for n in names if n != kept.name] == [f"step={s:08d}" for s in (16, 18, 20)]
