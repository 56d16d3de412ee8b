"""pytorch-tabular: a category-embedding model on a small table, which the library trains and saves."""

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked


def table(count: int) -> pd.DataFrame:
    random = np.random.default_rng(count)
    a, b, kind = random.normal(size=count), random.normal(size=count), random.choice(["x", "y", "z"], count)
    return pd.DataFrame({"a": a, "b": b, "kind": kind, "target": a - 2 * b + (kind == "x")})


def train(callbacks, folder):
    trained = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=["a", "b"], categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="regression", layers="16-8", dropout=0.1, seed=1),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(
            batch_size=16, max_epochs=5, accelerator="cpu", early_stopping=None, checkpoints=None,
            load_best=False, progress_bar="none", seed=1, trainer_kwargs={"default_root_dir": str(folder)},
        ),
        verbose=False,
    )  # fmt: skip
    trained.fit(train=table(160), validation=table(48), callbacks=callbacks)
    return trained


def load(folder):
    merged = train([], folder.parent / "again")
    merged.model.load_state_dict(load_merge(folder))
    merged.save_model(str(folder.parent / "saved"))
    return TabularModel.load_model(str(folder.parent / "saved")).model.state_dict()


torch.set_num_threads(1)
checked("pytorch-tabular", pl, train, load).write(result_path())
