"""Puts LoRA experts and routers into a model, and saves and loads them as one folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import merge_callback
from merge_callback.checkpoints.lora import LoraAdapter, plain
from merge_callback.checkpoints.open import open_checkpoint
from merge_callback.checks import one_of, positive
from merge_callback.merging.low_rank import LowRank
from merge_callback.moerge.layer import MoergedLinear, arrow
from merge_callback.snapshots.files import make_folder, read_object, replacing, write_json

Model = TypeVar("Model", bound=nn.Module)
Experts = Mapping[str, LowRank]

RECORD, TENSORS = "moerge.json", "moerge.safetensors"
_FORMAT = 1
_PARTS = ("lora_A", "lora_B", "router")


def moerge(
    base: Model,
    adapters: Sequence[str | os.PathLike[str] | Experts],
    k: int = 2,
    init: str = "arrow",
    score: str = "abs",
) -> Model:
    """Gives a model's linear layers LoRA experts, k of which each token is routed to, and returns it.

    ``y = W x + b + Σ_{t∈top-k} π_t E_t(x) / Σ_{t∈top-k} π_t`` per layer and token, with
    ``E_t(x) = s_t B_t A_t x`` (*Less Is More*, eq. 2). The layers are replaced in ``base`` itself. All its
    parameters are frozen; the experts and routers are fp32 and train, with any loop and optimizer, on a
    mixture of the experts' data (the paper: 4000 steps, peak learning rate 1e-5).

    Arrow begins each router's row with the first right singular vector v of B_tA_t. Its sign is arbitrary, so
    Arrow ranks experts by ``|v·x|``. With ``score="abs"`` π is ``softmax(|R x|)``, at the start and while
    R trains: training begins with exactly Arrow's routing. ``score="signed"`` is eq. 2 to the letter,
    ``softmax(R x)``; tokens that point away from a vector, as half of them do, then begin at other experts.

    Example::

        model = moerge(AutoModelForCausalLM.from_pretrained("base"), ["experts/law", "experts/code"])
        ...  # train it
        save_moerged(model, "moerged")
        model = load_moerged(AutoModelForCausalLM.from_pretrained("base"), "moerged")

    Args:
        base: the model that the adapters were trained on; ``nn.Linear`` and transformers' ``Conv1D`` are
            replaced.
        adapters: folders of peft's LoRA adapters, or mappings from the names of layers to factors. Ranks and
            scales may differ, the set of layers may not.
        k: experts per token.
        init: of the routers: ``"arrow"``, or ``"random"`` (normal, of variance 1/in).
        score: ``"abs"`` or ``"signed"``.

    Raises:
        ValueError: for options that make no sense, adapters that do not fit the model or each other, that
            hold more than factors of linear layers (DoRA, ``modules_to_save``, embeddings), or that changed
            the base's weights (PiSSA); says which. ``base`` is as it was then.
    """
    one_of("init", init, ("arrow", "random"))
    experts = [each if isinstance(each, Mapping) else _read(each) for each in adapters]
    _check_same_layers(experts)
    layers = {name: [expert[name] for expert in experts] for name in experts[0]}
    made = {
        name: _empty(base, name, [e.rank for e in own], [e.scale for e in own], k, score)
        for name, own in layers.items()
    }
    for name, own in layers.items():
        _fill(name, made[name], own, init)
    return _replaced(base, made)


def save_moerged(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Saves a model's routers and experts, without its base, in ``moerge.safetensors`` and ``moerge.json``.

    Args:
        model: made by `moerge` or `load_moerged`; if wrapped, the names are those of the inner model's layers
            with the wrapper's prefix, so save the inner one.
        folder: is made; may hold other files, and files of an earlier save, which are replaced.

    Raises:
        ValueError: if the model has no such layers.
    """
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, MoergedLinear)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers of moerge()")
    first = next(iter(layers.values()))
    record = {
        "format": _FORMAT,
        "merge_callback": merge_callback.__version__,
        "k": first.k,
        "score": first.score,
        "layers": {n: {"ranks": layer.ranks, "scales": layer.scales} for n, layer in layers.items()},
    }
    tensors = {
        f"{name}.{part}": getattr(layer, part).detach().cpu().contiguous()
        for name, layer in layers.items()
        for part in _PARTS
    }
    folder = Path(folder)
    make_folder(folder)
    (folder / RECORD).unlink(missing_ok=True)  # last: without a record there is nothing to load
    with replacing(folder / TENSORS) as made, open(made, "xb") as file:
        file.write(save(tensors))
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / RECORD, record)


