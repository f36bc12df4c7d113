"""Strategy: names as checkpoints and adapters have them, and a core counted by hand."""

from __future__ import annotations

import pytest

from peft_cpift.report.places import layer_of, module_type, spread

NAMES = {
    "base_model.model.model.layers.0.self_attn.q_proj.propulsion_z": (0, "q_proj"),
    "model.layers.17.mlp.down_proj.weight": (17, "down_proj"),
    "model.layers.2.self_attn.q_proj.bias": (2, "q_proj"),
    "model.embed_tokens.weight": (None, "embed_tokens"),
    "transformer.h.11.attn.c_attn.weight": (11, "c_attn"),
    "layers.3.q_proj.lora_A.weight": (3, "q_proj"),
    "layers.3.q_proj.lora_B.default.weight": (3, "q_proj"),
    "layers.3.q_proj.base_layer.weight": (3, "q_proj"),
    "layers.4.block_sparse_moe.experts.7.w1.weight": (4, "w1"),
    "layers.4.mlp.experts.propulsion_z": (4, "experts"),
    "lm_head.modules_to_save.weight": (None, "lm_head"),
    "layer4.weight": (None, "layer4"),
    "w": (None, "w"),
}


@pytest.mark.parametrize("name", NAMES)
def test_place_of_a_tensor(name):
    assert (layer_of(name), module_type(name)) == NAMES[name]


def test_shares_are_of_the_core_and_densities_of_the_place():
    tensors = {"layers.1.q.weight": 10, "layers.0.q.weight": 20, "layers.1.v.weight": 30, "norm.weight": 0}
    found = spread({"layers.1.q.weight": 1, "layers.1.v.weight": 3, "layers.0.q.weight": 4}, tensors, layer_of)
    assert list(found) == [1, 0, None]
    assert [(p.core, p.entries, p.share, p.density) for p in found.values()] == [
        (4, 40, 0.5, 0.1),
        (4, 20, 0.5, 0.2),
        (0, 0, 0.0, 0.0),
    ]


def test_an_empty_core_lies_nowhere():
    assert spread({}, {"w": 3}, layer_of)[None].share == 0
