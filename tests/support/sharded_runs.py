"""Fits with the merging callback on several ranks, and what each of them saw."""

import json
import logging
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import distributed_runs
import torch
import torch.distributed as dist
from distributed_runs import Run, UnevenModule
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from merge_callback import CheckpointMergeCallback, SpikeOptions
from merge_callback.sharding import Piece
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.safetensors_header import read_header
from merge_callback.snapshots.shard_files import a_file, gather_shards
from merge_callback.snapshots.snapshot_files import names_in

WINDOW, EVERY = 4, 2
OFF = SpikeOptions(action="off")


class Metrics(Logger):
    """Keeps every logged number in memory, by step and name."""

    name, version = "metrics", 0

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.seen |= {f"{step} {k}": float(v) for k, v in metrics.items() if k.startswith("merge")}


@dataclass
class Outcome:
    """What a rank saw of a fit. ``windows`` holds the steps of the window's snapshots after each step."""

    rank: int
    run: Run | None = None
    state: dict = field(default_factory=dict)
    metrics: dict = field(default_factory=dict)
    windows: dict = field(default_factory=dict)
    bytes: tuple = (0, 0)  # of a snapshot: this rank's, all
    differ: list = field(default_factory=list)  # tensors of which two ranks hold the same part, not equal
    replaced: list = field(default_factory=list)  # live tensors that are other objects at the end
    told: list = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def records(self):
        return self.state["window"]["snapshots"]

    @property
    def steps(self):
        return [record["step"] for record in self.records]


class Peek(Callback):
    """Looks at a session from outside; comes after the merging callback."""

    def __init__(self, callback, outcome):
        self.callback, self.outcome, self.live = callback, outcome, None

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self.callback is None:
            return
        session = self.callback.session
        self.outcome.windows[trainer.global_step] = [s.step for s in session.window.snapshots]
        store = session.window.store
        self.outcome.bytes = (store.layout.nbytes, store.whole.nbytes)
        if self.live is None:
            self.live = _live(trainer, module)

    def on_train_end(self, trainer, module):
        self.outcome.differ = differing(module, trainer.strategy.model)
        now = _live(trainer, module)
        self.outcome.replaced = [k for k, known in (self.live or {}).items() if now.get(k) != known]


