"""Strategy: the formula in plain Python floats, plus the geometry that it must have whatever the formula.

Pairs are built with a chosen angle between them, so that both sides of the threshold for linear interpolation are met
on purpose, and not by the luck of random numbers.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift import slerp

DTYPES = (torch.float32, torch.float64)
OMEGAS = (0.0, 0.1, 0.25, 0.5, 2 / 3, 0.9, 1.0)


def reference(a: list[float], b: list[float], omega: float, linear_above: float) -> tuple[list[float], float, bool]:
    length_a, length_b = math.sqrt(math.fsum(x * x for x in a)), math.sqrt(math.fsum(x * x for x in b))
    linear = [(1 - omega) * x + omega * y for x, y in zip(a, b, strict=True)]
    if length_a == 0 or length_b == 0:
        return linear, math.nan, True
    cosine = math.fsum(x * y for x, y in zip(a, b, strict=True)) / (length_a * length_b)
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if abs(cosine) > linear_above:
        return linear, angle, True
    left, right = math.sin((1 - omega) * angle) / math.sin(angle), math.sin(omega * angle) / math.sin(angle)
    return [left * x + right * y for x, y in zip(a, b, strict=True)], angle, False


def pair_at(angle: float, dtype: torch.dtype, size: int = 40, lengths: tuple[float, float] = (3.0, 0.5)):
    """Two random vectors of the given lengths and angle between them."""
    generator = torch.Generator().manual_seed(size)
    first, other = torch.randn(2, size, dtype=torch.float64, generator=generator)
    first = first / first.norm()
    other = other - other.dot(first) * first
    second = math.cos(angle) * first + math.sin(angle) * other / other.norm()
    return (first * lengths[0]).to(dtype), (second * lengths[1]).to(dtype)


@pytest.mark.parametrize("omega", OMEGAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.03, 0.0318, 0.1, 0.7, math.pi / 2, 2.5, 3.10, 3.13, math.pi])
def test_equals_the_formula(angle, dtype, omega):
    a, b = pair_at(angle, dtype)
    result, got_angle, linear = slerp(a, b, omega)
    expected, expected_angle, expected_linear = reference(a.tolist(), b.tolist(), omega, 0.9995)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    assert result.dtype == dtype
    assert result.tolist() == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert got_angle == pytest.approx(expected_angle, abs=1e-7)
    assert linear is expected_linear
    # acos(0.9995) is 0.03162.
    assert linear is (angle < 0.0317 or angle > math.pi - 0.0316)


def test_by_hand():
    result, angle, linear = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0]), 1 / 3)
    # At a right angle: sin(60 deg) of the one and sin(30 deg) of the other.
    assert result.tolist() == pytest.approx([2 * math.sqrt(0.75), 4 * 0.5])
    assert angle == pytest.approx(math.pi / 2)
    assert linear is False


@pytest.mark.parametrize("omega", OMEGAS)
def test_equal_lengths_stay_on_the_sphere_and_share_the_angle(omega):
    a, b = pair_at(1.2, torch.float64, lengths=(2.0, 2.0))
    result = slerp(a, b, omega).result
    assert result.norm().item() == pytest.approx(2.0)
    assert math.acos(min(1.0, result.dot(a).item() / 4)) == pytest.approx(omega * 1.2, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle", [0.0, 0.01, 1.0, 2.0, math.pi])
def test_the_ends_are_exact(angle, dtype):
    a, b = pair_at(angle, dtype)
    assert torch.equal(slerp(a, b, 0.0).result, a)
    assert torch.equal(slerp(a, b, 1.0).result, b)


@given(
    values=st.lists(st.tuples(*[st.floats(-10, 10, width=32)] * 2), min_size=1, max_size=6),
    omega=st.floats(0, 1),
    linear_above=st.sampled_from([0.0, 0.5, 0.9995]),
)
@settings(max_examples=150, deadline=None, database=None)
def test_any_small_vectors(values, omega, linear_above):
    a, b = ([pair[side] for pair in values] for side in (0, 1))
    result, angle, linear = slerp(
        torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), omega, linear_above=linear_above
    )
    assert bool(torch.isfinite(result).all())
    expected, expected_angle, expected_linear = reference(a, b, omega, linear_above)
    if not math.isnan(expected_angle) and abs(abs(math.cos(expected_angle)) - linear_above) < 1e-9:
        return  # on the border, where one rounding decides
    if min(map(abs, (*a, *b))) < 1e-150 and math.isnan(angle):
        return  # squares below the smallest float count as zero
    assert linear is expected_linear
    assert result.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert (angle == pytest.approx(expected_angle, abs=1e-6)) or (math.isnan(angle) and math.isnan(expected_angle))


@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_a_zero_vector_is_interpolated_linearly(which):
    a = torch.zeros(3) if which != "b" else torch.tensor([1.0, -2.0, 4.0])
    b = torch.zeros(3) if which != "a" else torch.tensor([1.0, -2.0, 4.0])
    result, angle, linear = slerp(a, b, 0.25)
    factor = {"a": 0.25, "b": 0.75, "both": 0.0}[which]
    assert result.tolist() == [factor * 1.0, factor * -2.0, factor * 4.0]
    assert math.isnan(angle)
    assert linear is True


def test_an_antiparallel_pair_is_interpolated_linearly():
    a = torch.tensor([1.0, -2.0, 3.0])
    result, angle, linear = slerp(a, -2 * a, 0.25)
    assert result.tolist() == pytest.approx([0.25, -0.5, 0.75])
    assert angle == pytest.approx(math.pi)
    assert linear is True


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("omega", [0.0, 0.3, 0.5, 1.0])
def test_parallel_pairs_under_the_highest_threshold(sign, omega, size):
    """No cosine exceeds 1, so 1 asks for the sphere wherever there is one; a line has none and must not fail."""
    a = torch.linspace(1.0, 2.0, size, dtype=torch.float64)
    result = slerp(a, sign * a, omega, linear_above=1.0).result
    assert result.tolist() == pytest.approx([(1 - omega + sign * omega) * x for x in a.tolist()], abs=1e-12)


def test_the_threshold_can_be_moved():
    a, b = pair_at(0.02, torch.float64)
    assert slerp(a, b, 0.5).linear is True
    assert slerp(a, b, 0.5, linear_above=1.0).linear is False
    a, b = pair_at(1.0, torch.float64)
    assert slerp(a, b, 0.5).linear is False
    assert slerp(a, b, 0.5, linear_above=0.5).linear is True
    a, b = pair_at(math.pi - 1.0, torch.float64)
    assert slerp(a, b, 0.5, linear_above=0.5).linear is True


def test_a_matrix_is_one_vector():
    a, b = pair_at(1.0, torch.float64)
    flat = slerp(a, b, 0.4)
    square = slerp(a.reshape(5, 8), b.reshape(5, 8), 0.4)
    assert torch.equal(square.result, flat.result.reshape(5, 8))
    assert square[1:] == flat[1:]
    turned = slerp(a.reshape(5, 8).T, b.reshape(5, 8).T, 0.4)
    assert turned.result.T.reshape(-1).tolist() == pytest.approx(flat.result.tolist(), rel=1e-12)


def test_inner_products_are_formed_in_float64():
    """Squares of these overflow, and squares of those vanish, in float32."""
    for scale in (1e30, 1e-30):
        a, b = torch.tensor([scale, 0.0]), torch.tensor([scale, scale])
        result, angle, linear = slerp(a, b, 0.5)
        assert angle == pytest.approx(math.pi / 4)
        assert linear is False
        assert result.tolist() == pytest.approx(reference(a.tolist(), b.tolist(), 0.5, 0.9995)[0], rel=1e-6)


def test_inputs_are_left_alone():
    for angle in (0.0, 1.0):
        a, b = pair_at(angle, torch.float32)
        before = a.clone(), b.clone()
        slerp(a, b, 0.5)
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])
