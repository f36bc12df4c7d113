"""Single layers against the formula in float64, for each kind of base layer and dtype.

The reference never uses the package: it multiplies the base layer's output, computed in float64, k times by z.
Tolerances are those of the dtype. "Bit for bit" compares the bytes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_cpift.propulsion import Embedding, Linear, PropulsionConfig, PropulsionLayer

# relative to the largest output: the base layer's own rounding, and for a merged layer that of its weights
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}
DEGREE = 15


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def conv1d() -> nn.Module:
    layer = Conv1D(7, 5)
    nn.init.normal_(layer.bias)
    return layer


BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(5, 7),
    "linear_without_bias": lambda: nn.Linear(5, 7, bias=False),
    "square_linear": lambda: nn.Linear(5, 5),
    "conv1d": conv1d,
    "embedding": lambda: nn.Embedding(11, 7, padding_idx=0),
    "sparse_embedding": lambda: nn.Embedding(11, 7, sparse=True),
}


def make(kind: str, dtype: torch.dtype = torch.float32, **settings) -> tuple[PropulsionLayer, torch.Tensor]:
    """Return an adapted layer with a frozen base and a random z, and an input for it."""
    torch.manual_seed(0)
    base = BASES[kind]().to(dtype).requires_grad_(False)
    config = PropulsionConfig(target_modules=["x"], **({"init_weights": False, "degree": DEGREE} | settings))
    if isinstance(base, nn.Embedding):
        return Embedding(base, "default", config, "block.embed"), torch.tensor([[0, 3, 10], [3, 3, 1]])
    return Linear(base, "default", config, "block.linear"), torch.randn(2, 3, 5).to(dtype)


def reference(layer: PropulsionLayer, x: torch.Tensor, *zs: torch.Tensor) -> torch.Tensor:
    base = copy.deepcopy(layer.get_base_layer()).double()
    y = base(x if not x.is_floating_point() else x.double())
    for z in zs or (layer.propulsion_z["default"],):
        for _ in range(DEGREE):
            y = y * z.double()
    return y


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * expected.abs().max().item()
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BASES)
def test_forward_and_merged_forward_match_the_reference(kind, dtype):
    layer, x = make(kind, dtype)
    expected = reference(layer, x).detach()
    assert (expected - layer.base_layer(x)).abs().max() > 5 * TOLERANCE[dtype]  # the scale is far from 1
    assert_near(layer(x), expected, dtype)
    layer.merge()
    assert_near(layer(x), expected, dtype)
    assert_near(layer.base_layer(x), expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BASES)
def test_starts_as_the_base_layer_bit_for_bit(kind, dtype):
    layer, x = make(kind, dtype, init_weights=True)
    assert (layer.propulsion_z["default"] == 1).all()
    assert same_bits(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("kind", BASES)
def test_gradient_of_z_matches_the_reference(kind):
    layer, x = make(kind)
    z = layer.propulsion_z["default"]
    upstream = torch.randn(layer(x).shape)
    (layer(x) * upstream).sum().backward()
    z64 = z.detach().double().requires_grad_()
    (reference(layer, x, z64) * upstream).sum().backward()
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-5, atol=1e-6)


def test_gradient_flows_to_the_input():
    layer, x = make("linear")
    x.requires_grad_()
    layer(x).sum().backward()
    x64 = x.detach().double().requires_grad_()
    reference(layer, x64).sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BASES)
def test_unmerge_is_exact_even_where_z_is_zero(kind, dtype):
    layer, x = make(kind, dtype)
    with torch.no_grad():
        layer.propulsion_z["default"][:2] = 0
    before = {name: p.clone() for name, p in layer.base_layer.named_parameters()}
    output = layer(x)
    layer.merge()
    assert not same_bits(layer.base_layer.weight, before["weight"])
    assert (layer(x)[..., :2] == 0).all()
    layer.unmerge()
    assert all(same_bits(p, before[name]) for name, p in layer.base_layer.named_parameters())
    assert same_bits(layer(x), output)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_several_active_adapters_multiply(kind):
    layer, x = make(kind)
    layer.update_layer("other", PropulsionConfig(degree=DEGREE, init_weights=False))
    zs = [layer.propulsion_z[name].detach() for name in ("default", "other")]
    alone = reference(layer, x, zs[0])
    both = reference(layer, x, *zs)

    layer.set_adapter(["default", "other"])
    assert_near(layer(x), both, torch.float32)
    layer.set_adapter("default")
    assert_near(layer(x), alone, torch.float32)

    original = layer.base_layer.weight.clone()
    layer.merge()
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        layer.merge(adapter_names=["other"])  # on top: rounds once, from the original
    assert layer.merged_adapters == ["default", "other"]
    assert_near(layer(x), both, torch.float32)
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge(adapter_names=["default", "other"])
    assert_near(layer(x), both, torch.float32)
    layer.unmerge()
    assert same_bits(layer.base_layer.weight, original)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_merging_in_two_steps_rounds_once():
    twice, _ = make("linear", torch.bfloat16)
    twice.update_layer("other", PropulsionConfig(degree=DEGREE, init_weights=False))
    once = copy.deepcopy(twice)
    once.merge(adapter_names=["default", "other"])
    twice.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already following"):
        twice.merge(adapter_names=["other"])
    assert same_bits(once.base_layer.weight, twice.base_layer.weight)


def test_each_adapter_keeps_its_own_degree():
    layer, x = make("linear")
    layer.update_layer("square", PropulsionConfig(degree=2))
    with torch.no_grad():
        layer.propulsion_z["square"].fill_(3)
    layer.set_adapter("square")
    torch.testing.assert_close(layer(x), 9 * layer.base_layer(x))
    with pytest.warns(UserWarning, match="Adapter square was active"):
        layer.delete_adapter("square")
    assert list(layer.propulsion_z) == list(layer.degree) == ["default"]


def test_disabling_also_unmerges():
    layer, x = make("linear")
    base_output = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert same_bits(layer(x), base_output)
    assert not layer.merged


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_safe_merge_names_the_layer_and_leaves_it_alone(kind, bad):
    layer, _ = make(kind)
    with torch.no_grad():
        layer.propulsion_z["default"][1] = bad
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=f"weight of {layer.module_name} gives NaN or infinite"):
        layer.merge(safe_merge=True)
    assert same_bits(layer.base_layer.weight, before)
    assert not layer.merged


def test_safe_merge_sees_an_overflow_of_the_dtype():
    layer, _ = make("linear", torch.float16)
    with torch.no_grad():
        layer.propulsion_z["default"].fill_(4)  # 4**15 is fine in float32, not in float16
    with pytest.raises(ValueError, match="infinite"):
        layer.merge(safe_merge=True)


def test_safe_merge_looks_at_the_bias_too():
    layer, _ = make("linear")
    layer.base_layer.bias.data[0] = torch.inf
    with pytest.raises(ValueError, match=r"the bias of block\.linear"):
        layer.merge(safe_merge=True)


def test_safe_merge_merges_what_is_finite():
    layer, x = make("linear")
    expected = reference(layer, x).detach()
    layer.merge(safe_merge=True)
    assert_near(layer(x), expected, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_z_stays_float32_whatever_happens_to_the_model(dtype):
    layer, x = make("linear", dtype)
    z = layer.propulsion_z["default"]
    assert z.dtype == torch.float32
    layer(x).sum().backward()
    value, gradient = z.detach().clone(), z.grad.clone()
    for convert in (lambda m: m.to(dtype), lambda m: m.double(), lambda m: m.half()):
        convert(layer)
        z = layer.propulsion_z["default"]
        assert same_bits(z.detach(), value)
        assert same_bits(z.grad, gradient)
    assert layer.base_layer.weight.dtype == torch.float16
    layer._move_adapter_to_device_of_base_layer("default")
    assert same_bits(layer.propulsion_z["default"].detach(), value)


def test_a_move_of_1e_4_shows_in_a_bfloat16_layer():
    layer, x = make("linear", torch.bfloat16)
    z = layer.propulsion_z["default"]
    with torch.no_grad():
        z.fill_(1.01)
        before = layer(x)
        z.add_(1e-4)
        after = layer(x)
    assert (before != after).float().mean() > 0.1
    assert before.dtype == after.dtype == torch.bfloat16


def test_originals_follow_the_model_to_another_dtype():
    layer, _ = make("linear")
    original = layer.base_layer.weight.clone()
    layer.merge()
    layer.bfloat16()
    layer.unmerge()
    assert same_bits(layer.base_layer.weight, original.bfloat16())


def test_merging_on_top_follows_the_model_to_another_dtype():
    layer, _ = make("linear")
    layer.update_layer("other", PropulsionConfig(degree=DEGREE, init_weights=False))
    layer.merge()
    layer.bfloat16()
    with pytest.warns(UserWarning, match="Already following"):
        layer.merge(adapter_names=["other"])
    assert layer.base_layer.weight.dtype == layer.base_layer.bias.dtype == torch.bfloat16


def test_a_new_merge_starts_from_the_weights_of_now():
    layer, x = make("linear")
    layer.merge()
    layer.unmerge()
    layer.base_layer.weight.data = torch.randn(7, 5)
    expected = reference(layer, x).detach()
    layer.merge()
    assert_near(layer(x), expected, torch.float32)


def test_only_active_adapters_outside_inference_are_trainable():
    layer, _ = make("linear")
    layer.update_layer("other", PropulsionConfig())
    assert [z.requires_grad for z in layer.propulsion_z.values()] == [True, False]
    layer, _ = make("linear", inference_mode=True)
    assert not layer.propulsion_z["default"].requires_grad


def test_originals_stay_out_of_the_state_dict():
    layer, _ = make("linear")
    names = set(layer.state_dict())
    layer.merge()
    assert set(layer.state_dict()) == names == {"base_layer.weight", "base_layer.bias", "propulsion_z.default"}


def test_max_norm_runs_but_does_not_merge():
    torch.manual_seed(0)
    base = nn.Embedding(11, 7, max_norm=1.0)
    layer = Embedding(base, "default", PropulsionConfig(init_weights=False), "embed")
    x = torch.tensor([1, 2])
    torch.testing.assert_close(layer(x), base(x) * layer.propulsion_z["default"] ** 15)
    with pytest.raises(ValueError, match="embed cannot be merged, because its max_norm"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize(("kind", "value"), [("linear", True), ("conv1d", False)])
def test_a_wrong_fan_in_fan_out_is_corrected_with_a_warning(kind, value):
    with pytest.warns(UserWarning, match=r"contradicts the class of block\.linear"):
        layer, x = make(kind, fan_in_fan_out=value)
    layer.merge()
    torch.testing.assert_close(layer(x).double(), layer.base_layer.double()(x.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_fan_in_fan_out_needs_no_setting(kind, recwarn):
    make(kind)
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
