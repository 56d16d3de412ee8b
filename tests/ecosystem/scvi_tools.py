"""scvi-tools: an SCVI on random counts, trained by the library's own Trainer and training plan."""

import anndata
import lightning.pytorch as pl
import numpy as np
import scvi
import torch

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked


def model() -> scvi.model.SCVI:
    counts = np.random.default_rng(0).poisson(2.0, (240, 30)).astype(np.float32)
    data = anndata.AnnData(counts)
    scvi.model.SCVI.setup_anndata(data)
    scvi.settings.seed = 0  # of the split, too
    return scvi.model.SCVI(data, n_hidden=16, n_latent=4)


def train(callbacks, folder):
    trained = model()
    trained.train(
        max_epochs=6, batch_size=32, train_size=0.8, accelerator="cpu", callbacks=callbacks,
        check_val_every_n_epoch=1, plan_kwargs={"n_epochs_kl_warmup": 1}, default_root_dir=folder,
        enable_progress_bar=False,
    )  # fmt: skip
    return trained


def load(folder):
    names = load_merge(folder)
    merged = model()
    merged.module.load_state_dict({n.removeprefix("module."): tensor for n, tensor in names.items()})
    merged.is_trained = True
    merged.save(str(folder.parent / "saved"), save_anndata=True)
    loaded = scvi.model.SCVI.load(str(folder.parent / "saved"), accelerator="cpu")
    return {f"module.{name}": tensor for name, tensor in loaded.module.state_dict().items()}


torch.set_num_threads(1)
checked("scvi-tools", pl, train, load).write(result_path())
