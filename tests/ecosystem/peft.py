"""peft: LoRA adapters of a small Llama in a LightningModule; and the adapters that peft saves, merged.

The callback merges A and B each for itself here, so its merges are the mean of the snapshots like all others.
"""

import lightning.pytorch as pl
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import DataLoader

from tests.ecosystem.comparison import WINDOW, merge_files, result_path
from tests.ecosystem.lightning_runs import checked
from tests.ecosystem.small_language import llama, sentences, tokenizer
from tests.support.training_runs import assert_mean, seed


class LoRA(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(llama(), lora)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.01)


class SavingAdapters(pl.Callback):
    """Saves the adapters as peft does."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if trainer.global_step % 6 == 0:
            pl_module.model.save_pretrained(self.folder / f"checkpoint-{trainer.global_step}")


def loader(count: int, **options) -> DataLoader:
    return DataLoader(
        tokenizer()(sentences(count), return_tensors="pt")["input_ids"], batch_size=4, **options
    )


def trainer(**options) -> pl.Trainer:
    return pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)


def train(callbacks, folder):
    seed()
    module = LoRA()
    callbacks = [*callbacks, SavingAdapters(folder / "adapters")]
    seed()
    fit = trainer(max_steps=36, callbacks=callbacks, default_root_dir=folder)
    fit.fit(module, loader(48, shuffle=True), loader(16))
    return module


def load(folder):
    """An emission is an adapter, too; a merge of the adapters that peft has saved is one of their mean ΔW."""
    root = folder.parent.parent
    saved = sorted((root / "run/adapters").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    files = added(merge_files(root / "run/adapters", root / "adapters"))
    assert_mean(files, [added(path) for path in saved[-WINDOW:]])
    merged = PeftModel.from_pretrained(llama(), folder).state_dict()
    return {f"model.{name}": tensor for name, tensor in merged.items()}


def added(folder):
    """The base with an adapter added."""
    return PeftModel.from_pretrained(llama(), folder).merge_and_unload().state_dict()


torch.set_num_threads(1)
checked("peft", pl, train, load, lora="factors").write(result_path())
