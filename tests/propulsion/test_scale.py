"""The two pure functions against the formula written out in float64 as a product of k factors.

Gradients are compared with the naive formula's, and with finite differences. The limits of bfloat16 are checked on
every significand there is, so the numbers in the docstring are the true ones.
"""

from __future__ import annotations

import pytest
import torch

from peft_cpift.propulsion.scale import propulsion_scale, scale_output

# half a unit in the last place, relative to the value
EPS = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def naive_power(z: torch.Tensor, degree: int) -> torch.Tensor:
    z = z.double()
    return torch.stack([z] * degree).prod(0)


def all_bfloat16_significands() -> torch.Tensor:
    return (1 + torch.arange(128) / 128).to(torch.bfloat16)


@pytest.mark.parametrize("degree", [1, 2, 15, 55])
def test_power_matches_repeated_multiplication_in_float64(degree):
    z = torch.tensor([1.0, 0.98, 1.02, -1.01, 0.0, 0.5])
    scale = propulsion_scale(z, degree)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), naive_power(z, degree), rtol=1e-6, atol=0)
    assert scale[0] == 1


@pytest.mark.parametrize("dtype", EPS)
def test_product_is_rounded_once(dtype):
    torch.manual_seed(0)
    y = torch.randn(4, 5, 7).to(dtype)
    scale = propulsion_scale(torch.linspace(0.98, 1.02, 7), 15)
    out = scale_output(y, scale)
    assert (out.dtype, out.shape) == (dtype, y.shape)
    exact = y.double() * scale.double()
    # one rounding to the dtype, and for the half-precision ones a float32 rounding before it
    bound = EPS[dtype] + (0 if dtype in (torch.float32, torch.float64) else EPS[torch.float32])
    assert ((out.double() - exact).abs() <= bound * exact.abs() * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", EPS)
def test_scale_of_one_returns_the_same_bits(dtype):
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).tiny, 1.0, -3.0])
    y = torch.cat([special, torch.randn(1000)]).to(dtype)
    out = scale_output(y, propulsion_scale(torch.ones(len(y)), 15))
    assert y.view(torch.uint8).equal(out.view(torch.uint8))


def test_gradients_match_the_naive_formula_in_float64():
    torch.manual_seed(0)
    y = torch.randn(3, 4, 5, requires_grad=True)
    z = torch.linspace(-1.02, 1.02, 5).requires_grad_()  # the middle one is 0
    upstream = torch.randn(3, 4, 5)
    (scale_output(y, propulsion_scale(z, 15)) * upstream).sum().backward()

    y64, z64 = y.detach().double().requires_grad_(), z.detach().double().requires_grad_()
    (y64 * naive_power(z64, 15) * upstream).sum().backward()
    torch.testing.assert_close(z.grad.double(), z64.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y.grad.double(), y64.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("degree", [1, 15])
def test_gradcheck(degree):
    torch.manual_seed(0)
    y = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    z = torch.tensor([0.97, 1.0, 1.05], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, z: scale_output(y, propulsion_scale(z, degree)), (y, z))


def test_small_moves_of_a_trained_z_show_in_bfloat16():
    y = all_bfloat16_significands()
    before = scale_output(y, propulsion_scale(torch.full((128,), 1.01), 15))
    after = scale_output(y, propulsion_scale(torch.full((128,), 1.0101), 15))
    assert (before != after).float().mean() > 0.2


def test_from_one_a_bfloat16_output_changes_from_the_documented_move_on():
    y = all_bfloat16_significands()

    def changed(move: float) -> bool:
        return not torch.equal(y, scale_output(y, propulsion_scale(torch.full((128,), 1 + move), 15)))

    assert not changed(1.25e-4)  # z keeps it, the output's dtype cannot show it
    assert changed(1.35e-4)
    assert changed(2e-4)  # two steps of 1e-4 have added up
