"""Tiny models with random weights, built on the spot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Return a function that builds the same two-block Llama each time, in evaluation mode."""

    def make(dtype: torch.dtype = torch.float32, **settings) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        return LlamaForCausalLM(LlamaConfig(**(sizes | heads | settings))).to(dtype).eval()

    return make


@pytest.fixture
def input_ids() -> torch.Tensor:
    """Two rows of eight token ids below 64, shape `(2, 8)`."""
    return torch.arange(16).reshape(2, 8) * 3
