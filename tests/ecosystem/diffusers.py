"""diffusers: a small UNet trained to remove noise, in a LightningModule; and the folders it saves, merged."""

import lightning.pytorch as pl
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch.utils.data import DataLoader

from merge_callback import load_merge
from tests.ecosystem.comparison import merge_files, result_path
from tests.ecosystem.lightning_runs import checked
from tests.support.training_runs import seed


class Denoiser(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4,
        )  # fmt: skip
        self.noise = DDPMScheduler(num_train_timesteps=50)

    def training_step(self, batch, batch_idx):
        noise, steps = torch.randn_like(batch), torch.randint(0, 50, (len(batch),))
        return torch.nn.functional.mse_loss(
            self.unet(self.noise.add_noise(batch, noise, steps), steps).sample, noise
        )

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class SavingFolders(pl.Callback):
    """Saves the model as diffusers does."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step % 6 == 0:
            pl_module.unet.save_pretrained(self.folder / f"checkpoint-{trainer.global_step}")


def loader(count: int, **options) -> DataLoader:
    pictures = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(count))
    return DataLoader(pictures, batch_size=8, **options)


def trainer(**options) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)


def train(callbacks, folder):
    seed()
    module = Denoiser()
    callbacks = [*callbacks, SavingFolders(folder / "unets")]
    fit = trainer(max_epochs=3, callbacks=callbacks, default_root_dir=folder)
    fit.fit(module, loader(96, shuffle=True), loader(16))
    return module


def load(folder):
    """The emission goes into the module; the library's own loading is of the merge of its folders."""
    module = Denoiser()
    module.load_state_dict(load_merge(folder))
    unets = merge_files(folder.parent.parent / "run/unets", folder.parent.parent / "unet")
    loaded = UNet2DModel.from_pretrained(unets).state_dict()
    for name, tensor in module.unet.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, msg=name)
    return module.state_dict()


torch.set_num_threads(1)
checked("diffusers", pl, train, load).write(result_path())
