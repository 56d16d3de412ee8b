"""A small language: sentences, a tokenizer of their words, and a Llama that is large enough for them."""

import random

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.support.training_runs import seed

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "small", "big", "red", "old", "tree"]


def sentences(count: int, length: int = 8) -> list[str]:
    """Sentences of words drawn at random, always the same."""
    draw = random.Random(count)
    return [" ".join(draw.choices(WORDS, k=length)) for _ in range(count)]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word."""
    special = ["<pad>", "<unk>", "<s>", "</s>"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama() -> LlamaForCausalLM:
    """Always the same one."""
    seed()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **size))
