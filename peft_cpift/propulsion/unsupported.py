"""Layers whose weight another module reads without calling them: scaling their output would silently have no effect.

A layer counts as bypassed if it is so in any situation the model may come into: on some device, in training or in
evaluation, while generating. An embedding that is called, and whose weight is read besides (by an output layer tied to
it, to look up the nearest code, to resize position embeddings on request), does not count: its lookup is scaled, as
that of any tied embedding.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from itertools import takewhile

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# Children, and the classes of torch and transformers (5.23) that bypass them. Classes that are not here are judged by
# their source, see `_reads_weight`; an empty entry overrules that.
_TABLE: tuple[tuple[str, str], ...] = (
    # not bypassed: the branch that reads the weight is never taken, or the codebook is called by another class
    ("", "DisentangledSelfAttention Emu3VQVAEVectorQuantizer"),
    # fused attention and the "fast path" of evaluation
    ("out_proj", "MultiheadAttention"),
    ("linear1 linear2", "TransformerEncoderLayer"),
    ("k_proj out_proj q_proj v_proj", "WavLMAttention"),
    # state-space mixers and short convolutions: kernels that are given the weights, some of them in training only
    ("conv", "Lfm2MoeShortConv Lfm2ShortConv Lfm3ShortConv"),
    ("conv1d", "BailingHybridDeltaAttention Glm5NextTextLinearAttention Inkling2ShortConvolution"),
    ("conv1d", "InklingShortConvolution KimiLinearDeltaAttention OlmoHybridGatedDeltaNet Qwen3NextGatedDeltaNet"),
    ("conv1d", "Qwen3_5GatedDeltaNet Qwen3_5MoeGatedDeltaNet Qwen4ExpTextGatedDeltaNet ZambaMambaMixer"),
    ("conv1d dt_proj", "JambaMambaMixer"),
    ("conv1d dt_proj out_proj x_proj", "FalconMambaMixer MambaMixer"),
    ("conv1d out_proj", "BambaMixer FalconH1Mixer GraniteMoeHybridMambaLayer Mamba2Mixer NemotronHMamba2Mixer"),
    ("conv1d out_proj", "Zamba2MambaMixer"),
    ("conv_1d", "RecurrentGemmaRecurrentBlock"),  # while generating
    # a product computed another way: as a convolution, in slices, concatenated, clipped, with cached states
    ("correction_coefs", "Gemma3nTextAltUp"),
    ("decoder dense", "MobileBertLMPredictionHead"),
    ("dense", "BloomAttention"),
    ("dense_4h_to_h", "BloomMLP"),
    ("k_linear", "DabDetrMHAttentionMap"),
    ("k_proj", "ConditionalDetrMHAttentionMap DetrMHAttentionMap MaskFormerDetrMHAttentionMap"),
    ("kernel", "TDNNLayer"),
    ("classifier", "LongcatFlashTopkRouter"),
    ("lm_head", "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM"),
    ("query_key value", "LSHSelfAttention"),
    ("unembedding_projection", "NeoMMEForMaskedLM"),
    # tables of relative or absolute positions, used whole or by indexing the weight
    ("embed_positions", "AudioFlamingo3Encoder MossTranscribeDiarizeAudioModel Qwen2AudioEncoder VoxtralEncoder"),
    ("ngram_embeddings", "ProphetNetDecoder"),
    ("position_embedding", "Cosmos3EdgeVisionEmbeddings Glm4vMoeVisionEmbeddings Glm4vVisionEmbeddings"),
    ("position_embedding", "GlmImageVisionEmbeddings HunYuanVLVisionPatchEmbed Siglip2VisionEmbeddings"),
    ("rel_embeddings", "DebertaEncoder DebertaV2Encoder SEWDTransformerEncoder"),
    ("rel_pos_bias rel_pos_x_bias rel_pos_y_bias", "LayoutLMv2Encoder LayoutLMv3Encoder"),
    ("rel_pos_bias", "PPDocLayoutV2ReadingOrderEncoder"),
    # learnt queries, tokens and codes, kept as the weight of an embedding that is never called
    ("cls_embed", "Sam3GeometryEncoder Sam3LiteTextGeometryEncoder"),
    ("embedding", "GlmImageVQVAEVectorQuantizer"),
    ("hq_token iou_token mask_tokens", "SamHQMaskDecoder"),
    ("iou_token mask_tokens", "SamMaskDecoder"),
    ("iou_token mask_tokens obj_score_token", "EdgeTamMaskDecoder EdgeTamVideoMaskDecoder Sam2MaskDecoder"),
    ("iou_token mask_tokens obj_score_token", "Sam2VideoMaskDecoder Sam3TrackerMaskDecoder"),
    ("iou_token mask_tokens obj_score_token", "Sam3TrackerVideoMaskDecoder"),
    ("level_embed queries_embedder", "Mask2FormerTransformerModule OneFormerTransformerModule"),
    ("no_mask_embed not_a_point_embed", "EdgeTamPromptEncoder EdgeTamVideoPromptEncoder Sam2PromptEncoder"),
    ("no_mask_embed not_a_point_embed", "Sam2VideoPromptEncoder Sam3TrackerPromptEncoder"),
    ("no_mask_embed not_a_point_embed", "Sam3TrackerVideoPromptEncoder"),
    ("no_mask_embed not_a_point_embed point_embed", "SamHQPromptEncoder SamPromptEncoder"),
    ("patterns query_refpoint_embeddings", "DabDetrModel"),
    ("presence_token query_embed reference_points", "Sam3DetrDecoder Sam3LiteTextDetrDecoder"),
    ("prompt_ctx", "OneFormerTextMapper"),
    ("queries_embedder", "MaskFormerTransformerModule"),
    ("queries_features", "Mask2FormerTransformerModule"),
    ("query", "EomtDinov3ForUniversalSegmentation EomtForUniversalSegmentation VideomtForUniversalSegmentation"),
    ("query_1024_resolution query_768_resolution", "DeepseekOcr2VisionModel"),
    ("query_feat reference_point_embed", "LwDetrModel RfDetrModel"),
    ("query_position_embeddings", "ConditionalDetrModel DeformableDetrModel DetrModel TableTransformerModel"),
    ("query_position_embeddings reference_points", "GroundingDinoModel MMGroundingDinoModel"),
    ("tgt_embed", "OmDetTurboDecoder"),
    # the encoder and the decoder have embeddings of their own, tied to it; so has every `shared` of transformers
    ("word_embeddings", "ProphetNetDecoderWrapper ProphetNetModel"),
)
_BYPASSED: dict[str, set[str]] = {}
for _children, _classes in _TABLE:
    for _class in _classes.split():
        _BYPASSED.setdefault(_class, set()).update(_children.split())

# classes that do so with some settings only
_ONLY_IF: dict[str, Callable[[nn.Module], bool]] = {
    "BloomAttention": lambda reader: reader.slow_but_exact and reader.pretraining_tp > 1,
    "BloomMLP": lambda reader: reader.slow_but_exact and reader.pretraining_tp > 1,
    "Gemma3nTextAltUp": lambda reader: reader.config.altup_coef_clip is not None,
    "Gemma4AssistantForCausalLM": lambda reader: reader.config.use_ordered_embeddings,
    "Gemma4UnifiedAssistantForCausalLM": lambda reader: reader.config.use_ordered_embeddings,
}

# what can be asked of a weight without using its values
_ABOUT = {"data", "device", "dim", "dtype", "element_size", "is_cuda", "ndim", "numel", "shape", "size"}
_FRAMEWORK = ("torch.nn.modules.module", "transformers.modeling_utils")  # base classes without children


def bypassed_by(model: nn.Module, name: str) -> str | None:
    """Say which module reads the weight of the layer `name` without calling the layer.

    Args:
        model: The whole model.
        name: A layer's name in it.

    Returns:
        The class name of the module that does so, or None if the layer's output is what the model uses. Also the class
        that holds the same layer under another name: PEFT adapts a layer under its first name only.

    Example:
        >>> bypassed_by(nn.Sequential(nn.MultiheadAttention(4, 2)), "0.out_proj")
        'MultiheadAttention'
        >>> bypassed_by(nn.Sequential(nn.Linear(4, 2)), "0")
    """
    layer = model.get_submodule(name)
    reader_name, _, child = name.rpartition(".")
    reader = model.get_submodule(reader_name)
    is_embedding = isinstance(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer, nn.Embedding)
    # a linear layer is looked for in its own list only, where detection heads repeat it: everywhere would take long
    holders = held_by(model if is_embedding else reader, layer)
    if len(holders) > 1:
        return type(next((holder for holder in holders if holder is not reader), reader)).__name__
    while isinstance(reader, (nn.ModuleList, nn.ModuleDict)) and reader_name:
        reader_name, _, child = reader_name.rpartition(".")
        reader = model.get_submodule(reader_name)
    return type(reader).__name__ if _is_bypassed(reader, child, is_embedding) else None


def held_by(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that have `layer` as a child, one for each name they give it."""
    return [holder for holder in model.modules() for child in holder._modules.values() if child is layer]


