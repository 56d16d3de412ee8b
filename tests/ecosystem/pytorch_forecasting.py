"""pytorch-forecasting: a temporal fusion transformer on sine waves."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked
from tests.support.training_runs import seed


def series() -> TimeSeriesDataSet:
    time = np.arange(40)
    frames = [
        pd.DataFrame({"time": time, "wave": str(i), "value": np.sin(time / 3 + i) + 2.0}) for i in range(6)
    ]
    return TimeSeriesDataSet(
        pd.concat(frames, ignore_index=True), time_idx="time", target="value", group_ids=["wave"],
        max_encoder_length=8, max_prediction_length=4, static_categoricals=["wave"],
        time_varying_unknown_reals=["value"], time_varying_known_reals=["time"], add_relative_time_idx=True,
    )  # fmt: skip


def model(data: TimeSeriesDataSet) -> TemporalFusionTransformer:
    seed()
    return TemporalFusionTransformer.from_dataset(
        data,
        hidden_size=8,
        attention_head_size=2,
        hidden_continuous_size=4,
        loss=QuantileLoss(),
        learning_rate=0.01,
    )


def trainer(**options) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)


def train(callbacks, folder):
    data = series()
    trained = model(data)
    fit = trainer(
        max_epochs=6,
        limit_train_batches=10,
        callbacks=callbacks,
        default_root_dir=folder,
        gradient_clip_val=0.1,
        log_every_n_steps=4,
    )
    fit.fit(
        trained, data.to_dataloader(train=True, batch_size=16), data.to_dataloader(train=False, batch_size=64)
    )
    return trained


def load(folder):
    merged = model(series())
    merged.load_state_dict(load_merge(folder))
    return merged.state_dict()


def load_checkpoint(merged, newest):
    module = TemporalFusionTransformer.load_from_checkpoint(newest)  # its hyperparameters are objects
    module.load_state_dict(load_merge(merged))
    return module


torch.set_num_threads(1)
checked("pytorch-forecasting", pl, train, load, load_checkpoint=load_checkpoint).write(result_path())
