"""The two pure functions against the formula written out in float64 as a product of k factors.

Gradients are compared with the naive formula's, and with finite differences, for each of the three ways in which the
one autograd function can keep what it needs. The limits of bfloat16 are checked on every significand there is, so the
numbers in the docstring are the true ones.
"""

from __future__ import annotations

import pytest
import torch

from peft_cpift.propulsion.scale import POOLINGS, propulsion_scale, scale_output

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


MODES = {
    "input": {"keep": "input"},
    "output": {"keep": "output"},
    "in place": {"keep": "output", "in_place": True},
}


def scaled(y: torch.Tensor, scale: torch.Tensor, mode: str) -> torch.Tensor:
    """Scale a fresh copy of `y`, as layers do with outputs that nobody else has."""
    return scale_output(y * 1, scale, **MODES[mode])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (0, 3)])
def test_every_mode_returns_the_same_bits(mode, shape):
    torch.manual_seed(0)
    y, scale = torch.randn(shape).bfloat16(), torch.tensor([0.5, -1.3, 0.0])
    assert scaled(y, scale, mode).equal((y.float() * scale).bfloat16())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("degree", [1, 2, 15])
@pytest.mark.parametrize("pooling", [None, *POOLINGS])
def test_gradients_pass_finite_differences(mode, degree, pooling):
    if (mode != "input" and degree == 1) or (pooling == "l2" and degree == 1):
        z = torch.tensor([0.97, 1.01, -1.05], dtype=torch.float64)
    else:
        z = torch.tensor([0.97, 0.0, -1.05], dtype=torch.float64)
    if pooling is not None:
        z = torch.stack([z, z * 1.01 - 0.003 * (z != 0)])  # no ties, but both are 0 together
        if pooling in ("max", "min", "l2") and degree > 1:
            z[:, 1] = torch.tensor([0.4, 0.3])  # at a common 0 the extremes tie and the root has a corner
    y = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def ours(y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return scaled(y, propulsion_scale(z, degree, pooling), mode)

    assert torch.autograd.gradcheck(ours, (y.requires_grad_(), z.requires_grad_()))


@pytest.mark.parametrize("mode", MODES)
def test_second_derivatives_pass_finite_differences(mode):
    y = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    z = torch.tensor([0.9, -1.1, 1.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda y, z: scaled(y, propulsion_scale(z, 3), mode), (y, z))


def both_gradients(mode, degree, z, y, consume) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the gradients of y and z by the package in float32, and by the naive formula in float64."""
    ours = [y.clone().requires_grad_(), z.clone().requires_grad_()]
    consume(scaled(ours[0], propulsion_scale(ours[1], degree), mode)).backward()
    naive = [y.double().requires_grad_(), z.double().requires_grad_()]
    consume(naive[0] * naive_power(naive[1], degree)).backward()
    return [t.grad.double() for t in ours], [t.grad for t in naive]


CONSUMERS = {
    "two consumers": lambda out: (out.sin() + out * out.roll(1, 0)).sum(),
    "a transposed gradient": lambda out: (out.transpose(0, 1).contiguous().flatten() ** 2).cumsum(0).sum(),
    "an expanded gradient": lambda out: out.sum(),
    "a gradient of one row": lambda out: out[1].pow(2).sum(),
    "itself scaled again": lambda out: (scale_output(out, torch.full((3,), 0.5), keep="output") * out).sum(),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("degree", [1, 2, 15])
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_gradients_are_right_whatever_comes_next(mode, degree, consumer):
    torch.manual_seed(0)
    y = torch.randn(4, 5, 3)
    z = torch.tensor([0.95, -1.02, 1.1 if mode != "input" and degree == 1 else 0.0])
    for actual, expected in zip(*both_gradients(mode, degree, z, y, CONSUMERS[consumer]), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("degree", [1, 2])
def test_a_kept_output_loses_the_gradient_at_zero_for_degree_one_only(degree):
    z = torch.tensor([0.0, 1.0], requires_grad=True)
    scaled(torch.tensor([[3.0, 4.0]]), propulsion_scale(z, degree), "in place").sum().backward()
    assert z.grad.tolist() == [0.0, 4.0 * degree]  # the naive formula gives 3 and 0 in the first place


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_gives_zero_gradients(mode):
    y, z = torch.zeros(0, 3, requires_grad=True), torch.ones(3, requires_grad=True)
    scaled(y, propulsion_scale(z, 15), mode).sum().backward()
    assert z.grad.tolist() == [0, 0, 0]
    assert y.grad.shape == (0, 3)


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_scale_passes_the_gradient_on(mode):
    y = torch.ones(2, 3, requires_grad=True)
    scaled(y, torch.tensor([2.0, 0.0, -1.0]), mode).sum().backward()
    assert y.grad.tolist() == [[2, 0, -1]] * 2


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_of_the_scale_is_summed_in_float32(mode):
    # 1001 is no number of bfloat16
    z = torch.ones(1, requires_grad=True)
    scaled(torch.ones(1001, 1, dtype=torch.bfloat16), propulsion_scale(z, 1), mode).sum().backward()
    assert z.grad.dtype == torch.float32
    assert z.grad.item() == 1001


@pytest.mark.parametrize("mode", MODES)
def test_one_tensor_of_the_size_of_the_output_is_kept(mode):
    kept: list[torch.Tensor] = []
    y, scale = torch.randn(6, 3), torch.full((3,), 1.5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = scale_output(y, scale, **MODES[mode])
    large = {t.data_ptr() for t in kept if t.numel() == y.numel()}
    assert large == {(y if mode == "input" else out).data_ptr()}
    assert (out.data_ptr() == y.data_ptr()) is (mode == "in place")


@pytest.mark.parametrize("mode", MODES)
def test_a_write_to_what_is_kept_is_noticed(mode):
    y, scale = torch.randn(6, 3), torch.full((3,), 1.5, requires_grad=True)
    out = scale_output(y, scale, **MODES[mode])
    with torch.no_grad():
        (y if mode == "input" else out).add_(1)
    by_name = (
        "modified by an inplace operation" if mode == "input" else "PropulsionScale is a view and .* modified inplace"
    )
    with pytest.raises(RuntimeError, match=by_name):
        out.sum().backward()


@pytest.mark.parametrize("mode", MODES)
def test_function_transforms_see_through(mode):
    torch.manual_seed(0)
    y, z, tangent = torch.randn(4, 3), torch.tensor([0.95, -1.02, 1.1]), torch.randn(3)

    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return scaled(y, propulsion_scale(z, 3), mode).sin().sum()

    def naive(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (y * z**3).sin().sum()

    torch.testing.assert_close(torch.func.grad(loss)(z, y), torch.func.grad(naive)(z, y))
    per_row = torch.func.vmap(torch.func.grad(loss), (None, 0))
    torch.testing.assert_close(per_row(z, y), torch.func.vmap(torch.func.grad(naive), (None, 0))(z, y))
    for ours, theirs in zip(
        torch.func.jvp(lambda z: loss(z, y), (z,), (tangent,)),
        torch.func.jvp(lambda z: naive(z, y), (z,), (tangent,)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z, tangent)
        primal, moved = torch.autograd.forward_ad.unpack_dual(loss(dual, y))
    expected = torch.func.jvp(lambda z: naive(z, y), (z,), (tangent,))
    torch.testing.assert_close((primal, moved), expected)
    torch.testing.assert_close(torch.func.hessian(loss)(z, y), torch.func.hessian(naive)(z, y))


def test_pooling_matches_its_definition_in_float64():
    torch.manual_seed(0)
    z = torch.empty(3, 5).uniform_(-1.1, 1.1)
    powers = naive_power(z, 4)
    expected = {
        "mean": powers.sum(0) / 3,
        "max": powers.max(0).values,
        "min": powers.min(0).values,
        "l2": ((powers**2).sum(0) / 3).sqrt(),
    }
    assert set(expected) == set(POOLINGS)
    for pooling, value in expected.items():
        torch.testing.assert_close(propulsion_scale(z, 4, pooling).double(), value, rtol=1e-6, atol=1e-9)
        assert (propulsion_scale(torch.ones(3, 5), 4, pooling) == 1).all()


@pytest.mark.parametrize("vectors", [2, 3, 5, 6, 7, 10])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_of_ones_is_exactly_one_with_equal_gradients(vectors, pooling):
    z = torch.ones(vectors, 4, requires_grad=True)
    scale = propulsion_scale(z, 15, pooling)
    assert (scale == 1).all()
    scale.sum().backward()
    torch.testing.assert_close(z.grad, torch.full((vectors, 4), 15 / vectors))


def test_float64_stays_float64():
    z = torch.tensor([1 + 1e-12], dtype=torch.float64)
    assert propulsion_scale(z, 2).item() == (1 + 1e-12) ** 2
    assert scale_output(torch.ones(1, dtype=torch.float64), z).item() == 1 + 1e-12


@pytest.mark.parametrize("mode", ["input", "output"])
def test_products_for_the_gradient_of_the_scale_are_not_rounded(mode):
    # 1.0078125**2 needs more bits than bfloat16 has, and one addend cannot hide that
    y = torch.full((1, 1), 1.0078125, dtype=torch.bfloat16)
    scale = torch.ones(1, requires_grad=True)
    scale_output(y, scale, keep=mode).backward(y)
    assert scale.grad.item() == 1.0078125**2


@pytest.mark.parametrize("mode", MODES)
def test_a_frozen_scale_keeps_nothing_of_the_output(mode):
    kept: list[torch.Tensor] = []
    linear = torch.nn.Linear(3, 3).requires_grad_(False)
    y = linear(torch.randn(6, 3, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scale_output(y, torch.full((3,), 1.5), **MODES[mode])
    assert [t.shape for t in kept] == [(3,)]
