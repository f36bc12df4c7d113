"""Experts that are kept in one tensor: each has its own z, and the reference is a loop over experts in float64.

The loop is written here, once for each layout, and uses neither the package nor a library's experts; whole models
(Mixtral, gpt-oss) are compared with themselves after their tensors were multiplied by hand. Each implementation of
experts that transformers offers on this machine is run.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from peft_cpift.propulsion import PropulsionConfig
from peft_cpift.propulsion.experts import ParamWrapper

EXPERTS, WIDTH, INNER = 3, 4, 5


class Experts(nn.Module):
    """Experts with two tensors, in any of the layouts that transformers uses; every expert sees every token."""

    def __init__(self, transposed: bool, biased: bool) -> None:
        super().__init__()
        self.up = nn.Parameter(
            torch.randn(EXPERTS, WIDTH, INNER) if transposed else torch.randn(EXPERTS, INNER, WIDTH)
        )
        self.down = nn.Parameter(
            torch.randn(EXPERTS, INNER, WIDTH) if transposed else torch.randn(EXPERTS, WIDTH, INNER)
        )
        self.is_transposed = transposed
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, INNER)) if biased else None
        self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH)) if biased else None

    def forward(self, x: torch.Tensor, factor: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
        up, down = (t if self.is_transposed else t.transpose(1, 2) for t in (self.up, self.down))
        hidden = torch.einsum("ti,eio->teo", x, up) + (0 if self.up_bias is None else self.up_bias)
        out = torch.einsum("teo,eoi->tei", hidden.tanh(), down) + (0 if self.down_bias is None else self.down_bias)
        return out.sum(1) * factor + shift


class Block(nn.Module):
    def __init__(self, transposed: bool = False, biased: bool = False) -> None:
        super().__init__()
        self.experts = Experts(transposed, biased)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.experts(x, 2.0, shift=0.5))


LAYOUTS = {
    "plain": (False, False),
    "biased": (False, True),
    "transposed": (True, False),
    "as in gpt-oss": (True, True),
}
TARGETS = ["experts.up", "experts.down"]


def adapted(layout: str, targets: list[str] = TARGETS, dtype: torch.dtype = torch.float32, **settings: Any):
    torch.manual_seed(0)
    base = Block(*LAYOUTS[layout]).to(dtype)
    model = get_peft_model(base, PropulsionConfig(target_parameters=targets, **{"degree": 3} | settings))
    randomize(model)
    return model, torch.randn(6, WIDTH).to(dtype)


def randomize(model: nn.Module, adapter: str = "default", seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(f"propulsion_z.{adapter}"):
                p.copy_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    return {m.parameter_name: m for m in model.modules() if isinstance(m, ParamWrapper)}


def loop(model: PeftModel, x: torch.Tensor, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run expert after expert in float64, scaling what comes out of each of its two products."""
    head = next(m for m in model.modules() if isinstance(m, nn.Linear))
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    x, result = x.double(), 0
    for e in range(EXPERTS):
        y = x
        for part in ("up", "down"):
            weight = getattr(experts, part)[e].detach().double()
            y = y @ (weight if experts.is_transposed else weight.T)
            bias = getattr(experts, f"{part}_bias")
            y = y if bias is None else y + bias[e].double()
            y = y * scales[part][e] if part in scales else y
            y = y.tanh() if part == "up" else y
        result = result + y
    return (result * 2 + 0.5) @ head.weight.double().T + head.bias.double()


def z_scales(model: PeftModel, adapter: str = "default", degree: int = 3) -> dict[str, torch.Tensor]:
    return {n: m.propulsion_z[adapter].double() ** degree for n, m in wrappers(model).items()}


