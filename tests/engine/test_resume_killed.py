"""Runs that are killed, and resumed from Lightning's checkpoints."""

import random
import re
import shutil
import signal

import pytest
from resumed_runs import CODEC, assert_survived, kept_id
from run_outcomes import emissions
from tiny_run import fit


@pytest.fixture(scope="module")
def calls(tmp_path_factory, live):
    """How many calls `merge_callback` makes in such a run."""
    counted = live(tmp_path_factory.mktemp("calls"), last={"count": "call"})
    return counted["outcome"]["counts"]["call"]


@pytest.fixture(scope="module")
def codec_survivor(tmp_path_factory, live):
    """The same, its snapshots kept as differences."""
    return live(tmp_path_factory.mktemp("codec"), options=CODEC)["outcome"]


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


DEFAULT = [
    "while a snapshot is written",
    "between a snapshot and its name",
    "between a snapshot and the manifest",
    "between the manifest and its name",
    "before an eviction",
    "between a merge and its name",
    "between the pointer and its name",
    "between a checkpoint of Lightning's and its name",
]


@pytest.mark.parametrize(
    "kind", [*DEFAULT, *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in DEFAULT)]
)
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


@pytest.mark.parametrize("part", [0, 2, 3, 5, *(pytest.param(k, marks=pytest.mark.slow) for k in (1, 4))])
def test_a_run_killed_while_a_snapshot_is_made_whole_resumes_with_the_same_window_and_merges(
    tmp_path, live, codec_survivor, part
):
    places = making_whole(codec_survivor["counts"]["names"])
    assert len(places) >= 6, f"too little happens: {codec_survivor['counts']['names']}"

    result = live(tmp_path, [{"file": places[part * len(places) // 6]}], options=CODEC)

    assert_survived(result, codec_survivor)


@pytest.mark.parametrize("moment", [0, 1, *(pytest.param(k, marks=pytest.mark.slow) for k in (2, 3))])
def test_a_run_killed_at_any_moment_resumes_with_the_same_window_and_merges(
    tmp_path, live, survivor, calls, moment
):
    at = random.Random(moment).randrange(1, calls)

    assert_survived(live(tmp_path, [{"call": at}]), survivor)


@pytest.mark.parametrize("again", [3, 19, *(pytest.param(k, marks=pytest.mark.slow) for k in (11, 33))])
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
