"""Mistral, equal to transformers' MistralForCausalLM.

What differs from Llama: every layer attends to a sliding window, config.json's sliding_window (null means none), so
that its cache never holds more than that. Nothing else: the weights and the arithmetic are Llama's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from . import llama


@dataclass(kw_only=True)
class Config(llama.Config):
    """Llama's fields, and the window."""

    sliding_window: int | None = 4096  # transformers' default; null means none
    num_key_value_heads: int | None = 8

    @property
    def windows(self) -> Sequence[int | None]:
        return [self.sliding_window] * self.num_hidden_layers


class Mistral(llama.Llama):
    """The decoder: Llama, whose make_cache and masks follow `Config.windows`. So a query sees only its window."""

    config: Config
