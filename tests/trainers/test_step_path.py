"""What the step path asks of Lightning by short cuts is what Lightning itself answers."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, IterableDataset
from training_runs import Classifier, loader, rows, train

from merge_callback.trainers.lightning.private import is_validation_next, step_progress


class Answers(Callback):
    """Both answers after every batch; and the batches after which there was a validation."""

    def __init__(self):
        self.steps, self.coming, self.known, self.validated = [], [], [], []
        self.batches = 0

    def on_train_start(self, trainer, pl_module):
        self.progress = step_progress(trainer)

    def on_train_batch_end(self, trainer, pl_module, *_):
        loop = trainer.fit_loop
        self.batches += 1
        self.steps.append((self.progress.completed, trainer.global_step))
        self.coming.append(is_validation_next(trainer))
        self.known.append(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))

    def on_validation_start(self, trainer, pl_module):
        self.validated.append(self.batches)


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self):
        return iter(rows(64))


class Iterating(Classifier):
    """Takes its batches from the loader itself."""

    def training_step(self, dataloader_iter):
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


class TwoByHand(Classifier):
    """Steps two optimizers in turn."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[batch_idx % 2]
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if batch_idx % 3:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD([layer.weight], lr=0.1) for layer in (self.net[0], self.net[2])]


def answers(module=Classifier, stream=False, **options):
    found = Answers()
    val = None if options.pop("no_validation", False) else loader(16)
    train(
        module(),
        found,
        data=DataLoader(Stream(), batch_size=8) if stream else loader(64),
        val=val,
        **{"max_epochs": 3, **options},
    )
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"val_check_interval": 3},
        {"val_check_interval": 0.25},
        {"val_check_interval": 5, "check_val_every_n_epoch": None},
        {"check_val_every_n_epoch": 2},
        {"limit_train_batches": 5},
        {"limit_val_batches": 0},
        {"no_validation": True},
        {"val_check_interval": 3, "accumulate_grad_batches": 2},
        {"stream": True},
        {"stream": True, "limit_train_batches": 3},
        {"stream": True, "val_check_interval": 3},
        {"module": Iterating},
        {"module": Iterating, "val_check_interval": 3},
        {"module": TwoByHand, "val_check_interval": 3},
    ],
    ids=str,
)
def test_a_coming_validation_is_known_as_lightning_knows_it(options):
    found = answers(**options)
    assert found.coming == found.known
    assert [batch + 1 for batch, coming in enumerate(found.coming) if coming] == found.validated


@pytest.mark.parametrize("module", [Classifier, TwoByHand, Iterating])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_steps_are_counted_as_lightning_counts_them(module, accumulated):
    options = {} if module is TwoByHand else {"accumulate_grad_batches": accumulated}
    steps = answers(module, **options).steps
    assert len({step for step, _ in steps}) > 3
    assert all(mine == lightnings for mine, lightnings in steps)