def _is_bypassed(reader: nn.Module, child: str, is_embedding: bool) -> bool:
    for base in type(reader).__mro__:
        package = base.__module__.partition(".")[0]
        if package == "transformers" and child == "shared" and is_embedding:
            return True
        if package in ("torch", "transformers") and base.__name__ in _BYPASSED:
            applies = _ONLY_IF.get(base.__name__, lambda reader: True)
            return child in _BYPASSED[base.__name__] and applies(reader)
    read, called = _reads_weight(type(reader), child)
    return read and not (is_embedding and called)


@cache
def _reads_weight(cls: type, child: str) -> tuple[bool, bool]:
    """Say, going by the source of `cls`, whether it uses the weight or bias of `self.<child>`, and if it calls it."""
    read = called = False
    overridden: set[str] = set()
    for base in takewhile(lambda base: base.__module__ not in _FRAMEWORK, cls.__mro__):
        try:
            source = textwrap.dedent(inspect.getsource(base)) if _mentions_weight(base.__module__, child) else ""
            tree = ast.parse(source)
        except (KeyError, OSError, SyntaxError, TypeError):  # compiled, or made at run time
            tree = ast.Module([], [])
        for method in ast.walk(tree):
            if not isinstance(method, ast.FunctionDef) or method.name in overridden:
                continue
            if not method.name.lstrip("_").startswith(("init", "reset", "resize", "set_", "tie")):
                uses = set(_uses(method, child))
                read, called = read or "weight" in uses, called or "call" in uses
        overridden.update(vars(base))
    return read, called


@cache
def _mentions_weight(module_name: str, child: str) -> bool:
    # a glance at the text, because finding a class in it takes a tenth of a second
    text = inspect.getsource(sys.modules[module_name])
    return re.search(rf"\bself\.{child}\b(\[[^]]*\])?\.(weight|bias)\b", text) is not None


def _uses(method: ast.FunctionDef, child: str) -> Iterator[str]:
    """Yield "call" for each call of `self.<child>` or `self.<child>[...]`, and "weight" for each use of its values."""

    def is_child(node: ast.AST) -> bool:
        node = node.value if isinstance(node, ast.Subscript) else node
        return isinstance(node, ast.Attribute) and ast.unparse(node) == f"self.{child}"

    not_values: set[ast.AST] = set()
    for node in ast.walk(method):  # parents come before their children
        if isinstance(node, ast.Attribute) and node.attr in _ABOUT:
            not_values.add(node.value)
        elif isinstance(node, ast.Compare):  # with None
            not_values.add(node.left)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "isinstance"):
                not_values.add(node.args[0])
            if is_child(node.func):
                yield "call"
        elif isinstance(node, ast.Attribute) and node.attr in ("weight", "bias"):
            yield from ["weight"] * (is_child(node.value) and node not in not_values)
