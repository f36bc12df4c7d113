"""Strategy: the formula vector by vector in NumPy, plus the geometry that it must have whatever the formula.

Pairs are built with a chosen angle between them, so that both sides of the threshold for linear interpolation are met
on purpose, and not by the luck of random numbers. Chains of many vectors are folded from their inner products alone,
and compared with the reference, which forms every running result: at ordinary angles, nearly parallel, opposite, and
where a running result cancels, exactly or up to the rounding of its terms.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cpift import slerp
from peft_cpift.fusion.slerp import combine, fold, inner_products

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OMEGAS = (0.0, 0.1, 0.25, 0.5, 2 / 3, 0.9, 1.0)
ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-13, torch.bfloat16: 2**-7.99}


def pair_at(angle: float, dtype: torch.dtype, size: int = 40, lengths: tuple[float, float] = (3.0, 0.5)):
    """Two random vectors of the given lengths and angle between them."""
    generator = torch.Generator().manual_seed(size)
    first, other = torch.randn(2, size, dtype=torch.float64, generator=generator)
    first = first / first.norm()
    other = other - other.dot(first) * first
    second = math.cos(angle) * first + math.sin(angle) * other / other.norm()
    return (first * lengths[0]).to(dtype), (second * lengths[1]).to(dtype)


# Two


@pytest.mark.parametrize("omega", OMEGAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("angle", [0.0, 1e-3, 0.03, 0.0314, 0.0318, 0.1, 0.7, math.pi / 2, 2.5, 3.10, 3.13, math.pi])
def test_equals_the_formula(interpolate_reference, angle, dtype, omega):
    a, b = pair_at(angle, dtype)
    result, got_angle, linear = slerp(a, b, omega)
    expected, expected_angle, expected_linear = interpolate_reference(
        a.double().numpy(), b.double().numpy(), omega, 0.9995
    )
    assert result.dtype == dtype
    assert result.tolist() == pytest.approx(expected.tolist(), rel=ROUNDING[dtype], abs=1e-15)
    assert got_angle == pytest.approx(expected_angle, abs=5e-8)
    assert linear is expected_linear
    if dtype != torch.bfloat16:  # which turns vectors by more than their distance from acos(0.9995) = 0.03162
        assert linear is (angle < 0.0316 or angle > math.pi - 0.0316)


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
def test_any_small_vectors(interpolate_reference, values, omega, linear_above):
    a, b = ([pair[side] for pair in values] for side in (0, 1))
    result, angle, linear = slerp(
        torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), omega, linear_above=linear_above
    )
    assert bool(torch.isfinite(result).all())
    if any(0 < abs(value) < 1e-12 for value in (*a, *b)):
        return  # angles to vectors whose squares are near the smallest floats are the package's own choice
    expected, expected_angle, _ = interpolate_reference(a, b, omega, -1.0)  # the angle alone
    if expected_angle is None or abs(abs(math.cos(expected_angle)) - linear_above) > 1e-9:
        expected, expected_angle, expected_linear = interpolate_reference(a, b, omega, linear_above)
        assert linear is expected_linear
        assert result.tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)
    assert math.isnan(angle) if expected_angle is None else angle == pytest.approx(expected_angle, abs=1e-6)


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
    result, _, linear = slerp(a, sign * a, omega, linear_above=1.0)
    assert result.tolist() == pytest.approx([(1 - omega + sign * omega) * x for x in a.tolist()], abs=1e-12)
    assert linear is True


def test_the_threshold_can_be_moved():
    a, b = pair_at(0.02, torch.float64)
    assert slerp(a, b, 0.5).linear is True
    assert slerp(a, b, 0.5, linear_above=1.0).linear is False
    a, b = pair_at(1.0, torch.float64)
    assert slerp(a, b, 0.5).linear is False
    assert slerp(a, b, 0.5, linear_above=0.5).linear is True
    a, b = pair_at(math.pi - 1.0, torch.float64)
    assert slerp(a, b, 0.5, linear_above=0.5).linear is True


def test_the_threshold_itself_is_spherical():
    """ "Above" it: a cosine that equals the threshold is not."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert slerp(a, b, 0.5, linear_above=0.0).linear is False


