"""The last line of a run."""

import shutil
from types import SimpleNamespace

from merge_callback.engine.validations import closing_line
from merge_callback.publish import Publisher


def test_merges_that_somebody_has_removed_are_not_named(tmp_path):
    publisher = Publisher(tmp_path / "merges", None, 1 << 30)
    method = {"name": "sma", "options": {}, "reference": ""}
    publisher.publish("step=00000004-sma", lambda draft: {}, {"run_id": "run", "step": 4, "method": method})
    unvalidated = SimpleNamespace(metric=None)
    assert closing_line(unvalidated, 1, publisher, None, None).endswith("merges/step=00000004-sma")
    shutil.rmtree(tmp_path / "merges/step=00000004-sma")
    told = "merge: 1 merge published, of which none is there any more"
    assert closing_line(unvalidated, 1, publisher, None, None) == told
