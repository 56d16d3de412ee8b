"""A device that is not there: real numbers in host memory that say they are on a GPU.

Between such a tensor and the host there is a queue, as on CUDA. A copy to pinned memory that does not block
is made when an event after it is waited for; until then there is NaN. Whatever else brings a value to the
host, or makes the host wait, is noted, and refused if that is asked for.

What this can't show is the order between streams: all of them are one queue.
"""

import threading
import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_any, tree_map_only

from merge_callback.engine.background import Background
from merge_callback.reduce import dispatch
from merge_callback.signals import async_scalars
from merge_callback.snapshots import staging

GPU = torch.device("cuda", 0)

_READS = {
    *(
        "item",
        "tolist",
        "numpy",
        "__array__",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__contains__",
    ),
    *("equal", "allclose", "is_nonzero", "nonzero", "masked_select", "unique", "__repr__", "__format__"),
}
_FROM_THE_HOST = {"tensor", "as_tensor", "from_numpy"}


class OnGpu(Tensor):
    """A tensor that says it is on the device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _gpu.call(func, args, kwargs or {})


class RefusedError(AssertionError):
    """The host would wait for the device."""


class Event:
    def __init__(self, blocking=False, **_):
        self.gpu, self.after, self.blocking = _gpu, 0, blocking

    def record(self, *_):
        self.gpu, self.after = _gpu, _gpu.queued

    def query(self):
        done = self.gpu.done >= self.after
        self.gpu.run_until(self.after)
        return done

    def synchronize(self):
        _gpu.note("event" if self.blocking else "event that takes a core")
        self.gpu.run_until(self.after)

    def wait(self, *_): ...


class Stream:
    device = GPU

    def __init__(self, *_, **__): ...

    def record_event(self, event=None):
        event = event or Event()
        event.record()
        return event

    def wait_event(self, *_): ...

    def wait_stream(self, *_): ...

    def synchronize(self):
        _gpu.note("stream")
        _gpu.run_until(_gpu.queued)


class PretendGpu(TorchFunctionMode):
    """Within, tensors can be made on the device, and moved there.

    Attributes:
        waits: what made a thread wait for the device: the thread's name, what, and where in the package.
        launches: calls that a GPU would be handed, by the thread's name, in this order.
        capacity: bytes of its memory; ``peak``: the most that training has taken of them.
        room: bytes that can really be allocated at once; ``None`` for any number.
        allocated: of what sizes memory was asked for, in bytes.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.launches = [], []
        self.capacity, self.peak, self.room, self.allocated = 1 << 30, 0, None, []
        self.queued = self.done = 0
        self._queue, self._lock, self._refusing = [], threading.RLock(), set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    @contextmanager
    def refusing(self, *allowed):
        """Within, this thread may wait for nothing but ``allowed``: ``"event"``, ``"stream"``, …"""
        thread, before = threading.get_ident(), set(self._refusing)
        self._refusing = {(thread, frozenset(allowed))}
        try:
            yield
        finally:
            self._refusing = before

    def note(self, what):
        self.waits.append((threading.current_thread().name, what, _place()))
        for thread, allowed in self._refusing:
            if thread == threading.get_ident() and what not in allowed:
                raise RefusedError(f"{what} waits for the device, {_place()}")

    def waits_of_training(self):
        """The waits of the thread that trains."""
        return [wait[1:] for wait in self.waits if wait[0] == "MainThread"]

    def run_until(self, position):
        with self._lock:
            while self.done < position:
                self._queue.pop(0)()
                self.done += 1

    def call(self, func, args, kwargs):
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu):
            on = isinstance(args[0], OnGpu)
            found = {Tensor.device: GPU, Tensor.is_cuda: True, Tensor.is_cpu: False}
            return found[owner] if on else _plainly(func, args, kwargs)
        if name in ("is_pinned", "pin_memory"):
            return self._pin(args[0]) if name == "pin_memory" else self._is_pinned(args[0])
        if name in ("to", "cpu", "cuda"):
            return self._moved(func, args, kwargs)
        is_on = tree_any(lambda leaf: isinstance(leaf, OnGpu), (args, kwargs))
        if name in _READS and is_on:
            self.note(name)
            self.run_until(self.queued)
            return _plainly(func, args, kwargs)
        if name == "copy_":
            return self._copied(args[0], args[1], *args[2:], **kwargs)
        if name == "_foreach_copy_":
            for target, source in zip(*args[:2], strict=True):
                self._copied(target, source, *args[2:], **kwargs)
            return None
        wants = kwargs.get("device")
        makes_there = wants is not None and torch.device(wants).type == "cuda"
        if makes_there and name in _FROM_THE_HOST:
            self.note(name)
        to_host = wants is not None and not makes_there
        pins = kwargs.pop("pin_memory", False)
        out = _plainly(func, args, {**kwargs, **({"device": "cpu"} if makes_there else {})})
        if pins:
            self._pin_in_place(out)
        if (is_on and not to_host) or makes_there:
            self.launches.append((threading.current_thread().name, name))
            out = tree_map_only(Tensor, _labelled, out)
            if name.startswith("empty") and makes_there:
                self._take_room(out.untyped_storage().nbytes())
        return out

    def _take_room(self, nbytes):
        self.allocated.append(nbytes)
        if self.room is not None and nbytes > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory (pretended)")

    def _moved(self, func, args, kwargs):
        tensor, rest = args[0], [*args[1:], *kwargs.values()]
        there = {"cpu": torch.device("cpu"), "cuda": GPU}.get(func.__name__)
        for value in rest:
            if isinstance(value, (str, torch.device)):
                there = torch.device(value)
            elif isinstance(value, Tensor):
                there = value.device
        was_on = isinstance(tensor, OnGpu)
        goes_on = was_on if there is None else there.type == "cuda"
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        args = tuple("cpu" if value == "cuda" else value for value in args)
        is_async = kwargs.get("non_blocking") is True and (was_on or self._is_pinned(tensor))
        if was_on != goes_on and not is_async:
            self.note(f"{func.__name__}: to the {'device' if goes_on else 'host'}")
            self.run_until(self.queued)
        name = "to" if func.__name__ == "cuda" else func.__name__
        out = _plainly(getattr(Tensor, name), args if name == func.__name__ else (tensor, "cpu"), kwargs)
        if was_on == goes_on and out is tensor:
            return tensor
        if was_on != goes_on and out is tensor:
            with torch._C.DisableTorchFunctionSubclass():
                out = tensor.clone()
        if was_on or goes_on:
            self.launches.append((threading.current_thread().name, func.__name__))
        return _labelled(out) if goes_on else out.as_subclass(Tensor)

    def _copied(self, target, source, non_blocking=False):
        between = isinstance(target, OnGpu) != isinstance(source, OnGpu)
        host = source if isinstance(target, OnGpu) else target
        if isinstance(target, OnGpu) or isinstance(source, OnGpu):
            self.launches.append((threading.current_thread().name, "copy_"))
        if between and not (non_blocking and self._is_pinned(host)):
            pinned = "" if self._is_pinned(host) else " through pageable memory"
            self.note("copy to the " + ("device" if isinstance(target, OnGpu) else "host") + pinned)
            self.run_until(self.queued)
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if between and non_blocking and isinstance(source, OnGpu) and self._is_pinned(host):
                kept, place = source.detach().clone(), target.detach()
                place.view(torch.uint8).fill_(255) if place.ndim else place.fill_(torch.nan)
                with self._lock:
                    self._queue.append(lambda: place.copy_(kept))
                    self.queued += 1
                return target
        return _plainly(Tensor.copy_, (target, source), {})

    def _pin(self, tensor):
        out = _plainly(Tensor.clone, (tensor,), {})
        return self._pin_in_place(out)

    def _pin_in_place(self, tensor):
        _pinned[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    def _is_pinned(self, tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.untyped_storage().data_ptr() in _pinned


_gpu = PretendGpu()
_pinned = {}


@contextmanager
def pretend_gpu(monkeypatch):
    """Within, there is the device, for this thread and for the package's background."""
    global _gpu
    _gpu = gpu = PretendGpu()
    for name, stand_in in {
        "is_initialized": lambda: True,
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda *_: Stream(),
        "stream": lambda *_: nullcontext(),
        "device": lambda *_: nullcontext(),
        "synchronize": lambda *_: Stream().synchronize(),
        "mem_get_info": lambda *_: (gpu.capacity - gpu.peak, gpu.capacity),
        "memory_reserved": lambda *_: gpu.peak,
        "max_memory_reserved": lambda *_: gpu.peak,
        "get_per_process_memory_fraction": lambda *_: 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(dispatch, "triton_serves", lambda *_, **__: False)
    monkeypatch.setattr(staging, "_chunks", staging._Chunks())
    real = Background._work

    def work(self, job):
        with gpu:
            real(self, job)

    monkeypatch.setattr(Background, "_work", work)
    async_scalars._side_stream.cache_clear()
    with gpu:
        yield gpu
    async_scalars._side_stream.cache_clear()


def put_on(module):
    """Puts a module's parameters and buffers on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_labelled(parameter.data), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = _labelled(buffer)
    return module


class OneGpu(SingleDeviceStrategy):
    """Trains on the device."""

    def __init__(self):
        super().__init__(device=GPU)

    def setup_environment(self): ...  # which the accelerator would refuse

    def teardown(self): ...  # the module stays there


def plain(tensor):
    """A copy of a tensor in host memory, that nobody is told of."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().clone().as_subclass(Tensor)


def _labelled(tensor):
    with torch._C.DisableTorchFunctionSubclass():
        return tensor if isinstance(tensor, OnGpu) else tensor.as_subclass(OnGpu)


def _plainly(func, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _place():
    frames = traceback.extract_stack()
    own = [f for f in frames if "/merge_callback/" in f.filename and "/tests/" not in f.filename]
    return f"{Path(own[-1].filename).name}: {own[-1].name}" if own else "outside the package"
