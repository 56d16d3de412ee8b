"""Loading a published merge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from merge_callback.checkpoints.file_names import BEST, LATEST, PROVENANCE
from merge_callback.checkpoints.merge_record import read_record
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.checks import one_of
from merge_callback.snapshots.capture import clean_name
from merge_callback.urls import is_remote, local_path


def load_merge(
    path: str | Path, module: nn.Module | str | None = None, which: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a published merge, by all their names (tied ones too): ready for ``load_state_dict``.

    They usually are those of the LightningModule; if a prefix was stripped from the names (``"model."``, as
    of a wrapped Hugging Face model), those of the model under it: ``module.model.load_state_dict(…)``. With
    ``module``, they are its own in any case: ``module.load_state_dict(load_merge(path, module))``.

    Of a run's folder, ``load_merge("…/merges", "best")`` loads the merge that scored best in its validation,
    and ``load_merge("…/merges", "latest")`` the newest.

    Args:
        path: an emission's folder, e.g. ``…/merges/latest``; also a URL that fsspec knows
            (``s3://…/merges/latest``), from which the emission is copied to a temporary folder first.
        module: what they are to be loaded into: the names are those of its ``state_dict`` then, with the
            prefix that was stripped and the ``_orig_mod`` of compiled parts, which published names lack. Or
            ``which`` of a run's merges it is.
        which: ``"best"`` or ``"latest"``, if ``path`` is a run's folder.

    Returns:
        New tensors in memory, in the shapes and dtypes of the files.

    Raises:
        FileNotFoundError: if there is no published merge.
        ValueError: if its record or a file of it is broken, or leads out of the folder; for another
            ``which``.
    """
    if isinstance(module, str):
        module, which = None, module
    if which is not None:
        return load_merge(f"{path}/{one_of('which', which, (BEST, LATEST))}", module)
    if is_remote(path):
        from merge_callback.checkpoints.remote_files import fetched

        with fetched(str(path)) as folder:
            return load_merge(folder, module)
    path = local_path(path)
    if not (path / PROVENANCE).exists():
        remedy = f"did you mean '{path / LATEST}'?" if (path / LATEST).exists() else f"it has no {PROVENANCE}"
        raise FileNotFoundError(f"{path}: no published merge; {remedy}")
    merge = open_checkpoint(path)
    tensors = {name: tensor.clone() for name, tensor in merge.tensors.items()}
    tensors |= {alias: tensors[kept] for alias, kept in merge.tied.items()}
    if module is None:
        return tensors
    return named_for(module, tensors, str(read_record(path).content.get("stripped_prefix") or ""))


def named_for(module: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """Tensors by the names that they have in a module's ``state_dict``, as far as it has them.

    Args:
        module: what they are to be loaded into.
        tensors: by published names.
        prefix: what was stripped from these.
    """
    own = {clean_name(name): name for name in module.state_dict()}
    return {own.get(name) or own.get(prefix + name) or name: tensor for name, tensor in tensors.items()}
