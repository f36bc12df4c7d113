"""The claim itself is run: a stand-in that would double a layer's output is never called, and the model's output stays
as it is, in the situation for which the layer is listed; a neighbour that is not listed changes the output.

The table is compared with the sources of every model of transformers, in both directions; layers of classes that it
cannot know are judged by the same reading of the source, which is tried on classes written here.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.detr.modeling_detr import DetrMHAttentionMap
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from peft_cpift.propulsion.unsupported import _BYPASSED, _uses, bypassed_by

IDS = torch.tensor([[5, 6, 7, 8]])
SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
STATE_SPACE = SMALL | {"state_size": 4, "conv_kernel": 2, "expand": 2}
T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
DEBERTA = {"intermediate_size": 32, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
BLOOM = {"vocab_size": 32, "hidden_size": 16, "n_layer": 1, "n_head": 2, "pretraining_tp": 2}
LFM2 = {"intermediate_size": 32, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
WAVLM = {"conv_dim": [8], "conv_stride": [5], "conv_kernel": [10], "num_feat_extract_layers": 1}
WAVLM |= {"intermediate_size": 32, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
SIGLIP2 = {"intermediate_size": 32, "num_patches": 4, "patch_size": 2, "vision_use_head": False}
LAYOUT = {"intermediate_size": 32, "visual_embed": False, "coordinate_size": 3, "shape_size": 2}
LAYOUT |= {"has_spatial_attention_bias": True, "has_relative_attention_bias": True}


def of(model_type: str, auto: type = transformers.AutoModel, **settings) -> nn.Module:
    return auto.from_config(transformers.AutoConfig.for_model(model_type, **settings))


def on_ids(model: nn.Module) -> Tensor:
    return model(input_ids=IDS)[0]


def on_both_ids(model: nn.Module) -> Tensor:
    return model(input_ids=IDS, decoder_input_ids=IDS)[0]


def siglip2_output(model: nn.Module) -> Tensor:
    shapes = torch.tensor([[2, 2]])
    return model(
        pixel_values=torch.linspace(0, 1, 48).view(1, 4, 12),
        pixel_attention_mask=torch.ones(1, 4, dtype=torch.long),
        spatial_shapes=shapes,
    )[0]


def with_kernel(modeling: ModuleType, kernel: str) -> Callable[[nn.Module], Tensor]:
    """Run as where the fused kernel is installed, which computes the whole block from the weights that it is given."""

    def fused(projected: Tensor, *tensors, outproj_weight: Tensor | None = None, **kwargs) -> Tensor:
        weight = tensors[4] if outproj_weight is None else outproj_weight
        inner = projected.transpose(1, 2) if outproj_weight is None else projected
        return functional.linear(inner[..., : weight.shape[1]], weight)

    def run(model: nn.Module) -> Tensor:
        with mock.patch.object(modeling, kernel, fused):
            return on_ids(model)

    return run


WAVE = torch.linspace(-1, 1, 200)[None]
SEQUENCE = torch.linspace(-1, 1, 24).view(1, 3, 8)
MASK_HEAD = torch.linspace(-1, 1, 64).view(1, 16, 2, 2)

# model, how to run it, in training or evaluation, class, bypassed layers, a layer that is called
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor], bool, str, tuple[str, ...], str]] = {
    "attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)),
        lambda model: model[1](model[0](SEQUENCE, SEQUENCE, SEQUENCE)[0]),
        True,
        "MultiheadAttention",
        ("0.out_proj",),
        "1",
    ),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)),
        lambda model: model(SEQUENCE),
        False,
        "TransformerEncoderLayer",
        ("0.linear1", "0.linear2"),
        "1",
    ),
    "bart": (
        lambda: of("bart", vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1),
        on_both_ids,
        False,
        "BartModel",
        ("shared",),
        "encoder.embed_tokens",
    ),
    "t5": (lambda: of("t5", **T5), on_both_ids, False, "T5Model", ("shared",), "decoder.embed_tokens"),
    "deberta": (
        lambda: of("deberta", **SMALL, **DEBERTA),
        on_ids,
        False,
        "DebertaEncoder",
        ("encoder.rel_embeddings",),
        "encoder.layer.0.attention.self.in_proj",
    ),
    "deberta-v2": (
        lambda: of("deberta-v2", **SMALL, **DEBERTA, share_att_key=True),
        on_ids,
        False,
        "DebertaV2Encoder",
        ("encoder.rel_embeddings",),
        "encoder.layer.0.attention.self.key_proj",
    ),
    "bloom": (
        lambda: of("bloom", **BLOOM, slow_but_exact=True),
        on_ids,
        False,
        "BloomMLP",
        ("h.0.mlp.dense_4h_to_h",),
        "h.0.mlp.dense_h_to_4h",
    ),
    "bloom attention": (
        lambda: of("bloom", **BLOOM, slow_but_exact=True),
        on_ids,
        True,
        "BloomAttention",
        ("h.0.self_attention.dense",),
        "h.0.self_attention.query_key_value",
    ),
    "mobilebert": (
        lambda: of("mobilebert", transformers.AutoModelForMaskedLM, **SMALL, embedding_size=8, intermediate_size=32),
        on_ids,
        False,
        "MobileBertLMPredictionHead",
        ("cls.predictions.decoder", "cls.predictions.dense"),
        "cls.predictions.transform.dense",
    ),
    "mamba": (
        lambda: of("mamba", **STATE_SPACE),
        on_ids,
        False,
        "MambaMixer",
        ("layers.0.mixer.conv1d", "layers.0.mixer.dt_proj"),
        "layers.0.mixer.in_proj",
    ),
    "mamba in training": (
        lambda: of("mamba", **STATE_SPACE),
        with_kernel(modeling_mamba, "mamba_inner_fn"),
        True,
        "MambaMixer",
        tuple(f"layers.0.mixer.{child}" for child in ("conv1d", "dt_proj", "out_proj", "x_proj")),
        "layers.0.mixer.in_proj",
    ),
    "mamba2 in training": (
        lambda: of("mamba2", **(STATE_SPACE | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4})),
        with_kernel(modeling_mamba2, "mamba2_split_conv1d_scan_combined"),
        True,
        "Mamba2Mixer",
        ("layers.0.mixer.conv1d", "layers.0.mixer.out_proj"),
        "layers.0.mixer.in_proj",
    ),
    "lfm2": (
        lambda: of("lfm2", **(SMALL | LFM2 | {"num_hidden_layers": 2})),
        on_ids,
        True,
        "Lfm2ShortConv",
        ("layers.0.conv.conv",),
        "layers.0.conv.out_proj",
    ),
    "wavlm": (
        lambda: of("wavlm", **SMALL, **WAVLM),
        lambda model: model(WAVE)[0],
        False,
        "WavLMAttention",
        tuple(f"encoder.layers.0.attention.{child}_proj" for child in ("q", "k", "v", "out")),
        "encoder.layers.0.feed_forward.output_dense",
    ),
    "siglip2": (
        lambda: of("siglip2_vision_model", **SMALL, **SIGLIP2),
        siglip2_output,
        False,
        "Siglip2VisionEmbeddings",
        ("embeddings.position_embedding",),
        "embeddings.patch_embedding",
    ),
    "layoutlmv3": (
        lambda: of("layoutlmv3", **SMALL, **LAYOUT),
        on_ids,
        False,
        "LayoutLMv3Encoder",
        ("encoder.rel_pos_bias", "encoder.rel_pos_x_bias", "encoder.rel_pos_y_bias"),
        "encoder.layer.0.attention.self.key",
    ),
    "detr": (
        lambda: nn.ModuleList([DetrMHAttentionMap(16, 2)]),
        lambda model: model[0](MASK_HEAD.mean((2, 3))[:, None], MASK_HEAD),
        False,
        "DetrMHAttentionMap",
        ("0.k_proj",),
        "0.q_proj",
    ),
}


class Doubled(nn.Module):
    """Stands in for a layer as an adapter does: its parameters can be read, its output is not the layer's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.calls = 0

    def __getattr__(self, name: str):
        return getattr(super().__getattr__("layer"), name) if name != "layer" else super().__getattr__(name)

    def forward(self, *args) -> Tensor:
        self.calls += 1
        return self.layer(*args) * 2


