"""The README and the pages: every block of code runs, every table is the code's, no link is dead."""

import glob
import importlib.util
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from checkpoint_files import ROOT
from safetensors.torch import save_file
from training_runs import loader, train

from merge_callback import CheckpointMergeCallback
from merge_callback.checkpoints.registry import READERS
from merge_callback.cli.main import main
from merge_callback.demo import DemoData, DemoModule
from merge_callback.demo.gpt import GPTConfig
from merge_callback.demo.schedule import WSDSchedule
from merge_callback.merging import METHODS, Ties
from merge_callback.metrics import METRICS, described


def load_generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = load_generator()

SMALLER = {
    "max_steps=100_000": "max_steps=12",
    "max_steps=2_048": "max_steps=12",
    "total_steps=100_000": "total_steps=12",
    "every_n_steps=2_000": "every_n_steps=3",
    "eval_steps=1_000": "eval_steps=6",
    "step % 1_000": "step % 6",
}
"""What the blocks say, and what a test can wait for."""


@dataclass
class Block:
    """A fenced block: its language, what else its first line says, and its text."""

    language: str
    info: str
    text: str

    @property
    def is_run(self) -> bool:
        """Whether it is run here; else its first line has to say why not."""
        reason = re.fullmatch(r'not-run="(.+)"', self.info)
        return not reason


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    return [Block(*found) for found in re.findall(r"(?ms)^```(\S*) ?([^\n]*)\n(.*?)^```$", text)]


def sections() -> list:
    """Pages, and of the one whose sections are about different training loops each section."""
    found = []
    for page in generate.pages():
        name = str(page.relative_to(ROOT))
        parts = [page.read_text()]
        if name == "docs/trainers.md":
            parts = re.split(r"(?m)^(?=## )", parts[0])
        for part in parts:
            if any(block.language in ("python", "sh") and block.is_run for block in blocks(part)):
                title = re.match(r"## (.+)", part)
                found.append(pytest.param(part, id=name + (f", {title[1]}" if title else "")))
    return found


class Data(DemoData):
    """Few batches of short texts."""

    def __init__(self) -> None:
        super().__init__(batch_size=4, context=16, epoch_batches=6, validation_batches=2, max_bytes=2_000_000)


def small_model() -> DemoModule:
    return DemoModule(GPTConfig(width=16, layers=1, heads=1, context=16), WSDSchedule(1, 1000, 0))


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the blocks take for given: a model, data, files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    ids = [torch.randint(256, (4, 16)) for _ in range(12)]
    known, readers = set(METHODS), list(READERS)
    yield {
        "model": small_model(),
        "data": Data(),
        "batches": ids,
        "loss_of": loss_of,
        "validate": lambda model: float(loss_of(model, ids[0])),
    }
    for name in METHODS.keys() - known:
        del METHODS[name]
    READERS[:] = readers
    for module in ("my_methods", "my_module", "my_probe"):
        sys.modules.pop(module, None)


def write_checkpoints() -> list[Path]:
    """Checkpoints of runs, by the names that the pages use."""
    written = []
    for folder in ("run", "logs/version_0/checkpoints"):
        Path(folder).mkdir(parents=True)
        for step in (0, 10, 20, 30):
            state = {"layer.weight": torch.randn(4, 4), "layer.router_bias": torch.randn(4)}
            path = Path(folder) / (f"epoch=0-step={step}.ckpt" if step else "first.ckpt")
            moments = {"exp_avg": torch.randn(4, 4), "exp_avg_sq": torch.rand(4, 4), "step": step}
            optimizer = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
            content = {
                "global_step": step,
                "pytorch-lightning_version": "2.6.6",
                "optimizer_states": [optimizer],
            }
            torch.save({"state_dict": state, **content}, path)
            written.append(path)
    shutil.copy("run/first.ckpt", "base.ckpt")
    for folder in ("run-a/final", "run-b/final"):
        Path(folder).mkdir(parents=True)
        save_file({"layer.weight": torch.randn(4, 4)}, f"{folder}/model.safetensors")
    return written


def write_adapters() -> None:
    """Three adapters and their base, by the names of their pages."""
    transformers = pytest.importorskip("transformers")
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 6}
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    transformers.LlamaModel(transformers.LlamaConfig(**heads, **shape)).save_pretrained("model")
    name = "base_model.model.layers.0.self_attn.q_proj.lora_"
    for index, task in enumerate(("law", "code", "math")):
        folder = Path("experts") / task
        folder.mkdir(parents=True)
        factors = {"A": torch.randn(4, 8), "B": torch.randn(6, 4) + index}
        save_file({f"{name}{f}.weight": t for f, t in factors.items()}, folder / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))


MY_METHODS = """
from merge_callback import register_method
from merge_callback.merging import LinearMethod

@register_method("last_k")
class LastK(LinearMethod):
    k: int = 2
    def raw_weights(self, positions):
        return [float(i < self.k) for i in reversed(range(len(positions)))]
"""


MY_PROBE = """
import torch

class Routed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, bias=False)
        self.layer.router_bias = torch.nn.Parameter(torch.zeros(4))
    def forward(self, x):
        return self.layer(x) + self.layer.router_bias

def build():
    return Routed(), torch.ones(2, 4)
"""


MY_MODULE = """
def evaluate(state):
    return {"val_loss": state["layer.weight"].square().mean()}
"""


