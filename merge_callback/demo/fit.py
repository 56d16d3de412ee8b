"""Trains from a YAML file through LightningCLI."""

import warnings
from collections.abc import Sequence

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI


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
    """Trains with the given command-line arguments of LightningCLI's `fit`."""
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
