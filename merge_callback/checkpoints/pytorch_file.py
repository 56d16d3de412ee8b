"""Lightning's ``.ckpt`` files and other files of ``torch.save``."""

from __future__ import annotations

import errno
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, _weights_only_unpickler, nn

from merge_callback.checkpoints.checkpoint import Checkpoint, parse_count, step_in_name
from merge_callback.checkpoints.model_folder import step_beside
from merge_callback.checkpoints.other_formats import what_archive, what_else
from merge_callback.checkpoints.quantised import with_plain_weights
from merge_callback.checkpoints.reader import OpenOptions, Reader
from merge_callback.checkpoints.stand_ins import StandIn, kind_of, standing_in
from merge_callback.checkpoints.state_key import find_state, is_extra
from merge_callback.checkpoints.training_state import without_training_state
from merge_callback.snapshots.files import CorruptFileError, open_regular

_CALLBACK = "CheckpointMergeCallback"
_STEPS = ("global_step", "global_steps", "step", "iteration", "iter_num")
_DEEPEST = 1000  # values within values
_MANY_MARKS = 100_000  # below that many, a pickle loads in a fraction of a second


class PytorchReader(Reader):
    """Reads any file that no other reader matches, if it is one of ``torch.save``."""

    name = "pytorch"
    suffixes = (".ckpt",)
    glob_suffixes = (".pt", ".pth", ".bin")

    def matches(self, path: Path) -> bool:
        """Whether it is a file."""
        return path.is_file()

    def open(self, path: Path, options: OpenOptions) -> Checkpoint:
        """The state dict in it, mapped; a LightningModule's is what that module says it is."""
        stored = open_pytorch(path, options.state_key)
        weights = stored if stored.format == "lightning" else without_training_state(stored)
        return with_plain_weights(weights, options)

    def step(self, path: Path) -> int | None:
        """What the records of its folder's model tell, if it is that model; else what is in it."""
        if (step := step_beside(path)) is not None:
            return step
        return _step(load_mapped(path))


def open_pytorch(path: Path, state_key: str | None = None) -> Checkpoint:
    """The state dict of a file written by ``torch.save``, mapped.

    It is what the file holds under ``state_key``, or the one state dict that ``find_state`` finds in it.
    Entries that ``get_extra_state`` made and that are no tensors are left out.

    Raises:
        ValueError: if loading would run code, if there is no state dict or no telling which, or if a
            tensor is none that can be read as a plain array of its own.
        CorruptFileError: if the file is cut or altered.
        OSError: if it can't be opened.
    """
    content = load_mapped(path)
    state = find_state(path, content, state_key)
    named = {name: t for name, t in state.items() if isinstance(t, Tensor) or not is_extra(name)}
    for name, tensor in named.items():
        _check_plain(path, name, tensor)
    if not any(t.numel() for t in named.values()):
        raise ValueError(
            f"{path}: its tensors are empty: their values are in the files of the ranks, which DeepSpeed's "
            "zero_to_fp32.py puts together"
        )
    tied = _find_tied(path, named)
    return Checkpoint(
        path=path,
        tensors={name: t.detach() for name, t in named.items() if name not in tied},
        tied=tied,
        step=step_in_name(path) if (step := _step(content)) is None else step,
        tokens=_tokens(content),
        files=[path],
        extras=[],
        format="lightning" if "pytorch-lightning_version" in content else "pytorch",
    )


def load_mapped(path: Path) -> Mapping[Any, Any]:
    """The content of a ``torch.save`` file, its tensors mapped; never runs code from it.

    Objects of other classes than torch's own are ``StandIn``s.

    Raises:
        ValueError: if the pickle wants code, or the file is not the kind that can be mapped.
        CorruptFileError: if the file is cut or altered.
        OSError: if it can't be opened.
    """
    check_archive(path)
    try:
        with short_reasons():
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError:
                with standing_in(path):
                    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: loading it would run code, which this tool never does; save a file of tensors, numbers "
            f"and text only, e.g. torch.save(model.state_dict(), …) ({_reason(error)})"
        ) from None
    except RuntimeError as error:
        raise _unreadable(path, error) from None
    except Exception as error:  # a broken pickle raises anything
        raise CorruptFileError(f"{path}: its content cannot be read ({error!r:.200})") from None
    if not isinstance(content, Mapping):
        remedy = "; save its state_dict()" if isinstance(content, StandIn) else ""
        raise ValueError(f"{path}: holds a {kind_of(content)}, expected a state dict{remedy}")
    return content


class _ShortError(pickle.UnpicklingError):
    def __str__(self) -> str:
        return super().__str__()[:500]


@contextmanager
def short_reasons() -> Iterator[None]:
    """Within, torch's reason to refuse a pickle is as long as a reason is, and is not printed.

    It searches the reason by patterns that take the square of its length: with a name of 100,000 letters in
    it, that takes minutes.
    """
    known = getattr(_weights_only_unpickler, "UnpicklingError", None)
    if known is None:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of the file beside refusing it
        _weights_only_unpickler.UnpicklingError = _ShortError  # type: ignore[attr-defined]
        try:
            yield
        finally:
            _weights_only_unpickler.UnpicklingError = known  # type: ignore[attr-defined]


