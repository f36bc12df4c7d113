"""Which modules the presets "attention", "blocks" and "all" stand for, in each architecture.

`attention` and `all` are the paper's: the query, key and value layers; every linear layer of the blocks, and the
embeddings. `blocks`, the default, is `all` without the embeddings, which were not seen to add anything
(`benchmarks/README.md`). Poolers, heads, norms, and projections between the embeddings and the blocks are in none, nor
are tables of attention biases (T5) and relative positions (DeBERTa).

Names are endings of module names, as PEFT matches them. Models that fuse the three projections into one layer have a
single name for them: its outputs are exactly the queries, keys and values. Encoder-decoder models have them in self-
and cross-attention. `gemma3` has blocks in the language model and in its vision tower. Mixtral's experts are fused
tensors, not linear layers, and so not in the presets.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peft_cpift.errors import CpiftError
from peft_cpift.propulsion.unsupported import bypassed_by, held_by

ATTENTION = "attention"
"""The word for this preset in `target_modules`."""

BLOCKS = "blocks"
"""The word for this preset in `target_modules`; `None` means the same."""

ALL = "all"
"""The word for this preset in `target_modules`."""

MEANINGS = {
    ATTENTION: "query, key and value layers",
    BLOCKS: "linear layers of the blocks",
    ALL: "linear layers and the embeddings",
}
"""Every preset, in words."""


@dataclass(frozen=True)
class Preset:
    """The names of an architecture's layers; a name that a model lacks is passed over.

    Attributes:
        attention: The query, key and value layers.
        linear: The other linear layers of the blocks.
        embeddings: The embeddings: of tokens, positions, token types and image patches.
    """

    attention: tuple[str, ...]
    linear: tuple[str, ...]
    embeddings: tuple[str, ...]


_QKV_PROJ = ("q_proj", "k_proj", "v_proj")
_GATED_MLP = ("gate_proj", "up_proj", "down_proj")
_BERT_DENSE = ("intermediate.dense", "output.dense")  # the latter in the attention, too
_BERT_EMBEDDINGS = ("embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings")
_NEOX_DENSE = ("dense", "dense_h_to_4h", "dense_4h_to_h")

_BERT = Preset(("query", "key", "value"), _BERT_DENSE, _BERT_EMBEDDINGS)
_LLAMA = Preset(_QKV_PROJ, ("o_proj", *_GATED_MLP), ("embed_tokens",))
_T5 = Preset(("q", "k", "v"), ("o", "wi", "wi_0", "wi_1", "wo"), ("embed_tokens",))

PRESETS: dict[str, Preset] = {
    "bart": Preset(_QKV_PROJ, ("out_proj", "fc1", "fc2"), ("embed_tokens", "embed_positions")),
    "bert": _BERT,
    "bloom": Preset(("query_key_value",), _NEOX_DENSE, ("word_embeddings",)),
    "deberta": Preset(("in_proj",), ("pos_proj", "pos_q_proj", *_BERT_DENSE), _BERT_EMBEDDINGS),
    "deberta-v2": Preset(
        ("query_proj", "key_proj", "value_proj"), ("pos_query_proj", "pos_key_proj", *_BERT_DENSE), _BERT_EMBEDDINGS
    ),
    "distilbert": Preset(("q_lin", "k_lin", "v_lin"), ("out_lin", "lin1", "lin2"), _BERT_EMBEDDINGS),
    "electra": _BERT,
    "falcon": Preset(("query_key_value",), _NEOX_DENSE, ("word_embeddings",)),
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3": Preset(
        _QKV_PROJ,
        ("o_proj", *_GATED_MLP, "self_attn.out_proj", "fc1", "fc2"),
        ("embed_tokens", "embeddings.patch_embedding", "embeddings.position_embedding"),
    ),
    "gemma3_text": _LLAMA,
    "gpt2": Preset(("c_attn", "q_attn"), ("c_proj", "c_fc"), ("wte", "wpe")),
    "gpt_neox": Preset(("query_key_value",), _NEOX_DENSE, ("embed_in",)),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Preset(_QKV_PROJ, ("o_proj",), ("embed_tokens",)),
    "mt5": _T5,
    "opt": Preset(_QKV_PROJ, ("out_proj", "fc1", "fc2"), ("embed_tokens", "embed_positions")),
    "phi": Preset(_QKV_PROJ, ("dense", "fc1", "fc2"), ("embed_tokens",)),
    "phi3": Preset(("qkv_proj",), ("o_proj", "gate_up_proj", "down_proj"), ("embed_tokens",)),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "roberta": _BERT,
    "t5": _T5,
    "vit": Preset(_QKV_PROJ, ("o_proj", "fc1", "fc2"), ("embeddings.patch_embeddings.projection",)),
    "xlm-roberta": _BERT,
}
"""Model type, as in `config.model_type`, to the names of its layers."""


def resolve_preset(preset: str, model: nn.Module) -> set[str]:
    """Return the names that stand for a preset in this model, to be given to PEFT as `target_modules`.

    A linear layer is named by its ending, short and readable, unless that ending also fits a layer outside the blocks
    or one that cannot be adapted; then the layers wanted are named in full. Embeddings are named in full: PEFT saves
    the whole base embedding with the adapter if the bare word `embed_tokens` is among the targets.

    Args:
        preset: `"attention"`, `"blocks"` or `"all"`.
        model: The base model, with a `config` as those of transformers have; other adapters may be on it.

    Returns:
        The names, each of which matches a module of this model.

    Raises:
        CpiftError: A `ValueError`: the preset or the model type is not known, the model has none of the layers that
            its model type should have, or an embedding is one module under several names.

    Source:
        Propulsion (arXiv 2409.10927): "Attn" adapts the query, key and value layers, "All" every linear layer and the
        embeddings. `"blocks"` is ours.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> sorted(resolve_preset("attention", model))
        ['k_proj', 'q_proj', 'v_proj']
        >>> sorted(resolve_preset("all", model))
        ['down_proj', 'gate_proj', 'k_proj', 'model.embed_tokens', 'o_proj', 'q_proj', 'up_proj', 'v_proj']
    """
    if preset not in MEANINGS:
        raise CpiftError(f"there is no preset {preset!r}; use one of {', '.join(MEANINGS)}, or name target_modules.")
    layers = MEANINGS[preset]
    cure = "name them with target_modules, or use target_modules='all-linear'."
    config = getattr(model, "config", None)
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    if model_type not in PRESETS:
        raise CpiftError(f"the {layers} of model type {model_type!r} are not known; {cure}")
    names = PRESETS[model_type]
    targets: set[str] = set()
    for ending in names.attention if preset == ATTENTION else names.attention + names.linear:
        targets |= _linear_layers(model, ending)
    if preset == ALL:
        for ending in names.embeddings:
            targets |= _embeddings(model, ending)
    if not targets:
        raise CpiftError(f"the {layers} of model type {model_type!r} are not in this {type(model).__name__}; {cure}")
    return targets


def _matches(name: str, ending: str) -> bool:
    return name == ending or name.endswith(f".{ending}")


def _linear_layers(model: nn.Module, ending: str) -> set[str]:
    matched = {name for name, _ in model.named_modules() if _matches(name, ending)}
    # blocks are numbered; heads and poolers, which may use the same names, are not
    in_blocks = {name for name in matched if any(part.isdigit() for part in name.split("."))}
    wanted = {name for name in in_blocks if bypassed_by(model, name) is None}
    return {ending} if wanted == matched != set() else wanted


def _embeddings(model: nn.Module, ending: str) -> set[str]:
    # with duplicates: PEFT goes by each module's first name, which may be another one than that it is called by
    matched = [item for item in model.named_modules(remove_duplicate=False) if _matches(item[0], ending)]
    for name, layer in matched:
        if len(held_by(model, layer)) > 1:
            raise CpiftError(
                f"{name} has a second name in this model, and PEFT would adapt it under one of them only; save the "
                "model and load it again (resizing the vocabulary makes such models), or name target_modules."
            )
    return {name for name, _ in matched if bypassed_by(model, name) is None}
