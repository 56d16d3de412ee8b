"""Small runs of a Hugging Face ``Trainer``."""

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, models
from training_runs import seed
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

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


EVALUATED = {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 2}
SAVED = {**EVALUATED, "save_strategy": "steps", "save_steps": 6}


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
