"""Trains from a YAML file through LightningCLI."""

import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class FitOptionsError(ValueError):
    """An option of the trainer or the callback that can't be used."""


class MergeCLI(LightningCLI):
    """A LightningCLI for any module and data; those of the demo are the defaults."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Sets the defaults."""
        parser.set_defaults(
            {
                "model": {"class_path": "merge_callback.demo.DemoModule"},
                "data": {"class_path": "merge_callback.demo.DemoData"},
            }
        )


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
        _fit(arguments)
    except (ValueError, MisconfigurationException) as error:
        first: BaseException = error
        while first.__cause__ is not None:  # the parser wraps what a class raises in a page of its own
            first = first.__cause__
        *_, (frame, _) = traceback.walk_tb(first.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("merge_callback", "lightning"):
            raise
        raise FitOptionsError(" ".join(str(first).split())) from None
    finally:
        sys.path.remove(here)


def _fit(arguments: Sequence[str]) -> None:
    # Passed on purpose: if LightningCLI read sys.argv, it would not know our other subcommands.
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    MergeCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_kwargs={"prog": "merge-callback"},
        args=["fit", *arguments],
    )
