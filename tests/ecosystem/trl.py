"""TRL: supervised fine-tuning of a small Llama."""

from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from tests.ecosystem.comparison import result_path
from tests.ecosystem.small_language import llama, sentences, tokenizer
from tests.ecosystem.transformers_runs import ARGUMENTS, checked, set_threads


def train(callbacks, folder):
    trainer = SFTTrainer(
        llama(),
        SFTConfig(folder, max_length=16, bf16=False, **ARGUMENTS),
        train_dataset=Dataset.from_dict({"text": sentences(64)}),
        eval_dataset=Dataset.from_dict({"text": sentences(16)}),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder).state_dict()


set_threads()
checked("trl", train, load, load).write(result_path())
