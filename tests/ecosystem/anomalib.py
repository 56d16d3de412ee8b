"""anomalib: a FastFlow on small pictures, whose metrics are computed by one of the library's callbacks."""

import tempfile
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.models import Fastflow
from anomalib.pre_processing import PreProcessor
from PIL import Image

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.lightning_runs import checked
from tests.support.training_runs import seed


def pictures() -> Path:
    root, random = Path(tempfile.mkdtemp(prefix="pictures-")), np.random.default_rng(0)
    for kind, count in (("good", 40), ("bad", 12)):
        (root / kind).mkdir()
        for i in range(count):
            picture = random.integers(100, 140, (64, 64, 3), dtype=np.uint8)
            if kind == "bad":
                picture[16:32, 16:32] = random.integers(0, 255)
            Image.fromarray(picture).save(root / kind / f"{i}.png")
    return root


ROOT = pictures()


def data() -> Folder:
    return Folder(
        "small", root=ROOT, normal_dir="good", abnormal_dir="bad", train_batch_size=4, eval_batch_size=4,
        num_workers=0, seed=0,
    )  # fmt: skip


def pre_processor() -> PreProcessor:
    return Fastflow.configure_pre_processor(image_size=(64, 64))


def model() -> Fastflow:
    seed()
    return Fastflow(
        backbone="resnet18", pre_trained=False, flow_steps=2,
        pre_processor=pre_processor(),
        evaluator=Evaluator(val_metrics=[AUROC(fields=["pred_score", "gt_label"], prefix="val_")]),
        visualizer=False,
    )  # fmt: skip


def train(callbacks, folder):
    trained = model()
    engine = Engine(
        max_epochs=5,
        callbacks=callbacks,
        default_root_dir=folder,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    engine.fit(model=trained, datamodule=data())
    return trained


def validate(trained):
    engine = Engine(default_root_dir=tempfile.mkdtemp(), accelerator="cpu", enable_progress_bar=False)
    return engine.validate(model=trained, datamodule=data(), verbose=False)[0]


def load(folder):
    merged = model()
    merged.load_state_dict(load_merge(folder))
    return merged.state_dict()


def load_checkpoint(merged, newest):
    """The pre-processor is given, as with any checkpoint of anomalib: it is an object, which none holds."""
    return Fastflow.load_from_checkpoint(
        merged / "merged.ckpt", pre_processor=pre_processor(), visualizer=False
    )


torch.set_num_threads(1)
thresholds = "post_processor.*"  # some are never set
checked("anomalib", pl, train, load, validate, load_checkpoint, thresholds).write(result_path())
