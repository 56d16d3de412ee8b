"""The three checks for libraries that train with a Lightning Trainer, of either name."""

import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from merge_callback import CheckpointMergeCallback, load_merge
from tests.ecosystem.comparison import (
    EVERY,
    MERGING,
    WINDOW,
    Findings,
    assert_emissions,
    assert_mean_weights,
    assert_metrics,
    assert_same_weights,
    merge_files,
)
from tests.support.training_runs import weights_of


def checked(
    library: str,
    namespace: Any,
    train: Callable,
    load: Callable,
    validate: Callable | None = None,
    load_checkpoint: Callable | None = None,
    exclude: str | None = None,
    **options: Any,
) -> Findings:
    """Trains with and without the callback and compares.

    Args:
        library: its name on PyPI.
        namespace: ``lightning.pytorch`` or ``pytorch_lightning``, whichever the library trains with.
        train: from a list of callbacks and a folder to whatever the library trains, always from one seed.
        load: from the folder of an emission to the state dict of a new object that the library loads.
        validate: from what was trained, with the merged weights in it, to the metrics by name; default:
            by the trainer of the fit, once it is over.
        load_checkpoint: from the folder of a merge of Lightning checkpoints and the newest of them to a
            module that the library has loaded. Without one no checkpoints are saved.
        exclude: tensors that a merge of those checkpoints copies from the newest.
        options: of the callback.
    """
    findings = Findings(library, namespace.__name__)
    root = Path(tempfile.mkdtemp(prefix="ecosystem-"))
    alone, probe = _probe(namespace), _probe(namespace)

    def saving(name: str) -> list[Any]:
        return [_saving(namespace, root / name)] if load_checkpoint else []

    train([alone, *saving("alone")], root / "run-alone")
    merging = CheckpointMergeCallback(dirpath=root / "merges", **MERGING, **options)
    with findings.checking("trains bitwise as without", "final weights"):
        trained = train([merging, probe, *saving("saved")], root / "run")
        assert len(probe.weights) >= WINDOW, f"snapshots at {list(probe.weights)} only"
        for step, weights in alone.weights.items():
            assert_same_weights(probe.weights[step], weights)
        assert_same_weights(weights_of(probe.module), weights_of(alone.module))
    with findings.checking("merges load back", "merges are the mean of their snapshots"):
        assert_emissions(root / "merges", probe.weights, load_merge)
    with findings.checking("merges load back", "the library loads the latest"):
        assert_same_weights(load(root / "merges/latest"), load_merge(root / "merges/latest"))
    if load_checkpoint:
        with findings.checking("merges load back", "the library's checkpoints, merged"):
            left_out = ["--exclude", exclude] if exclude else []
            merged = merge_files(root / "saved", root / "merged", "--as", "lightning", *left_out)
            snapshots = [probe.weights[step] for step in sorted(probe.weights)[-WINDOW:]]
            newest = root / "saved" / f"step={max(probe.weights)}.ckpt"
            copied = {n: t for n, t in snapshots[-1].items() if exclude and fnmatch(n, exclude)}
            found = weights_of(load_checkpoint(merged, newest))
            assert_mean_weights(found, [snapshot | copied for snapshot in snapshots])
    with findings.checking("merged metrics right", "the last validation"):
        probe.module.load_state_dict(load_merge(root / "merges/latest"))
        torch.set_rng_state(probe.random)
        logged = probe.merged  # a later validation may call the probe again
        again = partial(probe.trainer.validate, probe.module, probe.trainer.val_dataloaders, verbose=False)
        expected = validate(trained) if validate else again()[0]
        print(f"by hand {expected}\nlogged {logged}")
        assert_metrics(logged, expected)
    return findings


def _probe(namespace: Any) -> Any:
    class Probe(namespace.Callback):
        """Records the weights at each snapshot's step, and the merged metrics of each validation."""

        def __init__(self) -> None:
            self.weights: dict[int, dict[str, Tensor]] = {}
            self.merged: dict[str, float] = {}

        def __deepcopy__(self, memo: Any) -> Any:
            return self  # neuralforecast trains copies of its models

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.trainer, self.module = trainer, pl_module

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % EVERY == 0 and trainer.global_step not in self.weights:
                self.weights[trainer.global_step] = weights_of(pl_module)
            self.random = torch.get_rng_state()  # a validation may draw

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            known = {k: float(v) for k, v in trainer.callback_metrics.items()}
            self.merged = {k.removeprefix("merged/"): v for k, v in known.items() if k.startswith("merged/")}

    return Probe()


def _saving(namespace: Any, folder: Path) -> Any:
    return namespace.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=EVERY, save_top_k=-1
    )
