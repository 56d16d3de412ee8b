"""A tiny run that resumes exactly, and copies of it that are killed at chosen file operations or calls.

Every attempt is a process of its own, which dies by SIGKILL where it is told to; the next goes on from the
last checkpoint of Lightning's that can be read. See `live`.
"""

import hashlib
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
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn.functional import cross_entropy

from merge_callback import CheckpointMergeCallback

STEPS, EVERY, WINDOW, BATCHES = 26, 2, 4, 10
"""Optimizer steps, steps between snapshots, snapshots in the window, batches in an epoch."""


class Tokens:
    """A loader whose batch number i depends on i alone, and which goes on where a checkpoint was saved."""

    def __init__(self, batches=BATCHES, offset=0):
        self.batches, self.offset, self.position = batches, offset, 0

    def __len__(self):
        return self.batches

    def __iter__(self):
        for _ in range(self.batches):
            self.position += 1
            yield self.draw(self.position)

    def draw(self, index):
        generator = torch.Generator().manual_seed(self.offset + index)
        return {"input_ids": torch.randint(16, (4, 6), generator=generator)}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Held(Tokens):
    """The same validation batches every time."""

    def __iter__(self):
        return (self.draw(index) for index in range(self.batches))


class Tiny(LightningModule):
    """Predicts the next token; has parameters, float buffers, an integer buffer, and a WSD schedule."""

    def __init__(self, width=8, steps=STEPS):
        super().__init__()
        self.steps = steps
        self.embed = nn.Embedding(16, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 16)

    def loss(self, batch):
        tokens = batch["input_ids"]
        hidden = self.norm(self.embed(tokens[:, :-1]).flatten(0, 1))
        return cross_entropy(self.head(hidden), tokens[:, 1:].flatten())

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch), batch_size=len(batch["input_ids"]))

    def configure_optimizers(self):
        def factor(step):
            return min((step + 1) / 3, 1.0, max(0.0, (self.steps - step) / 7))

        optimizer = torch.optim.AdamW(self.parameters(), lr=0.03)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Elsewhere(Tiny):
    """`Tiny` from other initial weights."""

    def __init__(self):
        super().__init__()
        nn.init.normal_(self.head.weight)


class Recorder(Logger):
    """Keeps every logged number in a file, across processes."""

    def __init__(self, path):
        super().__init__()
        self.path = Path(path)

    @property
    def name(self):
        return "recorder"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        numbers = {key: float(value) for key, value in metrics.items() if key.startswith("merge")}
        if numbers:
            with open(self.path, "a") as file:
                file.write(json.dumps([step, numbers]) + "\n")


class StopError(Exception):
    """Ends a run in the middle."""


class Keeper(Callback):
    """Remembers the live weights of every step."""

    def __init__(self):
        self.weights = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.weights[trainer.global_step] = {k: v.clone() for k, v in module.state_dict().items()}


def wait_for_snapshots(trainer):
    """Waits until nothing of ours is written beside training: a test is about to meddle with the files."""
    for callback in trainer.callbacks:
        if getattr(callback, "session", None):
            callback.session.background.drain()


