"""A next stage of training that begins with a merge: `merge-callback fit --init_from`, and in Python."""

from pathlib import Path

import pytest
import torch
from checkpoint_files import ROOT
from lightning.pytorch import Callback
from training_runs import Classifier, assert_same_bits, loader, train, weights_of

from merge_callback import CheckpointMergeCallback, load_merge
from merge_callback.cli.main import main
from merge_callback.demo import DemoData, DemoModule, GPTConfig, GradientNorm, WSDSchedule

CONFIG = str(ROOT / "example_configs/second_stage.yaml")
SMALL = {"width": 16, "layers": 1, "heads": 1, "context": 16}


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    """The folder of a merge of a small model of the demo."""
    folder = tmp_path_factory.mktemp("first")
    data = DemoData(4, 16, epoch_batches=6, validation_batches=1, max_bytes=2_000_000)
    module = DemoModule(GPTConfig(**SMALL), WSDSchedule(1, 100, 0))
    merging = CheckpointMergeCallback(every_n_steps=2, dirpath=folder, evaluate=False, spike="off")
    train(module, merging, data=data, max_steps=6, limit_val_batches=0)
    return merging.latest


def fit(*arguments, **gpt):
    """Trains two steps with a learning rate of 0."""
    small = [f"--model.gpt.{name}={value}" for name, value in {**SMALL, **gpt}.items()]
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=1"]
    data = ["--data.batch_size=2", "--data.context=16", "--data.max_bytes=8_000_000"]
    return main(["fit", "--config", CONFIG, *small, *short, *data, "--model.learning_rate=0", *arguments])


def saved():
    (path,) = Path("demo_run/second_stage/version_0/checkpoints").iterdir()
    return path, torch.load(path)["state_dict"]


@pytest.mark.parametrize("flag", ["--init_from", "--init-from"])
def test_a_next_stage_begins_with_the_weights_of_a_merge(merge, flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit(f"{flag}={merge}") == 0
    assert_same_bits(saved()[1], load_merge(merge))


def test_a_next_stage_that_is_resumed_keeps_its_own_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fit() == 0
    checkpoint, weights = saved()
    assert fit("--init_from=what/is/gone", f"--ckpt_path={checkpoint}", "--trainer.max_steps=3") == 0
    (resumed,) = Path("demo_run/second_stage/version_1/checkpoints").iterdir()
    assert_same_bits(torch.load(resumed)["state_dict"], weights)


def test_what_is_no_merge_of_this_model_is_refused_in_a_line(merge, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert fit("--init_from=nowhere") == 1
    assert "merge-callback: --init_from=nowhere: nowhere: no published merge" in capsys.readouterr().err
    assert fit(f"--init_from={merge}", width=32) == 1
    assert f"--init_from={merge}: it does not fit the model: " in capsys.readouterr().err


def test_names_that_lost_their_prefix_have_it_again_for_the_module(tmp_path):
    module = Classifier()
    train(
        module, CheckpointMergeCallback(every_n_steps=2, dirpath=tmp_path, strip_prefix="net."), data=loader()
    )
    assert "0.weight" in load_merge(tmp_path / "latest")
    found = load_merge(tmp_path / "latest", module)
    assert found.keys() == weights_of(module).keys()
    module.load_state_dict(found)


class Clipped(Callback):
    """Notes the norm of the gradients that the optimizer is going to use."""

    def __init__(self):
        self.logged, self.computed = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.computed.append(torch.cat([p.grad.flatten() for p in module.parameters()]).norm().item())

    def on_train_batch_end(self, trainer, *_):
        self.logged.append(trainer.callback_metrics["grad_norm"].item())


def test_the_gradient_norm_is_that_before_clipping():
    notes = Clipped()
    train(Classifier(), GradientNorm(), notes, data=loader(), max_steps=3, gradient_clip_val=1e-3)
    assert notes.logged == pytest.approx(notes.computed, rel=1e-6)
    assert min(notes.logged) > 1e-2


def test_the_text_of_a_package_is_its_own_source():
    data = DemoData(package="torch")
    data.setup("fit")
    other = DemoData()
    other.setup("fit")
    assert data.corpus.train[:1000].tolist() != other.corpus.train[:1000].tolist()
    with pytest.raises(ValueError, match="package='no_such_package' is no package that is installed"):
        DemoData(package="no_such_package").setup("fit")
