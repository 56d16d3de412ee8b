"""Which of a run's merges are published, when, and which of them stay."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merge_callback.engine.background import Background
from merge_callback.engine.candidates import Candidates
from merge_callback.engine.history import History
from merge_callback.engine.validations import Scored
from merge_callback.messages import warn
from merge_callback.options import Options
from merge_callback.publish import Publisher
from merge_callback.publish.emission import step_of
from merge_callback.publish.export import Exporter, Naming
from merge_callback.sharding import Ranks
from merge_callback.signals.host import Host
from merge_callback.snapshots.capture import ModelTensors
from merge_callback.snapshots.merge import Merge
from merge_callback.snapshots.window import Window

_OFTEN = 2
"""Intervals in a row with a validation, after which a merge waits for its own: the next one has one, too."""


@dataclass
class _Held:
    """A merge that is published once it is validated, and what is known of it."""

    merge: Merge
    model: ModelTensors
    diversity: dict[str, Any] | None


class Emissions:
    """Publishes a run's merges in the background, and keeps the best of them.

    A merge that is about to be validated is held back until then, so that its record tells what it scores,
    and the best candidate is published in its place. Without a validation it is published at the next
    snapshot.

    Args:
        options: the callback's options.
        host: the run.
        window: the run's window.
        publisher: writes the emissions, and removes old ones.
        naming: the published names of the tensors.
        candidates: what else the window is merged by.
        history: what the validations have found.
        background: where merges are published.
    """

    def __init__(
        self,
        options: Options,
        host: Host,
        window: Window,
        publisher: Publisher,
        naming: Naming,
        candidates: Candidates,
        history: History,
        background: Background,
    ) -> None:
        self._options, self._host, self._window, self.publisher = options, host, window, publisher
        self._candidates, self._history, self._background = candidates, history, background
        self._group = Ranks.of_run()  # for publishing, while others use the window's group
        sharding, as_dcp = window.store.sharding, options.format == "dcp"
        self._exporter = Exporter(publisher, sharding, naming, self._group, as_dcp)
        self._held: _Held | None = None  # the merge that waits for its validation
        self._choice: dict[str, Any] = {}  # of the last comparison: its step and its record
        self._released: tuple[int, str] | None = None  # step and name of the last merge to be published
        self._validated = False  # whether there was a validation since the last snapshot
        self._often = 0  # of how many intervals up to there that is so, without a break
        self._emitted = -1  # step of the last merge that is published
        self._last_stable = -1  # step of the last one whose snapshots are of the stable phase
        self._handed_in = -1  # step of the last merge that was handed in; the same on all ranks
        self._is_stable = False  # whether that is of the stable phase
        self.count = 0  # of published merges

    def begin_interval(self, is_validated: bool) -> bool:
        """Publishes what is held back, before a snapshot; returns whether the next merge is to be held back.

        Args:
            is_validated: whether this run validates its merges.
        """
        self.release()
        self._often, self._validated = (self._often + 1 if self._validated else 0), False
        # Where validations are rarer than snapshots, most merges would wait for one in vain.
        is_likely = self._often >= _OFTEN or self._host.validates_now
        return is_validated and (bool(self._candidates.names) or is_likely)

    def hand_in(
        self, merge: Merge, model: ModelTensors, diversity: dict[str, Any] | None, hold: bool = False
    ) -> None:
        """Publishes a merge of the window, if it is new, or holds it back for its validation.

        Args:
            merge: the merge by the default method.
            model: the live model's tensors.
            diversity: of its window.
            hold: whether it is held back.
        """
        if merge.step == self._handed_in:
            return
        self._handed_in, self._is_stable = merge.step, merge.snapshots[-1].phase == "stable"
        self._held = _Held(merge, model, diversity)
        merge.published = self._release_and_wait  # whoever needs its memory
        if not hold:
            self.release()

    def release(self) -> None:
        """Has the merge that is held back published; the best candidate in its place, once it is known."""
        if self._held is None:
            return
        held, self._held = self._held, None
        merge, held.merge.published = held.merge, None
        record = self._choice["record"] if self._choice.get("step") == merge.step else {}
        if record and record["selected"] != merge.name:
            merge = self._candidates.merge(held.model, record["selected"]) or merge
        self._released = merge.step, merge.name
        done = self._background.submit(partial(self._publish, merge, held, record))
        merge.published = done.wait

    def scored_step(self, scored: Scored | None) -> int | None:
        """The step of the merge that has the scores of a validation; ``None`` if there is none."""
        step = scored.newest.step if scored and scored.newest else None
        if scored and scored.compared and self._released and self._released[0] == step:
            # It is published already, perhaps by the default method: then this is not what it scores.
            return step if self._released[1] == scored.compared.selected else None
        return step

    def note_validation(self, scored: Scored | None) -> None:
        """Publishes the merge that waited for a validation; another emission may be the best by it."""
        self._validated = True
        if scored and scored.compared and (scored.compared.metric or self._options.select is None):
            self._choice = {"step": scored.step, "record": scored.compared.record()}
        is_decided = scored and (scored.compared is None or self._choice.get("step") == scored.step)
        if scored and is_decided and self._held and self._held.merge.step == scored.step:
            self.release()
        self._background.submit(self._protect)

    def agree_on_last(self) -> None:
        """Has all ranks know which merge was published last: only the first one knows what it wrote."""
        self._handed_in = self._window.ranks.from_first(self._emitted)

    @property
    def best(self) -> int | None:
        """The step of the published merge that scored best; ``None`` if none of them was validated."""
        return next(iter(self._ranked()), None)

    def close(self) -> None:
        """Closes the process group of publishing. All ranks have to call this."""
        self._group.close()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as primitives."""
        return {
            "handed_in": self._handed_in,
            "is_stable": self._is_stable,
            "choice": self._choice,
            "validated": [self._validated, self._often],
            "published": list(self.publisher.published),
            "emissions": self.count,
            "last_stable": self._last_stable,
            "remote_names": self.publisher.remote_names,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a ``state_dict``; older versions have a part of it."""
        self.count = state.get("emissions", len(state["published"]))
        self._last_stable = state.get("last_stable", -1)
        self._choice = state.get("choice", {})
        self._validated, self._often = state.get("validated", (False, 0))
        self.publisher.resume(state["published"], state["run_id"], state.get("handed_in", -1))
        self._emitted = self._handed_in = self._window.ranks.from_first(self.publisher.newest_step)
        if state.get("is_stable") and self._emitted == state["handed_in"]:  # published after the checkpoint
            self._last_stable = self._emitted
        self._background.submit(self._protect)  # ``best`` may lead to a branch that was abandoned

    def is_missing(self, step: int) -> bool:
        """Whether the merge of a step, the last one of its run, was to be published and was not."""
        return step > self._emitted

    def is_validated(self, step: int) -> bool:
        """Whether the scores of a merge are known."""
        return step == self._choice.get("step") or bool(self._history.scores(step))

    def _release_and_wait(self) -> None:
        if (held := self._held) is not None:
            self.release()
            held.merge.wait()

    # In the background.

    def _publish(self, merge: Merge, held: _Held, record: Mapping[str, Any]) -> None:
        seconds = -time.monotonic()
        try:
            prepared = self._group.agreed(partial(self._prepared, merge, held, record))
            if merge.snapshots[-1].phase == "stable":
                self._last_stable = merge.step
            self._protect()
            if folder := prepared():
                self._record(merge, folder, seconds + time.monotonic())
            self._emitted, self.count = merge.step, self.count + 1
            self._protect()  # it may be the best
        except Exception as error:
            warn(f"merge: the merge of step {merge.step} was not published ({error!r}); training goes on")

    def _prepared(self, merge: Merge, held: _Held, record: Mapping[str, Any]) -> Callable[[], Path | None]:
        """A function that publishes a merge."""
        is_scored = not record or record["selected"] == merge.name
        scores = self._history.scores(merge.step) if is_scored else {}
        return self._exporter.prepare(
            merge,
            held.model.tied,
            diversity=held.diversity,
            layout=self._window.store.whole.hash,
            run_id=self._window.folder.run_id,
            **({"metrics": scores} if scores else {}),
            # The selected one may have found no memory: the default one is published then.
            **({"candidates": {**record, "selected": merge.name}} if record else {}),
        )

    def _protect(self) -> None:
        """Keeps the best emissions, and the last one of the stable phase, whatever comes after them."""
        if (count := self._options.keep_best) and self._window.ranks.is_first:
            best = self._ranked()
            self.publisher.protect({*best[:count], self._last_stable}, best[0] if best else None)

    def _ranked(self) -> list[int]:
        """The steps of the published merges that were validated, the one that scored best first."""
        return self._history.ranked({*map(step_of, self.publisher.kept)})

    def _record(self, merge: Merge, folder: Path, seconds: float) -> None:
        newest, size = merge.snapshots[-1], None
        with suppress(OSError):  # it may be uploaded, and gone from here
            size = sum(path.stat().st_size for path in folder.iterdir())
        self._host.record(
            "emission",
            merge.step,
            path=folder.name,
            method=merge.method.name,
            phase=newest.phase,
            tokens=newest.tokens,
            snapshots=[snapshot.step for snapshot in merge.snapshots],
            weights=merge.weights,
            bytes=size,
            seconds=seconds,
        )
