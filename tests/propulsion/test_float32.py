"""Parameters that stay float32, whatever casts a model goes through.

Each way in which models and trainers cast is tried on a value that bfloat16 and float16 would round; "untouched" means
equal bits and the same object, since an optimizer holds on to it.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from peft_cpift.propulsion.float32 import Float32Parameter, Float32ParameterDict

VALUES = torch.tensor([1.0001, 0.98765, -1e-9, 3.14159])  # none of them is a number of half precision
HALVES = [torch.bfloat16, torch.float16]


class Net(nn.Module):
    def __init__(self, requires_grad: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.z = Float32ParameterDict({"a": Float32Parameter(VALUES.clone(), requires_grad)})


CASTS: dict[str, Callable[[nn.Module], object]] = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to float16": lambda m: m.half(),
    "to float64": lambda m: m.double(),
    "to float32": lambda m: m.float(),
    "there and back": lambda m: m.bfloat16().half().double().bfloat16().float(),
    "by data": lambda m: [setattr(p, "data", p.data.to(torch.bfloat16)) for p in m.parameters()],
    "by data, twice": lambda m: [setattr(p, "data", p.data.bfloat16().half()) for p in m.parameters()],
    "moved and cast": lambda m: m.to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_leaves_it_untouched(cast):
    net = Net()
    z = net.z["a"]
    CASTS[cast](net)
    if cast == "by data, twice":  # the rounding of a rounding need not be the rounding of the value itself
        torch.testing.assert_close(net.z["a"].detach(), VALUES, rtol=1e-2, atol=1e-7)
    else:
        assert torch.equal(net.z["a"], VALUES)
    assert net.z["a"] is z
    assert z.dtype == torch.float32
    assert net.linear.weight.dtype == {"to float64": torch.float64, "to float16": torch.float16}.get(
        cast, net.linear.weight.dtype
    )


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_gradients_are_cast_neither(dtype):
    net = Net()
    (net.z["a"] * VALUES).sum().backward()
    z, gradient = net.z["a"], VALUES.clone()
    net.to(dtype)
    assert net.z["a"].grad.dtype == torch.float32
    assert torch.equal(net.z["a"].grad, gradient)
    assert net.z["a"] is z
    (net.z["a"] * VALUES).sum().backward()
    assert torch.equal(z.grad, 2 * gradient)


def test_an_optimizer_goes_on_after_a_cast():
    net = Net()
    optimizer = torch.optim.AdamW(net.z.parameters(), lr=1e-4, weight_decay=0)
    for _ in range(2):
        net.bfloat16()
        optimizer.zero_grad()
        net.z["a"].sum().backward()
        optimizer.step()
    torch.testing.assert_close(net.z["a"].detach(), VALUES - 2e-4, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
def test_another_value_is_taken_over_in_float32(dtype):
    z = Float32Parameter(VALUES.clone())
    z.data = (VALUES + 1).to(dtype)
    assert z.dtype == torch.float32
    assert torch.equal(z, (VALUES + 1).to(dtype).float())
    z.data = torch.ones(2, 3, dtype=dtype)
    assert torch.equal(z, torch.ones(2, 3))
    z.data = VALUES
    assert torch.equal(z, VALUES)


def test_one_entry_that_differs_makes_it_another_value():
    z = Float32Parameter(VALUES.clone())
    value = VALUES.bfloat16()
    value[2] = 5
    z.data = value
    assert torch.equal(z, value.float())


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_keep_class_and_values(duplicate, requires_grad):
    z = Float32Parameter(VALUES.clone(), requires_grad)
    twin = duplicate(z)
    assert type(twin) is Float32Parameter
    assert torch.equal(twin, z)
    assert twin.requires_grad is requires_grad
    module = duplicate(Net(requires_grad))
    assert type(module.z["a"]) is Float32Parameter
    assert type(module.z) is Float32ParameterDict
    assert torch.equal(module.bfloat16().z["a"], VALUES)


def test_torch_saves_and_loads_it(tmp_path):
    torch.save(Net(), tmp_path / "net.pt")
    net = torch.load(tmp_path / "net.pt", weights_only=False)
    assert type(net.z["a"]) is Float32Parameter
    assert torch.equal(net.z["a"], VALUES)
    torch.save(Net().state_dict(), tmp_path / "state.pt")
    assert torch.equal(torch.load(tmp_path / "state.pt")["z.a"], VALUES)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_is_loaded_into_float32(assign, dtype):
    net = Net()
    state = {n: t.to(dtype) + 1 for n, t in net.state_dict().items()}
    net.load_state_dict(state, assign=assign)
    assert type(net.z["a"]) is Float32Parameter
    assert net.z["a"].dtype == torch.float32
    assert torch.equal(net.z["a"], state["z.a"].float())
    assert torch.equal(net.bfloat16().z["a"], state["z.a"].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_plain_parameter_put_into_the_dictionary_becomes_one_and_stays_the_same_object(dtype):
    net, plain = Net(), nn.Parameter(VALUES.to(dtype))
    net.z["b"] = plain
    assert net.z["b"] is plain
    assert type(plain) is Float32Parameter
    assert plain.dtype == torch.float32
    assert torch.equal(plain, VALUES.to(dtype).float())


def test_plain_tensors_in_other_places_stay_what_they_are():
    net = Net().bfloat16()
    assert type(net.linear.weight) is nn.Parameter
    assert net.linear.weight.dtype == torch.bfloat16


def test_meta_parameters_are_materialized_in_float32():
    net = Net().to("meta")
    assert net.z["a"].is_meta
    net.bfloat16().to_empty(device="cpu")
    assert net.z["a"].dtype == torch.float32
    net.load_state_dict(Net().state_dict())
    assert torch.equal(net.bfloat16().z["a"], VALUES)


@pytest.mark.parametrize("setting", ["overwrite_module_params_on_conversion", "swap_module_params_on_conversion"])
def test_casts_that_put_new_parameters_in_place_leave_the_values_untouched(setting):
    getattr(torch.__future__, f"set_{setting}")(True)
    try:
        net = Net().bfloat16()
    finally:
        getattr(torch.__future__, f"set_{setting}")(False)
    assert net.linear.weight.dtype == torch.bfloat16
    assert torch.equal(net.z["a"], VALUES)
    assert torch.equal(net.half().z["a"], VALUES)


def test_a_parameter_without_values_keeps_its_dtype_too():
    z = Float32Parameter(torch.ones(3, device="meta"))
    z.data = z.data.to(torch.bfloat16)
    assert z.is_meta
    assert z.dtype == torch.float32


def test_it_is_a_parameter_to_everyone():
    z = Float32Parameter(VALUES.clone())
    assert isinstance(z, nn.Parameter)
    assert type(z + 1) is torch.Tensor
    assert type(z.data) is torch.Tensor
    assert not z.data.requires_grad
    assert z.data.data_ptr() == z.data_ptr()
    z.data.mul_(2)
    assert torch.equal(z, VALUES * 2)
