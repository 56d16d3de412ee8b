"""What has to hold after a power loss: of a run's folder as it is found, and of what a resume makes of it."""

import hashlib
import json
import logging
import re
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import torch
from training_runs import assert_mean

from merge_callback import load_merge
from merge_callback.cli.main import main
from merge_callback.report.history import read_history

from .states import FOLDER, below, digest, lay_out

MERGES = "new/newer/merges"
"""The run's folder below the one that is watched; none of the three was there before."""

_WRITER = re.compile(rb"(frozen-step=\d+)-[0-9a-f]{12}(?=\")")
"""The name of a frozen part that several ranks wrote: its end tells the launch."""

RECORD = "spikes.jsonl"


@dataclass(frozen=True)
class Promises:
    """What a run has let others know up to some record, and so has to be found again.

    ``published`` are emissions whose publishing has returned and whose removal has not begun. ``latest``
    leads to one of ``leads``: the last of them, or where it was pointed since. ``has_best`` says that there
    was a ``best`` when the last of them was published. ``lines`` are the events in
    ``spikes.jsonl`` at the end of the last batch, ``checkpoints`` the last two of the trainer's.
    """

    published: tuple[str, ...] = ()
    leads: tuple[str, ...] = ()
    has_best: bool = False
    lines: str = ""
    checkpoints: tuple[tuple[int, str], ...] = ()

    def after(self, record, disk):
        """The promises after one more record, of which the disk knows already."""
        what, value = record.get("mark"), record.get("value")
        if what == "published":
            has_best = f"{MERGES}/best" in disk.as_it_is()  # pointed at another one before this one
            return replace(self, published=(*self.published, value), leads=(value,), has_best=has_best)
        if what == "checkpoint":
            return replace(self, checkpoints=(*self.checkpoints[-1:], (value["step"], value["path"])))
        if what == "batch":
            sha = disk.as_it_is().get(f"{MERGES}/{RECORD}")
            return replace(self, lines=disk.log.blob(sha).decode() if sha else "")
        changed = {name: number for _, name, number in record.get("names", ())}
        if changed.get("latest") is not None:
            return replace(self, leads=(*self.leads, disk.targets[changed["latest"]]))
        kept = tuple(name for name in self.published if changed.get(name, name) is not None)
        return self if kept == self.published else replace(self, published=kept)


@dataclass
class Verdict:
    """What is wrong with a state, one line each."""

    damaged: list[str] = field(default_factory=list)
    torn: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)  # lost, but somebody was told

    def __iadd__(self, other):
        for name, lines in vars(other).items():
            vars(self)[name].extend(lines)
        return self

    @property
    def problems(self):
        """All that should not be."""
        return [f"{n}: {line}" for n, lines in vars(self).items() if n != "told" for line in lines]


def inspected(tree, log, place):
    """The tensors of an emission, which is laid out, inspected and loaded as a user does it."""
    place.mkdir(parents=True)
    lay_out(tree, log, place)
    with redirect_stdout(StringIO()) as out, redirect_stderr(out):
        assert main(["inspect", str(place)]) == 0, out.getvalue()
    return load_merge(place)


def judge_folder(tree, promises, truth, log):
    """What is wrong with a run's folder before anybody goes on in it.

    Args:
        tree: as it is found.
        promises: that the run has made.
        truth: digests of the emissions as they were when their publishing returned, by name.
        log: of the run.
    """
    verdict, merges = Verdict(), below(tree, MERGES) or {}
    names = [path for path, what in merges.items() if path.startswith("step=") and what == FOLDER]
    best = merges.get("best", "").removeprefix("link ")
    if best and best not in names:
        verdict.damaged.append(f"best leads to {best}, which is not there")
    if promises.has_best and not best:
        verdict.silent.append("best is gone")
    for name in (name for name in names if "/" not in name):
        if digest(below(merges, name)) not in truth.get(name, ()):
            verdict.damaged.append(f"{name} is not what was published: {sorted(below(merges, name))}")
    latest = merges.get("latest", "").removeprefix("link ")
    if latest and latest not in names:
        verdict.damaged.append(f"latest leads to {latest}, which is not there")
    if promises.published and latest not in promises.leads:
        verdict.silent.append(f"latest leads to {latest or 'nothing'}, not to {promises.leads}")
    verdict.silent += [f"{name} is gone" for name in promises.published if name not in names]
    sha = merges.get(RECORD)
    text = log.blob(sha).decode(errors="replace") if sha else ""
    if not text.startswith(promises.lines):
        verdict.silent.append(f"{RECORD} holds {text!r:.100}, not {promises.lines!r:.100}")
    return verdict


