import math

import numpy as np
import pytest
import torch

from cdm_plugin.metrics import frechet_distance


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def samples_with_moments(mean, cov, count=50, seed=0):
    """Samples whose own mean and covariance (ddof=1) are exactly these: whitened noise, coloured."""
    mean, cov = torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(cov, dtype=torch.float64)
    noise = normal(count, len(mean), seed=seed)
    noise = noise - noise.mean(0)
    factor = torch.linalg.cholesky(noise.T @ noise / (count - 1))
    white = torch.linalg.solve_triangular(factor, noise.T, upper=False).T
    return white @ torch.linalg.cholesky(cov).T + mean


def test_hand_calculation_in_one_dimension():
    # means 1 and 2, variances 2 and 8: 1 + (sqrt(8) - sqrt(2))^2 = 3
    assert frechet_distance(torch.tensor([[0.], [2.]]), torch.tensor([[0.], [4.]])) == pytest.approx(3, abs=1e-12)


def test_closed_form_for_diagonal_covariances():
    a = samples_with_moments([0., 1., 2.], torch.diag(torch.tensor([1., 4., 9.])), seed=1)
    b = samples_with_moments([1., 1., 0.], torch.diag(torch.tensor([4., 4., 0.25])), seed=2)
    # |m_a - m_b|^2 = 1 + 0 + 4, and the standard deviations differ by 1, 0 and 2.5
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 6.25, rel=1e-10)


def test_closed_form_for_covariances_that_do_not_commute():
    cov_a, cov_b = torch.tensor([[2., 0.5], [0.5, 1.]]), torch.tensor([[1., -0.8], [-0.8, 3.]])
    # the root of a 2x2 matrix P has trace sqrt(tr P + 2 sqrt(det P)); P = C_a C_b has trace 4.2 and determinant
    # 1.75 * 2.36
    expected = 25 + 3 + 4 - 2 * math.sqrt(4.2 + 2 * math.sqrt(1.75 * 2.36))
    a, b = samples_with_moments([3., 0.], cov_a, seed=1), samples_with_moments([0., 4.], cov_b, seed=2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)  # cov_b comes from float32


@pytest.mark.parametrize('count', [2, 30, 500])  # fewer samples than features: a singular covariance
def test_a_set_is_at_distance_zero_from_itself_and_its_shuffle(count):
    features = 3 * normal(count, 64) + 10
    assert 0 <= frechet_distance(features, features) < 1e-8
    assert 0 <= frechet_distance(features, features.flip(0)) < 1e-8


def test_features_that_are_always_zero_do_no_harm():
    a, b = normal(200, 64, seed=1), 1 + normal(200, 64, seed=2)
    dead = torch.zeros(200, 16, dtype=torch.float64)
    padded = frechet_distance(torch.cat([a, dead], 1), torch.cat([b, dead], 1))
    assert padded == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_sets_in_orthogonal_directions():
    a, b = torch.zeros(40, 2, dtype=torch.float64), torch.zeros(40, 2, dtype=torch.float64)
    a[:, :1] = samples_with_moments([0.], [[2.]], count=40)
    b[:, 1:] = samples_with_moments([0.], [[3.]], count=40)
    assert frechet_distance(a, b) == pytest.approx(2 + 3, rel=1e-10)  # C_a C_b = 0


def test_laws_of_symmetry_scale_and_shift():
    a, b = normal(300, 8, seed=1), normal(200, 8, seed=2) @ normal(8, 8, seed=3)
    distance = frechet_distance(a, b)
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-10)
    assert frechet_distance(7 * a, 7 * b) == pytest.approx(49 * distance, rel=1e-10)
    assert frechet_distance(a + 1e4, b + 1e4) == pytest.approx(distance, rel=1e-6)
    assert frechet_distance(a, a + 2) == pytest.approx(8 * 4, rel=1e-10)


def test_agrees_with_the_matrix_square_root_of_scipy():
    from scipy import linalg
    a, b = normal(500, 64, seed=1) @ normal(64, 64, seed=3), 0.5 + normal(400, 64, seed=2) @ normal(64, 64, seed=4)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum().item() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_takes_arrays_and_low_precision_and_computes_in_float64():
    a, b = (1000 + normal(100, 4, seed=1)).float(), (1000 + normal(100, 4, seed=2)).float()
    expected = frechet_distance(a.double(), b.double())
    assert frechet_distance(a, b) == expected
    assert frechet_distance(a.numpy(), b.requires_grad_()) == expected
    assert frechet_distance(a.half(), a.half()) < 1e-8


@pytest.mark.parametrize('bad, message', [
    (torch.zeros(1, 4), 'features_b needs at least 2 samples'),
    (torch.zeros(0, 4), 'features_b needs at least 2 samples'),
    (torch.zeros(5, 3), 'same width, got 4 and 3'),
    (torch.zeros(5), r'features_b must have shape \(N, D\)'),
    (torch.tensor([[0., 0, 0, 0], [0, math.nan, 0, 0], [0, 0, math.inf, math.inf]]), '2 of its 3 rows'),
])
def test_refuses_what_has_no_distance(bad, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(torch.zeros(5, 4), bad)
