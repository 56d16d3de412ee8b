"""A small fine-tuning task for the demo's GPT: which kind of Python token does each byte belong to?"""

from __future__ import annotations

import io
import keyword
import os
import tokenize
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from merge_callback.checkpoints.load_merge import load_merge
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.demo.text import split_files

KINDS = ("space", "keyword", "name", "number", "string", "operator", "comment")
"""The classes, in the order of their labels."""

_KIND_OF = {
    tokenize.NUMBER: "number",
    tokenize.STRING: "string",
    tokenize.OP: "operator",
    tokenize.COMMENT: "comment",
    # f-strings are several tokens since Python 3.12
    **{getattr(tokenize, n): "string" for n in dir(tokenize) if n.startswith(("FSTRING_", "TSTRING_"))},
}


def token_kinds(source: str) -> Tensor:
    """The label of each character of Python source text, `(characters,)` int64.

    Raises:
        SyntaxError: If the tokenizer can't read it. (`tokenize.TokenError` until Python 3.11.)
    """
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    kinds = torch.zeros(len(source), dtype=torch.int64)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = _KIND_OF.get(token.type)
        if token.type == tokenize.NAME:
            kind = "keyword" if keyword.iskeyword(token.string) else "name"
        if kind:
            (first, begin), (last, end) = token.start, token.end
            kinds[starts[first - 1] + begin : starts[last - 1] + end] = KINDS.index(kind)
    return kinds


class TokenKindData(LightningDataModule):
    """Source files of the standard library, byte by byte, with the kind of token that each byte belongs to.

    Args:
        batch_size: Sequences per batch.
        context: Tokens per sequence.
        max_bytes: Read no more text than this.
    """

    def __init__(self, batch_size: int = 16, context: int = 128, max_bytes: int = 400_000) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.context = context
        self.max_bytes = max_bytes

    def setup(self, stage: str) -> None:
        """Reads and labels the text, one file in sixteen for validation."""
        crops: tuple[list[Tensor], list[Tensor]] = ([], [])
        size = 0
        for path, is_validation in split_files(Path(os.__file__).parent):
            if size >= self.max_bytes and all(crops):
                break
            try:
                source = path.read_text("ascii")
                labelled = torch.stack([torch.tensor([*source.encode()]), token_kinds(source)])
            except (OSError, UnicodeDecodeError, SyntaxError, tokenize.TokenError):
                continue
            size += len(source)
            crops[is_validation].extend(torch.split(labelled, self.context, dim=1)[:-1])
        self.train, self.validation = (TensorDataset(torch.stack(part)) for part in crops)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches in a new order each epoch."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The same batches every time."""
        return DataLoader(self.validation, self.batch_size)


class TokenKindModule(LightningModule):
    """Fine-tunes a GPT of the demo at a constant learning rate; logs `train_loss`, `val_loss` and `val_acc`.

    Args:
        gpt: Shape of the model.
        base: A merge of the demo to begin with; without one the expert begins with random weights.
        learning_rate: The peak, if a callback changes it.
        weight_decay: Of AdamW.

    Example::

        module = TokenKindModule(base="demo_run/dense/merges/latest")
        Trainer(max_steps=2048).fit(module, datamodule=TokenKindData())
    """

    def __init__(
        self,
        gpt: GPTConfig | None = None,
        base: str | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = GPT(gpt)
        if base is not None:
            weights = load_merge(base)
            self.model.load_state_dict({n.removeprefix("model."): t for n, t in weights.items()})
        self.model.head = nn.Linear(self.model.config.width, len(KINDS))
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def forward(self, input_ids: Tensor) -> Tensor:
        """Judges every byte by what precedes it; `(batch, context)` to logits `(batch, context, kinds)`."""
        logits: Tensor = self.model(input_ids)
        return logits

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        """Computes the training loss."""
        loss, _ = self._score(batch[0])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor], batch_idx: int) -> None:
        """Adds a batch to the validation's loss and accuracy."""
        loss, accuracy = self._score(batch[0])
        scores = {"val_loss": loss, "val_acc": accuracy}
        self.log_dict(scores, prog_bar=True, batch_size=len(batch[0]), sync_dist=True)

    def configure_optimizers(self) -> AdamW:
        """AdamW without a schedule."""
        return AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def _score(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of `(batch, 2, context)` bytes and labels."""
        input_ids, kinds = batch.unbind(1)
        logits = self(input_ids).flatten(0, 1)
        correct = logits.argmax(-1) == kinds.flatten()
        return F.cross_entropy(logits.float(), kinds.flatten()), correct.float().mean()
