"""Wrong options name themselves, their value and the mend."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy, XLAStrategy

from merge_callback import CheckpointMergeCallback
from merge_callback.merging import Ema, Sma, Weighted
from merge_callback.snapshots.storage import STORAGES, Memory


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"every_n_tokens": 10, "every_n_steps": 10}, "every_n_tokens=10 and every_n_steps=10.*give one"),
        ({"window": 0}, "window=0"),
        ({"window": 2.5}, "window=2.5"),
        ({"window": 1}, "window=1 holds nothing to merge; choose 2"),
        ({"count_tokens": 128}, "count_tokens=128 must be a function"),
        ({"strip_prefix": 3}, "strip_prefix=3"),
        ({"durable": "no"}, "durable='no' must be True or False"),
        ({"evaluate": 0}, "evaluate=0 must be True or False"),
        ({"dirpath": 3}, "dirpath=3"),
        ({"exclude": None}, "exclude=None"),
        ({"method": ["sma"]}, r"method=\['sma'\].*give a name, or an object"),
        ({"method": {"name": "ema", "alpha": 0.1}}, r"alpha.*give an object, e.g. Ema\(alpha=0.1\)"),
        ({"method": Weighted([0.4, 0.6])}, "does not fit window=10: .* or choose window=2"),
        ({"every_n_steps": -1}, "every_n_steps=-1"),
        ({"every_n_tokens": 0}, "every_n_tokens=0"),
        ({"diversity_lag": 0}, "diversity_lag=0"),
        ({"method": "mean"}, "'mean'.*sma"),
        ({"method": {"stabel": "sma"}}, "stabel.*stable, decay"),
        ({"method": {"stable": "mean"}}, "'mean'"),
        ({"method": {"warmup": "sma"}}, "warmup.*stable, decay"),
        ({"storage": "ram"}, "storage='ram'.*'cpu'"),
        ({"storage": "disk", "durable": False}, "durable=False"),
        ({"snapshot_dtype": "int8"}, "snapshot_dtype='int8'.*bf16"),
        ({"emit_every": -1}, "emit_every=-1 must be 0 or a positive"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"max_shard_size": "five"}, "max_shard_size='five'.*5GB"),
        ({"max_shard_size": 0}, "max_shard_size=0"),
        ({"max_shard_size": "-5GB"}, "max_shard_size='-5GB'"),
        ({"exclude": [1]}, "exclude="),
    ],
)
def test_wrong_options_name_themselves(options, named):
    with pytest.raises(ValueError, match=named):
        CheckpointMergeCallback(**options)


def test_a_dirpath_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"dirpath=.*file"):
        CheckpointMergeCallback(dirpath=tmp_path / "file" / "merges")


def test_spellings_of_the_same_option_mean_the_same():
    assert CheckpointMergeCallback(snapshot_dtype="bf16").options.snapshot_dtype == torch.bfloat16
    assert CheckpointMergeCallback(snapshot_dtype="bfloat16").options.snapshot_dtype == torch.bfloat16
    assert CheckpointMergeCallback(snapshot_dtype=torch.bfloat16).options.snapshot_dtype == torch.bfloat16
    assert CheckpointMergeCallback(every_n_tokens=4e9).options.every == 4_000_000_000
    assert CheckpointMergeCallback(max_shard_size="1.5 GB").options.max_shard_bytes == 1_500_000_000
    assert CheckpointMergeCallback(exclude="*.bias").options.exclude == ("*.bias",)


def test_four_billion_tokens_is_the_default_interval():
    options = CheckpointMergeCallback().options
    assert (options.every, options.unit) == (4_000_000_000, "tokens")


def test_each_phase_may_have_its_own_method():
    methods = CheckpointMergeCallback(method={"decay": Ema(alpha=0.5)}).options.methods
    assert methods == {"stable": Sma(), "decay": Ema(alpha=0.5)}


def fit(callback, tmp_path, **options):
    options = {"max_steps": 3, "limit_val_batches": 0, "devices": 1, **options}
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=callback,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(BoringModel())


def test_batches_without_tokens_are_refused_before_the_first_step(tmp_path):
    model_steps = []

    class Probe(CheckpointMergeCallback):
        def on_train_batch_end(self, *args):
            model_steps.append(1)

    with pytest.raises(ValueError, match="every_n_steps="):
        fit(Probe(), tmp_path)
    assert not model_steps


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"exclude": ["*.router.bias"]}, r"exclude=.*router.bias.*matches no tensor.*layer.weight"),
        ({"strip_prefix": "model."}, "strip_prefix='model.'.*layer.weight"),
    ],
)
def test_patterns_that_match_nothing_are_refused_at_the_start_of_fit(options, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        fit(CheckpointMergeCallback(every_n_steps=1, **options), tmp_path)


def test_two_callbacks_may_not_share_a_folder(tmp_path):
    twins = [CheckpointMergeCallback(every_n_steps=n, dirpath=tmp_path / "merges") for n in (1, 2)]
    with pytest.raises(Exception, match=r"share dirpath=.*give each its own"):
        fit(twins, tmp_path)


class UnknownStrategy(Strategy):
    """One that nobody has looked at."""


UnknownStrategy.__abstractmethods__ = frozenset()  # what it lacks is never called


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (DeepSpeedStrategy, "master weights"),
        (partial(FSDPStrategy, use_orig_params=False), "use_orig_params=False"),
        (XLAStrategy, "is not known"),
        (UnknownStrategy, "is not known"),
    ],
)
def test_strategies_whose_weights_would_be_guessed_at_are_refused(strategy, reason):
    kind = getattr(strategy, "func", strategy)
    bare = kind.__new__(kind)  # their packages need not be there
    if kind is FSDPStrategy:
        bare.kwargs = strategy.keywords
    with pytest.raises(MisconfigurationException, match=rf"can't work with {kind.__name__}: .*{reason}"):
        CheckpointMergeCallback().setup(SimpleNamespace(strategy=bare), None, "fit")


def test_a_window_that_cannot_fit_says_how_much_and_what_to_choose(tmp_path, monkeypatch):
    monkeypatch.setattr("merge_callback.snapshots.storage.available_memory", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"needs 2.9 kB of cpu room and 1.0 kB are free: choose storage='disk'"
    ):
        fit(CheckpointMergeCallback(every_n_steps=1, storage="cpu", durable=False), tmp_path)


def test_a_storage_is_one_class_that_is_known_by_its_name(tmp_path, monkeypatch):
    class Counted(Memory):
        admitted_arenas = 0

        def admitted(self, stored, arena):
            Counted.admitted_arenas += 1
            return super().admitted(stored, arena)

    monkeypatch.setitem(STORAGES, "counted", Counted)
    fit(CheckpointMergeCallback(every_n_steps=1, storage="counted", dirpath=tmp_path / "merges"), tmp_path)
    assert Counted.admitted_arenas == 3
    assert (tmp_path / "merges" / "latest").resolve().name == "step=00000003-sma"


def test_an_interval_in_steps_never_needs_tokens(tmp_path):
    callback = CheckpointMergeCallback(every_n_steps=1, dirpath=tmp_path / "merges")
    fit(callback, tmp_path)
    assert (tmp_path / "merges" / "latest").resolve().name == "step=00000003-sma"
