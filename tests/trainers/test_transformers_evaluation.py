"""The merge's evaluation in a Hugging Face ``Trainer``."""

import json
import math
import re

import pytest
import torch
from hugging_face_runs import (
    EVALUATED,
    OPTIONS,
    SAVED,
    history,
    language_model,
    own_log,
    texts,
    train,
    trainer_of,
)
from training_runs import assert_same_bits, emissions, seed, weights_of
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, Trainer, TrainerCallback

from merge_callback.merging import Wsm
from merge_callback.transformers import CheckpointMergeTrainerCallback


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