@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1], TARGETS[1:]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_expert_is_scaled_by_its_own_z(layout, targets):
    model, x = adapted(layout, targets)
    scales = z_scales(model)
    assert {n: s.shape for n, s in scales.items()} == {
        n.split(".")[1]: (EXPERTS, INNER if n.endswith("up") else WIDTH) for n in targets
    }
    expected = loop(model, x, scales)
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected - loop(model, x, {})).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_square_experts_are_scaled_along_the_right_dimension(layout, monkeypatch):
    monkeypatch.setitem(globals(), "INNER", WIDTH)
    model, x = adapted(layout)
    expected = loop(model, x, z_scales(model))
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_match_the_loop(layout):
    model, x = adapted(layout)
    with torch.no_grad():
        wrappers(model)["up"].propulsion_z["default"][0, 0] = 0
    model(x).sin().sum().backward()
    zs = {n: m.propulsion_z["default"].detach().double().requires_grad_() for n, m in wrappers(model).items()}
    loop(model, x, {n: z**3 for n, z in zs.items()}).sin().sum().backward()
    for name, module in wrappers(model).items():
        torch.testing.assert_close(module.propulsion_z["default"].grad.double(), zs[name].grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_base_model_and_merges_and_unmerges(layout, dtype):
    torch.manual_seed(0)
    base = Block(*LAYOUTS[layout]).to(dtype)
    before = copy.deepcopy(base)
    model = get_peft_model(base, PropulsionConfig(target_parameters=TARGETS))
    x = torch.randn(6, WIDTH).to(dtype)
    assert torch.equal(model(x), before(x))
    randomize(model)
    with torch.no_grad():
        for module in wrappers(model).values():
            module.propulsion_z["default"][0, 0] = 0
    expected = model(x)
    model.merge_adapter(safe_merge=True)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())
    merged = {n: p.clone() for n, p in model.named_parameters() if "experts" in n and "propulsion" not in n}
    model.unmerge_adapter()
    restored = dict(model.named_parameters())
    scaled = {"up", "down", "up_bias", "down_bias"}
    for name, p in merged.items():
        assert torch.equal(restored[name], before.get_parameter(f"experts.{name.rpartition('.')[2]}"))
        assert name.rpartition(".")[2] not in scaled or not torch.equal(restored[name], p)
    assert torch.equal(model(x), expected)
    exported = model.merge_and_unload()
    assert type(exported.experts) is Experts
    assert exported.state_dict().keys() == before.state_dict().keys()
    torch.testing.assert_close(exported(x), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_safe_merge_leaves_all_parameters_alone():
    model, x = adapted("as in gpt-oss")
    expected = model(x)
    z = wrappers(model)["down"].propulsion_z["default"]
    value = z[1, 1].item()
    z.data[1, 1] = torch.inf
    with pytest.raises(ValueError, match=r"into the down of .*experts.* gives NaN or infinite"):
        wrappers(model)["down"].merge(safe_merge=True)
    assert not any(m.merged for m in wrappers(model).values())
    z.data[1, 1] = value
    assert torch.equal(model(x), expected)


def test_state_dicts_name_each_wrapper_and_load_back(tmp_path):
    model, x = adapted("as in gpt-oss")
    expected = model(x)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {(n.count("base_layer"), *t.shape) for n, t in saved.items()} in (
        {(0, EXPERTS, WIDTH), (1, EXPERTS, INNER)},
        {(1, EXPERTS, WIDTH), (0, EXPERTS, INNER)},
    )
    for low_cpu_mem_usage in (False, True):
        torch.manual_seed(0)
        loaded = PeftModel.from_pretrained(
            Block(*LAYOUTS["as in gpt-oss"]), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_adapters_multiply_switch_and_go(layout):
    model, x = adapted(layout)
    first = model(x)
    model.add_adapter("other", PropulsionConfig(target_parameters=TARGETS, degree=2))
    randomize(model, "other", seed=2)
    assert torch.equal(model(x), first)
    a, b = z_scales(model), z_scales(model, "other", degree=2)
    model.base_model.set_adapter(["default", "other"])
    both = loop(model, x, {n: a[n] * b[n] for n in a})
    torch.testing.assert_close(model(x).double(), both, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(model(x).double(), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    model.set_adapter("other")
    torch.testing.assert_close(model(x).double(), loop(model, x, b), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(x).double(), loop(model, x, {}), rtol=1e-4, atol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("other")
    assert not [n for n, _ in model.named_parameters() if n.endswith("other")]
    assert torch.equal(model(x), first)


def test_adapters_on_different_parameters_of_one_module():
    model, x = adapted("plain", TARGETS[:1])
    model.add_adapter("other", PropulsionConfig(target_parameters=TARGETS[1:], degree=3))
    randomize(model, "other", seed=2)
    up = z_scales_of(model, "default")
    down = z_scales_of(model, "other")
    assert (set(up), set(down)) == ({"up"}, {"down"})
    torch.testing.assert_close(model(x).double(), loop(model, x, up), rtol=1e-5, atol=1e-5)
    model.set_adapter("other")
    torch.testing.assert_close(model(x).double(), loop(model, x, down), rtol=1e-5, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(x).double(), loop(model, x, up | down), rtol=1e-5, atol=1e-5)


def z_scales_of(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {n: m.propulsion_z[adapter].double() ** 3 for n, m in wrappers(model).items() if adapter in m.propulsion_z}


def test_combined_adapters_of_experts():
    model, x = adapted("as in gpt-oss")
    model.add_adapter("other", PropulsionConfig(target_parameters=TARGETS, degree=2))
    randomize(model, "other", seed=2)
    model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "sum", combination_type="linear")
    a, b = z_scales(model), z_scales(model, "other", degree=2)
    model.set_adapter("sum")
    expected = loop(model, x, {n: 1 + (a[n] - 1) + 0.5 * (b[n] - 1) for n in a})
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "max", "min", "l2"])
def test_several_vectors_for_each_expert(pooling):
    model, x = adapted("transposed", num_vectors=2, pooling=pooling)
    powers = {n: m.propulsion_z["default"].double() ** 3 for n, m in wrappers(model).items()}
    assert powers["up"].shape == (2, EXPERTS, INNER)
    pooled = {
        "mean": lambda p: p.mean(0),
        "max": lambda p: p.amax(0),
        "min": lambda p: p.amin(0),
        "l2": lambda p: p.square().mean(0).sqrt(),
    }[pooling]
    expected = loop(model, x, {n: pooled(p) for n, p in powers.items()})
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["experts.up_bias", "norm"], "norm has 1 dimensions, and target_parameters are for"),
        (["experts.up", "table"], "table has 4 dimensions, and target_parameters are for"),
        (["experts.up", "head.weight"], "head.weight has 2 dimensions, and target_parameters are for"),
        (["experts.up", "silent.up"], "silent.up belongs to a Module, which does not say where its outputs are"),
        (["experts.up", "eighth"], "eighth is a Parameter of torch.float8_e4m3fn, .*unquantized"),
    ],
)
def test_other_parameters_are_refused_and_the_model_stays(targets, message):
    block = Block(biased=True)
    block.norm = nn.Parameter(torch.ones(3))
    block.table = nn.Parameter(torch.ones(1, 2, 2, 2))
    block.silent = nn.Module()
    block.silent.up = nn.Parameter(torch.ones(2, 2, 2))
    block.eighth = nn.Parameter(torch.zeros(2, 2, 2).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=message) as error:
        get_peft_model(block, PropulsionConfig(target_parameters=targets))
    assert "\n" not in str(error.value)
    assert not wrappers(block)