def load_moerged(base: Model, folder: str | os.PathLike[str]) -> Model:
    """Puts saved routers and experts into a model like the one they were made for, and returns it.

    Args:
        base: the base model, without experts.
        folder: of `save_moerged`.

    Raises:
        FileNotFoundError: if nothing was saved there.
        ValueError: if the record or the tensors are incomplete, or of another base; ``base`` is as it was.
    """
    folder = Path(folder)
    record = read_object(folder / RECORD)
    if record.get("format") != _FORMAT or not isinstance(record.get("layers"), dict) or not record["layers"]:
        raise ValueError(f"{folder / RECORD}: no record of moerge() that this version reads")
    try:
        made = {
            name: _empty(base, name, each["ranks"], each["scales"], record["k"], record["score"])
            for name, each in record["layers"].items()
        }
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder / RECORD}: a broken record ({error!r})") from None
    wanted = {f"{name}.{part}": getattr(layer, part) for name, layer in made.items() for part in _PARTS}
    with safe_open(folder / TENSORS, framework="pt") as file:
        if strange := wanted.keys() ^ set(file.keys()):
            raise ValueError(f"{folder / TENSORS}: {min(strange)} is in the record or the file, not in both")
        for name, target in wanted.items():
            _copy(f"{folder / TENSORS}: {name}", target, file.get_tensor(name))
    return _replaced(base, made)


def _read(path: str | os.PathLike[str]) -> dict[str, LowRank]:
    adapter = LoraAdapter.of(open_checkpoint(Path(path)))
    if adapter is None:
        raise ValueError(f"{path}: no LoRA adapter of peft")
    if adapter.whole:
        raise ValueError(f"{path}: {min(adapter.whole)} is no factor of a layer; an expert has nothing else")
    if adapter.changes_the_base:
        raise ValueError(f"{path}: {adapter.changes_the_base} has changed the base's weights")
    for name, layer in adapter.layers.items():
        if layer.is_embedding or layer.kernel:
            raise ValueError(f"{path}: {plain(name)} is no linear layer")
    return {plain(name): layer.matrix for name, layer in adapter.layers.items()}


def _check_same_layers(experts: Sequence[Experts]) -> None:
    if not experts or not experts[0]:
        raise ValueError("moerge() needs adapters, each with at least one layer")
    for number, expert in enumerate(experts[1:], 2):
        if different := expert.keys() ^ experts[0].keys():
            raise ValueError(f"adapters 1 and {number} differ in their layers: only one has {min(different)}")


def _empty(
    base: nn.Module, name: str, ranks: Sequence[int], scales: Sequence[float], k: int, score: str
) -> MoergedLinear:
    """The layer that takes another's place, with parameters that are still to be filled."""
    one_of("score", score, ("abs", "signed"))
    if positive("k", k) > len(ranks):
        raise ValueError(f"k={k} must be at most the number of adapters, {len(ranks)}")
    try:
        layer = base.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the adapters have a layer {name}, {type(base).__name__} has none") from None
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"{name} belongs to an nn.MultiheadAttention, which reads its weight without calling it"
        )
    if isinstance(layer, nn.Linear):
        shape = layer.in_features, layer.out_features
    elif type(layer).__name__ == "Conv1D":  # transformers'; its weight is transposed
        weight: Any = layer.weight
        shape = weight.shape[0], weight.shape[1]
    else:
        raise ValueError(f"{name} is a {type(layer).__name__}; experts need an nn.Linear")
    return MoergedLinear(layer, ranks, scales, *shape, k, score)


@torch.no_grad()
def _fill(name: str, layer: MoergedLinear, experts: Sequence[LowRank], init: str) -> None:
    for number, (expert, own) in enumerate(zip(experts, layer.experts(), strict=True), 1):
        _copy(f"{name}: A of adapter {number}", own.a, expert.a)
        _copy(f"{name}: B of adapter {number}", own.b, expert.b)
    if init == "arrow":
        layer.router.copy_(torch.stack([arrow(expert) for expert in experts]))
    else:
        nn.init.normal_(layer.router, std=layer.router.shape[1] ** -0.5)


@torch.no_grad()
def _copy(what: str, target: Tensor, value: Tensor) -> None:
    if value.shape != target.shape:
        raise ValueError(f"{what} is {tuple(value.shape)}, but the base needs {tuple(target.shape)}")
    target.copy_(value)


def _replaced(base: Model, layers: Mapping[str, MoergedLinear]) -> Model:
    trained = {id(parameter) for layer in layers.values() for parameter in layer.parameters(recurse=False)}
    for name, layer in layers.items():
        layer.train(base.training)
        base.set_submodule(name, layer)
    for parameter in base.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return base
