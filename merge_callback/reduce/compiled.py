"""The passes on a CPU, in C (``kernels.c``): each group of 64 elements of all sources is summed in registers.

The library is an optional part of an installation. If there was no compiler for it, or the processor has no
fused multiply-add, ``instructions()`` is 0 and ``blocks`` does the same with PyTorch's operations.

A weighted sum has the same bits as in ``blocks``; a sum of squares is more exact. The contrasts are formed in
fp32, squared and summed in fp64, and their sum is the same for any number of threads. The two passes of TIES,
``elect`` and ``tally``, also give the same bits as PyTorch's operations.
"""

from __future__ import annotations

import ctypes
import importlib.util
import threading
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from merge_callback.reduce import threads
from merge_callback.reduce.passes import Cut, Outs, Row, Weights, rows_of

_SHARE = 1 << 23  # least bytes per thread: half a millisecond; starting one on a busy core takes longer

_GROUP = 64  # elements that are written at once; the last may be beyond those that are meant

MARKED = 1 << 12
"""Elements for which ``tally`` gives a mark: ``BLOCK`` in ``kernels.c``."""

_VERSION = 5  # version of the structures below and the functions in kernels.c, which has the same number

Room = npt.NDArray[np.int32]


class Split(NamedTuple):
    """The numbers of magnitudes above ``high``, at it, and at ``low`` (0 if both are the same); those between.

    Each row of ``marks`` has the numbers at ``high``, at ``low`` and between of so many elements: `MARKED`, or all.
    """

    above: int
    at_high: int
    at_low: int
    between: npt.NDArray[np.signedinteger[Any]]
    marks: npt.NDArray[np.int32]


_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WEIGHTED, _CONTRASTED = 1, 2


class _Source(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("roles", ctypes.c_int32),
        ("weight", ctypes.c_float),
        ("factor", ctypes.c_float),
    )


class _Pass(ctypes.Structure):
    _fields_ = (
        ("sources", ctypes.POINTER(_Source)),
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int32),
        ("roles", ctypes.c_int32),
        ("bounds", ctypes.c_void_p),
        ("segments", ctypes.c_int64),
        ("partials", ctypes.c_void_p),
        ("next", ctypes.c_int64),
    )


class _Sums(ctypes.Structure):
    _fields_ = (
        ("first", _Pass),
        ("weights", ctypes.POINTER(ctypes.c_float)),
        ("starts", ctypes.POINTER(ctypes.c_float)),
        ("outs", ctypes.POINTER(ctypes.c_void_p)),
        ("out_dtypes", ctypes.POINTER(ctypes.c_int32)),
        ("count", ctypes.c_int64),
    )