# --- what a resume makes of it ------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a run left that went on for an interval: its snapshots, and the last merge that it published."""

    window: dict = field(default_factory=dict)  # by step the digest of the files' bytes
    missing: list = field(default_factory=list)  # files of the manifest that are not what it says
    merge: str = ""  # digest of its tensors
    broken: list = field(default_factory=list)  # emissions in sight that are not what their record says
    differs: str = ""  # how the emission differs from the mean of what it says it is made of
    weights: str = ""  # of the live model at the end
    averages: dict = field(default_factory=dict)  # by name the last update's step and the values' digest
    told: str = ""
    error: str = ""


def outcome(merges, published, weights, is_exact, averages):
    """What a run left in its folder.

    Args:
        merges: the folder.
        published: names of what it has published itself.
        weights: of the live model by step, of the whole run.
        is_exact: whether snapshots are kept as they were.
        averages: what running averages hold at the end.
    """
    found = Outcome(weights=digest_of(weights[max(weights)]), averages=averages)
    manifest = json.loads((merges / "window/manifest.json").read_text())
    for record in manifest["snapshots"]:
        path = merges / "window" / record["file"]
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        sums = {file.name: _sha(file) for file in files if file.exists()}
        listed = json.loads((path / "shards.json").read_text())["files"] if path.is_dir() else {}
        if any(sums[name] != checksum for name, checksum in listed.items()):
            found.missing.append(f"a file of {record['file']} is not what its list says")
        found.window[record["step"]] = [_content(path / name) for name in sorted(listed)] or _content(path)
        own = sums.get("shards.json") if path.is_dir() else sums.get(path.name)
        if own != record["checksum"]:
            found.missing.append(f"{record['file']} is not what the manifest says")
    for place in sorted(merges.glob("step=*")):
        if why := _broken(place):
            found.broken.append(f"{place.name}: {why}")
    try:
        read_history(merges)
    except (OSError, ValueError) as error:
        found.broken.append(f"the record of events: {error}")
    if published:
        record = json.loads((merges / published[-1] / "merge.json").read_text())
        merge = load_merge(merges / published[-1])
        found.merge = digest_of(merge)
        steps = [snapshot["step"] for snapshot in record["snapshots"]]
        if is_exact:
            try:
                assert_mean(merge, [weights[step] for step in steps])
            except AssertionError as error:
                found.differs = str(error)
    return found


def judge_outcome(found, expected):
    """How a resumed run differs from one in a folder that nothing happened to.

    Args:
        found: the `Outcome` after a power loss.
        expected: the one without.
    """
    verdict = Verdict()
    if found.error:
        verdict.crashed.append(found.error)
        return verdict
    verdict.damaged += found.broken
    verdict.torn += found.missing
    lost = expected.window.keys() - found.window.keys()
    for step in lost:
        is_told = re.search(rf"snapshot of step {step}\b", found.told)
        (verdict.told if is_told else verdict.silent).append(f"the snapshot of step {step} is lost")
    for step, files in found.window.items():
        if files != expected.window.get(step) and not lost:  # what is left may be kept in other files
            verdict.torn.append(f"the snapshot of step {step} is another")
    if not lost and found.merge != expected.merge:
        verdict.torn.append("the next merge is another")
    if found.differs:
        verdict.torn.append(f"the next merge is not that of its snapshots: {found.differs:.200}")
    if found.weights != expected.weights:
        verdict.torn.append("the live weights are others")
    for name, average in expected.averages.items():
        if found.averages.get(name) != average:
            is_told = f"running average {name} " in found.told
            (verdict.told if is_told else verdict.torn).append(f"running average {name} is another")
    return verdict


@contextmanager
def noting(told):
    """Notes all that the package tells: warnings, and lines of its log."""

    class Told(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    handler = Told()
    loggers = [logging.getLogger(name) for name in ("merge_callback", "lightning.pytorch")]
    for logger in loggers:
        logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            told += [str(warning.message) for warning in caught]


def _broken(emission):
    try:
        files = json.loads((emission / "merge.json").read_text())["files"]
        wrong = [name for name, checksum in files.items() if _sha(emission / name) != checksum]
    except (OSError, ValueError, KeyError) as error:
        return repr(error)
    return f"{wrong} are not what merge.json says" if wrong else ""


def _sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _content(file):
    """A digest of a snapshot's file; which launch wrote the frozen part that it names does not count."""
    content = file.read_bytes() if file.exists() else b""
    return hashlib.sha256(_WRITER.sub(rb"\1", content)).hexdigest()


def digest_of(weights):
    """Says whether two mappings of tensors hold the same bits."""
    total = hashlib.sha256()
    for name, tensor in weights.items():
        total.update(name.encode())
        total.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
