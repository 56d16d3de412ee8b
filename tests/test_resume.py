"""Runs that are stopped or killed, and resumed from Lightning's checkpoints."""

import json
import os
import random
import re
import shutil
import signal

import pytest
import torch
from killed_run import (
    STEPS,
    At,
    Held,
    Keeper,
    SaveAt,
    StopError,
    Tiny,
    Tokens,
    emissions,
    fit,
    killable_runs,
    metrics,
    outcome,
    window,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from safetensors.torch import load_file

from merge_callback import CheckpointMergeCallback, load_merge, merge_state_dicts

STORAGES = ["disk", "cpu", "device"]
CODEC = {"snapshot_codec": "delta-fp16"}
KEPT = [*({"storage": storage} for storage in STORAGES), {"storage": "disk", **CODEC}]
"""Ways to keep a window."""


def kept_id(kept):
    return " ".join(kept.values())


STOPPED = 13
"""The batch after which most runs here stop: in the middle of the second epoch, snapshots 6 8 10 12 taken."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run leaves behind that was never stopped, by its options."""
    known = {}

    def outcome_of(**options):
        key = json.dumps(options, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("unbroken")
            _, module, _ = fit(folder, **options)
            known[key] = outcome(folder, module)
        return known[key]

    return outcome_of


def stopped(folder, batch=STOPPED, stop=None, **options):
    """A run that saves a checkpoint after a batch and ends with an exception; returns the checkpoint."""
    checkpoint = folder / f"after-{batch}.ckpt"
    after_validation = options.pop("after_validation", False)
    save = SaveAt(checkpoint, batch, after_validation=after_validation, stop=stop or batch)
    with pytest.raises(StopError):
        fit(folder, callbacks=[*options.pop("callbacks", []), save], **options)
    return checkpoint


def assert_same(found, expected, but=()):
    """Two outcomes are equal, bit for bit. Retained files that are in no window may differ."""
    for what in ("weights", "latest", "emissions", "metrics"):
        if what not in but:
            assert found[what] == expected[what], what
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]
    assert found["window"]["layout"] == expected["window"]["layout"]
    for record in found["window"]["snapshots"]:
        assert found["window"]["files"][record["file"]] == record["checksum"]


def steps(merges):
    """The steps of the snapshots in a folder's window."""
    return [record["step"] for record in window(merges)["snapshots"]]


def live_files(merges):
    """Every file of the window's folder by its snapshot's step."""
    return {int(p.name[5:13]): p for p in (merges / "window").glob("step=*.safetensors")}


# --- stopped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", KEPT, ids=kept_id)
@pytest.mark.parametrize(
    ("saved", "stop", "after_validation"),
    [
        pytest.param(14, 14, False, id="at a snapshot"),
        pytest.param(13, 13, False, id="between snapshots"),
        # Lightning does not make up for a validation due after the checkpoint, so let it come before.
        pytest.param(12, 17, False, id="at a snapshot and before a validation"),
        pytest.param(10, 10, False, id="at the end of an epoch"),
        pytest.param(12, 12, True, id="after a validation"),
        pytest.param(9, 17, False, id="from before the newest snapshots"),
        pytest.param(1, 2, False, id="before the first snapshot"),
        pytest.param(22, 23, False, id="in the decay"),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, unbroken, kept, saved, stop, after_validation):
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


# --- killed -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live():
    """Lives through a run whose processes are killed; see `killed_run.live`."""
    with killable_runs() as ask:
        yield ask


@pytest.fixture(scope="module")
def survivor(tmp_path_factory, live):
    """The outcome of a run like the killed ones that nobody killed."""
    return live(tmp_path_factory.mktemp("survivor"))["outcome"]


@pytest.fixture(scope="module")
def calls(tmp_path_factory, live):
    """How many calls `merge_callback` makes in such a run."""
    counted = live(tmp_path_factory.mktemp("calls"), last={"count": "call"})
    return counted["outcome"]["counts"]["call"]


@pytest.fixture(scope="module")
def codec_survivor(tmp_path_factory, live):
    """The same, its snapshots kept as differences."""
    return live(tmp_path_factory.mktemp("codec"), options=CODEC)["outcome"]


def assert_survived(result, expected):
    *killed, last = result["ends"]
    assert last == 0, f"the resumed run ended with {last}: {result['outcome']}"
    assert all(end in (-signal.SIGKILL, 0) for end in killed)
    assert not result["damage"]
    assert not result["outcome"]["left over"]
    assert_same(result["outcome"], expected)


KINDS = {
    "while a snapshot is written": r"os.fsync \.step=\d+\.\d+\.tmp",
    "between a snapshot and its name": r"os.rename \.step=\d+\.\d+\.tmp",
    "between a snapshot and the manifest": r"open \.manifest",
    "while the manifest is written": r"os.fsync \.manifest",
    "between the manifest and its name": r"os.rename \.manifest",
    "before an eviction": r"os.remove step=\d+-",
    "while a merge is written": r"os.fsync model",
    "between a merge and its provenance": r"open \.merge",
    "between a merge and its name": r"os.rename \.step=\d+-tokens=\d+-sma\.",
    "between a merge and its pointer": r"os.symlink",
    "between the pointer and its name": r"os.rename \.latest",
    "before an old merge goes": r"os.rename step=\d+-tokens",
    "while an old merge goes": r"os.remove model",
    "between a checkpoint of Lightning's and its name": r"os.rename (?!\.|step)",
    "before an old checkpoint of Lightning's goes": r"os.remove step=\d+\.ckpt",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_a_file_operation_resumes_with_the_same_window_and_merges(
    tmp_path, live, survivor, kind
):
    places = [k for k, name in enumerate(survivor["counts"]["names"], 1) if re.match(KINDS[kind], name)]
    assert places, f"nothing like it happens: {survivor['counts']['names']}"

    # The last but one: by then everything has happened before, and a checkpoint is there to resume from.
    assert_survived(live(tmp_path, [{"file": places[-2:][0]}]), survivor)


def making_whole(names):
    """Places of the file operations from the making whole of a snapshot to the next snapshot."""
    writes = [
        (k, int(found[1]))
        for k, name in enumerate(names, 1)
        if (found := re.match(r"os.fsync \.step=(\d+)\.\d+\.tmp", name))
    ]
    again = [i for i, (_, step) in enumerate(writes) if i and step < writes[i - 1][1]]
    first, following = writes[again[-2]], writes[again[-2] + 1]  # the last but one
    return range(first[0] - 1, following[0] + 1)


@pytest.mark.parametrize("part", range(6))
def test_a_run_killed_while_a_snapshot_is_made_whole_resumes_with_the_same_window_and_merges(
    tmp_path, live, codec_survivor, part
):
    places = making_whole(codec_survivor["counts"]["names"])
    assert len(places) >= 6, f"too little happens: {codec_survivor['counts']['names']}"

    result = live(tmp_path, [{"file": places[part * len(places) // 6]}], options=CODEC)

    assert_survived(result, codec_survivor)


@pytest.mark.parametrize("moment", range(4))
def test_a_run_killed_at_any_moment_resumes_with_the_same_window_and_merges(
    tmp_path, live, survivor, calls, moment
):
    at = random.Random(moment).randrange(1, calls)

    assert_survived(live(tmp_path, [{"call": at}]), survivor)


@pytest.mark.parametrize("again", [3, 11, 19, 33])
def test_a_run_killed_again_while_it_resumes_resumes_with_the_same_window_and_merges(
    tmp_path, live, survivor, again
):
    first = random.Random(again).randrange(60, survivor["counts"]["file"])

    assert_survived(live(tmp_path, [{"file": first}, {"file": again}]), survivor)


@pytest.mark.parametrize("codec", [{}, CODEC], ids=kept_id)
def test_a_snapshot_file_cut_off_while_the_run_goes_on_does_not_end_the_run(tmp_path, live, codec):
    result = live(tmp_path, last={"CutsASnapshot": True}, options=codec)

    assert result["ends"] != [-signal.SIGBUS]
    assert result["ends"] == [0], result["outcome"]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("codec", [{}, CODEC], ids=kept_id)
def test_a_run_killed_at_every_single_file_operation_resumes_bit_for_bit(
    tmp_path, live, survivor, codec_survivor, storage, codec
):
    expected = codec_survivor if codec else survivor
    for k in range(1, expected["counts"]["file"] + 1):
        result = live(tmp_path / str(k), [{"file": k}], options={"storage": storage, **codec})
        assert_survived(result, expected)
        shutil.rmtree(tmp_path / str(k))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_killed_at_two_hundred_random_moments_resumes_bit_for_bit(tmp_path, live, survivor, calls):
    draw = random.Random(5)
    for i in range(200):
        result = live(tmp_path / str(i), [{"call": draw.randrange(1, calls)}])
        assert_survived(result, survivor)
        shutil.rmtree(tmp_path / str(i))


def test_kills_do_not_fill_the_disk_with_drafts(tmp_path):
    merges = tmp_path / "merges"
    fit(tmp_path, emit_every=1, trainer={"max_steps": 8})
    drafts = ".step=00000006-tokens=144-sma.12345.tmp", ".step=00000002-tokens=48-sma.12345.old"
    for draft in drafts:  # what processes leave that were killed while they published or removed a merge
        shutil.copytree(emissions(merges)[-1], merges / draft)
    (merges / ".latest.12345.tmp").symlink_to("nowhere")

    fit(tmp_path)

    assert [p.name for p in merges.iterdir() if p.name.startswith(".")] == [".lock"]


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


class StopAtStart(Callback):
    """Ends a run before its first batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        raise StopError


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


def decoded_files(merges):
    """The weights of a window's snapshots by their step, added up from its files."""
    found, before = {}, {}
    for record in window(merges)["snapshots"]:
        tensors = load_file(merges / "window" / record["file"])
        trained = dict(Tiny().named_parameters())
        if record["difference_to"] is not None:
            assert record["difference_to"] == max(found)
            unit = 2.0**-10  # what a 1 stands for in fp16 differences
            tensors = {n: before[n] + unit * t.float() if n in trained else t for n, t in tensors.items()}
        found[record["step"]] = before = tensors
    return found


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


# --- folders shared by runs ---------------------------------------------------------------------------------


def test_a_fresh_run_over_an_old_folder_moves_the_old_window_aside_and_both_can_be_resumed(
    tmp_path, unbroken
):
    first = stopped(tmp_path)
    shutil.move(first, tmp_path / "first.ckpt")
    (tmp_path / "metrics.jsonl").unlink()
    second = stopped(tmp_path, module=Elsewhere)
    shutil.move(second, tmp_path / "second.ckpt")
    fresh = window(tmp_path / "merges")["snapshots"]
    assert [r["step"] for r in fresh] == [6, 8, 10, 12]
    (tmp_path / "metrics.jsonl").unlink()

    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "first.ckpt", [StopAtStart()])
    old = window(tmp_path / "merges")["snapshots"]
    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "second.ckpt", [StopAtStart()], module=Elsewhere)
    assert window(tmp_path / "merges")["snapshots"] == fresh
    _, module, _ = fit(tmp_path, tmp_path / "first.ckpt")

    assert [r["step"] for r in old] == [6, 8, 10, 12]
    assert old != fresh
    found, expected = outcome(tmp_path, module), unbroken()
    assert found["window"]["snapshots"] == expected["window"]["snapshots"]
    assert found["weights"] == expected["weights"]


class Elsewhere(Tiny):
    """`Tiny` from other initial weights."""

    def __init__(self):
        super().__init__()
        torch.nn.init.normal_(self.head.weight)


def test_a_hundred_fresh_runs_over_one_folder_start(tmp_path):
    for k in range(1, 100):
        (tmp_path / f"merges/window.old-{k}").mkdir(parents=True)
    fit(tmp_path, trainer={"max_steps": 2})

    fit(tmp_path, trainer={"max_steps": 2})

    assert list((tmp_path / "merges/window.old-100").glob("*.safetensors"))


def test_two_callbacks_with_one_folder_are_refused_by_name(tmp_path):
    with pytest.raises(Exception, match=r"dirpath=.*merges"):
        fit(tmp_path, before=[CheckpointMergeCallback(every_n_steps=3, dirpath=tmp_path / "merges")])


def test_two_callbacks_that_reach_one_folder_by_two_names_are_refused_by_name(tmp_path):
    (tmp_path / "merges").mkdir()
    (tmp_path / "alias").symlink_to("merges")

    with pytest.raises(ValueError, match=r"dirpath=.* another run is using it"):
        fit(tmp_path, before=[CheckpointMergeCallback(every_n_steps=3, dirpath=tmp_path / "alias")])


@pytest.mark.parametrize("durable", [True, False])
def test_two_trainers_with_one_folder_are_refused_by_name(tmp_path, durable):
    options = {"durable": durable, "storage": "cpu", "trainer": {"logger": False}}

    def intrude(module):
        with pytest.raises(ValueError, match=r"dirpath='.*merges'.* another run is using it"):
            fit(tmp_path, **options)

    fit(tmp_path, callbacks=[At(step5=intrude)], **options)


def test_two_callbacks_with_two_folders_resume_each_with_its_own_window(tmp_path, unbroken):
    def fast():
        return CheckpointMergeCallback(window=3, every_n_steps=1, dirpath=tmp_path / "fast", evaluate=False)

    fit(tmp_path / "unbroken", before=[fast()])
    expected = window(tmp_path / "fast")
    shutil.rmtree(tmp_path / "fast")
    checkpoint = stopped(tmp_path, before=[fast()])

    fit(tmp_path, checkpoint, before=[fast()])

    assert window(tmp_path / "fast")["snapshots"] == expected["snapshots"]
    assert window(tmp_path / "merges")["snapshots"] == unbroken()["window"]["snapshots"]


def test_two_moved_callbacks_do_not_lose_their_windows_in_silence(tmp_path, recwarn):
    def pair(folder):
        return [
            CheckpointMergeCallback(window=3, every_n_steps=n, dirpath=folder / f"every-{n}", evaluate=False)
            for n in (1, 3)
        ]

    checkpoint = stopped(tmp_path, callback=False, before=pair(tmp_path / "a"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    recwarn.clear()

    with pytest.raises(StopError):
        fit(tmp_path, checkpoint, [StopAtBatchTwo()], callback=False, before=pair(tmp_path / "b"))

    told = any("merge:" in str(w.message) for w in recwarn.list)
    assert told or (steps(tmp_path / "b/every-1") == [12, 13, 14])


class StopAtBatchTwo(Callback):
    """Ends a run after one more step."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == STOPPED + 1:
            raise StopError


def test_a_folder_in_use_by_another_process_is_refused_by_name_and_free_afterwards(tmp_path, live, survivor):
    os.mkfifo(tmp_path / "hold")
    other = live(tmp_path, start={"Holds": True})["pid"]
    refused = pytest.raises(ValueError, match=r"dirpath='.*merges'.* another run is using it")
    with open(tmp_path / "hold", "w"), refused:  # the pipe opens once the other process waits at it
        fit(tmp_path, trainer={"logger": False})

    assert live(tmp_path, wait=other)["ends"] == [0]
    assert window(tmp_path / "merges")["snapshots"] == survivor["window"]["snapshots"]
    fit(tmp_path, trainer={"max_steps": 2, "logger": False})


def test_a_killed_run_can_be_restarted_while_a_process_it_forked_still_lives(tmp_path, live):
    result = live(tmp_path, [{"DiesBesideItsWorker": True}])
    try:
        worker = int((tmp_path / "worker").read_text())
        os.kill(worker, 0)  # it lives

        assert result["ends"] == [-signal.SIGKILL, 0], result["outcome"].get("log")
    finally:
        os.kill(worker, signal.SIGKILL)


# --- one callback, several fits -----------------------------------------------------------------------------


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


# --- corrupt files ------------------------------------------------------------------------------------------


def _flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _to_folder(path):
    path.unlink()
    path.mkdir()
    (path / "note.txt").write_text("not a snapshot")


def _to_link(path):
    path.unlink()
    path.symlink_to("nowhere")


CORRUPTIONS = {
    "a bit of the data": lambda path: _flip(path, -100),
    "a bit of the header": lambda path: _flip(path, 30),
    "a bit of the header's length": lambda path: _flip(path, 1),
    "the highest bit of the header's length": lambda path: _flip(path, 7),
    "cut by a byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut inside the header": lambda path: os.truncate(path, 100),
    "empty": lambda path: os.truncate(path, 0),
    "longer by a byte": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": lambda path: path.unlink(),
    "a folder": _to_folder,
    "a dangling link": _to_link,
    "another file": lambda path: path.write_bytes(random.Random(0).randbytes(6000)),
}


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """A run stopped after batch 13, to be copied; every snapshot is published and every merge kept."""
    folder = tmp_path_factory.mktemp("halfway")
    stopped(folder / "recorded", emit_every=1, keep_last=None)
    # The checkpoint knows the old place: a file missing from a copy must not be found there.
    return shutil.move(folder / "recorded", folder / "moved")


@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_a_corrupt_snapshot_is_named_and_left_out_and_later_merges_are_right(
    tmp_path, halfway, corrupt, storage
):
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder, symlinks=True)
    files = live_files(folder / "merges")
    CORRUPTIONS[corrupt](files[8])
    kept = {step: load_file(files[step]) for step in (6, 10, 12)}

    with pytest.raises(StopError), pytest.warns(UserWarning, match=r"left out.*step 8.*"):
        fit(
            folder,
            folder / "after-13.ckpt",
            [SaveAt(folder / "again.ckpt", 2, stop=2)],
            emit_every=1,
            keep_last=None,
            storage=storage,
        )

    assert steps(folder / "merges") == [6, 10, 12, 14]
    kept[14] = load_file(live_files(folder / "merges")[14])
    merged = load_merge(folder / "merges/step=00000014-tokens=336-sma")
    for name, tensor in merge_state_dicts(list(kept.values())).items():
        assert torch.equal(merged[name], tensor), name


@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("corrupt", ["a bit of the data", "deleted", "a dangling link"])
@pytest.mark.parametrize(("step", "left"), [(6, [14]), (8, [6, 14]), (12, [6, 8, 10, 14])])
def test_what_builds_on_a_corrupt_snapshot_is_left_out_too_and_the_next_builds_on_what_is_left(
    tmp_path, codec_halfway, corrupt, storage, step, left
):
    folder = tmp_path / "run"
    shutil.copytree(codec_halfway, folder, symlinks=True)
    CORRUPTIONS[corrupt](live_files(folder / "merges")[step])
    keeper = Keeper()

    with pytest.raises(StopError), pytest.warns(UserWarning, match="left out") as told:
        fit(
            folder,
            folder / "after-13.ckpt",
            [keeper, SaveAt(folder / "again.ckpt", 2, stop=2)],
            emit_every=1,
            storage=storage,
            **CODEC,
        )

    lines = [str(w.message) for w in told if "left out" in str(w.message)]
    lost = [s for s in (6, 8, 10, 12) if s >= step]
    assert [int(re.search(r"snapshot of step (\d+)", line)[1]) for line in lines] == lost
    assert all("kept as the difference to that of step" in line for line in lines[1:])
    assert steps(folder / "merges") == left
    found = decoded_files(folder / "merges")
    for name, live in keeper.weights[14].items():
        way = (live - found[left[-2]][name]).abs() if len(left) > 1 else torch.zeros(())
        # One rounding to fp16, 11 bits, of how far the weights went since the snapshot that is left.
        assert bool(((found[14][name] - live).abs() <= way * 2.0**-11 * 1.01 + 1e-7).all()), name


@pytest.fixture(scope="module")
def codec_halfway(tmp_path_factory):
    """`halfway`, its snapshots kept as differences."""
    folder = tmp_path_factory.mktemp("codec-halfway")
    stopped(folder / "recorded", emit_every=1, **CODEC)
    return shutil.move(folder / "recorded", folder / "moved")


def test_a_window_whose_every_file_is_corrupt_starts_anew(tmp_path, halfway, unbroken):
    folder = tmp_path / "run"
    shutil.copytree(halfway, folder, symlinks=True)
    for path in live_files(folder / "merges").values():
        os.truncate(path, 10)

    with pytest.warns(UserWarning, match="step 12"):
        _, module, _ = fit(folder, folder / "after-13.ckpt")

    assert outcome(folder, module)["window"]["snapshots"] == unbroken()["window"]["snapshots"]
    assert outcome(folder, module)["weights"] == unbroken()["weights"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null", b"{}"], ids=repr)
def test_an_unreadable_manifest_loses_nothing(tmp_path, unbroken, content):
    checkpoint = stopped(tmp_path)
    (tmp_path / "merges/window/manifest.json").write_bytes(content)

    _, module, _ = fit(tmp_path, checkpoint)

    assert_same(outcome(tmp_path, module), unbroken())


@pytest.mark.parametrize("content", [None, b"", b"{}"], ids=repr)
def test_a_fresh_run_does_not_delete_the_snapshots_beside_a_lost_manifest(tmp_path, unbroken, content):
    checkpoint = stopped(tmp_path)
    shutil.move(checkpoint, tmp_path / "first.ckpt")
    manifest = tmp_path / "merges/window/manifest.json"
    manifest.unlink() if content is None else manifest.write_bytes(content)
    fit(tmp_path, module=Elsewhere, trainer={"max_steps": 8, "logger": False})
    (tmp_path / "metrics.jsonl").unlink()

    with pytest.raises(StopError):
        fit(tmp_path, tmp_path / "first.ckpt", [StopAtStart()])

    assert steps(tmp_path / "merges") == [6, 8, 10, 12]


def test_files_of_others_in_the_window_folder_do_not_stop_the_run(tmp_path):
    checkpoint = stopped(tmp_path)
    (tmp_path / "merges/window/notes").mkdir()
    (tmp_path / "merges/window/notes/plan.txt").write_text("ours")

    fit(tmp_path, checkpoint)

    assert steps(tmp_path / "merges") == [20, 22, 24, 26]
    assert (tmp_path / "merges/window/notes/plan.txt").read_text() == "ours"
