"""A run that diverges in a plain loop with ``CheckpointMerger``, which finds it out and restores the run."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.papers.runs import built, load, optimizer_of, training_loss, weights
from benchmarks.papers.spec import Spec
from benchmarks.papers.study import Study
from merge_callback import CheckpointMerger, SpikeOptions

BEFORE = 200
"""Steps before the excess: the baseline of losses takes 128."""


def rescued(study: Study, spec: Spec, surge: range, rate: float, end: int) -> dict[str, Any]:
    """What became of it: the step of the restore from the onset, the held-out loss at the end, all losses.

    Args:
        study: whose cache keeps the result.
        spec: the run at its right learning rate.
        surge: steps at an excessive one, until the restore.
        rate: the excessive one.
        end: the last step.
    """
    path = study.cache / "rescued" / f"{spec.key}-{surge.start}-{end}.json"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        with TemporaryDirectory() as folder:
            path.write_text(json.dumps(_trained(study, spec, surge, rate, end, Path(folder))))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _trained(study: Study, spec: Spec, surge: range, rate: float, end: int, folder: Path) -> dict[str, Any]:
    model, begin, restores, losses = built(spec), surge.start - study.steps(BEFORE), [], []
    optimizer, state = optimizer_of(model, spec), study.run(spec).state(begin)
    load(model, state["weights"])
    optimizer.load_state_dict(state["optimizer"])

    def tell(event: Any) -> None:
        if event["event"] == "restore":
            restores.append(event["step"])

    with CheckpointMerger(
        model,
        optimizer,
        total_steps=end - begin,
        every_n_steps=study.steps(20),
        dirpath=folder,
        emit_every=0,
        durable=False,
        exclude=("*.router_bias",) if spec.experts else (),
        compute_loss=lambda step: training_loss(model, spec, step),
        spike=SpikeOptions(on_spike=tell, rewarm_steps=study.steps(30)),
    ) as merger:
        for step in range(begin, end):
            for group in optimizer.param_groups:
                group["lr"] = rate if step in surge and not restores else spec.learning_rate
            loss = training_loss(model, spec, step)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), spec.clip)
            model.balance_experts()
            optimizer.step()
            optimizer.zero_grad()
            merger.step(loss=loss.detach(), batch=step)
            losses.append(loss.item())
    after = study.evaluate(spec, weights(model)).loss
    return {
        "restored": restores[0] - study.steps(BEFORE) if restores else None,
        "after": after,
        "losses": losses,
    }
