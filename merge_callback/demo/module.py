"""The demo's LightningModule: a GPT under AdamW and a warmup-stable-decay schedule."""

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from merge_callback.demo.crops import Batch
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.demo.schedule import WSDSchedule


class DemoModule(LightningModule):
    """Trains a byte-level GPT to predict the next byte; logs `train_loss` and `val_loss` in nats per byte.

    Args:
        gpt: Shape of the model.
        schedule: Lengths and decay curve of the learning-rate schedule.
        learning_rate: Its peak.
        weight_decay: Applied to matrices only.

    Example::

        Trainer(max_steps=5400, gradient_clip_val=1.0).fit(DemoModule(), datamodule=DemoData())
    """

    def __init__(
        self,
        gpt: GPTConfig | None = None,
        schedule: WSDSchedule | None = None,
        learning_rate: float = 8e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.model = GPT(gpt)
        self.schedule = schedule or WSDSchedule()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay

    def configure_model(self) -> None:
        """Shards the model block by block (FSDP2), but only under Lightning's `ModelParallelStrategy`."""
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Predicts the next byte at every position; `(batch, context)` to logits `(batch, context, 256)`."""
        logits: Tensor = self.model(input_ids)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Computes the training loss."""
        loss = self._mean_loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds a batch to the validation loss."""
        loss = self._mean_loss(batch)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch["labels"]), sync_dist=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Balances the experts once per optimizer step, even if it accumulates several batches."""
        self.model.balance_experts()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Builds AdamW and steps its schedule once per optimizer step."""
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        # foreach groups calls, on which a model this small spends its time. Fused would be faster still, but
        # Lightning refuses to clip the gradients of a fused optimizer under mixed precision.
        optimizer = AdamW(groups, lr=self.learning_rate, betas=(0.9, 0.95), foreach=True)
        scheduler = LambdaLR(optimizer, self.schedule.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _mean_loss(self, batch: Batch) -> Tensor:
        logits = self(batch["input_ids"])
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten())
