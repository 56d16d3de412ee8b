"""lightly: SimCLR on random pictures, with a backbone and a head of the library's, in a LightningModule."""

import lightning.pytorch as pl
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead
from torch.utils.data import DataLoader, TensorDataset

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked
from tests.support.training_runs import seed


class SimCLR(pl.LightningModule):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.backbone = torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 3, stride=2), torch.nn.BatchNorm2d(width), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        )  # fmt: skip
        self.head = SimCLRProjectionHead(width, width, 8)
        self.criterion = NTXentLoss(temperature=0.5)

    def _loss(self, batch):
        first, second = batch
        return self.criterion(self.head(self.backbone(first)), self.head(self.backbone(second)))

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def loader(count: int, **options) -> DataLoader:
    pictures = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count))
    noise = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(count + 1))
    return DataLoader(TensorDataset(pictures, pictures + 0.3 * noise), batch_size=8, **options)


def trainer(**options) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)


def train(callbacks, folder):
    seed()
    model = SimCLR()
    fit = trainer(max_epochs=3, callbacks=callbacks, default_root_dir=folder, log_every_n_steps=4)
    fit.fit(model, loader(96, shuffle=True), loader(32))
    return model


def load(folder):
    model = SimCLR()
    model.load_state_dict(load_merge(folder))
    return model.state_dict()


def load_checkpoint(merged, newest):
    return SimCLR.load_from_checkpoint(merged / "merged.ckpt")


checked("lightly", pl, train, load, load_checkpoint=load_checkpoint).write(result_path())
