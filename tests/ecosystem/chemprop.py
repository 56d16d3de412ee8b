"""chemprop: a message-passing network on small molecules, with the library's own schedule."""

import torch
from chemprop import data, models, nn
from lightning import pytorch as pl

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked
from tests.support.training_runs import seed


def model() -> models.MPNN:
    seed()
    network = (
        nn.BondMessagePassing(d_h=16),
        nn.MeanAggregation(),
        nn.RegressionFFN(input_dim=16, hidden_dim=16),
    )
    return models.MPNN(
        *network, batch_norm=True, metrics=[nn.metrics.RMSE(), nn.metrics.MAE()], warmup_epochs=1
    )


def loader(count: int, shuffle: bool = False):
    chains = ["C" * (1 + i % 9) + "NO"[i % 2] + "C" * (i % 5) for i in range(count)]
    points = [data.MoleculeDatapoint.from_smi(chain, [float(len(chain))]) for chain in chains]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=8, shuffle=shuffle)


def trainer(**options) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)


def train(callbacks, folder):
    trained = model()
    fit = trainer(max_epochs=6, callbacks=callbacks, default_root_dir=folder, log_every_n_steps=4)
    fit.fit(trained, loader(80, shuffle=True), loader(24))
    return trained


def load(folder):
    merged = model()
    merged.load_state_dict(load_merge(folder))
    models.save_model(folder.parent / "merged.pt", merged)
    return models.load_model(folder.parent / "merged.pt").state_dict()


def load_checkpoint(merged, newest):
    module = models.MPNN.load_from_checkpoint(newest)  # its hyperparameters are classes
    module.load_state_dict(load_merge(merged))
    return module


torch.set_num_threads(1)
checked("chemprop", pl, train, load, load_checkpoint=load_checkpoint).write(result_path())