def doubled(model: nn.Module, run: Callable[[nn.Module], Tensor], name: str) -> tuple[Tensor, int]:
    """Run the model with the layer's output doubled; return the output, and how often the layer was called."""
    layer = model.get_submodule(name)
    stand_in = Doubled(layer)
    model.set_submodule(name, stand_in)
    torch.manual_seed(0)  # in training there may be dropout
    with torch.no_grad():
        output = run(model)
    model.set_submodule(name, layer)
    return output, stand_in.calls


@pytest.mark.parametrize("case", CASES)
def test_a_bypassed_layer_is_named_and_has_no_effect(case):
    build, run, training, class_name, bypassed, called = CASES[case]
    torch.manual_seed(0)
    model = build().train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        expected = run(model)
    for name in bypassed:
        assert bypassed_by(model, name) == class_name
        output, calls = doubled(model, run, name)
        assert calls == 0, name
        assert torch.equal(output, expected), name
    assert bypassed_by(model, called) is None
    output, calls = doubled(model, run, called)
    assert calls > 0
    assert not torch.equal(output, expected)


@pytest.mark.parametrize("settings", [{}, {"slow_but_exact": True, "pretraining_tp": 1}])
def test_bloom_calls_its_layers_unless_it_is_slow_but_exact(settings):
    model = of("bloom", **(BLOOM | settings)).eval()
    expected = on_ids(model)
    for name in ("h.0.mlp.dense_4h_to_h", "h.0.self_attention.dense"):
        assert bypassed_by(model, name) is None
        assert not torch.equal(doubled(model, on_ids, name)[0], expected)


