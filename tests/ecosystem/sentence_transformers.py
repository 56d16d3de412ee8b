"""sentence-transformers: an embedding model on pairs of sentences."""

from pathlib import Path
from tempfile import mkdtemp

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
)
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from transformers import BertConfig, BertModel

from merge_callback import load_merge
from tests.ecosystem.comparison import result_path
from tests.ecosystem.small_language import sentences, tokenizer
from tests.ecosystem.transformers_runs import ARGUMENTS, checked, set_threads
from tests.support.training_runs import seed


def model() -> SentenceTransformer:
    seed()
    folder = Path(mkdtemp(prefix="bert-"))
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=32, **size)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    words = Transformer(str(folder), max_seq_length=16)
    return SentenceTransformer(modules=[words, Pooling(32), Dense(32, 16)], device="cpu")


def pairs(count: int) -> Dataset:
    first = sentences(count)
    return Dataset.from_dict({"anchor": first, "positive": [text.replace("small", "big") for text in first]})


def train(callbacks, folder):
    trained = model()
    trainer = SentenceTransformerTrainer(
        trained,
        SentenceTransformerTrainingArguments(str(folder), **ARGUMENTS),
        train_dataset=pairs(64),
        eval_dataset=pairs(16),
        loss=losses.MultipleNegativesRankingLoss(trained),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def load(folder):
    merged = model()
    merged.load_state_dict(load_merge(folder))
    merged.save_pretrained(str(folder.parent / "saved"))
    return SentenceTransformer(str(folder.parent / "saved"), device="cpu").state_dict()


set_threads()
checked("sentence-transformers", train, load).write(result_path())