def test_a_matrix_is_one_vector():
    a, b = pair_at(1.0, torch.float64)
    flat = slerp(a, b, 0.4)
    square = slerp(a.reshape(5, 8), b.reshape(5, 8), 0.4)
    assert torch.equal(square.result, flat.result.reshape(5, 8))
    assert square[1:] == flat[1:]
    turned = slerp(a.reshape(5, 8).T, b.reshape(5, 8).T, 0.4)
    assert turned.result.T.reshape(-1).tolist() == pytest.approx(flat.result.tolist(), rel=1e-12)


def test_inner_products_are_formed_in_float64(interpolate_reference):
    """Squares of these overflow, and squares of those vanish, in float32."""
    for scale in (1e30, 1e-30):
        a, b = torch.tensor([scale, 0.0]), torch.tensor([scale, scale])
        result, angle, linear = slerp(a, b, 0.5)
        assert angle == pytest.approx(math.pi / 4)
        assert linear is False
        assert result.tolist() == pytest.approx(
            interpolate_reference(a.tolist(), b.tolist(), 0.5, 0.9995)[0].tolist(), rel=1e-6
        )


def test_inputs_are_left_alone():
    for angle in (0.0, 1.0):
        a, b = pair_at(angle, torch.float32)
        before = a.clone(), b.clone()
        slerp(a, b, 0.5)
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])


# Any number


def fold_vectors(vectors: np.ndarray, omegas, **options):
    stacked = torch.tensor(np.asarray(vectors, dtype=np.float64))
    found = fold(inner_products(stacked), omegas, **options)
    return combine(stacked, found.coefficients).numpy(), found


def assert_folded(fold_reference, vectors, omegas, *, above=0.9995, rounding=1e-13):
    result, found = fold_vectors(vectors, omegas, linear_above=above)
    expected, angles, linear = fold_reference(vectors, omegas, above)
    assert found.linear == linear
    assert [None if math.isnan(angle) else angle for angle in found.angles] == pytest.approx(angles, abs=1e-6)
    scale = np.abs(np.asarray(vectors)).max()
    assert np.abs(result - expected).max() <= rounding * scale * len(vectors)


