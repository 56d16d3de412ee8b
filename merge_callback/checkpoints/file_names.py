"""The names that the files of checkpoints go by: each is defined once, here or in the room that writes it."""

from merge_callback.events import PROVENANCE
from merge_callback.snapshots.manifest import MANIFEST
from merge_callback.snapshots.shard_files import SHARDS
from merge_callback.snapshots.window_folder import WINDOW

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BEST",
    "BIN_INDEX",
    "BIN_WEIGHTS",
    "CARD",
    "CARD_BEFORE",
    "CONFIG",
    "GENERATION_CONFIG",
    "INDEX",
    "LATEST",
    "LIGHTNING_META",
    "MANIFEST",
    "MERGED_CKPT",
    "METADATA",
    "PROVENANCE",
    "SHARDS",
    "TRAINER_STATE",
    "WEIGHTS",
    "WEIGHTS_ALONE",
    "WINDOW",
]

CARD, CARD_BEFORE = "README.md", "README.original.md"
"""The card of a merge, and somebody's own one of the checkpoint that the merge is like."""

LATEST, BEST = "latest", "best"
"""What points at the newest emission, and at the best one: symlinks, or text files in a remote folder."""

MERGED_CKPT = "merged.ckpt"
"""The file of a merge that was written for Lightning."""

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Hugging Face's names for a model's weights in one file, and for the list of which file has which."""

BIN_WEIGHTS, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The same for files of ``torch.save``."""

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""peft's names for the weights of an adapter, and for what it is."""

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
"""What a Hugging Face model needs besides its weights."""

TRAINER_STATE = "trainer_state.json"
"""What Hugging Face's Trainer saves with a model: its step and tokens, among others."""

METADATA = ".metadata"
"""What ``torch.distributed.checkpoint`` writes last into a folder."""

LIGHTNING_META = "meta.pt"
"""What Lightning's sharded checkpoints hold besides tensors."""

WEIGHTS_ALONE = frozenset(
    {"model", "pytorch_model", "consolidated", "diffusion_pytorch_model", "adapter_model"}
)
"""Stems of files named for what they are, a model's weights: only their folder's name may tell a step."""
