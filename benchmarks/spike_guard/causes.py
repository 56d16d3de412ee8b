"""What breaks a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from benchmarks.spike_guard.plan import PLAN
from merge_callback.demo.crops import Batch


@dataclass
class Cause:
    """Something that goes wrong for ``length`` steps or until the run is restored. The hooks do nothing.

    Args:
        seed: of the run.
    """

    seed: int
    length = 1
    mends = True
    """Whether it ends with the first restore, as if somebody had mended it then."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1000 + self.seed)
        self.ended = False

    def is_on(self, step: int) -> bool:
        """Whether it breaks the update after ``step`` optimizer steps."""
        return not self.ended and PLAN.onset <= step < PLAN.onset + self.length

    def learning_rate(self, step: int) -> float:
        """What the learning rate is multiplied by."""
        return 1.0

    def batch(self, batch: Batch, step: int) -> Batch:
        """The batch that is trained on."""
        return batch

    def gradients(self, module: LightningModule, step: int) -> None:
        """Spoils the gradients."""

    def clips(self) -> bool:
        """Whether the gradients are clipped."""
        return True

    def weights(self, module: LightningModule, before: Tensor | None) -> None:
        """Spoils the weights after the update; ``before`` are those before it where `remembers` is set."""

    remembers = False


def random_labels(batch: Batch, generator: torch.Generator) -> Batch:
    """The same text with random bytes for labels."""
    labels = torch.randint(0, 256, batch["labels"].shape, generator=generator)
    return {"input_ids": batch["input_ids"], "labels": labels}


class Surge(Cause):
    """The learning rate is 40 times too high for 40 steps."""

    length = 40
    excess = 40.0

    def learning_rate(self, step: int) -> float:
        return self.excess


class Creep(Surge):
    """The learning rate grows by a tenth a step for 80 steps, at most 300-fold: the slowest to show."""

    length = 80
    growth = 1.1
    excess = 300.0

    def learning_rate(self, step: int) -> float:
        return min(self.excess, self.growth ** (step - PLAN.onset + 1))


class LostClipping(Cause):
    """Clipping is off, and one batch in three has random labels and a loss that counts 300 times.

    With clipping on the same batches do no harm that lasts (`ClippedOutliers`).
    """

    length = 90
    scale = 300.0
    period = 3

    def batch(self, batch: Batch, step: int) -> Batch:
        return batch if (step - PLAN.onset) % self.period else random_labels(batch, self.generator)

    def gradients(self, module: LightningModule, step: int) -> None:
        if (step - PLAN.onset) % self.period == 0:
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.grad *= self.scale

    def clips(self) -> bool:
        return False


class ClippedOutliers(LostClipping):
    """The control: the same outliers, clipped."""

    def clips(self) -> bool:
        return True


class CorruptBatches(Cause):
    """The labels of 150 batches are random bytes, as after a wrong offset in a file.

    No restore changes the data: they go on to their end.
    """

    length = 150
    mends = False

    def batch(self, batch: Batch, step: int) -> Batch:
        return random_labels(batch, self.generator)


class Bfloat16(Cause):
    """The weights live in bf16, and an update is added in 256 parts, each sum rounded toward zero.

    So rounds an accumulator that drops the bits it has no room for. Fewer parts do the same harm more mildly:
    with 8 the loss rises by a tenth, with 64 by a third, and neither is an outlier among batches this small.
    """

    length = 200
    parts = 256
    remembers = True

    def weights(self, module: LightningModule, before: Tensor | None) -> None:
        assert before is not None
        part = (parameters_to_vector(module.parameters()) - before) / self.parts
        total = before
        for _ in range(self.parts):
            total = ((total + part).view(torch.int32) & -65536).view(torch.float32)
        vector_to_parameters(total, module.parameters())


class BitFlip(Cause):
    """The highest bit of the exponent of one weight flips, once: |w| < 2 becomes |w| · 2^128.

    Seeds take turns at the matrices of the blocks.
    """

    def weights(self, module: LightningModule, before: Tensor | None) -> None:
        matrices = [p for name, p in module.named_parameters() if "blocks" in name and p.ndim == 2]
        chosen = matrices[int(torch.randint(len(matrices), (), generator=self.generator))].view(-1)
        index = int(torch.randint(len(chosen), (), generator=self.generator))
        chosen.view(torch.int32)[index] ^= 1 << 30


CAUSES: dict[str, type[Cause]] = {
    "lr surge": Surge,
    "lost clipping": LostClipping,
    "corrupted batches": CorruptBatches,
    "bf16 accumulation": Bfloat16,
    "bit flip": BitFlip,
}
EXTRA: dict[str, type[Cause]] = {"lr creep": Creep, "clipped outliers": ClippedOutliers}
"""Further ones for ``--kinds``: the one whose damage is older than its first outlier, and a control."""
