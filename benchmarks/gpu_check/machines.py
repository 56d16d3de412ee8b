"""Where the checks run: on a GPU, or for a dry run on the CPU, where tensors may pretend to be on one."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import nn

ROOT = Path(__file__).parents[2]


class Machine(Protocol):
    """What the checks need to know of a machine.

    Attributes:
        is_dry: whether there is no GPU, so that sizes are tiny and no target has to be reached.
        device: of the tensors.
    """

    is_dry: bool
    device: torch.device

    def trains(self) -> AbstractContextManager[Any]:
        """Within, modules can be trained on the device."""
        ...

    def trainer(self) -> dict[str, Any]:
        """The Trainer's options for it."""
        ...

    def put(self, module: nn.Module) -> nn.Module:
        """A module that can be trained there, before the Trainer gets it."""
        ...

    def waits(self) -> AbstractContextManager[list[str]]:
        """Within, notes what made this thread wait for the device; events may be waited for."""
        ...

    def plain(self) -> Machine:
        """The same for what can't be pretended: compilation, mixed precision, graphs."""
        ...

    def synchronize(self) -> None:
        """Waits for the device."""
        ...

    def tidy(self) -> None:
        """Frees what a check has left."""
        ...


class Gpu:
    """The first NVIDIA GPU."""

    is_dry = False

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise SystemExit("there is no NVIDIA GPU here that PyTorch can use; --dry runs without one")
        self.device = torch.device("cuda", 0)

    def trains(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def trainer(self) -> dict[str, Any]:
        return {"accelerator": "gpu", "devices": 1}

    def put(self, module: nn.Module) -> nn.Module:
        return module  # the Trainer moves it

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        # Warnings, no errors: some of the package's own handlers would take an error for a failed copy.
        found: list[str] = []

        def noting(wait: Callable[..., None]) -> Callable[..., None]:
            def noted(*args: Any) -> None:
                found.append("the whole stream or device")
                wait(*args)

            return noted

        with warnings.catch_warnings(record=True) as caught, ExitStack() as stack:
            warnings.simplefilter("always")
            for owner in (torch.cuda.Stream, torch.cuda):
                stack.enter_context(patch.object(owner, "synchronize", noting(owner.synchronize)))
            before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield found
            finally:
                torch.cuda.set_sync_debug_mode(before)
                # What PyTorch says the first time that the mode is set is another warning.
                noted = [w for w in caught if "called a synchronizing" in str(w.message)]
                found += [f"{Path(w.filename).name}:{w.lineno}" for w in noted]

    def plain(self) -> Machine:
        return self

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def tidy(self) -> None:
        gc.collect()
        with suppress(RuntimeError):  # after an illegal address every call fails, and each check says so
            torch.cuda.empty_cache()


class Cpu:
    """A dry run."""

    is_dry = True
    device = torch.device("cpu")

    def trains(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def trainer(self) -> dict[str, Any]:
        return {"accelerator": "cpu", "devices": 1}

    def put(self, module: nn.Module) -> nn.Module:
        return module

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        yield []

    def plain(self) -> Machine:
        return Cpu()

    def synchronize(self) -> None: ...

    def tidy(self) -> None:
        gc.collect()


class Pretended(Cpu):
    """A dry run whose modules and tensors say, while they train, that they are on a GPU.

    It takes the package's paths for CUDA, and notes every wait; see ``tests/support/pretend_gpu.py``.
    """

    def __init__(self) -> None:
        self._support = _of_tests("pretend_gpu")
        self.device = self._support.GPU
        self.gpu: Any = None

    @contextmanager
    def trains(self) -> Iterator[Any]:
        with _Patches() as patches, self._support.pretend_gpu(patches) as self.gpu:
            yield self.gpu

    def trainer(self) -> dict[str, Any]:
        return {"accelerator": "cpu", "devices": 1, "strategy": self._support.OneGpu()}

    def put(self, module: nn.Module) -> nn.Module:
        put: nn.Module = self._support.put_on(module)
        return put

    @contextmanager
    def waits(self) -> Iterator[list[str]]:
        found: list[str] = []
        before = len(self.gpu.waits_of_training())
        yield found
        waited = self.gpu.waits_of_training()[before:]
        found += [f"{what} ({place})" for what, place in waited if what != "event"]


class Interpreted(Cpu):
    """A dry run whose Triton kernels run in Triton's interpreter, which TRITON_INTERPRET=1 has to ask for."""

    def __init__(self) -> None:
        from merge_callback.merging import census
        from merge_callback.reduce import dispatch

        self._patches = _Patches()
        _of_tests("interpreted_triton").round_to_bf16(self._patches)

        def serves(*tensors: torch.Tensor) -> bool:
            return not dispatch.EAGER and all(t.dtype in dispatch.NARROW for t in tensors)

        self._patches.setattr(dispatch, "triton_serves", serves)
        self._patches.setattr(census, "compiled_serves", lambda *tensors: False)


class _Patches(ExitStack):
    """Replaces attributes for as long as it is open; does for the tests' helpers what pytest does."""

    def setattr(self, owner: object, name: str, value: object) -> None:
        self.enter_context(patch.object(owner, name, value))


def _of_tests(name: str) -> Any:
    support = str(ROOT / "tests/support")
    if support not in sys.path:
        sys.path.append(support)
    return __import__(name)
