"""The presets against real architectures: each is built tiny, from its own configuration class, bare and with heads.

What a preset should match is read off the model's structure, not its names: linear layers within numbered blocks, and
embeddings outside them. PEFT's own function says what the resolved names do match, and a forward pass that every one
of these layers is called. The attention presets are counted by hand, from the number of blocks; the paper's parameter
counts are checked on models of the paper's sizes, built on the meta device.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_cpift.errors import CpiftError, NoEffectWarning
from peft_cpift.propulsion import PropulsionConfig
from peft_cpift.propulsion.targets import ALL, ATTENTION, MEANINGS, PRESETS, resolve_preset
from peft_cpift.propulsion.unsupported import bypassed_by

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
    "decoder_start_token_id": 0,
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
BLOOM = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": BLOCKS, "num_attention_heads": 2}
DEBERTA = ENCODER | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE_TOKEN = 30
GEMMA3 = {
    "text_config": DECODER | HEAD_DIM,
    "vision_config": VISION,
    "mm_tokens_per_image": 4,
    "image_token_id": IMAGE_TOKEN,
}

# model type -> (settings, modules of "attention"); q, k, v in each of two blocks unless noted
ARCHITECTURES: dict[str, tuple[dict, int]] = {
    "bart": (BART, 3 * BLOCKS * 3),  # encoder, decoder, cross-attention
    "bert": (ENCODER, 3 * BLOCKS),
    "bloom": (BLOOM, BLOCKS),  # fused
    "deberta": (DEBERTA, BLOCKS),  # fused
    "deberta-v2": (DEBERTA, 3 * BLOCKS),
    "distilbert": ({"vocab_size": 32, "dim": 16, "hidden_dim": 32, "n_layers": BLOCKS, "n_heads": 2}, 3 * BLOCKS),
    "electra": (ENCODER | {"embedding_size": 8}, 3 * BLOCKS),
    "falcon": (BLOOM, BLOCKS),  # fused
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
    "opt": (ENCODER | {"ffn_dim": 32, "word_embed_proj_dim": 8}, 3 * BLOCKS),
    "phi": (DECODER, 3 * BLOCKS),
    "phi3": (DECODER, BLOCKS),  # fused
    "qwen2": (DECODER, 3 * BLOCKS),
    "qwen3": (DECODER | HEAD_DIM, 3 * BLOCKS),
    "roberta": (ENCODER, 3 * BLOCKS),
    "t5": (T5, 3 * BLOCKS * 3),  # encoder, decoder, cross-attention
    "vit": (VISION | {"num_hidden_layers": BLOCKS}, 3 * BLOCKS),
    "xlm-roberta": (ENCODER, 3 * BLOCKS),
}
WITH_HEADS = [
    ("bart", transformers.AutoModelForSequenceClassification),  # its head has an out_proj, too
    ("bart", transformers.AutoModelForSeq2SeqLM),
    ("bert", transformers.AutoModelForMaskedLM),
    ("deberta-v2", transformers.AutoModelForSequenceClassification),
    ("electra", transformers.AutoModelForSequenceClassification),
    ("gemma3", transformers.AutoModelForImageTextToText),
    ("gpt2", transformers.AutoModelForCausalLM),
    ("llama", transformers.AutoModelForCausalLM),
    ("llama", transformers.AutoModelForSequenceClassification),
    ("phi", transformers.AutoModelForTokenClassification),
    ("roberta", transformers.AutoModelForSequenceClassification),
    ("roberta", transformers.AutoModelForMaskedLM),
    ("t5", transformers.AutoModelForSequenceClassification),
    ("t5", transformers.AutoModelForSeq2SeqLM),
    ("t5", transformers.T5EncoderModel),
    ("vit", transformers.AutoModelForImageClassification),
]
MODELS = [(model_type, transformers.AutoModel) for model_type in sorted(ARCHITECTURES)] + WITH_HEADS

# tables that are no embeddings of the input, or are not called
NOT_EMBEDDINGS = ("rel_embeddings", "relative_attention_bias", "shared")


def build(model_type: str, auto: type = transformers.AutoModel, device: str = "meta", **more) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **(ARCHITECTURES[model_type][0] | more))
    with torch.device(device):
        return auto.from_config(config) if hasattr(auto, "from_config") else auto(config)


def matched(model: nn.Module, preset: str) -> set[str]:
    config = LoraConfig(target_modules=resolve_preset(preset, model))
    return {name for name, _ in model.named_modules() if check_target_module_exists(config, name)}


def in_block(name: str) -> bool:
    return any(part.isdigit() for part in name.split("."))


def forward(model: nn.Module) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    image = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    if model.config.model_type == "vit":
        model(pixel_values=image)
    elif model.config.model_type == "gemma3":
        model(input_ids=torch.tensor([[5, 6, *[IMAGE_TOKEN] * 4, 7]]), pixel_values=image)
    elif model.config.is_encoder_decoder and hasattr(model, "get_decoder"):
        model(input_ids=ids, decoder_input_ids=ids)
    else:
        model(input_ids=ids)


def test_every_preset_is_checked_here():
    assert set(ARCHITECTURES) == set(PRESETS)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_query_key_value_of_each_architecture(model_type):
    model = build(model_type)
    names = matched(model, ATTENTION)
    assert len(names) == ARCHITECTURES[model_type][1]
    assert all(in_block(name) and isinstance(model.get_submodule(name), (nn.Linear, Conv1D)) for name in names)
    # the layer that projects the heads' outputs back is in the same module, and is not one of them
    parents = {name.rpartition(".")[0] for name in names}
    assert all("attention" in parent.lower() or "attn" in parent for parent in parents)
    assert not any("out" in name.rpartition(".")[2] for name in names)


@pytest.mark.parametrize(("model_type", "auto"), MODELS)
def test_blocks_are_all_their_linear_layers_and_all_has_the_embeddings_too(model_type, auto):
    model = build(model_type, auto)
    linear, embeddings = set(), set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and in_block(name):
            linear.add(name)
        patches = isinstance(module, nn.Conv2d) and "patch" in name
        if (patches or isinstance(module, nn.Embedding)) and name.rpartition(".")[2] not in NOT_EMBEDDINGS:
            embeddings.add(name)
    assert matched(model, ALL) == linear | embeddings
    assert matched(model, "blocks") == linear
    assert matched(model, ATTENTION) < linear


@pytest.mark.parametrize("preset", MEANINGS)
@pytest.mark.parametrize(("model_type", "auto"), MODELS)
def test_every_matched_layer_is_called(model_type, auto, preset):
    model = build(model_type, auto, "cpu")
    names = matched(model, preset)
    called = set()
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.add(name))
    if model_type in ("t5", "bart") and auto is transformers.AutoModelForSequenceClassification:
        model(input_ids=torch.tensor([[5, 6, 7, model.config.eos_token_id]]))
    else:
        forward(model)
    assert called == names
    assert not [name for name in names if bypassed_by(model, name)]


@pytest.mark.parametrize(("model_type", "auto"), MODELS)
def test_names_are_endings_of_linear_layers_and_full_names_of_embeddings(model_type, auto):
    model = build(model_type, auto)
    layers = dict(model.named_modules())
    for name in resolve_preset(ALL, model):
        matches = [other for other in layers if other == name or other.endswith(f".{name}")]
        if isinstance(layers[matches[0]], (nn.Linear, Conv1D)):
            ending = "." + name.rpartition(".")[2]
            assert name not in layers or any(not in_block(other) for other in layers if other.endswith(ending))
        else:
            assert matches == [name]


def test_the_bare_word_that_makes_peft_save_the_embedding_is_avoided():
    assert "model.embed_tokens" in resolve_preset(ALL, build("llama", transformers.AutoModelForCausalLM))
    # a long list, which PEFT shortens where it can: SigLIP's blocks and its head name their layers alike
    vision = VISION | {"num_hidden_layers": 12}
    model = build("gemma3", transformers.AutoModelForImageTextToText, vision_config=vision)
    adapted = get_peft_model(model, LoraConfig(target_modules=resolve_preset(ALL, model)))
    assert not {"embed_tokens", "language_model.embed_tokens"} & adapted.peft_config["default"].target_modules
    assert not [name for name in adapted.targeted_module_names if "head" in name]


def test_heads_that_share_a_name_with_the_blocks_are_left_out():
    model = build("bart", transformers.AutoModelForSequenceClassification)
    names = resolve_preset(ALL, model)
    assert "classification_head.out_proj" not in matched(model, ALL)
    assert "out_proj" not in names
    assert "model.encoder.layers.0.self_attn.out_proj" in names
    assert "out_proj" in resolve_preset(ALL, build("bart"))


def test_bypassed_layers_are_left_out():
    plain, exact = build("bloom"), build("bloom", slow_but_exact=True, pretraining_tp=2)
    assert resolve_preset(ALL, plain) - resolve_preset(ALL, exact) == {"dense", "dense_4h_to_h"}


def test_cross_attention_of_gpt2_is_attention():
    model = build("gpt2", add_cross_attention=True)
    assert resolve_preset(ATTENTION, model) == {"c_attn", "q_attn"}
    assert len(matched(model, ATTENTION)) == 3 * BLOCKS


def test_a_second_adapter_gets_the_same_names():
    model = build("gemma3")
    for preset in MEANINGS:
        names = resolve_preset(preset, model)
        inject_adapter_in_model(LoraConfig(target_modules=names), model, adapter_name=preset)
        assert resolve_preset(preset, model) == names


def test_one_embedding_under_several_names_is_refused_until_it_is_loaded_again(tmp_path):
    model = build("t5", transformers.AutoModelForSeq2SeqLM, "cpu")
    expected = matched(model, ALL)
    model.resize_token_embeddings(40)
    with pytest.raises(CpiftError, match=r"embed_tokens has a second name.*save the model and load it again") as error:
        resolve_preset(ALL, model)
    assert "\n" not in str(error.value)
    assert resolve_preset(ATTENTION, model) == {"q", "k", "v"}
    model.save_pretrained(tmp_path)
    assert matched(transformers.T5ForConditionalGeneration.from_pretrained(tmp_path), ALL) == expected


@pytest.mark.parametrize("config", [None, {}, {"model_type": "x"}, SimpleNamespace(), SimpleNamespace(model_type="x")])
@pytest.mark.parametrize(("preset", "layers"), [(ATTENTION, "query, key and value layers"), (ALL, "linear layers")])
def test_an_unknown_model_type_is_refused(config, preset, layers):
    model = nn.Sequential(nn.Linear(2, 2))
    if config is not None:
        model.config = config
    with pytest.raises(CpiftError, match=f"the {layers}.* are not known; name them with target_modules, or") as error:
        resolve_preset(preset, model)
    assert "\n" not in str(error.value)


def test_a_configuration_may_be_a_dictionary():
    model = build("llama")
    expected = resolve_preset(ALL, model)
    model.config = {"model_type": "llama"}
    assert resolve_preset(ALL, model) == expected


def test_a_model_without_the_layers_of_its_type_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = SimpleNamespace(model_type="llama")
    with pytest.raises(CpiftError, match="of model type 'llama' are not in this Sequential; name them"):
        resolve_preset(ATTENTION, model)


def test_an_unknown_preset_is_refused():
    with pytest.raises(CpiftError, match="there is no preset 'attn'; use one of attention, blocks, all, or name"):
        resolve_preset("attn", build("llama"))


@pytest.mark.parametrize(
    ("blocks", "hidden", "preset", "expected"),
    [
        (12, 768, ATTENTION, 27_648),
        (12, 768, ALL, 85_248),
        (24, 1024, ATTENTION, 73_728),
        (24, 1024, ALL, 224_256),
    ],
)
@pytest.mark.parametrize("auto", [transformers.AutoModel, transformers.AutoModelForSequenceClassification])
def test_trainable_parameters_of_the_paper(auto, blocks, hidden, preset, expected):
    sizes = {"num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": 4 * hidden}
    model = build("roberta", auto, **sizes, num_attention_heads=hidden // 64)
    layers = [model.get_submodule(name) for name in matched(model, preset)]
    outputs = [layer.embedding_dim if isinstance(layer, nn.Embedding) else layer.out_features for layer in layers]
    assert sum(outputs) == expected


def test_blocks_is_a_synonym_of_the_default():
    by_default = get_peft_model(build("llama"), PropulsionConfig())
    by_name = get_peft_model(build("llama"), PropulsionConfig(target_modules="blocks"))
    assert by_name.targeted_module_names == by_default.targeted_module_names != []


def test_experts_in_fused_tensors_are_not_left_out_in_silence():
    config = transformers.MixtralConfig(**DECODER, num_local_experts=2)
    for targets in (None, ALL, "all-linear"):
        with pytest.warns(NoEffectWarning, match=rf"^'{targets or 'blocks'}' leaves out the experts.*experts\."):
            get_peft_model(transformers.MixtralForCausalLM(config), PropulsionConfig(target_modules=targets))
