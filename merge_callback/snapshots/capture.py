"""Which tensors of a live module make up a snapshot, and under which names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter, eq, is_
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from merge_callback.checks import matches_any
from merge_callback.sharding.live import local
from merge_callback.sharding.pieces import Piece
from merge_callback.snapshots.unfit import Unfit, is_plain_array, why_unfit

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Name parts that ``torch.compile``, activation checkpointing and FSDP put in: no part of the model."""

_HOLDERS = ("_parameters", "_buffers", "_modules")
"""The attributes of a module that hold its tensors and its parts, by name."""

_KIND = attrgetter("shape", "dtype", "requires_grad")
"""What may change of a tensor in place, besides its values."""


@dataclass
class ModelTensors:
    """The tensors of a module that are saved: parameters and persistent buffers, each once.

    ``tensors`` maps a clean name to the live tensor: if it is sharded, to this rank's shard (a plain tensor);
    if it is complex, to its real and imaginary parts (a last dimension of 2). ``pieces`` says which part of
    the whole that is. ``tied`` maps every further name of a shared tensor to the name it is kept under.
    ``frozen`` names the parameters that take no gradient now, ``buffers`` the persistent buffers;
    ``transient`` holds the buffers that are not saved (caches and masks). ``unfit`` says of tensors that no
    snapshot can hold why not, ``has_lazy`` whether some have no shape yet (``nn.LazyLinear``).
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: dict[str, Piece] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    buffers: set[str] = field(default_factory=set)
    transient: list[Tensor] = field(default_factory=list)
    unfit: dict[str, Unfit] = field(default_factory=dict)
    has_lazy: bool = False
    names: dict[int, str] = field(default_factory=dict)
    """By the ``id`` of the module's own tensors, as its optimizers know them."""

    def matching(self, patterns: Sequence[str]) -> set[str]:
        """Names of the tensors that match a pattern under any of their names."""
        if not patterns:
            return set()
        aliases = [*((name, name) for name in self.tensors), *self.tied.items()]
        return {kept for name, kept in aliases if matches_any(name, patterns)}

    @classmethod
    def of(cls, module: nn.Module, root: nn.Module | None = None) -> ModelTensors:
        """Collects the tensors of ``module``, in the order of its ``state_dict``.

        Args:
            module: the model, by whose names its tensors go.
            root: what a strategy has wrapped it in, if that is another module.

        Raises:
            ValueError: if a tensor has no values (on the meta device).
        """
        found, local_piece = cls(), _local_pieces(root or module)
        for name, tensor in _saved_tensors(module):
            if is_lazy(tensor):
                found.has_lazy = True  # the first forward pass gives it a shape
                continue
            if tensor.is_meta:
                raise ValueError(
                    f"tensor {name!r} has no values (it is on the meta device); "
                    "materialise the model before training starts"
                )
            if reason := why_unfit(tensor):
                found.unfit[name] = Unfit(reason, tensor.requires_grad)
                if not isinstance(tensor, nn.Parameter) and is_plain_array(tensor):
                    found.transient.append(tensor)
                continue
            first = found.names.setdefault(id(tensor), name)
            if first != name:
                found.tied[name] = first
                continue
            found.tensors[name], found.pieces[name] = local_piece(tensor)
            if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                found.frozen.add(name)
            if not isinstance(tensor, nn.Parameter):
                found.buffers.add(name)
        found.transient += [b for part in module.modules() for b in _transient_buffers(part)]
        return found


