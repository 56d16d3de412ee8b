"""Commands that write more than one merge: a sweep, which keeps its scores, and the removal of old merges."""

from dataclasses import dataclass, replace

import torch

from merge_callback.offline.sweep_results import RESULTS
from merge_callback.publish import Publisher

from .checks import Verdict
from .commands import INPUTS, LOG, OUT, ROOT, Commands, Done
from .log import Log
from .states import FOLDER, MODELS, Disk, below, digest

SCORES, MERGES = "scored/scores", "merges"
"""The folders below the one that is watched: a sweep's scores, and a run's merges."""


def score(state):
    """What the sweep calls its merges' loss."""
    return {"val_loss": state["a"].square().mean() + state["b"].mean()}


@dataclass(frozen=True)
class Scored(Done):
    """Also the candidates whose scores the sweep has noted."""

    scored: tuple[str, ...] = ()

    def after(self, record, disk):
        """The same after one more record."""
        if record.get("mark") == "scored":
            return replace(self, scored=(*self.scored, record["value"]))
        return super().after(record, disk)


class Sweeps(Commands):
    """A sweep, which goes on from the scores that it finds."""

    promises = Scored()

    def __init__(self, **options):
        super().__init__(1, **options)

    def judge(self, tree, promises, log):
        """Likewise; and a score that was noted is there."""
        verdict, scores = super().judge(tree, promises, log), below(tree, SCORES) or {}
        text = log.blob(scores[RESULTS]).decode(errors="replace") if RESULTS in scores else ""
        verdict.silent += [f"the score {key} is gone" for key in promises.scored if key not in text]
        return verdict

    def judge_resume(self, found, number):
        """Likewise; and the table is that of all scores."""
        verdict, (code, _, root) = super().judge_resume(found, number), found
        if not code:
            scores = root / SCORES
            names = sorted(path.name for path in scores.iterdir())
            if names != ["results.csv", RESULTS]:
                verdict.damaged.append(f"{names} are the results")
            elif len((scores / "results.csv").read_text().splitlines()) != 6:
                verdict.torn.append("the table is another")
        return verdict

    def _arguments(self, place, number, force):
        inputs = [place / ROOT / INPUTS / f"step={i}.safetensors" for i in (0, 1)]
        forced = ["--force"] if force else []
        output = ["--output", str(place / ROOT / OUT), "--results", str(place / ROOT / SCORES), "--quiet"]
        methods = ["--methods", "sma", "ema:alpha=0.3", "wma", "extrapolate"]
        scored = ["--evaluate", "power_loss.further:score"]
        return ["sweep", *map(str, inputs), *methods, *scored, *output, *forced]


class Prunes(Commands):
    """The removal of all merges of a run but the newest one and the best one."""

    def __init__(self, **options):
        super().__init__(1, **options)

    def record(self, place):
        """Publishes merges, prunes them, and returns the log."""
        (place / ROOT).mkdir(parents=True)
        publisher = Publisher(place / ROOT / MERGES, None, 1 << 30)
        for step in range(1, 6):
            tensors = {"weight": torch.full((3, 2), float(step))}

            def write(draft, tensors=tensors):
                return publisher.write_safetensors(draft, tensors, iter(tensors.values()))

            record = {
                "run_id": "run",
                "step": step,
                "method": {"name": "sma", "options": {}, "reference": ""},
            }
            publisher.publish(f"step={step:08d}-sma", write, record)
        publisher.protect((), 2)
        self.start(place / ROOT, place / LOG, self.exchange, self._arguments(place, 0, False))
        return Log(place / LOG)

    def prepare(self, place, log):
        """Learns what was there, and what is left."""
        disk = Disk(log, MODELS[0])
        for i, record in enumerate(log.records):
            disk.do(record)
            if i == log.start - 1:
                self.before = below(disk.as_it_is(), MERGES)
            assert record.get("mark") != "done" or record["value"] == 0
        self.left = below(disk.as_it_is(), MERGES)
        assert _names(self.left) == ["step=00000002-sma", "step=00000005-sma"]
        assert len(_names(self.before)) == 5

    def judge(self, tree, promises, log):
        """What is wrong with a state: a merge that is not whole, or one gone that was to stay."""
        verdict, merges = Verdict(), below(tree, MERGES)
        for name in _names(merges):
            if digest(below(merges, name)) != digest(below(self.before, name)):
                verdict.damaged.append(f"{name} is not whole")
        changed = [path for path, what in self.left.items() if merges.get(path) != what]
        verdict.damaged += [f"{path} is another or gone" for path in changed]
        if promises.commands and _names(merges) != _names(self.left):
            verdict.silent.append(f"{_names(merges)} are there again")
        return verdict

    def judge_resume(self, found, number):
        """What is wrong with what the command made of a state."""
        verdict, (code, told, root) = Verdict(), found
        if code:
            verdict.crashed.append(f"exit status {code}: {told}")
        names = {str(path.relative_to(root / MERGES)) for path in (root / MERGES).rglob("*")}
        if names != self.left.keys():
            verdict.damaged.append(f"{sorted(names ^ self.left.keys())} are left over, or gone")
        return verdict

    def _arguments(self, place, number, force):
        return ["prune", str(place / ROOT / MERGES), "--keep-last", "1"]


def _names(merges):
    return sorted(p for p, what in merges.items() if what == FOLDER and p.startswith("step="))


FURTHER = {"sweep": Sweeps, "prune": Prunes}
"""By the kind of command."""
