"""A byte-level GPT on the Python standard library's own source text."""

from merge_callback.demo.crops import DemoData
from merge_callback.demo.expert import TokenKindData, TokenKindModule
from merge_callback.demo.gpt import GPT, GPTConfig
from merge_callback.demo.gradient_norm import GradientNorm
from merge_callback.demo.module import DemoModule
from merge_callback.demo.schedule import WSDSchedule, wsd_factor
from merge_callback.demo.text import load_corpus

__all__ = [
    "GPT",
    "DemoData",
    "DemoModule",
    "GPTConfig",
    "GradientNorm",
    "TokenKindData",
    "TokenKindModule",
    "WSDSchedule",
    "load_corpus",
    "wsd_factor",
]
