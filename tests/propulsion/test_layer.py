"""Single layers against the formula in float64, for each kind of base layer and dtype.

The reference never uses the package: it multiplies the base layer's output, computed in float64, k times by z.
Tolerances are those of the dtype. "Bit for bit" compares the bytes. Where a layer may write into its base layer's
output, and where it must not, is seen from the address of the memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_cpift.propulsion import Embedding, Linear, PropulsionConfig, PropulsionLayer
from peft_cpift.propulsion import layer as layer_module
from peft_cpift.propulsion.layer import Conv

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
    "convolution_1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1),
    "convolution_2d_in_groups": lambda: nn.Conv2d(6, 9, (3, 1), groups=3, bias=False, padding_mode="circular"),
    "convolution_3d_by_channel": lambda: nn.Conv3d(6, 6, 2, groups=6),
}


def make(kind: str, dtype: torch.dtype = torch.float32, **settings) -> tuple[PropulsionLayer, torch.Tensor]:
    """Return an adapted layer with a frozen base and a random z, and an input for it."""
    torch.manual_seed(0)
    base = BASES[kind]().to(dtype).requires_grad_(False)
    config = PropulsionConfig(target_modules=["x"], **({"init_weights": False, "degree": DEGREE} | settings))
    if isinstance(base, nn.Embedding):
        return Embedding(base, "default", config, "block.embed"), torch.tensor([[0, 3, 10], [3, 3, 1]])
    if isinstance(base, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return Conv(base, "default", config, "block.conv"), torch.randn(2, 6, *[4] * (base.weight.ndim - 2)).to(dtype)
    return Linear(base, "default", config, "block.linear"), torch.randn(2, 3, 5).to(dtype)


def by_channel(values: torch.Tensor, layer: PropulsionLayer) -> torch.Tensor:
    """Shape one value for each output channel to broadcast against outputs."""
    return values.view(-1, *[1] * (layer.base_layer.weight.ndim - 2)) if isinstance(layer, Conv) else values


def reference(layer: PropulsionLayer, x: torch.Tensor, *zs: torch.Tensor) -> torch.Tensor:
    base = copy.deepcopy(layer.get_base_layer()).double()
    y = base(x if not x.is_floating_point() else x.double())
    for z in zs or (layer.propulsion_z["default"],):
        for _ in range(DEGREE):
            y = y * by_channel(z.double(), layer)
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
    assert (layer(x) == 0).sum() >= 2 * layer(x).numel() // layer.out_features
    layer.unmerge()
    assert all(same_bits(p, before[name]) for name, p in layer.base_layer.named_parameters())
    assert same_bits(layer(x), output)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "convolution_1d"])
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


# -- memory: where the output is written ------------------------------------------------------------------------------


def first_output(layer: PropulsionLayer) -> list[int]:
    """Record the address of what the base layer returns, without a hook that the layer would notice."""
    addresses: list[int] = []
    original = type(layer.base_layer).forward

    class Watched(type(layer.base_layer)):
        def forward(self, *args):
            y = original(self, *args)
            addresses.append(y.data_ptr())
            return y

    layer.base_layer.__class__ = Watched
    return addresses


@pytest.fixture
def fresh(monkeypatch) -> Callable[[PropulsionLayer], list[int]]:
    """Return a function that records the addresses of outputs of a layer whose class still counts as known."""

    def watch(layer: PropulsionLayer) -> list[int]:
        addresses = first_output(layer)
        known = frozenset((*layer_module._WITH_FRESH_OUTPUT, type(layer.base_layer)))
        monkeypatch.setattr(layer_module, "_WITH_FRESH_OUTPUT", known)
        return addresses

    return watch


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("gradients", [True, False])
def test_a_fresh_output_is_scaled_where_it_is(kind, gradients, fresh):
    layer, x = make(kind)
    expected = reference(layer, x)
    addresses = fresh(layer)
    with torch.set_grad_enabled(gradients):
        output = layer(x)
    assert [output.data_ptr()] == addresses
    assert_near(output.detach(), expected.detach(), torch.float32)


@pytest.mark.parametrize(("kind", "settings"), [("linear", {"degree": 1}), ("convolution_1d", {})])
def test_what_the_backward_pass_needs_is_not_written_to(kind, settings, fresh):
    layer, x = make(kind, **settings)
    addresses = fresh(layer)
    assert layer(x).data_ptr() not in addresses


@pytest.mark.parametrize("gradients", [True, False])
def test_rows_of_different_adapters_are_scaled_in_place_without_gradients_only(gradients, fresh):
    layer, x = make("linear")
    addresses = fresh(layer)
    with torch.set_grad_enabled(gradients):
        output = layer(x, row_scales=layer.row_scales(["default", "__base__"]))
    assert (output.data_ptr() in addresses) is not gradients
    assert_near(output[0].detach(), reference(layer, x)[0].detach(), torch.float32)
    assert same_bits(output[1].detach(), layer.base_layer(x)[1])


@pytest.mark.parametrize("gradients", [True, False])
def test_an_embedding_of_one_row_becomes_one_for_each_adapter(gradients):
    layer, x = make("embedding")
    with torch.set_grad_enabled(gradients):
        output = layer(x[:1], row_scales=layer.row_scales(["default", "__base__", "default"]))
    expected = reference(layer, x[:1])[0].detach()
    assert_near(output[[0, 2]].detach(), torch.stack([expected, expected]), torch.float32)
    assert same_bits(output[1].detach(), layer.base_layer(x[:1])[0])


def test_one_row_of_another_layer_may_be_one_token_and_is_refused():
    layer, x = make("linear")
    with pytest.raises(ValueError, match=r"block\.linear has 1 rows and not one for each of the 3 adapter_names"):
        layer(x[:1], row_scales=layer.row_scales(["default", "__base__", "default"]))


def keep_in_hook(base: nn.Module, kept: list) -> None:
    base.register_forward_hook(lambda m, args, y: kept.append(y))


def keep_in_patched_forward(base: nn.Module, kept: list) -> None:
    original = base.forward
    base.forward = lambda x: kept.append(original(x)) or kept[-1]


def keep_in_subclass(base: nn.Module, kept: list) -> None:
    class Keeps(nn.Linear):
        def forward(self, x):
            kept.append(super().forward(x))
            return kept[-1]

    base.__class__ = Keeps


def keep_in_backward_hook(base: nn.Module, kept: list) -> None:
    base.register_full_backward_hook(lambda m, grads_in, grads_out: kept.append(grads_out[0]))


def keep_in_backward_pre_hook(base: nn.Module, kept: list) -> None:
    base.register_full_backward_pre_hook(lambda m, grads_out: kept.append(grads_out[0]))


@pytest.mark.parametrize("keep", [keep_in_hook, keep_in_patched_forward, keep_in_subclass])
@pytest.mark.parametrize("gradients", [True, False])
def test_an_output_that_somebody_else_has_is_not_written_to(keep, gradients):
    layer, x = make("linear")
    expected = layer.base_layer(x)
    kept: list[torch.Tensor] = []
    keep(layer.base_layer, kept)
    with torch.set_grad_enabled(gradients):
        output = layer(x)
    assert same_bits(kept[0].detach(), expected)
    assert_near(output.detach(), reference(make("linear")[0], x).detach(), torch.float32)


def test_a_global_hook_gets_the_unscaled_output():
    layer, x = make("linear")
    expected, kept = layer.base_layer(x), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: kept.append(y) if m is layer.base_layer else None
    )
    try:
        layer(x)
    finally:
        handle.remove()
    assert same_bits(kept[0].detach(), expected)


@pytest.mark.parametrize("keep", [keep_in_backward_hook, keep_in_backward_pre_hook])
def test_backward_hooks_get_the_gradient_of_the_unscaled_output(keep):
    layer, x = make("linear")
    kept: list[torch.Tensor] = []
    keep(layer.base_layer, kept)
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(kept[0], (layer.propulsion_z["default"] ** DEGREE).detach().expand(2, 3, 7))


def test_a_parametrized_layer_works():
    layer, x = make("linear")

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    torch.nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Doubled())
    assert not layer._output_is_fresh()
    y = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), y * layer.propulsion_z["default"] ** DEGREE)


# -- what comes next --------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "adds": lambda out: out.add_(1),
    "adds to a view": lambda out: out.view(-1, out.shape[-1])[0].add_(1) is None or out,
    "rectifies": nn.ReLU(inplace=True),
    "drops": lambda out: nn.functional.dropout(out, 0.5, inplace=True),
}


def z_gradient(layer: PropulsionLayer, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    layer.zero_grad()
    torch.manual_seed(0)
    run().sin().sum().backward()
    return layer.propulsion_z["default"].grad.clone()


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("kind", ["linear", "convolution_1d"])
@pytest.mark.parametrize("degree", [1, DEGREE])
def test_a_consumer_that_writes_to_the_output_gets_the_right_gradient_or_an_error(kind, degree, writer):
    layer, x = make(kind, degree=degree)
    write = WRITERS[writer]
    expected = z_gradient(layer, lambda: write(layer(x).clone()))
    if layer.keep_output and degree > 1:
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            z_gradient(layer, lambda: write(layer(x)))
        layer.keep_output = False
    torch.testing.assert_close(z_gradient(layer, lambda: write(layer(x))), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_recomputed_outputs_that_are_written_to_do_not_give_a_wrong_gradient(writer, reentrant):
    layer, x = make("linear")
    x.requires_grad_()

    def block(x: torch.Tensor) -> torch.Tensor:
        return WRITERS[writer](layer(x)).exp()

    expected = z_gradient(layer, lambda: WRITERS[writer](layer(x).clone()).exp())
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        z_gradient(layer, lambda: checkpoint(block, x, use_reentrant=reentrant))
    layer.keep_output = False
    torch.testing.assert_close(z_gradient(layer, lambda: checkpoint(block, x, use_reentrant=reentrant)), expected)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("degree", [1, 2, DEGREE])
def test_a_layer_used_twice_in_one_graph_sums_its_gradients(kind, degree):
    layer, x = make(kind, degree=degree)
    other = x.flip(0)
    z = layer.propulsion_z["default"]
    a, b = layer(x), layer(other)
    (a * b.sin() + a).sum().backward()
    with torch.no_grad():
        y, w = layer.base_layer(x).double(), layer.base_layer(other).double()
    z64 = z.detach().double().requires_grad_()
    scale = by_channel(z64, layer) ** degree
    (y * scale * (w * scale).sin() + y * scale).sum().backward()
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_the_gradient_at_zero_is_that_of_the_formula(kind):
    for degree in (1, 2):
        layer, x = make(kind, degree=degree)
        z = layer.propulsion_z["default"]
        with torch.no_grad():
            z[0] = 0
        layer(x).sum().backward()
        y = layer.base_layer(x).transpose(1 if isinstance(layer, Conv) else -1, 0)[0].sum()
        torch.testing.assert_close(z.grad[0], y if degree == 1 else torch.tensor(0.0))
        layer.zero_grad()


def test_a_second_adapter_of_degree_one_keeps_the_gradient_at_zero():
    layer, x = make("linear")
    layer.update_layer("plain", PropulsionConfig(degree=1))
    layer.set_adapter(["default", "plain"])
    with torch.no_grad():
        layer.propulsion_z["plain"][0] = 0
    layer(x).sum().backward()
    y = layer.base_layer(x)[..., 0].sum() * layer.propulsion_z["default"][0] ** DEGREE
    torch.testing.assert_close(layer.propulsion_z["plain"].grad[0], y)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_only_the_output_is_kept_for_the_backward_pass(kind):
    layer, x = make(kind)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = layer(x)
    assert {t.data_ptr() for t in kept if t.numel() >= output.numel()} == {output.data_ptr()}


def test_inference_mode_works():
    layer, x = make("linear")
    with torch.inference_mode():
        output = layer(x)
    assert_near(output.clone(), reference(layer, x).detach(), torch.float32)


def test_an_exported_program_computes_the_same():
    layer, x = make("linear")
    exported = torch.export.export(layer.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def test_random_starts_lie_in_the_documented_interval():
    layer, _ = make("linear")
    layer.reset_propulsion_parameters("default", init_weights=False)
    z = layer.propulsion_z["default"]
    assert 0.98 <= z.min() < z.max() <= 1.02
    layer.reset_propulsion_parameters("default")
    assert (z == 1).all()


def test_the_representation_names_the_method():
    assert repr(make("linear")[0]).startswith("propulsion.Linear(")


@pytest.mark.parametrize(("kind", "supported"), [("linear", False), ("linear_without_bias", True)])
def test_the_change_of_the_weight_is_what_merging_adds(kind, supported):
    layer, _ = make(kind)
    assert layer.supports_lora_conversion() is supported
    assert not layer.supports_lora_conversion("missing")
    delta = layer.get_delta_weight("default")
    before = layer.base_layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(before + delta, layer.base_layer.weight)


def test_the_change_of_a_transposed_weight_is_transposed():
    layer, _ = make("conv1d")
    before = layer.base_layer.weight.clone()
    delta = layer.get_delta_weight("default")
    layer.merge()
    torch.testing.assert_close(before + delta, layer.base_layer.weight)
