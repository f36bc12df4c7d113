"""The presets against real architectures: each is built tiny, from its own configuration class, and adapted.

The expected counts are worked out by hand from the number of blocks, so a name that matches nothing, or too much,
fails; a gradient in every z shows that the adapted layers are really called. The paper's parameter counts are checked
on models of the paper's sizes, built on the meta device.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from peft_cpift.errors import NoEffectWarning
from peft_cpift.propulsion import PropulsionConfig, PropulsionLayer
from peft_cpift.propulsion.targets import ATTENTION_MODULES

BLOCKS = 2
DECODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
ENCODER = {k: v for k, v in DECODER.items() if k != "num_key_value_heads"}
HEAD_DIM = {"head_dim": 8}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": BLOCKS,
    "num_decoder_layers": BLOCKS,
    "num_heads": 2,
}
BART = {
    "vocab_size": 32,
    "d_model": 16,
    "encoder_layers": BLOCKS,
    "decoder_layers": BLOCKS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
GEMMA3 = {"text_config": DECODER | HEAD_DIM, "vision_config": VISION, "mm_tokens_per_image": 4}

# model type -> (settings, adapted modules); q, k, v in each of two blocks unless noted
ARCHITECTURES: dict[str, tuple[dict, int]] = {
    "bart": (BART, 3 * BLOCKS * 3),  # encoder, decoder, cross-attention
    "bert": (ENCODER, 3 * BLOCKS),
    "distilbert": ({"vocab_size": 32, "dim": 16, "hidden_dim": 32, "n_layers": BLOCKS, "n_heads": 2}, 3 * BLOCKS),
    "electra": (ENCODER | {"embedding_size": 16}, 3 * BLOCKS),
    "gemma": (DECODER | HEAD_DIM, 3 * BLOCKS),
    "gemma2": (DECODER | HEAD_DIM, 3 * BLOCKS),
    "gemma3": (GEMMA3, 3 * BLOCKS + 3),  # and the one block of the vision tower
    "gemma3_text": (DECODER | HEAD_DIM, 3 * BLOCKS),
    "gpt2": ({"vocab_size": 32, "n_embd": 16, "n_layer": BLOCKS, "n_head": 2}, BLOCKS),  # fused
    "gpt_neox": (ENCODER, BLOCKS),  # fused
    "llama": (DECODER, 3 * BLOCKS),
    "mistral": (DECODER, 3 * BLOCKS),
    "mixtral": (DECODER | {"num_local_experts": 2}, 3 * BLOCKS),
    "mt5": (T5, 3 * BLOCKS * 3),  # encoder, decoder, cross-attention
    "opt": (ENCODER | {"ffn_dim": 32, "word_embed_proj_dim": 16}, 3 * BLOCKS),
    "phi": (DECODER, 3 * BLOCKS),
    "phi3": (DECODER, BLOCKS),  # fused
    "qwen2": (DECODER, 3 * BLOCKS),
    "qwen3": (DECODER | HEAD_DIM, 3 * BLOCKS),
    "roberta": (ENCODER, 3 * BLOCKS),
    "t5": (T5, 3 * BLOCKS * 3),  # encoder, decoder, cross-attention
    "xlm-roberta": (ENCODER, 3 * BLOCKS),
}


def build(model_type: str, settings: dict, device: str = "meta") -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.device(device):
        return transformers.AutoModel.from_config(config)


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, PropulsionLayer)]


def test_every_preset_is_checked_here():
    assert set(ARCHITECTURES) == set(ATTENTION_MODULES)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_query_key_value_of_each_architecture(model_type):
    settings, expected = ARCHITECTURES[model_type]
    model = get_peft_model(build(model_type, settings), PropulsionConfig())
    names = adapted(model)
    assert len(names) == expected
    assert {name.rpartition(".")[2] for name in names} == set(ATTENTION_MODULES[model_type])
    assert {p.shape for n, p in model.named_parameters() if p.requires_grad} == {
        (model.get_submodule(name).get_base_layer().weight.shape[0 if model_type != "gpt2" else 1],) for name in names
    }


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_adapted_layer_is_called(model_type):
    model = get_peft_model(build(model_type, ARCHITECTURES[model_type][0], "cpu"), PropulsionConfig())
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    model(**inputs).last_hidden_state.pow(3).sum().backward()
    for name, z in model.named_parameters():
        # without an image, Gemma 3's vision tower does not run
        if z.requires_grad and "vision" not in name:
            assert z.grad is not None, name
            assert z.grad.abs().max() > 0, name


def test_attention_is_a_synonym_of_the_default():
    by_default = get_peft_model(build("llama", DECODER), PropulsionConfig())
    by_name = get_peft_model(build("llama", DECODER), PropulsionConfig(target_modules="attention"))
    assert adapted(by_name) == adapted(by_default) != []


@pytest.mark.parametrize("target_modules", [None, "attention"])
def test_an_unknown_architecture_is_refused(target_modules):
    with pytest.raises(ValueError, match="model type 'custom' are not known; name them with target_modules"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), PropulsionConfig(target_modules=target_modules))


@pytest.mark.parametrize(("blocks", "hidden", "expected"), [(12, 768, 27_648), (24, 1024, 73_728)])
def test_trainable_parameters_of_the_paper(blocks, hidden, expected):
    sizes = {"num_hidden_layers": blocks, "hidden_size": hidden, "num_attention_heads": 8, "vocab_size": 32}
    model = get_peft_model(build("roberta", sizes), PropulsionConfig())
    assert model.get_nb_trainable_parameters()[0] == expected


def test_experts_in_fused_tensors_are_not_left_out_in_silence():
    config = transformers.MixtralConfig(**DECODER, num_local_experts=2)
    with pytest.warns(NoEffectWarning, match=r"leaves out the experts.*experts\."):
        get_peft_model(transformers.MixtralForCausalLM(config), PropulsionConfig(target_modules="all-linear"))