def test_merged_experts_are_no_rows_of_the_base_model():
    model, x = adapted("plain")
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match=r"experts.* one batch for each adapter"):
        model(x, adapter_names=["__base__"] * len(x))


def test_the_representation_names_the_parameter():
    assert "parameter_name='down'" in repr(adapted("plain")[0])


# -- models of transformers -------------------------------------------------------------------------------------------

MOE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "head_dim": 8,
}
IDS = torch.tensor([[5, 6, 7, 8], [11, 3, 5, 30]])


def mixture(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**MOE)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5)
    return model


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("architecture", ["Mixtral", "GptOss"])
def test_every_implementation_of_experts_scales_outputs(architecture, implementation):
    model = get_peft_model(
        mixture(architecture),
        PropulsionConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], degree=3),
    ).eval()
    model.base_model.model.set_experts_implementation(implementation)
    randomize(model)
    expected = mixture(architecture).double()
    expected.set_experts_implementation("eager")
    experts = expected.model.layers[0].mlp.experts
    for name, scale in z_scales(model).items():
        weight = getattr(experts, name)
        assert scale.shape == (3, 64 if name == "gate_up_proj" else 16)
        weight.data *= scale[:, None, :] if architecture == "GptOss" else scale[:, :, None]
        if architecture == "GptOss":
            getattr(experts, f"{name}_bias").data *= scale
    with torch.no_grad():
        wanted = expected(IDS).logits
    actual = model(input_ids=IDS).logits
    torch.testing.assert_close(actual.double(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())
    actual.sum().backward()
    assert all(m.propulsion_z["default"].grad.abs().sum() > 0 for m in wrappers(model).values())
    merged = model.merge_and_unload()(IDS).logits
    torch.testing.assert_close(merged, actual, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


def test_llama_4_experts_are_scaled_by_output_channel():
    config = transformers.Llama4TextConfig(
        **MOE | {"intermediate_size_mlp": 32, "num_hidden_layers": 1, "interleave_moe_layer_step": 1}
    )
    model = get_peft_model(
        transformers.Llama4ForCausalLM(config), PropulsionConfig(target_parameters=["experts.gate_up_proj"])
    )
    assert wrappers(model)["gate_up_proj"].propulsion_z["default"].shape == (3, 64)
