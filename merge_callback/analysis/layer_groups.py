"""Groups tensors by layer, using their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def layer_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups tensors by layer, in the order of the names, but sorts layers by their numbers.

    A name with a number belongs to the group up to and including that number: ``model.layers.3.mlp.up`` to
    ``model.layers.3``. Any other name belongs to its first part below the parent of the layers:
    ``model.norm.weight`` to ``model.norm``, since ``model`` alone would put the embedding and the final norm
    together; ``lm_head.weight`` to ``lm_head``. In safetensors files, which are in alphabetical order, layer
    10 comes before layer 2; here it does not.

    Args:
        names: the tensors' names.

    Returns:
        The names of each group.
    """
    split = [(name, name.split(".")) for name in names]
    homes = {tuple(parts[: max(i - 1, 0)]) for _, parts in split if (i := _first_number(parts)) is not None}
    groups: dict[str, list[str]] = {}
    for name, parts in split:
        groups.setdefault(_group(parts, homes), []).append(name)
    rows = {row: position for position, row in reversed([*enumerate(map(_row, groups))])}
    return dict(sorted(groups.items(), key=lambda item: (rows[_row(item[0])], _number(item[0]))))


def is_layer(group: str) -> bool:
    """Whether a group is a numbered layer, such as ``layers.3``."""
    return group.rsplit(".", 1)[-1].isdecimal()


def _group(parts: Sequence[str], homes: Iterable[tuple[str, ...]]) -> str:
    number = _first_number(parts)
    if number is not None:
        return ".".join(parts[: number + 1])
    depth = max((len(home) for home in homes if tuple(parts[: len(home)]) == home), default=0)
    return ".".join(parts[: depth + 1])


def _row(group: str) -> str:
    """The part of a layer's name that its neighbours share: ``layers`` of ``layers.3``."""
    return group.rpartition(".")[0] if is_layer(group) else group


def _number(group: str) -> int:
    return int(group.rpartition(".")[2]) if is_layer(group) else 0


def _first_number(parts: Sequence[str]) -> int | None:
    return next((i for i, part in enumerate(parts) if part.isdecimal()), None)