class _Entries(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("end", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("below", ctypes.c_float),
        ("at_most", ctypes.c_float),
    )


class _Election(ctypes.Structure):
    _fields_ = (
        ("initial", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("entries", ctypes.POINTER(_Entries)),
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("next", ctypes.c_int64),
        ("initial_dtype", ctypes.c_int32),
        ("out_dtype", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class _Tally(ctypes.Structure):
    _fields_ = (
        ("theta", ctypes.c_void_p),
        ("between", ctypes.c_void_p),
        ("marks", ctypes.c_void_p),
        ("above", ctypes.c_int64),
        ("at_high", ctypes.c_int64),
        ("at_low", ctypes.c_int64),
        ("found", ctypes.c_int64),
        ("picked", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("low", ctypes.c_int32),
        ("high", ctypes.c_int32),
    )


class _Census(ctypes.Structure):
    _fields_ = (
        ("initial", ctypes.c_void_p),
        ("tallies", ctypes.POINTER(_Tally)),
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("initial_dtype", ctypes.c_int32),
    )


_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("reduce_instructions", ctypes.c_int, ()),
    ("reduce_take_chunks", None, (ctypes.POINTER(_Pass), ctypes.c_int)),
    ("reduce_take_sums", None, (ctypes.POINTER(_Sums), ctypes.c_int)),
    ("reduce_combine", None, (ctypes.POINTER(_Pass), ctypes.c_void_p)),
    ("reduce_elect_chunks", None, (ctypes.POINTER(_Election), ctypes.c_int)),
    ("reduce_tally", None, (ctypes.POINTER(_Census), ctypes.c_int)),
)


@cache
def instructions() -> int:
    """Which passes in ``kernels.c`` this processor can run; 0 if none, or if there is no library."""
    library = _library()
    return int(library.reduce_instructions()) if library else 0


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether the passes take these tensors: contiguous fp32, bf16 or fp16, of one size, in host memory."""
    return instructions() > 0 and all(
        isinstance(t, Tensor)  # not an object that only reads like one (a `Decoded`)
        and t.dtype in _DTYPES
        and t.device.type == "cpu"
        and t.layout == torch.strided
        and t.is_contiguous()
        and t.numel() == tensors[0].numel()
        for t in tensors
    )


def one_pass(
    sources: Sequence[Tensor],
    weights: Weights,
    out: Outs,
    contrast: Sequence[float] | None,
    bounds: Sequence[int],
) -> Tensor | None:
    """See ``reduce.one_pass``; the arguments are checked there."""
    rows, ends = rows_of(weights, out), np.asarray(bounds, dtype=np.int64)
    terms = _terms(sources, [row.weights for row in rows], contrast)
    work = _Pass((_Source * len(terms))(*(term for term, _ in terms)), len(terms), sources[0].numel())
    chunks = _chunks(work.size)
    if contrast is not None:
        partials = np.zeros(len(ends) + chunks)
        work.partials, work.bounds, work.segments = partials.ctypes.data, ends.ctypes.data, len(ends)
    most = min(chunks, _bytes(sources) // _SHARE)
    if len(rows) > 1:
        _in_threads(_loaded().reduce_take_sums, sums := _sums(work, rows, terms, contrast), most)
        work = sums.first
    else:
        work.roles = _WEIGHTED if any(term.roles & _WEIGHTED for term, _ in terms) else 0
        if rows:
            work.out, work.out_dtype = rows[0].out.data_ptr(), _DTYPES[rows[0].out.dtype]
        _in_threads(_loaded().reduce_take_chunks, work, most)
    for row in rows:
        increment_version(row.out)  # as in-place operations do, so that autograd notices
    return None if contrast is None else _combined(work)


def elect(initial: Tensor, others: Sequence[Tensor], out: Tensor, scale: float, cuts: Sequence[Cut]) -> None:
    """Trims, elects and averages; each source is read once. See ``reduce.triton_ties.elect``."""
    entries = [
        _Entries(theta.data_ptr(), cut.end, _DTYPES[theta.dtype], cut.below, cut.at_most)
        for theta, cut in zip(others, cuts, strict=True)
    ]
    work = _Election(
        initial.data_ptr(),
        out.data_ptr(),
        (_Entries * len(entries))(*entries),
        len(entries),
        initial.numel(),
        0,
        _DTYPES[initial.dtype],
        _DTYPES[out.dtype],
        scale,
    )
    read = _bytes([initial, *others])
    _in_threads(_loaded().reduce_elect_chunks, work, min(_chunks(work.size), read // _SHARE))
    increment_version(out)


def tally(
    initial: Tensor, others: Sequence[Tensor], brackets: Sequence[tuple[int, int]], room: Room
) -> list[Split]:
    """Counts the magnitudes of every ``θ − θ_init`` by its own bracket; θ_init is read once for all.

    Runs in the calling thread only, and releases the GIL.

    Args:
        initial: flat and contiguous, fp32, bf16 or fp16, ``n`` elements.
        others: the θ, each of them likewise.
        brackets: for each θ the bits ``low`` and ``high`` of two fp32 magnitudes; ``high`` is not lower.
        room: what ``tally_room`` gave for as many θ and at least ``n`` elements.

    Returns:
        For each θ what was counted, with a mark for every `MARKED` elements; and the bits of those between,
        int32, in the order of the elements, until ``room`` is used again.
    """
    places = range(room.ctypes.data, room.ctypes.data + room.nbytes, room.strides[0])
    marks = np.empty((len(others), -(-initial.numel() // MARKED), 3), dtype=np.int32)
    first, each = marks.ctypes.data, marks.strides[0]
    tallies = (_Tally * len(others))(
        *(
            _Tally(theta.data_ptr(), place, first + i * each, 0, 0, 0, 0, 0, _DTYPES[theta.dtype], *bracket)
            for i, (theta, place, bracket) in enumerate(zip(others, places, brackets, strict=True))
        )
    )
    work = _Census(initial.data_ptr(), tallies, len(others), initial.numel(), _DTYPES[initial.dtype])
    _loaded().reduce_tally(ctypes.byref(work), instructions())
    return [
        Split(each.above, each.at_high, each.at_low, place[: each.found], mark)
        for each, place, mark in zip(tallies, room, marks, strict=True)
    ]


def tally_room(count: int, size: int) -> Room:
    """Memory for the magnitudes that ``tally`` finds between the brackets; it is not touched before.

    Args:
        count: number of θ.
        size: elements of each, at most.
    """
    return np.empty((count, size + _GROUP), dtype=np.int32)


def _terms(
    sources: Sequence[Tensor], rows: Sequence[Sequence[float]], contrast: Sequence[float] | None
) -> list[tuple[_Source, list[float]]]:
    """The sources that take part in a sum, each with its factors: of each row, and of the contrast."""
    terms = []
    for i, source in enumerate(sources):
        factors = [float(each[i]) for each in (*rows, *([] if contrast is None else [contrast]))]
        weight = factors[0] if rows else 0.0
        factor = 0.0 if contrast is None else factors[-1]
        if any(factors):
            roles = (_WEIGHTED if weight else 0) | (_CONTRASTED if factor else 0)
            terms.append((_Source(source.data_ptr(), _DTYPES[source.dtype], roles, weight, factor), factors))
    return terms


def _sums(
    work: _Pass,
    rows: Sequence[Row],
    terms: Sequence[tuple[_Source, list[float]]],
    contrast: Sequence[float] | None,
) -> _Sums:
    """Several sums of the sources, and their contrast, which is one sum more, without an output."""
    count = len(rows) + (contrast is not None)
    factors = [factor for _, each in terms for factor in each]
    starts = [-0.0 if any(row.weights) else 0.0 for row in rows]
    outs, dtypes = [row.out.data_ptr() for row in rows], [_DTYPES[row.out.dtype] for row in rows]
    return _Sums(
        work,
        (ctypes.c_float * len(factors))(*factors),
        (ctypes.c_float * count)(*starts),
        (ctypes.c_void_p * count)(*outs),
        (ctypes.c_int32 * count)(*dtypes),
        count,
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _chunks(size: int) -> int:
    return -(-size // ctypes.c_int64.in_dll(_loaded(), "reduce_chunk").value)


def _in_threads(job: Callable[..., object], work: ctypes.Structure, most: int) -> None:
    """Processes the chunks with ``most`` threads, including this one, but not more than PyTorch would use.

    Threads are started for each pass, because a pool would not survive the ``fork`` of a data loader or a
    launcher.
    """
    arguments = ctypes.byref(work), instructions()
    count = min(threads.most(), most)
    yields = threads.is_yielding() and most > 1  # then this thread, which runs Python, keeps its priority
    target = partial(threads.at_low_priority, job) if yields else job
    others: list[threading.Thread] = []
    try:
        for _ in range(0 if yields else 1, count):
            others.append(threading.Thread(target=target, args=arguments, name="reduce"))
            others[-1].start()
        if not yields:
            job(*arguments)
    finally:  # a Ctrl-C comes after the call: the threads must not outlive what they read
        for thread in others:
            if thread.ident is not None:  # it was started
                thread.join()


def _combined(work: _Pass) -> Tensor:
    squares = torch.empty(work.segments, dtype=torch.float64, device="cpu")
    _loaded().reduce_combine(ctypes.byref(work), ctypes.c_void_p(squares.data_ptr()))
    return squares


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert library is not None  # passes are only called if takes() is true
    return library


@cache
def _library() -> ctypes.CDLL | None:
    """The library that setuptools built from ``kernels.c``, next to this file; not a Python module."""
    found = importlib.util.find_spec("merge_callback.reduce._kernels")
    if found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        for name, result, arguments in _FUNCTIONS:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        version = ctypes.c_int64.in_dll(library, "reduce_version").value
    except OSError:  # built for another machine
        return None
    except (AttributeError, ValueError):  # it lacks a function or the version
        version = 0
    if version == _VERSION:
        return library
    warnings.warn(
        f"{found.origin} was built from another version of merge_callback: install it again; until then "
        "merges use PyTorch's operations, which are slower",
        stacklevel=2,
    )
    return None
