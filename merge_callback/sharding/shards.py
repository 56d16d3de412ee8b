"""Finds the part of each tensor that PyTorch's sharding leaves on a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
from torch.distributed.fsdp._traversal_utils import _get_fsdp_handles
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from merge_callback.sharding.live import local
from merge_callback.sharding.pieces import Piece


def local_piece(tensor: Tensor, flat: Mapping[int, Piece]) -> tuple[Tensor, Piece]:
    """The local part of a live tensor, and which part of the whole that is.

    Args:
        tensor: a module's tensor; may be a DTensor.
        flat: the result of ``flat_pieces`` for the model.

    Returns:
        A plain tensor that shares memory with the live one, but not its version counter: see ``capture``.
    """
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(
            tensor.shape, tensor.device_mesh, tensor.placements
        )
        piece = Piece.box(tensor.shape, offset, shape)
    else:
        piece = flat.get(id(tensor)) or Piece.all_of(tensor.shape)
    return local(tensor).data, Piece.of_pairs(piece) if tensor.is_complex() else piece


def flat_pieces(root: nn.Module) -> dict[int, Piece]:
    """The range of its tensor that each parameter sharded by FSDP1 holds, by the parameter's ``id``."""
    return {
        id(parameter): Piece.flat(shape, info.intra_param_start_idx, info.intra_param_end_idx + 1)
        if info.in_shard
        else Piece(tuple(shape), ())
        for flat in _flat_parameters(root)
        for parameter, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True)
    }


def resharding(root: nn.Module) -> Callable[[], None]:
    """Returns a function that frees gathered parameters, so that FSDP modules show their shards again.

    After a forward pass without a backward pass the root keeps its whole parameters, which would hide writes
    to the shards.
    """
    modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
    return partial(_reshard, modules, _fsdp1_handles(root))


def settle(root: nn.Module) -> None:
    """Ends a forward pass that an exception has cut off, between two steps of training.

    FSDP modules take it to be under way for ever: they would neither show their shards nor gather their
    parameters for the next one.
    """
    for module in root.modules():
        if isinstance(module, FullyShardedDataParallel):
            module.training_state = TrainingState.IDLE
        elif isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            if hasattr(module, "reset_iter_state"):  # torch 2.13
                if state._is_root:
                    module.reset_iter_state()
                continue
            state._training_state = state._training_state.__class__.IDLE
            state._state_ctx.iter_forward_root = None
            for group in getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]):
                if group is not None:
                    group.wait_for_unshard()
                    group._training_state = state._training_state
    for handle in _fsdp1_handles(root):
        handle._training_state = HandleTrainingState.IDLE


def _reshard(modules: Sequence[FSDPModule], handles: Sequence[Any]) -> None:
    for module in modules:
        module.reshard()
    for handle in handles:
        # Before the first forward pass there is nothing to free.
        if handle.uses_sharded_strategy and hasattr(handle.flat_param, "_local_shard"):
            handle.reshard(free_unsharded_flat_param=True)


def _flat_parameters(root: nn.Module) -> Iterator[Any]:
    return (handle.flat_param for handle in _fsdp1_handles(root) if handle.uses_sharded_strategy)


def _fsdp1_handles(root: nn.Module) -> list[Any]:
    if not any(isinstance(module, FullyShardedDataParallel) for module in root.modules()):
        return []
    return _get_fsdp_handles(root)
