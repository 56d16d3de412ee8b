"""Each score is that of the merge whose name it has, and none is left out without a word."""

import pytest
import torch
from torch import nn

from merge_callback import CheckpointMerger, PowerEma


@pytest.mark.parametrize("name", ["live", "merged", "sma", "ema", "wma-2"])
def test_a_running_average_has_no_other_merge_s_name(name):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"running: '{name}' is what another merge"):
        CheckpointMerger(model, optimizer, running={name: PowerEma(0.1)}, candidates={"wma-2": "wma"})


def test_scores_of_what_was_not_shown_are_left_out_with_a_warning(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"window": 3, "every_n_steps": 1, "durable": False, "spike": "off"}
    with CheckpointMerger(model, optimizer, dirpath=tmp_path, candidates=["wma"], **options) as merger:
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            merger.step()
        with merger.merged_weights("wma"):
            scores = {"wma": {"loss": 1.0}, "wsm": {"loss": 0.5}}
        with pytest.warns(UserWarning, match="leaves out the scores of wsm: .*has shown wma"):
            merger.log_validation({"loss": 2.0}, candidates=scores)
        assert merger.metrics["merged/loss"] == 1.0
        assert not [name for name in merger.metrics if "wsm" in name]
