"""Batches for the demo: crops of the corpus, the same in a resumed run as in an unbroken one."""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from merge_callback.demo.text import load_corpus, package_folder


class Batch(TypedDict):
    """Tokens, and the token that follows each of them; both `(batch, context)` int64."""

    input_ids: Tensor
    labels: Tensor


def cut(text: Tensor, starts: Tensor, context: int) -> Batch:
    """Cuts one crop of `text` per start, `context` tokens long, with labels one token ahead."""
    crops = text[starts[:, None] + torch.arange(context + 1)].long()
    return {"input_ids": crops[:, :-1], "labels": crops[:, 1:]}


class RandomCrops:
    """A stateful loader of random crops: batch number i depends only on (key, i).

    Lightning saves and restores its only state, `position`, with every checkpoint. Each iterator starts there
    and yields `len(self)` batches; Lightning itself ends a resumed epoch at the right batch. Of each batch a
    process yields its `share`.
    """

    def __init__(
        self,
        text: Tensor,
        batch_size: int,
        context: int,
        batches: int,
        key: Sequence[int] = (0,),
        share: slice = slice(None),
    ) -> None:
        self.text = text
        self.batch_size = batch_size
        self.context = context
        self.batches = batches
        self.key = tuple(key)
        self.share = share
        self.position = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        # Without a length Lightning prefetches one batch, so a saved position would be one too far.
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self)):
            # Advance before the yield: a checkpoint written while this batch is in use must count it.
            self.position += 1
            yield self.draw(self.position - 1)

    def draw(self, index: int) -> Batch:
        """Draws this process's share of batch number `index` of the run, independently of earlier draws."""
        generator = np.random.default_rng((*self.key, index))
        starts = generator.integers(len(self.text) - self.context, size=self.batch_size)
        return cut(self.text, torch.from_numpy(starts)[self.share], self.context)

    def state_dict(self) -> dict[str, int]:
        """Returns the number of batches yielded."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continues after the batches that were yielded when `state_dict` was taken."""
        self.position = state_dict["position"]


class SpacedCrops:
    """The same evenly spaced crops every time, so that all validations and seeds are comparable."""

    def __init__(self, text: Tensor, batch_size: int, context: int, starts: Tensor) -> None:
        self.text = text
        self.context = context
        self.starts = torch.split(starts, batch_size)

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[Batch]:
        return (cut(self.text, starts, self.context) for starts in self.starts)


class DemoData(LightningDataModule):
    """The Python standard library's source text, byte by byte; several processes split each batch.

    Args:
        batch_size: Sequences per batch of all processes together, so any number of them see the same batches.
        context: Tokens per sequence.
        seed: Seed of the order of the training crops.
        epoch_batches: Batches per epoch; an epoch of random crops is only a unit for the progress bar.
        validation_batches: Batches per validation of all processes together.
        max_bytes: Read no more text than this.
        package: An installed package whose own source files are the text instead, such as "torch".
    """

    def __init__(
        self,
        batch_size: int = 16,
        context: int = 128,
        seed: int = 0,
        epoch_batches: int = 5400,
        validation_batches: int = 24,
        max_bytes: int = 8_000_000,
        package: str | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.context = context
        self.seed = seed
        self.epoch_batches = epoch_batches
        self.validation_batches = validation_batches
        self.max_bytes = max_bytes
        self.package = package

    def setup(self, stage: str) -> None:
        """Reads the text, which takes some tens of milliseconds.

        Raises:
            ValueError: If there is too little, or no such package.
        """
        self.corpus = load_corpus(self.max_bytes, self.package and package_folder(self.package))

    def train_dataloader(self) -> RandomCrops:
        """Makes the stateful training loader; the processes split each batch."""
        text, key = self.corpus.train, (self.seed, 0)
        return RandomCrops(text, self.batch_size, self.context, self.epoch_batches, key, self._share())

    def val_dataloader(self) -> SpacedCrops:
        """Makes the validation loader; the processes split its crops."""
        text = self.corpus.validation
        crops = self.validation_batches * self.batch_size
        starts = torch.linspace(0, len(text) - self.context - 1, crops, dtype=torch.float64).long()
        return SpacedCrops(text, self.batch_size, self.context, starts[self._share()])

    def check_divisible(self, processes: int) -> None:
        """Checks that every batch can be split evenly over the processes.

        Raises:
            ValueError: If it can't.
        """
        if processes < 1 or self.batch_size % processes:
            raise ValueError(
                f"{processes} processes can't share batches of {self.batch_size} sequences evenly: "
                "choose a number of devices that divides the batch size."
            )

    def _share(self) -> slice:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        self.check_divisible(world)
        return slice(rank, None, world)
