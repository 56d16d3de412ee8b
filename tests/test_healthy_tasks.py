"""`benchmarks/healthy_tasks`: every task can be made, and shows its training step a batch."""

from importlib import import_module

from checkpoint_files import ROOT
from torch import Generator, Tensor


def test_every_task_can_be_made_and_draws_its_batches(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tasks = import_module("healthy_tasks.catalogue").TASKS
    assert len(tasks) > 90
    for name, task in tasks.items():
        module = task.build(0)
        first, again = (module.draw(0, Generator().manual_seed(1)) for _ in range(2))
        assert sum(parameter.numel() for parameter in module.parameters()), name
        assert [t.tolist() for t in first if isinstance(t, Tensor)] == [
            t.tolist() for t in again if isinstance(t, Tensor)
        ], name