class At(Callback):
    """Calls functions after steps: at the end of the batch, in the order of the callbacks."""

    acts_first = True

    def __init__(self, **calls):
        self.calls = {int(step.removeprefix("step")): call for step, call in calls.items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step in self.calls:
            wait_for_snapshots(trainer)
            self.calls[trainer.global_step](module)


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


class SaveAt(Checkpoint):
    """Saves a checkpoint after a batch (or the validation that follows it); then ends the run, if asked."""

    def __init__(self, path, batch, *, after_validation=False, stop=None):
        self.path, self.batch, self.after_validation = str(path), batch, after_validation
        self.stop = stop
        self.seen = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen += 1
        if self.seen == self.batch and not self.after_validation:
            trainer.save_checkpoint(self.path)
        self._stop_at(self.seen)

    def on_validation_end(self, trainer, module):
        if self.seen == self.batch and self.after_validation:
            trainer.save_checkpoint(self.path)
            self._stop_at(self.seen)

    def _stop_at(self, batch):
        saved = self.seen > self.batch or Path(self.path).exists()
        if self.stop is not None and saved and batch >= self.stop:
            raise StopError


def precede(callback, others):
    """Has others act before `callback`, which puts itself first in the trainer's list."""

    def preceded(hook):
        own = getattr(callback, hook)

        def act(*args):
            for other in others:
                getattr(other, hook)(*args)
            own(*args)

        return act

    callback.on_train_batch_end = preceded("on_train_batch_end")
    callback.on_train_end = preceded("on_train_end")


def fit(
    folder,
    ckpt_path=None,
    callbacks=(),
    module=Tiny,
    callback=None,
    before=(),
    data=None,
    trainer=None,
    **options,
):
    """Trains from scratch or on from a checkpoint; everything lands in `folder`.

    Args:
        folder: of the run.
        ckpt_path: to resume from.
        callbacks: further ones, after the merging one.
        module: one, or what builds one once the seed is set.
        callback: the merging one; default: a new one with `options`; False: none.
        before: further callbacks, listed before the merging one; those that `acts_first` act before it, too.
        data: the training loader.
        trainer: options of the `Trainer`.
        **options: of the merging callback.

    Returns:
        The trainer, the module and the callback.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    seed_everything(7, verbose=False)
    torch.use_deterministic_algorithms(True)
    given = {"window": WINDOW, "every_n_steps": EVERY, "dirpath": folder / "merges", "emit_every": 2}
    if callback is None:
        callback = CheckpointMergeCallback(**{**given, **options})
    if callback:
        precede(callback, [other for other in before if getattr(other, "acts_first", False)])
    before = [other for other in before if not getattr(other, "acts_first", False)]
    callbacks = [*before, *([callback] if callback else []), *callbacks]
    module = module() if callable(module) and not isinstance(module, nn.Module) else module
    chosen = {
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": 6,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "logger": Recorder(folder / "metrics.jsonl"),
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    built = Trainer(callbacks=callbacks, **{**chosen, **(trainer or {})})
    data = data or Tokens()
    built.fit(module, data, Held(3, offset=10_000), ckpt_path=ckpt_path, weights_only=True)
    return built, module, callback


def outcome(folder, module):
    """All that a run leaves behind, as primitives that hold no paths and no run id."""
    merges = Path(folder) / "merges"
    return {
        "window": window(merges),
        "emissions": {path.name: emission(path) for path in emissions(merges)},
        "latest": os.readlink(merges / "latest") if (merges / "latest").is_symlink() else None,
        "metrics": metrics(folder),
        "weights": {name: checksum_of(tensor) for name, tensor in module.state_dict().items()},
        "left over": leftovers(merges),
    }


def window(merges):
    """The manifest's records, and the checksum of every file beside it."""
    manifest = json.loads((merges / "window" / "manifest.json").read_text())
    files = {p.name: checksum(p) for p in sorted((merges / "window").glob("*.safetensors")) if p.is_file()}
    return {"snapshots": manifest["snapshots"], "layout": manifest["layout"], "files": files}


def emissions(merges):
    """The folders of the visible emissions, by name."""
    if not merges.is_dir():
        return []
    return sorted(p for p in merges.iterdir() if p.name.startswith("step=") and p.is_dir())


def emission(path):
    """The checksums of an emission's files, and what `merge.json` says but for the run's id."""
    record = json.loads((path / "merge.json").read_text())
    del record["run_id"]
    files = {p.name: checksum(p) for p in sorted(path.iterdir()) if p.name != "merge.json"}
    return {"record": record, "files": files}


def damage(merges):
    """What is wrong with the visible emissions: nothing, if what is visible is complete."""
    found = []
    for path in emissions(merges):
        try:
            content = emission(path)
        except (OSError, ValueError, KeyError) as error:
            found.append(f"{path.name}: {error!r}")
            continue
        weights = {name for name in content["files"] if name.endswith(".safetensors")}
        named = content["record"]["files"]
        if weights - named.keys() or any(content["files"].get(n) != named[n] for n in named):
            found.append(f"{path.name}: {content['files']} are not what merge.json says: {named}")
    latest = merges / "latest"
    if latest.is_symlink() and not (latest / "merge.json").is_file():
        found.append(f"latest points at {os.readlink(latest)}, which is not there")
    return found


def leftovers(merges):
    """Names under `merges` that nobody would miss."""
    found = [p.name for p in merges.iterdir() if p.name[0] == "." and p.name != ".lock"]
    return sorted(found + [p.name for p in (merges / "window").iterdir() if p.name[0] == "."])


def metrics(folder):
    """Every logged number by step and name. One that was logged with two values shows as a list."""
    found = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        step, numbers = json.loads(line)
        for name, value in numbers.items():
            values = found.setdefault(f"{step} {name}", [])
            if value not in values:
                values.append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def checksum(path):
    """SHA-256 of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def checksum_of(tensor):
    """SHA-256 of a tensor's bytes."""
    return hashlib.sha256(
        tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    ).hexdigest()


# --- killed processes ---------------------------------------------------------------------------------------


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
