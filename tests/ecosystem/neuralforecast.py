"""neuralforecast: an N-HiTS model on two sine waves, which the library trains and saves."""

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked


def waves() -> pd.DataFrame:
    days = pd.date_range("2020-01-01", periods=120, freq="D")
    angle = np.arange(120) / 5
    frames = [pd.DataFrame({"unique_id": str(i), "ds": days, "y": np.sin(angle + i)}) for i in range(4)]
    return pd.concat(frames, ignore_index=True)


def train(callbacks, folder):
    model = NHITS(
        h=4, input_size=12, max_steps=36, mlp_units=3 * [[16, 16]], batch_size=4, windows_batch_size=32,
        val_check_steps=6, random_seed=1, callbacks=callbacks, default_root_dir=str(folder),
        accelerator="cpu", enable_progress_bar=False, scaler_type="standard",
    )  # fmt: skip
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(waves(), val_size=12)
    return forecast


def load(folder):
    merged = train([], folder.parent / "again")
    merged.models[0].load_state_dict(load_merge(folder))
    merged.save(str(folder.parent / "saved"), save_dataset=False, overwrite=True)
    return NeuralForecast.load(str(folder.parent / "saved")).models[0].state_dict()


torch.set_num_threads(1)
checked("neuralforecast", pl, train, load).write(result_path())
