"""What a power loss after each operation of a log may leave on the disk, under three models of a file system.

In all of them what was synced lasts: a file's bytes once the file was, and a change of a folder's names once
the folder was. A change that is one call (a rename, an exchange of two names) is done as a whole or not at
all. They differ in what else lasts:

``ordered``
    Changes of names last in the order in which they were made, and a sync of anything makes all changes
    before it last: ext4 and xfs.
``unordered``
    Each change that was not synced may last or not, whatever becomes of those before it. A sync of a file or
    folder also makes the names last by which it is reached: btrfs and f2fs.
``strict``
    Likewise, but a sync makes nothing last than what it was called on, so that a name takes a sync of its own
    folder, and so on up to the root: what POSIX promises, and no more.

The bytes of a file that were not synced may be the old ones, the new ones, zeros, or cut off half-way. Where
few changes are open all their subsets are states, otherwise all, none, each one alone, all but each one, all
removals alone, and a sample.
"""

import hashlib
import random
from itertools import combinations

from .log import EMPTY, ROOT

MODELS = ("ordered", "unordered", "strict")

BYTES = ("old", "new", "zeros", "half")

FOLDER = "folder"


class Disk:
    """The files of a log up to some record: as they are, and as a power loss may leave them.

    Args:
        log: whose records are told to ``do``, one after another.
        model: of ``MODELS``.
        most: subsets of open changes that are looked at after each record.
    """

    def __init__(self, log, model, most=16):
        self.log, self.model, self.most = log, model, most
        self.kinds, self.targets = {ROOT: FOLDER}, {}
        self.now, self.contents = {ROOT: {}}, {}  # names by folder, and SHA-256 by file, as they are
        self._lasting, self._synced = {ROOT: {}}, {}  # as they are on the disk for sure
        self._open = []  # changes since, each with the folders that are still to be synced for it to last
        self._made = {}  # bytes that nobody wrote, by what they are made of

    def do(self, record):
        """Goes on by one record."""
        if "new" in record:
            self.kinds[record["new"]], self.targets[record["new"]] = record["kind"], record.get("target")
        elif "names" in record:
            _change(self.now, record["names"])
            self._open.append((record["names"], {folder for folder, _, _ in record["names"]}))
        elif "write" in record:
            self.contents[record["write"]] = record["sha"]
        elif "sync" in record:
            self._sync(record["sync"])

    def as_it_is(self):
        """All files below the root, by their paths: what a process sees."""
        return self._tree(self.now, dict.fromkeys(self.contents, "new"))

    def after_power_loss(self, dice):
        """What may be found after a power loss now: by its path of each file the SHA-256 of its bytes.

        Args:
            dice: a ``random.Random``, for what is sampled.
        """
        torn = [number for number, sha in self.contents.items() if sha != self._synced.get(number)]
        for kept, is_sampled in self._subsets(dice):
            names = {folder: dict(entries) for folder, entries in self._lasting.items()}
            for i, (changes, missing) in enumerate(self._open):
                if i in kept or not missing:
                    _change(names, changes)
            if not _is_a_tree(names, self.kinds):
                continue
            if is_sampled:
                yield self._tree(names, {number: dice.choice(BYTES) for number in torn})
                continue
            for way in BYTES if torn else ("new",):
                yield self._tree(names, dict.fromkeys(torn, way))

    def _sync(self, number):
        if self.kinds[number] == "file":
            self._synced[number] = self.contents.get(number, EMPTY)
        above = self._above(number) if self.model == "unordered" else ()
        for changes, missing in self._open:
            if self.model == "ordered":
                missing.clear()
            missing.discard(number)
            if any(target in above for _, _, target in changes):
                missing.clear()
        self._settle()
        reachable = _reachable(self._lasting, self._open)
        self._open = [change for change in self._open if {f for f, _, _ in change[0]} & reachable]
        self._lasting = {f: entries for f, entries in self._lasting.items() if f in reachable}

    def _settle(self):
        """Has the changes last that do, unless an earlier one of the same name is still open."""
        waiting, touched = [], set()
        for changes, missing in self._open:
            places = {(folder, name) for folder, name, _ in changes}
            if missing or places & touched:
                waiting.append((changes, missing))
                touched |= places
            else:
                _change(self._lasting, changes)
        self._open = waiting

    def _above(self, number):
        """A file or folder, and all folders that it lies in."""
        parents = {target: folder for folder, entries in self.now.items() for target in entries.values()}
        found = {number}
        while number in parents:
            number = parents[number]
            found.add(number)
        return found

    def _subsets(self, dice):
        """Which of the open changes last, and whether that is one of a sample."""
        open_ = [i for i, (_, missing) in enumerate(self._open) if missing]
        everything = frozenset(open_)
        if self.model == "ordered":
            yield from ((kept, False) for kept in {frozenset(), everything})
            return
        removals = frozenset(i for i in open_ if all(target is None for *_, target in self._open[i][0]))
        extremes = {frozenset(), everything, removals, everything - removals}
        yield from ((kept, False) for kept in sorted(extremes, key=sorted))
        if 2 ** len(open_) <= self.most:
            others = {frozenset(c) for n in range(len(open_) + 1) for c in combinations(open_, n)}
        else:
            others = {frozenset([i]) for i in open_} | {everything - {i} for i in open_}
            others |= {frozenset(i for i in open_ if dice.random() < 0.5) for _ in range(self.most)}
        yield from ((kept, True) for kept in sorted(others - extremes, key=sorted))

    def _tree(self, names, ways, folder=ROOT, above=""):
        tree = {}
        for name, number in names.get(folder, {}).items():
            path = f"{above}{name}"
            if self.kinds[number] == FOLDER:
                tree[path] = FOLDER
                tree |= self._tree(names, ways, number, f"{path}/")
            elif self.kinds[number] == "link":
                tree[path] = f"link {self.targets[number]}"
            else:
                tree[path] = self._bytes(number, ways.get(number, "old"))
        return tree

    def _bytes(self, number, way):
        old, new = self._synced.get(number, EMPTY), self.contents.get(number, EMPTY)
        if way in ("old", "new"):
            return old if way == "old" else new
        if (old, new, way) not in self._made:
            before, after = self.log.blob(old), self.log.blob(new)
            kept = len(before) if after.startswith(before) else 0
            half = after[: (kept + len(after)) // 2]
            torn = after[:kept] + bytes(len(after) - kept) if way == "zeros" else half
            self._made[old, new, way] = self.log.keep(torn)
        return self._made[old, new, way]


def crash_states(log, model, without=lambda record: False, seed=0, most=16):
    """All states of a log, as pairs of the disk after a record and what a power loss then may leave.

    Args:
        log: of a run.
        model: of ``MODELS``.
        without: says of a record whether to go on as if it never was: of a sync that was forgotten, say.
        seed: of the samples.
        most: of each, see ``Disk``.
    """
    disk, dice = Disk(log, model, most), random.Random(seed)
    for i, record in enumerate(log.records):
        if without(record):
            continue
        disk.do(record)
        if i >= log.start:
            yield disk, record, disk.after_power_loss(dice)


def digest(tree):
    """Says whether two trees are the same."""
    return hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()


def below(tree, folder):
    """The part of a tree that lies in a folder, by the paths in it; ``None`` if it is not there."""
    if tree.get(folder) != FOLDER:
        return None
    return {path[len(folder) + 1 :]: what for path, what in tree.items() if path.startswith(f"{folder}/")}


def lay_out(tree, log, root):
    """Makes a folder hold a tree, and nothing else."""
    for path, what in sorted(tree.items()):
        place = root / path
        if what == FOLDER:
            place.mkdir()
        elif what.startswith("link "):
            place.symlink_to(what.removeprefix("link "))
        else:
            place.write_bytes(log.blob(what))


def _change(names, changes):
    for folder, name, number in changes:
        entries = names.setdefault(folder, {})
        if number is None:
            entries.pop(name, None)
        else:
            entries[name] = number


def _is_a_tree(names, kinds):
    """Whether no folder has two names: a rename that came first is part of any that came later."""
    seen = [n for entries in names.values() for n in entries.values() if kinds[n] == FOLDER]
    return len(seen) == len(set(seen))


def _reachable(lasting, changes):
    """Folders that may still be found, whichever of the changes last."""
    targets = {}
    for folder, entries in lasting.items():
        targets.setdefault(folder, set()).update(entries.values())
    for change, _ in changes:
        for folder, _, number in change:
            targets.setdefault(folder, set()).add(number)
    found, todo = set(), [ROOT]
    while todo:
        folder = todo.pop()
        if folder not in found:
            found.add(folder)
            todo += [n for n in targets.get(folder, ()) if n in targets or n is not None]
    return found