def check_archive(path: Path) -> None:
    """Makes sure that the tensors lie in the file as they are: not pickled inline, not compressed.

    Raises:
        ValueError: if it is not the kind of file that can be mapped.
        CorruptFileError: if it is cut or altered, or its pickle would take minutes to be refused.
        OSError: if it can't be opened.
    """
    with open_regular(path) as file:
        if not (head := file.read(512)).startswith(b"PK\x03\x04"):
            raise ValueError(f"{path}: {what_else(path.name, head)}")
        try:
            with zipfile.ZipFile(file) as archive:
                other = what_archive(archive.namelist())
                packed = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED]
                deep = not packed and any(
                    _nests_too_deep(archive.read(i))
                    for i in archive.infolist()
                    if i.filename.endswith("/data.pkl")
                )
        except Exception as error:  # a broken archive raises anything
            raise CorruptFileError(f"{path}: cut or altered: {error}; fetch or save it again") from None
    if other:
        raise ValueError(f"{path}: {other}")
    if packed:
        raise CorruptFileError(
            f"{path}: {packed[0]!r} in it is compressed, which torch.save never does; "
            "save it again with torch.save"
        )
    if deep:
        raise CorruptFileError(f"{path}: its pickle nests more than {_DEEPEST} values; save it again")


def _nests_too_deep(content: bytes) -> bool:
    """Whether a pickle begins ever more values and ends none, which takes minutes and gigabytes to load."""
    if content.count(pickle.MARK) < _MANY_MARKS:
        return False
    depth = 0
    try:
        for opcode, _, _ in pickletools.genops(content):
            depth += opcode.name == "MARK"
            depth -= pickletools.markobject in opcode.stack_before
            if depth > _DEEPEST:
                return True
    except ValueError:  # where torch will stop, too
        pass
    return False


def _reason(error: Exception) -> str:
    """The line of torch's explanation that names what was refused."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "nsupported" in line]
    return (lines or [str(error)])[0][:200]


def _unreadable(path: Path, error: RuntimeError) -> Exception:
    if "Cannot allocate memory" in str(error):
        message = (
            "the system refuses to map it, usually because it is larger than the memory; allow that with "
            "`sysctl vm.overcommit_memory=1`, or save the weights alone, as safetensors"
        )
        return OSError(errno.ENOMEM, message, str(path))
    reason = " ".join(str(error).split())[:200]
    return CorruptFileError(f"{path}: cut, altered, or not written by torch.save ({reason})")


def _check_plain(path: Path, name: object, tensor: object) -> None:
    where = f"{path}: {name!r}"
    if not isinstance(name, str) or name == "__metadata__":
        raise ValueError(f"{where} is no name for a tensor in a safetensors file; rename it")
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{where} is a {kind_of(tensor)}, expected a plain tensor")
    assert isinstance(tensor, Tensor)
    if (
        tensor.layout != torch.strided
        or tensor.is_quantized
        or tensor.device.type != "cpu"
        or tensor.is_nested
    ):
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise ValueError(f"{where} is {kind}, expected a dense tensor with values; save it dense")


def _find_tied(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The further names of tensors that are one and the same view.

    A transposed view is a tensor of its own: what is merged element by element is the same in both.

    Raises:
        ValueError: if two others share memory: what is merged in one would change the other.
    """
    kept: dict[tuple[object, ...], str] = {}
    tied: dict[str, str] = {}
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        first = kept.setdefault((tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()), name)
        if first != name:
            tied[name] = first
    own = {_elements(tensors[name]): name for name in kept.values()}
    spans = sorted((*_span(tensors[name]), name) for name in own.values())
    for (_, end, name), (begin, _, other) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"{path}: {name!r} and {other!r} share memory without being the same tensor; "
                "save them as tensors of their own (.clone())"
            )
    return tied


def _elements(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common that hold the same elements, in whatever order of dimensions."""
    steps = sorted(
        (stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
    )
    return tensor.data_ptr(), tensor.dtype, *sorted(steps)


def _span(tensor: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _step(content: Mapping[Any, Any]) -> int | None:
    """The optimizer step, under the name that a trainer has for it."""
    history = content.get("optimizer_history")  # fairseq's, the newest last
    newest = history[-1] if isinstance(history, list) and history else None
    counts = [content.get(key) for key in _STEPS] + [
        newest.get("num_updates") if isinstance(newest, dict) else None
    ]
    return next((parse_count(count) for count in counts if type(count) is int), None)


def _tokens(content: Mapping[Any, Any]) -> int | None:
    """The token count of our callback, if its state is in the checkpoint."""
    states = content.get("callbacks")
    if not isinstance(states, Mapping):
        return None
    ours = [s for key, s in states.items() if str(key).startswith(_CALLBACK) and isinstance(s, Mapping)]
    return parse_count(ours[0].get("tokens")) or None if ours else None