def provide(part: str, names: dict) -> None:
    """Adds what only some pages need, and what is dear to make."""
    if "paths" in part or "merge-callback " in part:
        names["paths"] = write_checkpoints()[:4]
        Path("my_methods.py").write_text(MY_METHODS)
        Path("my_probe.py").write_text(MY_PROBE)
        Path("my_module.py").write_text(MY_MODULE)
    if "logs/version_0/merges" in part:
        merging = CheckpointMergeCallback(every_n_steps=2, dirpath="logs/version_0/merges")
        train(small_model(), merging, data=names["data"], max_steps=8)
        shutil.copy(ROOT / "example_configs/wsd_gpt.yaml", "config.yaml")
    if "experts/law" in part:
        write_adapters()
    if "pl_model" in part:
        names["pl_model"], names["data"] = older_model(), loader()
    if "hf_model" in part:
        names |= hugging_face()
    if any(use in part for use in ('load_merge("merges/latest"', 'read_history("merges")', "report merges")):
        train(
            names["model"],
            CheckpointMergeCallback(every_n_steps=2, dirpath="merges"),
            data=names["data"],
            max_steps=8,
        )


def older_model():
    pl = pytest.importorskip("pytorch_lightning")

    class Older(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 4)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Older()


def hugging_face():
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    ids = torch.arange(8) % 16
    rows = [{"input_ids": ids, "labels": ids}] * 16
    return {"hf_model": transformers.GPT2LMHeadModel(config), "train_set": rows, "eval_set": rows[:4]}


def run_python(block: Block, names: dict) -> None:
    text = block.text
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    exec(compile(text, "a block of the pages", "exec"), names)


def run_commands(block: Block, capsys) -> None:
    """Runs every ``merge-callback`` command of a block."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] == "merge-callback", f"mark the block not-run, or test it: {line}"
        words = [match for word in words[1:] for match in (sorted(glob.glob(word)) or [word])]
        if "--output" in words:
            shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
        assert main(words) == 0, f"{line}: {capsys.readouterr().err}"


@pytest.mark.parametrize("part", sections())
def test_every_block_runs(part, names, capsys):
    provide(part, names)
    for block in blocks(part):
        if block.language == "python" and block.is_run:
            run_python(block, names)
        elif block.language == "sh" and block.is_run:
            run_commands(block, capsys)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text)
            Path("merge.yaml").write_text(block.text)


@pytest.mark.parametrize("page", generate.pages(), ids=lambda page: str(page.relative_to(ROOT)))
class TestPage:
    def test_its_generated_blocks_are_up_to_date(self, page):
        assert page.read_text() == generate.generated(page.read_text()), "run python docs/generate.py"

    def test_every_block_says_what_it_is(self, page):
        for block in blocks(page.read_text()):
            assert block.language in ("python", "sh", "yaml", "", "{eval-rst}", "{toctree}")
            assert not block.info or not block.is_run or block.language.startswith("{"), block.info

    def test_its_links_lead_somewhere(self, page):
        text = page.read_text()
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?ms)^```.*?^```$|`[^`\n]*`", "", text)):
            if not target.startswith("https://"):
                path = target.partition("#")[0]
                assert (page.parent / path).exists(), target


def test_smaller_numbers_are_those_of_the_pages():
    everything = "".join(page.read_text() for page in generate.pages())
    assert all(large in everything for large in SMALLER)


def test_the_messages_under_troubleshooting_are_those_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "merge_callback").rglob("*.py"))
    symptoms = re.findall(r"(?m)^\*\*(.+?)\*\*", page)
    quoted = [quote for symptom in symptoms for quote in re.findall(r"`([^`]+ [^`]+)`", symptom)]
    assert len(quoted) > 4
    for part in [part.strip() for quote in quoted for part in quote.split("…") if part.strip()]:
        assert part in code, part


def test_all_that_is_logged_is_in_the_table(tmp_path):
    base = {name: tensor.clone() for name, tensor in small_model().state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: tensor + 1 for name, tensor in base.items()}, tmp_path / "sibling.safetensors")
    files = {"base": tmp_path / "base.safetensors", "experts": [tmp_path / "sibling.safetensors"]}
    options = {"dirpath": tmp_path / "merges", "count_tokens": lambda batch: 64, "method": Ties()}
    merging = CheckpointMergeCallback(every_n_steps=2, probe=True, **options, **files)
    comparing = CheckpointMergeCallback(every_n_steps=2, candidates=["wma"], dirpath=tmp_path / "compared")
    trainer = train(small_model(), merging, comparing, data=Data(), max_steps=12, log_every_n_steps=1)
    logged = [name for name in trainer.callback_metrics if name.startswith("merge")]
    assert all(described(name) for name in logged)
    unseen = [m.name for m in METRICS if not any(m.matches(name) for name in logged)]
    assert unseen == [
        "merged_eval_<name>",
        "merged_<candidate>_eval_<name>",
        "merge/forecast/<name>",
        "merge/forecast_error/<name>",
        "merge_spike/baseline",
        "merge_spike/threshold",
        "merge_spike/lr_factor",
    ]
    assert described("val_loss") is None


def test_every_option_and_method_is_on_a_page():
    with pytest.raises(KeyError):
        generate.generated("<!-- generated: nothing known -->\n<!-- end -->")
    assert all((ROOT / f"docs/methods/{name}.md").exists() for name in METHODS)
