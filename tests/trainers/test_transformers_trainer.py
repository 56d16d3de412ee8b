"""Merging in a Hugging Face ``Trainer``."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hugging_face_runs import (
    LONG,
    OPTIONS,
    QUIET,
    SAVED,
    SHORT,
    SPIKE,
    Break,
    Fail,
    history,
    language_model,
    own_log,
    texts,
    timeless,
    tokenizer,
    train,
    trainer_of,
)
from training_runs import assert_mean, assert_same_bits, emissions, seed, weights_of
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

from merge_callback import load_merge
from merge_callback.diversity.features import Call, features_of
from merge_callback.diversity.functional import functional_distances
from merge_callback.report.history import read_history
from merge_callback.transformers import CheckpointMergeTrainerCallback


class Probe(TrainerCallback):
    """Keeps the weights of every second step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % 2 == 0:
            self.weights[state.global_step] = weights_of(model)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run with the callback, its probe and its folder."""
    folder, probe = tmp_path_factory.mktemp("unbroken"), Probe()
    run = train(folder, CheckpointMergeTrainerCallback(**OPTIONS, probe=True), probe, **SAVED)
    return SimpleNamespace(
        run=run, weights=probe.weights, random=torch.get_rng_state(), folder=folder / "merges"
    )


def test_training_is_bit_for_bit_what_it_is_without(unbroken, tmp_path):
    run, random = unbroken.run, unbroken.random
    alone = train(tmp_path, **SAVED)
    assert_same_bits(torch.get_rng_state(), random)
    assert_same_bits(weights_of(run.model), weights_of(alone.model))
    assert own_log(run) == own_log(alone)


def test_functional_diversity_is_that_of_the_first_batch_evaluated(unbroken):
    run, weights = unbroken.run, unbroken.weights
    kinds = ("logits", "probabilities", "activations")
    found = {
        entry["step"]: [entry[f"merge/diversity_{kind}"] for kind in kinds]
        for entry in history(run)
        if "merge/diversity_logits" in entry
    }
    assert [*found] == [10, 12]  # the first evaluation comes after the snapshot of step 4
    model, features = language_model().eval(), {}
    batch = run.data_collator(texts(16, 5)[:4])
    for step in (10, 12, 8):
        model.load_state_dict(weights[step])
        layers = {"block": model.transformer.h[0]}
        features[step] = features_of(model, Call.of(model, batch), layers)
    right = functional_distances(features[8], features[12])
    assert found[12] == pytest.approx([right[kind] for kind in kinds], rel=1e-5)


def test_merges_are_means_of_the_window_and_load_by_from_pretrained(unbroken):
    weights, folder = unbroken.weights, unbroken.folder
    merges = emissions(folder)
    assert [json.loads((merge / "merge.json").read_text())["step"] for merge in merges] == [4, 6, 8, 10, 12]
    model, told = GPT2LMHeadModel.from_pretrained(merges[-1], output_loading_info=True)
    assert not told["missing_keys"]
    assert_mean(weights_of(model), [weights[step] for step in (8, 10, 12)])
    assert model.generation_config.eos_token_id == 0
    words = PreTrainedTokenizerFast.from_pretrained(folder / "latest")
    assert words.get_vocab() == tokenizer().get_vocab()


def test_the_merge_is_evaluated_on_the_same_data(unbroken, tmp_path):
    run, folder = unbroken.run, unbroken.folder
    found = {
        entry["step"]: entry["merged_eval_loss"] for entry in history(run) if "merged_eval_loss" in entry
    }
    live = {entry["step"]: entry["eval_loss"] for entry in history(run) if "eval_loss" in entry}
    gains = [entry["merge_gain/eval_loss"] for entry in history(run) if "merge_gain/eval_loss" in entry]
    assert [*found] == [4, 8, 12]
    for merge in emissions(folder)[::2]:
        alone = trainer_of(tmp_path, model=GPT2LMHeadModel.from_pretrained(merge))
        assert found[int(merge.name[5:13])] == alone.evaluate()["eval_loss"]
    assert gains == pytest.approx([live[step] - found[step] for step in found])


def test_the_event_file_tells_what_was_evaluated(unbroken):
    logged = {entry["step"]: entry for entry in history(unbroken.run) if "merged_eval_loss" in entry}
    events = read_history(unbroken.folder).of("validation")
    assert [event["step"] for event in events] == [*logged]
    for event, entry in zip(events, logged.values(), strict=True):
        assert event["merge"] == event["step"]
        assert event["scores"]["merged"]["eval_loss"] == entry["merged_eval_loss"]
        assert event["gains"]["eval_loss"] == entry["merge_gain/eval_loss"]


def test_a_resumed_run_is_the_unbroken_one(unbroken, tmp_path):
    run, folder = unbroken.run, unbroken.folder
    with pytest.raises(RuntimeError, match="machine"):
        train(tmp_path, CheckpointMergeTrainerCallback(**OPTIONS, probe=True), Fail(9), **SAVED)
    callback = CheckpointMergeTrainerCallback(**OPTIONS, probe=True)
    resumed = train(tmp_path, callback, resume=str(tmp_path / "checkpoint-6"), **SAVED)
    assert_same_bits(weights_of(resumed.model), weights_of(run.model))
    assert [merge.name for merge in emissions(tmp_path / "merges")] == [m.name for m in emissions(folder)]
    for merge in emissions(folder):
        assert_same_bits(load_merge(tmp_path / "merges" / merge.name), load_merge(merge))
    known = [timeless(entry) for entry in history(resumed)]
    assert all(timeless(entry) in known for entry in history(run) if "train_loss" not in entry)


def test_a_checkpoint_without_the_state_begins_an_empty_window(unbroken, tmp_path):
    shutil.copytree(unbroken.folder.parent / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "merge_callback.json").unlink()
    callback = CheckpointMergeTrainerCallback(**OPTIONS)
    with pytest.warns(UserWarning, match="window begins empty"):
        train(tmp_path, callback, resume=str(tmp_path / "checkpoint-6"), **SAVED)
    assert [int(merge.name[5:13]) for merge in emissions(tmp_path / "merges")] == [10, 12]


def test_an_exception_gives_the_folder_and_the_trainer_back(tmp_path):
    callback = CheckpointMergeTrainerCallback(**OPTIONS, dirpath=tmp_path / "merges")
    run = trainer_of(tmp_path, callback, Fail(5))
    with pytest.raises(RuntimeError, match="machine"):
        run.train()
    assert callback.session is None
    assert not {"training_step", "evaluation_loop", "save_model"} & vars(run).keys()
    run.save_model(tmp_path / "rescued")
    second = CheckpointMergeTrainerCallback(**OPTIONS, dirpath=tmp_path / "merges")
    trainer_of(tmp_path, second, max_steps=1).train()


def test_a_callback_that_is_added_later_finds_its_trainer(tmp_path):
    run = trainer_of(tmp_path, max_steps=4)
    run.add_callback(CheckpointMergeTrainerCallback(**OPTIONS))
    run.train()
    assert len(emissions(tmp_path / "merges")) == 1


def test_of_two_callbacks_each_has_a_folder_and_one_restores(tmp_path):
    first = CheckpointMergeTrainerCallback(**OPTIONS)
    second = CheckpointMergeTrainerCallback(every_n_steps=3, window=2, dirpath=tmp_path / "other")
    saved = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, first, second, max_steps=4, **saved)
    states = [
        json.loads((tmp_path / "checkpoint-4" / name).read_text())
        for name in ("merge_callback.json", "merge_callback-1.json")
    ]
    assert [Path(state["dirpath"]).name for state in states] == ["merges", "other"]
    train(tmp_path, first, second, max_steps=6, resume=str(tmp_path / "checkpoint-4"), **saved)
    assert [merge.name[5:13] for merge in emissions(tmp_path / "merges")] == ["00000004", "00000006"]


def test_what_is_not_for_a_trainer_is_refused():
    with pytest.raises(TypeError, match="evaluate_with"):
        CheckpointMergeTrainerCallback(evaluate_with=["Mixup"])
    with pytest.raises(TypeError, match="did you mean 'window'"):
        CheckpointMergeTrainerCallback(windw=3)
    with pytest.raises(ValueError, match="window=1"):
        CheckpointMergeTrainerCallback(window=1)


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True])
def test_supervised_fine_tuning_is_what_it_is_without(adapters, tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in texts(64, 0)])
    options = {**QUIET, **SHORT, **SAVED, "max_length": 16, "bf16": False}

    def tuned(folder, *callbacks):
        lora = {}
        if adapters:
            peft = pytest.importorskip("peft")
            lora["peft_config"] = peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
        seed(1)
        run = trl.SFTTrainer(
            language_model(),
            trl.SFTConfig(str(folder), **options),
            train_dataset=data,
            eval_dataset=data.select(range(16)),
            processing_class=tokenizer(),
            callbacks=list(callbacks),
            **lora,
        )
        run.train()
        return run

    run = tuned(tmp_path / "with", CheckpointMergeTrainerCallback(**OPTIONS))
    alone = tuned(tmp_path / "alone")
    assert_same_bits(weights_of(run.model), weights_of(alone.model))
    assert own_log(run) == own_log(alone)  # with the accuracies that the trainer collects by itself
    assert "eval_mean_token_accuracy" in str(own_log(run))
    latest = tmp_path / "with" / "merges" / "latest"
    if adapters:
        loaded = pytest.importorskip("peft").PeftModel.from_pretrained(language_model(), latest)
    else:
        loaded = GPT2LMHeadModel.from_pretrained(latest)
    assert_same_bits(weights_of(loaded), load_merge(latest))


def run_on_ranks(folder, sharded=False):
    """What two ranks find, one after the other without and with the callback, and resumed."""
    # accelerate asks where the ranks are to meet, though they have met.
    local = {"RANK": os.environ["LOCAL_RANK"], "LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"]}
    os.environ.update(local, MASTER_ADDR="localhost", MASTER_PORT="0")
    options, callback = {**SAVED, "ddp_backend": "gloo"}, partial(CheckpointMergeTrainerCallback, **OPTIONS)
    if sharded:
        shard_on_cpus()
        blocks = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
        options |= {"save_strategy": "no", "fsdp": True, "fsdp_config": blocks}
    runs = {
        "alone": train(f"{folder}/alone", **options),
        "with": train(f"{folder}/with", callback(), **options),
    }
    if not sharded:
        checkpoint = f"{folder}/with/checkpoint-6"
        runs["resumed"] = train(f"{folder}/with", callback(), resume=checkpoint, **options)
    states = {name: run.model.state_dict().items() for name, run in runs.items()}
    weights = {name: {k: own_part(v).clone() for k, v in state} for name, state in states.items()}
    merged = [entry for entry in history(runs["with"]) if "merged_eval_loss" in entry]
    never = {"eval_strategy": "no", "save_strategy": "no"}
    spiking = {**options, **LONG, **never, "model": language_model(), "max_steps": 90}
    spike = CheckpointMergeTrainerCallback(every_n_steps=5, window=4, spike={**SPIKE, "grad_norm": True})
    train(f"{folder}/spike", spike, Break(), **spiking)
    return weights, merged, type(runs["with"].model_wrapped).__name__


def own_part(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def shard_on_cpus():
    """Has accelerate shard a model on CPUs, too, where it would not."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    present = AcceleratorState.__init__

    def begin(self, *args, **kwargs):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        present(self, *args, **kwargs)

    AcceleratorState.__init__ = begin


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_ranks_merge_and_are_restored_like_one(sharded, tmp_path):
    from distributed_runs import run_ranks

    first, second = run_ranks(2, run_on_ranks, folder=str(tmp_path), sharded=sharded)
    for weights, merged, kind in (first, second):
        assert ("FSDP" if sharded else "DistributedDataParallel") in kind
        for name in weights:
            assert_same_bits(weights[name], weights["alone"])
        assert [entry["step"] for entry in merged] == [4, 8, 12]
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "with" / "merges" / "latest")
    assert model.config.architectures == ["GPT2LMHeadModel"]
    live = trainer_of(tmp_path / "evaluated", model=model).evaluate()["eval_loss"]
    assert first[1][-1]["merged_eval_loss"] == pytest.approx(live, rel=1e-5)
    (event,) = map(json.loads, (tmp_path / "spike" / "merges" / "spikes.jsonl").read_text().splitlines())
    assert event["event"] == "restore"
    assert event["evidence"]["source"] == "batch"


def test_the_callback_shows_its_run_in_python_when_it_is_over(tmp_path):
    merging = CheckpointMergeTrainerCallback(**OPTIONS)
    train(tmp_path, merging, eval_strategy="steps", eval_steps=4)
    assert [s.step for s in merging.window] == [8, 10, 12]
    rows = [row for row in merging.history if row["event"] == "validation"]
    assert [(row["step"], row["merge_step"]) for row in rows] == [(4, 4), (8, 8), (12, 12)]
    scores = {row["merge_step"]: row["merged_eval_loss"] for row in rows}
    assert merging.best.name.startswith(f"step={min(scores, key=scores.get):08d}-")
    assert merging.latest == (tmp_path / "merges/latest").resolve()
    assert_same_bits(merging.merge(), load_merge(merging.latest))
