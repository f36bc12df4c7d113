"""Which modules "query, key and value" are called in each architecture: the paper's setting "Attn", and the default.

Names are endings of module names, as PEFT matches them. Models that fuse the three projections into one layer have a
single name: its outputs are exactly the queries, keys and values. Encoder-decoder models have them in self- and
cross-attention; `gemma3` has them in the language model and in its vision tower.
"""

from __future__ import annotations

_QKV_PROJ = ("q_proj", "k_proj", "v_proj")
_BERT = ("query", "key", "value")

ATTENTION = "attention"
"""The word for this preset in `target_modules`; `None` means the same."""

ATTENTION_MODULES: dict[str, tuple[str, ...]] = {
    "bart": _QKV_PROJ,
    "bert": _BERT,
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "electra": _BERT,
    "gemma": _QKV_PROJ,
    "gemma2": _QKV_PROJ,
    "gemma3": _QKV_PROJ,
    "gemma3_text": _QKV_PROJ,
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "llama": _QKV_PROJ,
    "mistral": _QKV_PROJ,
    "mixtral": _QKV_PROJ,
    "mt5": ("q", "k", "v"),
    "opt": _QKV_PROJ,
    "phi": _QKV_PROJ,
    "phi3": ("qkv_proj",),
    "qwen2": _QKV_PROJ,
    "qwen3": _QKV_PROJ,
    "roberta": _BERT,
    "t5": ("q", "k", "v"),
    "xlm-roberta": _BERT,
}
"""Model type, as in `config.model_type`, to the names of the query, key and value layers."""
