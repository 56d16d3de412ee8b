"""Merges as files: atomic safetensors emission, provenance, Hugging Face export, retention."""

from merge_callback.publish.emission import Publisher, load_merge
from merge_callback.publish.export import Naming, publish_merge

__all__ = ["Naming", "Publisher", "load_merge", "publish_merge"]