class LiveModel:
    """A module that trains: its tensors are found once, and looked up at each snapshot.

    ``ModelTensors.of`` walks the module, which takes a tenth of a second and more for 20,000 tensors. A look
    makes sure that every part of the module still holds the very same parameters, buffers and modules under
    the same names, in a tenth of that time; if not, they are found again. What may change in place is read
    each time: values, shapes, and which parameters take a gradient.

    Args:
        module: the model.
        root: what a strategy has wrapped it in, if that is another module.
    """

    def __init__(self, module: nn.Module, root: nn.Module | None = None) -> None:
        self._module, self._root = module, root or module
        self._found: ModelTensors | None = None
        self._reshard: Callable[[], None] = _nothing
        self._kinds: list[tuple[Any, ...]] = []
        self._parameters: dict[str, Tensor] = {}
        self._sharded: dict[str, Tensor] = {}
        self._parts: list[dict[str, Any]] = []
        self._content: list[object] = []

    def tensors(self) -> ModelTensors:
        """The module's tensors, without their pieces; to be read only, as autograd notices what is written.

        If it is the same object as at the last look, all names, shapes and dtypes are the same.

        Raises:
            ValueError: as ``ModelTensors.of``.
        """
        self._reshard()
        # A lazy parameter gets its values in place.
        if self._found is None or self._found.has_lazy or not self._is_as_found():
            self._found = None  # in case that what follows raises
            self._find(found := ModelTensors.of(self._module, self._root))
            if self._found is None:
                return found
        own = self._found.tensors.values()
        if not all(map(eq, map(_KIND, own), self._kinds)):
            self._kinds = [*map(_KIND, own)]
            frozen = {name for name, parameter in self._parameters.items() if not parameter.requires_grad}
            self._found = replace(self._found, frozen=frozen)  # the one before may be in use
        if self._sharded:
            shards = {name: local(tensor) for name, tensor in self._sharded.items()}
            return replace(self._found, tensors=self._found.tensors | shards)
        return self._found

    def _find(self, found: ModelTensors) -> None:
        self._parts = [vars(part) for part in self._module.modules()]
        if not all(isinstance(part.get(name), dict) for part in self._parts for name in _HOLDERS):
            return  # TorchScript makes up what a module holds at each look
        self._content, self._reshard = _content(self._parts), resharding_of(self._root)
        saved = (tensor for _, tensor in _saved_tensors(self._module) if id(tensor) in found.names)
        own = {found.names[id(tensor)]: tensor for tensor in saved}
        self._parameters = {name: t for name, t in own.items() if isinstance(t, nn.Parameter)}
        self._sharded = {name: tensor for name, tensor in own.items() if local(tensor) is not tensor}
        self._found, self._kinds = replace(found, tensors=own, pieces={}), [*map(_KIND, own.values())]

    def _is_as_found(self) -> bool:
        content = _content(self._parts)
        return len(content) == len(self._content) and all(map(is_, content, self._content))


def _content(parts: Sequence[Mapping[str, Any]]) -> list[object]:
    """All that the parts of a module hold, and under which names: in one list, which is fast to make."""
    content: list[object] = []
    for part in parts:
        if held := part["_parameters"]:
            content += [held, *held, *held.values()]
        if held := part["_modules"]:
            content += [held, *held, *held.values()]
        if held := part["_buffers"]:
            content += [held, *held, *held.values(), *sorted(part["_non_persistent_buffers_set"])]
    return content


def tensor_names(module: nn.Module) -> list[str]:
    """The names that the tensors of ``module`` are kept under, in the order of its ``state_dict``."""
    names: dict[int, str] = {}
    for name, tensor in _saved_tensors(module):
        names.setdefault(id(tensor), name)
    return list(names.values())


def complex_names(module: nn.Module) -> frozenset[str]:
    """The names of the complex tensors of ``module``."""
    return frozenset(name for name, tensor in _saved_tensors(module) if tensor.is_complex())


def clean_name(name: str) -> str:
    """``name`` without the parts that wrappers put into it.

    >>> clean_name("model._orig_mod.layer.weight")
    'model.layer.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _local_pieces(root: nn.Module) -> Callable[[Tensor], tuple[Tensor, Piece]]:
    """A function that gives what this rank holds of a tensor (as plain memory), and which part that is."""
    if not _is_distributed():
        # Not detach(): that one shares the version counter, and a graph kept across a merged validation would
        # no longer run backward, though every bit is back.
        return lambda tensor: ((own := local(tensor).data), Piece.all_of(own.shape))
    from merge_callback.sharding.shards import flat_pieces, local_piece  # costs most of a second

    resharding_of(root)()
    return partial(local_piece, flat=flat_pieces(root))


def resharding_of(root: nn.Module) -> Callable[[], None]:
    """A function that has the modules of a model show their shards, if it is sharded."""
    if not _is_distributed():
        return _nothing
    from merge_callback.sharding.shards import resharding

    return resharding(root)


def settled(root: nn.Module) -> None:
    """Ends a forward pass of a sharded model that an exception has cut off: the next one would fail."""
    if _is_distributed():
        from merge_callback.sharding.shards import settle

        settle(root)


def _nothing() -> None:
    pass


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Not state_dict(): that one copies nothing either, but runs hooks, which communicate under FSDP.
    for prefix, part in module.named_modules(remove_duplicate=False):
        persistent = {k: b for k, b in part._buffers.items() if k not in part._non_persistent_buffers_set}
        for key, tensor in (*part._parameters.items(), *persistent.items()):
            if tensor is not None:
                yield clean_name(f"{prefix}.{key}" if prefix else key), tensor


def _transient_buffers(part: nn.Module) -> list[Tensor]:
    return [b for k in part._non_persistent_buffers_set if (b := part._buffers.get(k)) is not None]
