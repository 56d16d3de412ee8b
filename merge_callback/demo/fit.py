"""Trains from a YAML file through LightningCLI."""

import os
import re
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.checkpoints.load_merge import named_for


class FitOptionsError(ValueError):
    """An option of the trainer or the callback that can't be used."""


_FIT = """Trains a LightningModule from a configuration in YAML, as LightningCLI does. Every option of the
trainer, the callbacks, the module and the data may stand in the file or here, by its path. The demo's model
and data are the defaults. Example: merge-callback fit --config config.yaml --trainer.max_steps 1000. To check
a configuration without training: merge-callback validate --config config.yaml."""

_INIT_FROM = (
    "Folder of a merge, such as run/merges/latest, whose weights the model begins with: a next stage, with "
    "a new optimizer. A run that is resumed (--ckpt_path) goes on with its own weights."
)


class MergeCLI(LightningCLI):
    """A LightningCLI for any module and data; those of the demo are the defaults."""

    def before_fit(self) -> None:
        """Loads the merge that a next stage begins with, unless the run is resumed."""
        config = self.config.fit
        if config.init_from is not None and config.ckpt_path is None:
            _begin_with(self.model, config.init_from)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--init_from`, and sets the defaults."""
        parser.add_argument("--init_from", "--init-from", type=str | None, default=None, help=_INIT_FROM)
        parser.set_defaults(
            {
                "model": {"class_path": "merge_callback.demo.DemoModule"},
                "data": {"class_path": "merge_callback.demo.DemoData"},
            }
        )


def _begin_with(module: LightningModule, path: str) -> None:
    """Loads a merge into a module that is not trained yet.

    Raises:
        FitOptionsError: if there is none, or it is of another model.
    """
    try:
        module.load_state_dict(load_merge(path, module))
    except FileNotFoundError as error:
        raise FitOptionsError(f"--init_from={path}: {error}") from None
    except (RuntimeError, ValueError) as error:  # a model of configure_model has no tensors yet
        reason = " ".join(str(error).split())
        raise FitOptionsError(
            f"--init_from={path}: it does not fit the model: {reason:.300}; give the model the options that "
            "the merged one had, and make its layers in __init__"
        ) from None


def fit(arguments: Sequence[str]) -> None:
    """Trains with the given command-line arguments of LightningCLI's `fit`.

    The classes that they name are also found in modules of the current folder, after all installed ones.

    Raises:
        FitOptionsError: if the trainer or the callback refuses an option; what the module or the data raise
            is raised as it is.
    """
    here = os.getcwd()
    sys.path.append(here)
    try:
        _run(MergeCLI, arguments)
    except (ValueError, MisconfigurationException) as error:
        first = _first_cause(error)
        *_, (frame, _) = traceback.walk_tb(first.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("merge_callback", "lightning"):
            raise
        raise FitOptionsError(" ".join(str(first).split())) from None
    finally:
        sys.path.remove(here)


def check(arguments: Sequence[str]) -> tuple[list[CheckpointMergeCallback], int | None]:
    """Reads the arguments of `fit`, but makes neither the model nor the data, and trains nothing.

    Returns:
        The merging callbacks, and the trainer's `max_steps`, if it has any.

    Raises:
        FitOptionsError: if LightningCLI refuses an argument, or a callback one of its options.
    """
    here = os.getcwd()
    sys.path.append(here)
    try:
        _run(_Checking, arguments, exit_on_error=False)
    except ArgumentError as error:
        raise FitOptionsError(_shortened(str(error))) from None
    except _Read as read:
        trainer = read.config.fit.trainer
        several = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
        found = [made for callback in several if callback and (made := _made(callback)) is not None]
        return found, trainer.max_steps if trainer.max_steps > 0 else None
    finally:
        sys.path.remove(here)
    raise AssertionError


def validation(arguments: Sequence[str]) -> Callable[[dict[str, Tensor]], dict[str, float]]:
    """A function that scores a state dict by the validation of `fit`'s module and data, as `fit` makes them.

    The trainer has one device, and no logger and no callbacks. Each validation begins with the same seed.

    Raises:
        FitOptionsError: if LightningCLI refuses an argument; by the function, if a state dict does not fit.
    """
    here = os.getcwd()
    sys.path.append(here)
    try:
        _run(_Validating, [*arguments, *_PLAIN_TRAINER], exit_on_error=False)
    except ArgumentError as error:
        raise FitOptionsError(_shortened(str(error))) from None
    except (ValueError, MisconfigurationException) as error:
        raise FitOptionsError(" ".join(str(_first_cause(error)).split())) from None
    except _Made as made:
        return made.cli.validated
    finally:
        sys.path.remove(here)
    raise AssertionError


_PLAIN_TRAINER = [
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--trainer.callbacks=null",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]


class _Made(Exception):  # noqa: N818
    """Ends the command line of `_Validating` with what it has made."""

    def __init__(self, cli: "_Validating") -> None:
        super().__init__()
        self.cli = cli


class _Validating(MergeCLI):
    """Makes module, data and trainer as `fit` does, and trains nothing."""

    def before_fit(self) -> None:
        """Ends it."""
        raise _Made(self)

    def validated(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics of a validation with these weights."""
        module, trainer = self.model, self.trainer
        assert isinstance(module, LightningModule)
        assert isinstance(trainer, Trainer)
        try:
            module.load_state_dict(named_for(module, state))
        except RuntimeError as error:
            raise FitOptionsError(
                f"the merge does not fit the model of --config: {' '.join(str(error).split()):.300}"
            ) from None
        seed = self.config.fit.seed_everything
        with isolate_rng():
            seed_everything(seed if type(seed) is int else 0, workers=True, verbose=False)
            found = trainer.validate(module, datamodule=self.datamodule, verbose=False)
        return {name: float(value) for metrics in found for name, value in metrics.items()}


class _Read(Exception):  # noqa: N818
    """Ends `_Checking` with what it has read."""

    def __init__(self, config: Namespace) -> None:
        super().__init__()
        self.config = config


class _Checking(MergeCLI):
    """Reads the arguments as `fit` does."""

    def before_instantiate_classes(self) -> None:
        """Ends it: a model or its data may take minutes to make, or a GPU."""
        raise _Read(self.config)


def _made(callback: Namespace) -> CheckpointMergeCallback | None:
    """A merging callback by its configuration; `None` if it is that of another callback."""
    module, _, name = callback.class_path.rpartition(".")
    kind = getattr(import_module(module), name)
    if not (isinstance(kind, type) and issubclass(kind, CheckpointMergeCallback)):
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=kind)
    try:
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before 4.49
        found = instantiate(parser.parse_object({"callback": callback.as_dict()})).callback
    except (ArgumentError, ValueError) as error:
        raise FitOptionsError(" ".join(str(_first_cause(error)).split())) from None
    assert isinstance(found, CheckpointMergeCallback)
    return found


def _first_cause(error: BaseException) -> BaseException:
    """What a class has raised: the parser wraps it in a page of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _shortened(text: str) -> str:
    """What matters of the parser's page about an argument, in one line."""
    head, _, rest = text.partition("\n")
    problem = re.search(r"(?s)Problem with given class_path .*?(?=\n    - |\n  \S|\Z)", rest)
    return " ".join(f"{head} {problem[0] if problem else rest}".split())


def _run(kind: type[MergeCLI], arguments: Sequence[str], exit_on_error: bool = True) -> None:
    # Passed on purpose: if LightningCLI read sys.argv, it would not know our other subcommands.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    options: dict[str, Any] = {} if exit_on_error else {"exit_on_error": False}
    kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None if kind is _Validating else SaveConfigCallback,
        parser_kwargs={"prog": "merge-callback", **options, "fit": {**options, "description": _FIT}},
        args=["fit", *arguments],
    )