def vectors_around(number: int, spread: float, size: int = 200, seed: int = 0) -> np.ndarray:
    """Random vectors, `spread` away from a common one, relative to its length."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal(size) + spread * generator.standard_normal((number, size))


@pytest.mark.parametrize("omega", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4, 0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_chains_equal_the_reference(fold_reference, number, spread, omega):
    omegas = [1 / (n + 1) if omega is None else omega for n in range(1, number + 1)]
    assert_folded(fold_reference, vectors_around(number + 1, spread), omegas)


@pytest.mark.parametrize("above", [0.0, 0.5, 1.0])
def test_chains_under_another_threshold(fold_reference, above):
    omegas = [1 / (n + 1) for n in range(1, 21)]
    assert_folded(fold_reference, vectors_around(21, 0.01 if above == 1 else 1.0), omegas, above=above)


@pytest.mark.parametrize("angle", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 0.02])
@pytest.mark.parametrize("size", [7, 5_000, 300_000])
def test_tiny_angles_are_right_to_a_millionth(fold_reference, angle, size):
    """Also under the highest threshold, where they are not taken as zero."""
    a, b = (t.numpy() for t in pair_at(angle, torch.float64, size=size))
    _, found = fold_vectors([a, b], [0.5])
    assert found.angles == pytest.approx([angle], abs=1e-6)
    assert found.linear == [True]
    result, found = fold_vectors([a, b], [0.5], linear_above=1.0)
    assert found.angles == pytest.approx([angle], abs=1e-6)
    assert np.abs(result - (a + b) / 2).max() <= 1e-3 * np.abs(a).max()


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-30, 1e30])
def test_twenty_parallel_vectors_give_their_weighted_mean(scale):
    base = scale * np.random.default_rng(0).standard_normal(100)
    factors = np.arange(1, 22)
    result, found = fold_vectors([k * base for k in factors], [1 / (n + 1) for n in range(1, 21)])
    assert result == pytest.approx(factors.mean() * base, rel=1e-13)
    assert found.coefficients == pytest.approx([1 / 21] * 21, rel=1e-13)
    assert found.angles == pytest.approx([0.0] * 20, abs=1e-6)
    assert found.linear == [True] * 20


@pytest.mark.parametrize("where", [0, 1, 2, 3])
def test_zero_vectors_in_a_chain(fold_reference, where):
    vectors = vectors_around(4, 1.0)
    vectors[where] = 0
    assert_folded(fold_reference, vectors, [0.5, 1 / 3, 0.25])


def test_nothing_but_zeros():
    result, found = fold_vectors(np.zeros((4, 5)), [0.5, 0.5, 0.5])
    assert result.tolist() == [0] * 5
    assert all(map(math.isnan, found.angles))
    assert found.linear == [True] * 3


def test_opposite_vectors_in_a_chain(fold_reference):
    a, b, c = vectors_around(3, 1.0)
    assert_folded(fold_reference, [a, -2 * a, b, c], [0.25, 0.5, 0.5])


def test_a_running_result_that_cancels_is_a_zero_vector(fold_reference):
    """The rest interpolates linearly, instead of along an angle to nothing."""
    a, c, d = vectors_around(3, 1.0)
    assert_folded(fold_reference, [a, -a, c, d], [0.5, 0.5, 0.5])
    result, found = fold_vectors([a, -a, c], [0.5, 0.5])
    assert result == pytest.approx(c / 2, rel=1e-12)
    assert math.isnan(found.angles[1])


@pytest.mark.parametrize("size", [5, 40, 1000, 50_000])
@pytest.mark.parametrize("factor", [3, 7, 1 / 3, 0.1])
def test_a_running_result_that_cancels_but_for_rounding_is_a_zero_vector(factor, size):
    """What two float32 vectors leave that should cancel points anywhere, as does its angle from inner products."""
    a, c = np.random.default_rng(size).standard_normal((2, size)).astype(np.float32)
    result, found = fold_vectors([a, (-np.float32(factor) * a), c], [1 / (1 + factor), 0.5])
    assert found.linear == [True, True]
    assert math.isnan(found.angles[1])
    assert np.abs(result - c / 2).max() < 1e-6 * np.abs(c).max()


@pytest.mark.parametrize("left", [1e-4, 1e-3, 1e-2])
def test_a_running_result_that_nearly_cancels_has_an_angle(fold_reference, left):
    a, other, c = np.random.default_rng(3).standard_normal((3, 100))
    assert_folded(fold_reference, [a, -a + left * other, c], [0.5, 0.5], rounding=1e-7)


def test_coefficients_do_not_depend_on_the_scale():
    vectors = vectors_around(4, 1.0)
    _, one = fold_vectors(vectors, [0.5, 1 / 3, 0.25])
    _, other = fold_vectors(2.0**-300 * vectors, [0.5, 1 / 3, 0.25])
    assert one == other


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 10_000])
def test_inner_products(length):
    vectors = torch.randn(3, length, dtype=torch.float64, generator=torch.Generator().manual_seed(length))
    got = inner_products(vectors)
    assert got.dtype == torch.float64
    expected = [[math.fsum((a * b).tolist()) for b in vectors] for a in vectors]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=1e-11)


def test_combine():
    vectors = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, -30.0]], dtype=torch.float64)
    assert combine(vectors, [2.0, 0.5]).tolist() == [7.0, 14.0, -9.0]
    assert combine(vectors[:, :0], [2.0, 0.5]).shape == (0,)