def test_reformer_reads_its_weights_while_generating():
    settings = {"attn_layers": ["lsh"], "axial_pos_embds": False, "num_buckets": 2, "lsh_attn_chunk_length": 2}
    sizes = {"vocab_size": 32, "hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2}
    model = of("reformer", **settings, **sizes, is_decoder=True, max_position_embeddings=64, hash_seed=0).eval()
    name = "encoder.layers.0.attention.self_attention.value"
    assert bypassed_by(model, name) == "LSHSelfAttention"


def test_embeddings_that_are_also_called_are_not_bypassed():
    settings = {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
    model = of("siglip_vision_model", **SMALL, **settings)
    assert bypassed_by(model, "embeddings.position_embedding") is None  # also read, to interpolate it on request
    tied = of("gpt2", transformers.AutoModelForCausalLM, vocab_size=32, n_embd=16, n_layer=1, n_head=2)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert bypassed_by(tied, "transformer.wte") is None


def test_a_layer_under_two_names_is_bypassed_because_peft_adapts_one():
    model = of("t5", **T5)
    assert bypassed_by(model, "encoder.embed_tokens") is None
    model.resize_token_embeddings(40)
    assert model.shared is model.encoder.embed_tokens
    assert bypassed_by(model, "shared") == "T5Stack"
    assert bypassed_by(model, "encoder.embed_tokens") == "T5Model"
    head = nn.Linear(2, 2)
    assert bypassed_by(nn.ModuleList([head, head, nn.Linear(2, 2)]), "0") == "ModuleList"
    assert bypassed_by(nn.ModuleList([head, nn.Linear(2, 2)]), "1") is None


class Bypassing(nn.Module):
    """What code from elsewhere may do: `used` and `listed` are bypassed, the others are not."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.called, self.asked = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.listed = nn.ModuleList([nn.Embedding(2, 2), nn.Embedding(2, 2)])
        self.tied = nn.Embedding(2, 2)
        self.init_called()

    def init_called(self) -> None:
        nn.init.ones_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(x) + functional.linear(self.tied(x), self.tied.weight)
        if isinstance(self.asked.weight, Tensor) and self.asked.bias is not None:
            x = self.asked(x.to(self.asked.weight.dtype))
        return self.called(functional.linear(x, self.used.weight)) + self.listed[1].weight[0]


class Calling(Bypassing):
    """Overrides the method that bypasses."""

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.tied(x))


class MultiheadAttention(nn.Module):
    """Has the name of a class in the table, and calls its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.out_proj = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(x)


@pytest.mark.parametrize(
    ("cls", "expected"), [(Bypassing, {"used", "listed.0", "listed.1"}), (Calling, set()), (MultiheadAttention, set())]
)
def test_classes_not_in_the_table_are_judged_by_their_source(cls, expected):
    model = nn.Sequential(cls())
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    found = {name.removeprefix("0."): bypassed_by(model, name) for name in layers}
    assert {name for name, reader in found.items() if reader} == expected
    assert set(found.values()) <= {cls.__name__, None}


def test_a_class_without_source_is_not_judged():
    namespace = {"nn": nn, "__name__": "made_at_run_time"}
    exec("class Made(nn.Module):\n    def forward(self, x):\n        return x @ self.layer.weight", namespace)
    model = namespace["Made"]()
    model.layer = nn.Linear(2, 2)
    assert bypassed_by(model, "layer") is None


@pytest.mark.slow
def test_the_table_agrees_with_the_sources_of_transformers():
    root = Path(transformers.__file__).parent / "models"
    mentions = re.compile(r"self\.(\w+)(?:\[\w+\])?\.(?:weight|bias)\b")
    found: dict[str, set[str]] = {}
    for file in root.glob("*/modeling_*.py"):
        text = file.read_text()
        for cls in ast.parse(text).body if mentions.search(text) else ():
            if isinstance(cls, ast.ClassDef):
                source = ast.get_source_segment(text, cls)
                for child in set(mentions.findall(source)):
                    layer = re.search(rf"self\.{child}(?:: [^=]+)? = \(?\s*(?:torch\.)?(?:nn\.)?(\w+)", source)
                    kind = layer.group(1) if layer else ""
                    methods = [
                        node
                        for node in cls.body
                        if isinstance(node, ast.FunctionDef)
                        and not re.match(r"_*(init|reset|resize|set_|tie)", node.name)
                    ]
                    uses = {use for method in methods for use in _uses(method, child)}
                    tied = "call" in uses and "mbedding" in kind + child
                    if "weight" in uses and not tied and "orm" not in kind + child:
                        found.setdefault(cls.name, set()).add(child)
    # judged one by one to be called, or to hold layers that are never called and read by others
    others = {"MultiheadAttention", "TransformerEncoderLayer", "ProphetNetDecoderWrapper", "ProphetNetModel"}
    found.update({name: set() for name in ("DisentangledSelfAttention", "Emu3VQVAEVectorQuantizer")})
    assert found == {name: children for name, children in _BYPASSED.items() if name not in others}
