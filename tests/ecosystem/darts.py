"""darts: an N-HiTS model on a sine wave, which the library trains and saves."""

import numpy as np
import pytorch_lightning as pl
import torch
from darts import TimeSeries
from darts.models import NHiTSModel

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked


def wave(start: int, count: int) -> TimeSeries:
    time = np.arange(start, start + count)
    return TimeSeries.from_values((np.sin(time / 5) + 0.1 * np.sin(time * 1.7)).astype(np.float32))


def model(**options) -> NHiTSModel:
    return NHiTSModel(
        input_chunk_length=12, output_chunk_length=4, num_layers=1, layer_widths=16, batch_size=16,
        n_epochs=4, random_state=0,
        pl_trainer_kwargs={"accelerator": "cpu", "enable_progress_bar": False, **options},
    )  # fmt: skip


def train(callbacks, folder):
    trained = model(callbacks=callbacks, default_root_dir=str(folder))
    return trained.fit(wave(0, 207), val_series=wave(207, 60))


def load(folder):
    merged = model().fit(wave(0, 60), epochs=1)
    merged.model.load_state_dict(load_merge(folder))
    merged.save(str(folder.parent / "merged.pt"))
    return NHiTSModel.load(str(folder.parent / "merged.pt"), map_location="cpu").model.state_dict()


torch.set_num_threads(1)
checked("darts", pl, train, load).write(result_path())