def _live(trainer, module):
    """Every tensor of the model and its optimizers: which object, where in memory, how it is cut."""
    # FSDP1's views of its flat parameter are made anew for every forward pass.
    fsdp1 = type(trainer.strategy.model).__name__ == "FullyShardedDataParallel"
    found = {} if fsdp1 else {n: _of(t) for n, t in module.state_dict(keep_vars=True).items()}
    for i, optimizer in enumerate(trainer.optimizers):
        for j, state in enumerate(optimizer.state.values()):
            found |= {f"{i} {j} {k}": _of(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
    return found


def _of(tensor):
    cut = (str(tensor.device_mesh), str(tensor.placements)) if isinstance(tensor, DTensor) else ()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return id(tensor), local.data_ptr(), *cut


def differing(module, root):
    """Names of tensors of which two ranks hold the same part, but not the same bits; a collective call."""
    model = ModelTensors.of(module, root)
    own = {name: (model.pieces[name], tensor.clone()) for name, tensor in model.tensors.items()}
    everybody = [None] * (dist.get_world_size() if dist.is_initialized() else 1)
    dist.all_gather_object(everybody, own) if dist.is_initialized() else everybody.__setitem__(0, own)
    found = set()
    for theirs in everybody:
        for name, (piece, tensor) in theirs.items():
            if piece == own[name][0] and not torch.equal(tensor, own[name][1]):
                found.add(name)
    return sorted(found)


class Tokens:
    """Counts the tokens of a batch that ``copies`` ranks see, so that all together count it once."""

    def __init__(self, copies):
        self.copies = copies

    def __call__(self, batch):
        return batch.numel() // self.copies


def copies(strategy):
    """How many ranks see each batch, of those that count theirs."""
    if strategy == "alone":
        return 1
    return dist.get_world_size() // (2 if strategy == "fsdp2_tp" else 1)


@contextmanager
def noting(told):
    """Notes what the callback warns this rank of."""

    class Told(logging.Handler):
        def emit(self, record):
            told.append(record.getMessage())

    handler, logger = Told(logging.WARNING), logging.getLogger("merge_callback")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            logger.removeHandler(handler)
            told += [str(w.message) for w in caught if str(w.message).startswith("merge")]


def merged_fit(
    strategy, folder, *callbacks, module=None, callback=None, raises=False, trainer=None, **options
):
    """Trains with the callback, everything in ``folder``; this rank's ``Outcome``.

    Args:
        strategy: one of ``STRATEGIES``.
        folder: of the run.
        *callbacks: further ones, before the merging one (which acts first nonetheless).
        module: default: an ``UnevenModule``.
        callback: ``False``: train without.
        raises: whether to note an exception instead of raising it.
        trainer: further options of ``fit``.
        **options: of the callback.
    """
    outcome = Outcome(dist.get_rank() if dist.is_initialized() else 0)
    given = {
        "window": WINDOW,
        "every_n_steps": EVERY,
        "method": "sma",
        "dirpath": Path(folder) / "merges",
        "keep_last": None,
        "count_tokens": Tokens(copies(strategy)),
    }
    start = time.monotonic()
    with noting(outcome.told):
        if callback is None:
            callback = CheckpointMergeCallback(**{**given, **options})
        merging = [callback] if callback else []
        metrics = Metrics()
        chosen = {
            "val_check_interval": 4,
            "logger": metrics,
            "default_root_dir": str(folder),
            **(trainer or {}),
        }
        peek = Peek(callback or None, outcome)
        try:
            outcome.run = distributed_runs.fit(
                strategy, module or UnevenModule(), *callbacks, *merging, peek, **chosen
            )
        except Exception as error:
            if not raises:
                raise
            outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - start
    outcome.metrics = metrics.seen
    if callback:
        outcome.state = callback.state_dict()
    return outcome


# --- what lies on disk --------------------------------------------------------------------------------------


def published(folder):
    """The emissions by name: their ``merge.json`` without what tells two equal runs apart."""
    found = {}
    for path in sorted((Path(folder) / "merges").glob("step=*/merge.json")):
        record = json.loads(path.read_text())
        del record["run_id"]
        for snapshot in record["snapshots"]:
            del snapshot["checksum"]  # of one file, or of a list of several
        found[path.parent.name] = record
    return found


def without_diversity(emissions):
    """Records, and apart from them the diversities: those round differently."""
    plain = {
        name: {k: v for k, v in record.items() if k != "diversity"} for name, record in emissions.items()
    }
    return plain, {name: record["diversity"] for name, record in emissions.items()}


def window_folder(folder):
    return Path(folder) / "merges" / "window"


def manifest(folder):
    return json.loads((window_folder(folder) / "manifest.json").read_text())


def listed(folder):
    """The steps of the snapshots in the manifest."""
    return [record["step"] for record in manifest(folder)["snapshots"]]


def left_over(folder):
    """Names in the window's folder that the manifest does not know, and drafts anywhere."""
    known = manifest(folder)
    needed = {r[key] for r in known["snapshots"] for key in ("file", "frozen") if key in r}
    needed |= {file for files in known["saved"] for file in files}
    merges = Path(folder) / "merges"
    strange = [p.name for p in window_folder(folder).iterdir() if p.name not in {*needed, "manifest.json"}]
    drafts = [p.name for p in merges.rglob(".*") if p.name != ".lock"]
    return sorted({*strange, *drafts})


def on_rank(rank):
    """Whether this process is that rank."""
    return int(os.environ.get("LOCAL_RANK", "0")) == rank


# --- runs that are stopped and go on ------------------------------------------------------------------------


class Steady(UnevenModule):
    """Sees the same batch at every step, so that it does not matter where a loader begins anew."""

    def configure_optimizers(self):
        # All parameters: FSDP2 finds their state in another strategy's checkpoint by their number.
        return self.optimizer(self.parameters())

    def train_dataloader(self):
        (batch,) = self._batches(key=1, count=1)
        return DataLoader(batch.expand(12, -1, -1), batch_size=None)


class SaveAt(Callback):
    """Saves a checkpoint after a step, and copies the folder as a process killed then would leave it."""

    def __init__(self, step, folder, copy):
        self.step, self.folder, self.copy = step, Path(folder), Path(copy)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.folder / "last.ckpt")
            trainer.callbacks[0].session.background.drain()  # a merge being published would change names
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                copy_folder(self.folder, self.copy)
            trainer.strategy.barrier()


def copy_folder(source, target):
    shutil.copytree(source, target, symlinks=True)


def saved_fit(strategy, folder, step=7, **options):
    """A whole run, and beside it ``…-stopped``: its folder as it was at ``step``."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    save = SaveAt(step, folder, f"{folder}-stopped")
    return merged_fit(strategy, folder, save, module=Steady(), **options)


def resumed_fit(strategy, folder, **options):
    """Goes on from the checkpoint in ``folder``."""
    trainer = {"ckpt_path": str(Path(folder) / "last.ckpt"), **options.pop("trainer", {})}
    return merged_fit(strategy, folder, module=Steady(), trainer=trainer, **options)


def _frozen_part(folder, record):
    return window_folder(folder) / record.get("frozen", ""), record.get("frozen_checksum")


def snapshots(folder, names):
    """The tensors of every snapshot in the manifest, whole, by step; what is a difference is added up.

    Args:
        folder: of the run.
        names: a state dict with the shapes and dtypes.
    """
    found = {}
    for record in manifest(folder)["snapshots"]:
        out = {name: torch.empty_like(tensor) for name, tensor in names.items()}
        path = window_folder(folder) / record["file"]
        own = names_in(a_file(path))
        for where, checksum in ((path, record["checksum"]), _frozen_part(folder, record)):
            wanted = {n: Piece.all_of(t.shape) for n, t in names.items() if (n in own) == (where == path)}
            if wanted:
                gather_shards(where, checksum, wanted, out)
        if record.get("difference_to") is not None:
            before, differences = found[record["difference_to"]], _in_bf16(path)
            out = {n: before[n] + tensor if n in differences else tensor for n, tensor in out.items()}
        found[record["step"]] = out
    return found


def _in_bf16(path):
    """Names of the tensors that a snapshot keeps in bf16."""
    headers = [read_header(file).entries for file in ([path] if path.is_file() else path.glob("rank-*"))]
    return {name for header in headers for name, entry in header.items() if entry.get("dtype") == "BF16"}
