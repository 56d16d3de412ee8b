"""gluonts: a DeepAR estimator on sine waves, which the library trains in a LightningModule of its own."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from gluonts.dataset.common import ListDataset
from gluonts.model.predictor import Predictor
from gluonts.torch import DeepAREstimator

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked
from tests.support.training_runs import seed


def waves(count: int) -> ListDataset:
    rows = [
        {"start": pd.Period("2020-01-01", "D"), "target": np.sin(np.arange(count) / 5 + i)} for i in range(6)
    ]
    return ListDataset(rows, freq="D")


def estimator(**options) -> DeepAREstimator:
    return DeepAREstimator(
        freq="D", prediction_length=4, context_length=8, num_layers=1, hidden_size=8, lags_seq=[1, 2],
        batch_size=16, num_batches_per_epoch=12, dropout_rate=0.0,
        trainer_kwargs={"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, **options},
    )  # fmt: skip


def train(callbacks, folder):
    seed()
    trained = estimator(callbacks=callbacks, default_root_dir=folder)
    return trained.train_model(waves(60), validation_data=waves(64))


def load(folder):
    merged = estimator().create_lightning_module()
    merged.load_state_dict(load_merge(folder))
    predictor = estimator().create_predictor(estimator().create_transformation(), merged)
    (folder.parent / "predictor").mkdir()
    predictor.serialize(folder.parent / "predictor")
    loaded = Predictor.deserialize(folder.parent / "predictor", device="cpu")
    assert len(list(loaded.predict(waves(60)))) == 6
    return loaded.prediction_net.state_dict()


torch.set_num_threads(1)
checked("gluonts", pl, train, load).write(result_path())
