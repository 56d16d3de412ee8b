"""Merging in a Hugging Face ``Trainer``."""

import json
import math
import os
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import assert_mean, assert_same_bits, emissions, seed, weights_of

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    EarlyStoppingCallback,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from merge_callback import load_merge  # noqa: E402
from merge_callback.diversity.features import Call, features_of  # noqa: E402
from merge_callback.diversity.functional import functional_distances  # noqa: E402
from merge_callback.merging import Wsm  # noqa: E402
from merge_callback.report.history import read_history  # noqa: E402
from merge_callback.snapshots.live_merge import HalfRestoredError  # noqa: E402
from merge_callback.transformers import CheckpointMergeTrainerCallback  # noqa: E402

OPTIONS = {"every_n_steps": 2, "window": 3, "keep_last": None}
TOKENS = 32


def texts(count, start):
    """Token ids to learn: each one is its predecessor plus a constant."""
    rows = (torch.arange(start + i, start + i + 16 * (i % 3 + 1), i % 3 + 1) % TOKENS for i in range(count))
    return [{"input_ids": row, "labels": row} for row in rows]


def tokenizer():
    words = {f"w{i}": i for i in range(TOKENS)}
    words = Tokenizer(models.WordLevel(words, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def language_model():
    seed()
    size = {"vocab_size": TOKENS, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


class Regression(torch.nn.Module):
    """A small net whose training loss is higher than what it can learn by as much as a batch says."""

    def __init__(self):
        super().__init__()
        seed()
        self.net = torch.nn.Linear(8, 1)

    def forward(self, x, labels, harder=None):
        loss = torch.nn.functional.mse_loss(self.net(x), labels) + 1
        return {"loss": loss if harder is None else loss + harder.mean()}


def numbers(count, hard=()):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=generator)
    return [
        {"x": row, "labels": row.sum(0, keepdim=True), "harder": torch.tensor(90.0 * (i in hard))}
        for i, row in enumerate(x)
    ]


QUIET = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
SHORT = {"max_steps": 12, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
BATCHES = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}


def train(folder, *callbacks, resume=None, **options):
    """Trains for 12 steps unless told otherwise, in the order of the data."""
    run = trainer_of(folder, *callbacks, **options)
    seed(1)
    run.train(resume_from_checkpoint=resume)
    return run


def trainer_of(folder, *callbacks, model=None, data=None, trainer=Trainer, **options):
    arguments = {**QUIET, **SHORT, **BATCHES, "train_sampling_strategy": "sequential", **options}
    run = trainer(
        model or language_model(),
        TrainingArguments(str(folder), **arguments),
        train_dataset=data or texts(64, 0),
        eval_dataset=data or texts(16, 5),
        callbacks=list(callbacks),
        processing_class=None if data else tokenizer(),
    )
    run.remove_callback(PrinterCallback)
    return run


class Probe(TrainerCallback):
    """Keeps the weights of every second step."""

    def __init__(self):
        self.weights = {}

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % 2 == 0:
            self.weights[state.global_step] = weights_of(model)


class Fail(TrainerCallback):
    def __init__(self, step, error=RuntimeError):
        self.step, self.error = step, error

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise self.error("a fault of the machine")


def timeless(entry):
    """What the trainer has logged, without how long it took."""
    return {k: v for k, v in entry.items() if "_per_second" not in k and "runtime" not in k}


def own_log(run):
    """What the trainer has logged by itself."""
    ours = ("merge/", "merge_", "merged_eval_")
    return [timeless(entry) for entry in history(run) if not any(k.startswith(ours) for k in entry)]


def history(run):
    return run.state.log_history


def test_tensorboard_draws_live_and_merged_on_one_chart(tmp_path):
    from transformers.integrations import TensorBoardCallback

    class Writer:
        tags, layouts = set(), ()

        def add_scalar(self, tag, *_):
            self.tags.add(tag)

        def add_custom_scalars(self, layout):
            self.layouts = (*self.layouts, layout)

        def add_text(self, *_): ...
        def flush(self): ...
        def close(self): ...

    writer = Writer()
    merging = CheckpointMergeTrainerCallback(window=3, every_n_steps=2, dirpath=tmp_path / "merges")
    train(tmp_path, merging, TensorBoardCallback(writer), **EVALUATED)
    (layout,) = writer.layouts
    (patterns,) = [tags for _, tags in layout["Live and merged"].values()]
    drawn = {tag for tag in writer.tags if any(re.match(pattern, tag) for pattern in patterns)}
    assert drawn == {"eval/loss", "train/merged_eval_loss"}


EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 2}
SAVED = {**EVALUATED, "save_strategy": "steps", "save_steps": 6}


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


def test_best_model_and_early_stopping_follow_the_merge(tmp_path):
    stopping = EarlyStoppingCallback(early_stopping_patience=1)
    best = {
        "metric_for_best_model": "merged_eval_loss",
        "load_best_model_at_end": True,
        "greater_is_better": False,
    }
    run = train(
        tmp_path,
        stopping,
        CheckpointMergeTrainerCallback(**OPTIONS),
        **{**SAVED, **best, "save_steps": 2, "eval_steps": 2, "learning_rate": 1.0},
    )
    found = [entry["merged_eval_loss"] for entry in history(run) if "merged_eval_loss" in entry]
    first = next(entry["eval_loss"] for entry in history(run) if "eval_loss" in entry)
    assert run.state.best_metric == min(first, *found)
    assert run.state.global_step < 12
    assert "merged" not in str(stopping.__dict__)


def test_several_evaluation_sets_have_each_their_merged_metrics(tmp_path):
    class Evaluating(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.eval_dataset = {"near": texts(8, 0), "far": texts(8, 9)}

    callback = CheckpointMergeTrainerCallback(**OPTIONS)
    run = train(tmp_path, callback, trainer=Evaluating, **EVALUATED)
    last = [entry for entry in history(run) if entry["step"] == 12]
    assert sum("merged_eval_near_loss" in entry for entry in last) == 1
    assert sum("merged_eval_far_loss" in entry for entry in last) == 1


def test_the_best_of_several_candidates_is_published_and_is_what_the_trainer_sees(tmp_path):
    chosen = {"candidates": {"last": Wsm(last=2, order="reversed"), "ema": "ema"}, "method": "sma"}
    callback = CheckpointMergeTrainerCallback(**OPTIONS, **chosen, evaluate_batches=2)
    run = train(tmp_path, callback, **EVALUATED, metric_for_best_model="merged_eval_loss")
    names = {n: f"merged_{n}_eval_loss" for n in ("sma", "last", "ema")}
    rows = {entry["step"]: entry for entry in history(run) if names["last"] in entry}
    assert [*rows] == [4, 8, 12]
    for path in emissions(tmp_path / "merges"):
        step, said = int(path.name[5:13]), json.loads((path / "merge.json").read_text())
        assert ("candidates" in said) == (step in rows)
        if step not in rows:
            continue
        scores = {one["name"]: one["metrics"]["eval_loss"] for one in said["candidates"]["scores"]}
        assert scores == {name: rows[step][logged] for name, logged in names.items()}
        assert said["candidates"]["batches"] == 2
        alone = trainer_of(tmp_path / "alone", model=GPT2LMHeadModel.from_pretrained(path))
        assert rows[step]["merged_eval_loss"] == alone.evaluate()["eval_loss"]  # in full
        part = trainer_of(tmp_path / "alone", model=GPT2LMHeadModel.from_pretrained(path))
        found = part.evaluate(texts(8, 5))["eval_loss"]
        assert scores[said["candidates"]["selected"]] == pytest.approx(found, rel=1e-6)


class Masking:
    """A collator that replaces a part of each batch, as its own generator says."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, rows):
        ids = torch.stack([row["input_ids"] for row in rows])
        masked = torch.rand(ids.shape, generator=self.generator) < 0.2
        return {"input_ids": ids.masked_fill(masked, 0), "labels": ids}


def test_the_merge_is_given_the_batches_of_the_live_model(tmp_path):
    # As in sentence-transformers, whose evaluation is in an order of its own in each pass over a dataloader.
    given = []

    class Shuffling(Trainer):
        def get_eval_dataloader(self, eval_dataset=None):
            sampler = torch.utils.data.RandomSampler(range(16), generator=torch.Generator())
            loader = torch.utils.data.DataLoader(
                texts(16, 5), 4, sampler=sampler, collate_fn=self.data_collator
            )
            sampler.set_epoch = lambda epoch: sampler.generator.manual_seed(epoch)
            return self.accelerator.prepare(loader)

        def prediction_step(self, model, inputs, *args, **kwargs):
            given.append(inputs["input_ids"])
            return super().prediction_step(model, inputs, *args, **kwargs)

    def fitted(*callbacks):
        given.clear()
        run = trainer_of(tmp_path, *callbacks, trainer=Shuffling, **EVALUATED)
        run.data_collator = Masking()
        seed(1)
        run.train()
        return weights_of(run.model), [*given]

    weights, twice = fitted(CheckpointMergeTrainerCallback(**OPTIONS))
    plain, live = fitted()
    assert_same_bits(weights, plain)
    for first in range(0, 24, 8):
        assert_same_bits(twice[first : first + 4], live[first // 2 : first // 2 + 4])
        assert_same_bits(twice[first + 4 : first + 8], twice[first : first + 4])


def test_a_merged_evaluation_that_fails_leaves_no_value_and_no_trace(tmp_path):
    class Brittle(Trainer):
        calls, is_failing = 0, False

        def prediction_step(self, *args, **kwargs):
            Brittle.calls += 1
            if Brittle.is_failing and Brittle.calls % 6 == 0:  # in the second pass over four batches
                raise RuntimeError("a fault of the evaluation")
            return super().prediction_step(*args, **kwargs)

    seen = []

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **_):
            seen.append(metrics["eval_merged_loss"])  # by the name that the trainer looks for

    options = {**EVALUATED, "metric_for_best_model": "merged_loss"}
    Brittle.is_failing = True
    callback = CheckpointMergeTrainerCallback(**OPTIONS)
    run = train(tmp_path / "failing", callback, Look(), trainer=Brittle, **options)
    assert all(map(math.isnan, seen))
    assert not any("merged_eval_loss" in entry for entry in history(run))
    Brittle.is_failing = False
    alone = train(tmp_path / "alone", trainer=Brittle, **EVALUATED)
    assert_same_bits(weights_of(run.model), weights_of(alone.model))
    assert own_log(run) == own_log(alone)


class Break(TrainerCallback):
    """Spoils the weights after a step."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 70:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(20)


SGD = {"optim": "sgd", "learning_rate": 0.1}
LONG = {**SGD, "max_steps": 100, "gradient_accumulation_steps": 2, "max_grad_norm": 0.0}
SPIKE = {"rewarm_steps": 5, "guard": 5}


@pytest.mark.parametrize("evidence", ["batch", "validation"])
def test_a_run_is_restored_after_a_spike(evidence, tmp_path):
    spike = {**SPIKE, "evidence": evidence, "grad_norm": True}
    callback = CheckpointMergeTrainerCallback(every_n_steps=5, window=4, spike=spike)
    with pytest.warns(UserWarning, match="restored the sma"):
        run = train(
            tmp_path, callback, Break(), model=Regression(), data=numbers(64), **LONG, eval_strategy="epoch"
        )
    (event,) = map(json.loads, (tmp_path / "merges" / "spikes.jsonl").read_text().splitlines())
    losses = {entry["step"]: entry["loss"] for entry in history(run) if "loss" in entry}
    steps = range(event["onset"], event["step"] + 1)
    assert event["event"] == "restore"
    assert event["evidence"]["source"] == evidence
    assert event["values"] == pytest.approx([losses[step] for step in steps], rel=1e-5)
    assert event["batches"][0] == {"step": 71, "epoch": 8, "batch_idx": 13}  # the last of two micro-batches
    assert losses[100] < 1.1  # and 1 is the least there is


def test_hard_data_leaves_the_run_as_it_is(tmp_path):
    data = numbers(400, hard=range(280, 320))
    callback = CheckpointMergeTrainerCallback(every_n_steps=5, window=4, spike=SPIKE)
    kinds = {"model": Regression(), "data": data, "max_steps": 90, **SGD}
    with pytest.warns(UserWarning, match="spike"):
        run = train(tmp_path, callback, **kinds)
    (event,) = map(json.loads, (tmp_path / "merges" / "spikes.jsonl").read_text().splitlines())
    assert event["event"] != "restore"
    assert event["evidence"]["source"] == "batch"
    alone = train(tmp_path / "alone", **{**kinds, "model": Regression()})
    assert_same_bits(weights_of(run.model), weights_of(alone.model))
    assert own_log(run) == own_log(alone)


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


def test_a_mixture_is_never_saved(tmp_path):
    run = trainer_of(tmp_path, CheckpointMergeTrainerCallback(**OPTIONS), Fail(3, HalfRestoredError))
    with pytest.raises(HalfRestoredError, match="machine"):
        run.train()
    with pytest.raises(HalfRestoredError, match="not saved"):
        run.save_model(tmp_path / "rescued")
    run.remove_callback(Fail)
    run.train()
    run.save_model(tmp_path / "sound")


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


def test_a_live_adapter_is_evaluated_merged_with_a_finished_one(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(value):
        model = language_model()
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        seed(value)
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
        return peft.get_peft_model(model, config), base

    (sibling, base), (model, _) = adapted(3), adapted(4)
    sibling.save_pretrained(tmp_path / "sibling")
    callback = CheckpointMergeTrainerCallback(every_n_steps=50, experts=[tmp_path / "sibling"])
    run = train(tmp_path, callback, model=model, max_steps=2, eval_strategy="steps", eval_steps=1)
    found = [entry for entry in history(run) if "merged_eval_loss" in entry]
    assert [entry["merge_experts/evaluated"] <= 5 for entry in found] == [False, True]
    whole = [expert.merge_and_unload().state_dict() for expert in (model, sibling)]
    scale = found[-1]["merge_experts/scale"]
    merged = {n: t + scale * (whole[0][n] - t) + scale * (whole[1][n] - t) for n, t in base.items()}
    expected = language_model()
    expected.load_state_dict(merged)
    run = trainer_of(tmp_path / "by hand", model=expected)
    assert run.evaluate()["eval_loss"] == pytest.approx(found[-1]["merged_eval_loss"], rel=1e-4)


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


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_the_gradient_norm_of_an_fp16_run_is_unscaled(tmp_path, monkeypatch, optim):
    def norms(scaler):
        seen = []

        class Reads(TrainerCallback):
            def on_step_end(self, *_, **__):
                seen.append(merging.session.statistics._last.read().norm)

        merging = CheckpointMergeTrainerCallback(
            every_n_steps=100, dirpath=tmp_path / "merges", spike={"grad_norm": True}
        )
        run = trainer_of(tmp_path, merging, Reads(), max_steps=5, optim=optim)
        if scaler:  # as fp16=True on a GPU
            monkeypatch.setattr(type(run.accelerator), "mixed_precision", "fp16")
            run.accelerator.scaler, run.accelerator.native_amp = scaler, True
        run.train()
        return seen

    plain = norms(None)
    assert norms(torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)) == pytest.approx(
        plain, 0.02
    )
    assert len(plain) == 5
