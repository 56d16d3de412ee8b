"""Copies of the tiny run that are killed at chosen file operations or calls.

Every attempt is a process of its own, which dies by SIGKILL where it is told to; the next goes on from the
last checkpoint of Lightning's that can be read. See `live`.
"""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from forked import Forked
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from run_outcomes import damage, outcome
from tiny_run import fit, wait_for_snapshots


class CutsASnapshot(Callback):
    """Cuts the newest snapshot's file off at step 9, while the run maps it into memory."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 9:
            wait_for_snapshots(trainer)
            newest = max((Path(trainer.default_root_dir) / "merges/window").glob("step=*"))
            os.truncate(newest, 0)


class Holds(Callback):
    """Stops at step 5 until somebody has opened and closed the other end of the pipe `hold`."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            (Path(trainer.default_root_dir) / "hold").read_bytes()


class DiesBesideItsWorker(Callback):
    """Forks a process, as a loader forks its workers, and dies at step 5; the other stays."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 5:
            if (worker := os.fork()) == 0:
                os.read(os.pipe()[0], 1)  # in the middle of a slow batch
            (Path(trainer.default_root_dir) / "worker").write_text(str(worker))
            os.kill(os.getpid(), signal.SIGKILL)


_CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"}


class FileOperations:
    """Counts the file operations that change something under a folder, and dies before the k-th."""

    def __init__(self, folder, kill_at):
        self.prefix, self.kill_at, self.count, self.names = str(folder), kill_at, 0, []
        self.fsync = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if event in _CHANGES and self._concerns(event, args):
            self._step(event, args[0])

    def _concerns(self, event, args):
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return False
        if event in ("os.remove", "os.rmdir") and args[-1] != -1:
            return True  # relative to an open folder: shutil.rmtree
        paths = [os.fspath(arg) for arg in args if isinstance(arg, (str, os.PathLike))]
        return any(p.startswith(self.prefix) and not p.endswith(".jsonl") for p in paths)

    def _fsync(self, descriptor):
        self._step("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        self.fsync(descriptor)

    def _step(self, event, path):
        self.count += 1
        self.names.append(f"{event} {os.path.basename(path)}")
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Calls:
    """Counts the calls that `merge_callback`'s own code makes, and dies at the k-th."""

    def __init__(self, kill_at):
        self.kill_at, self.count = kill_at, 0
        sys.setprofile(self._hook)
        threading.setprofile(self._hook)  # snapshots are kept and merged beside training

    def _hook(self, frame, event, arg):
        if event in ("call", "c_call") and "/merge_callback/" in frame.f_code.co_filename:
            self.count += 1
            if self.count == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)


def last_checkpoint(folder):
    """The newest checkpoint of Lightning's that can be read."""
    found = []
    for path in (Path(folder) / "checkpoints").glob("*.ckpt"):
        try:
            found.append((torch.load(path, weights_only=False)["global_step"], str(path)))
        except Exception:  # cut off by the kill
            continue
    return max(found, default=(0, None))[1]


def attempt(case, kill):
    """One process of a run: trains from the last checkpoint on, to its death or to the end."""
    folder = Path(case["folder"])
    counters = {}
    resume = last_checkpoint(folder)
    checkpoints = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=5, filename="{step}")
    if "file" in kill or not kill:
        counters["file"] = FileOperations(folder, kill.get("file", -1))
    if "call" in kill or kill.get("count") == "call":
        counters["call"] = Calls(kill.get("call", -1))
    others = [kind() for kind in (CutsASnapshot, Holds, DiesBesideItsWorker) if kind.__name__ in kill]
    _, module, _ = fit(folder, resume, [*others, checkpoints], **case.get("options", {}))
    sys.setprofile(None)
    counts = {name: counter.count for name, counter in counters.items()}
    counts["names"] = counters["file"].names if "file" in counters else []
    (folder / "outcome.json").write_text(json.dumps({**outcome(folder, module), "counts": counts}))


def forked(case, kill, attempt):
    """Starts one attempt in a process of its own; returns its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            log = os.open(Path(case["folder"]) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            tempfile.tempdir = str(Path(case["folder"]))  # where Lightning writes a checkpoint at first
            attempt(case, kill)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def ended(pid):
    """Waits for a process; returns how it ended: 0, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def live(case, attempt=attempt):
    """Lives through a case: a folder, the callback's options and where its attempts are killed.

    A kill is ``{"file": k}`` (before the k-th file operation), ``{"call": k}`` (at the k-th call in
    `merge_callback`), the name of a callback from above, or ``{}`` (never). One attempt more than there are
    kills is made, and lives.

    Returns:
        How the attempts ended, what was damaged after each, and the outcome.
    """
    folder = Path(case["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    if "start" in case:  # and not wait for the end
        return {"pid": forked(case, case["start"], attempt)}
    if "wait" in case:
        return {"ends": [ended(case["wait"])]}
    ends, damaged = [], []
    for kill in [*case["kills"], case.get("last", {})]:
        ends.append(ended(forked(case, kill, attempt)))
        damaged += damage(folder / "merges")
    done = folder / "outcome.json"
    log = (folder / "log.txt").read_text()[-3000:]
    found = json.loads(done.read_text()) if done.exists() else {"log": log}
    return {"case": case, "ends": ends, "damage": damaged, "outcome": found}


@contextmanager
def killable_runs(attempt=attempt):
    """Yields `live` in a process that forks the attempts."""
    cases, theirs = multiprocessing.Pipe()
    server = Forked(_serve, theirs, attempt)
    theirs.close()

    def ask(folder, kills=(), **case):
        cases.send({"folder": str(folder), "kills": list(kills), **case})
        return cases.recv()

    try:
        yield ask
    finally:
        cases.close()
        server.wait()


def _serve(cases, attempt):
    with suppress(EOFError):
        while True:
            cases.send(live(cases.recv(), attempt))
