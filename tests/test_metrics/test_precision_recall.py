import math

import pytest
import torch

from cdm_plugin.metrics import precision_recall


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(features, reference, k):
    """Equation 1 and the two sums of the paper, one pair at a time."""
    def radius(point, points):
        return sorted(math.dist(point, other) for other in points)[k]  # [0] is the point itself

    def share(points, manifold):
        radii = [radius(centre, manifold) for centre in manifold]
        inside = [any(math.dist(p, c) <= r for c, r in zip(manifold, radii)) for p in points]
        return sum(inside) / len(inside)

    a, b = features.tolist(), reference.tolist()
    return share(a, b), share(b, a)


@pytest.mark.parametrize('k', [1, 3, 5])
def test_against_the_definition_written_out(k):
    a, b = normal(40, 3, seed=1), 0.7 * normal(30, 3, seed=2) + 0.8
    expected = literal(a, b, k)
    assert 0.1 < min(expected) and expected[0] != expected[1]  # neither trivial nor symmetric
    assert precision_recall(a, b, k) == expected


def test_hand_calculation_on_a_line():
    # Radii of the reference 0, 1, 10 with one neighbour: 1, 1, 9; of the samples 2.5, 19, 30: 16.5, 11, 11. Inside the
    # reference's balls [-1, 1], [0, 2], [1, 19] lie 2.5 and 19; inside the samples' [-14, 19], [8, 30], [19, 41] all.
    samples, reference = torch.tensor([[2.5], [19.0], [30.0]]), torch.tensor([[0.0], [1.0], [10.0]])
    assert precision_recall(samples, reference, 1) == (pytest.approx(2 / 3), 1)
    assert precision_recall(reference, samples, 1) == (1, pytest.approx(2 / 3))


def test_missing_modes_cost_recall_and_strays_cost_precision():
    modes = torch.cat([normal(100, 8, seed=1), normal(100, 8, seed=2) + 100])
    precision, recall = precision_recall(normal(100, 8, seed=3), modes)
    assert precision > 0.5 and recall < 0.5  # one mode of two is never reached
    with_strays = torch.cat([modes, normal(100, 8, seed=4) - 100])
    precision, recall = precision_recall(with_strays, modes)
    assert precision == pytest.approx(2 / 3) and recall == 1  # the samples hold the reference itself
    assert precision_recall(modes, modes) == (1, 1)
    assert precision_recall(modes, modes + 1e4) == (0, 0)


def test_duplicates_have_no_radius_but_still_hold_themselves():
    """float32 rows far from zero, where a product form of the distance would put equal rows apart."""
    same = (1000 + normal(1, 64, seed=5)).float().expand(6, 64)
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same + 1e-2, same) == (0, 0)


@pytest.mark.parametrize('features, neighbours, message', [
    (torch.zeros(9, 3), 3, 'as wide, but have 3 and 4 columns'),
    (torch.zeros(5, 4), 5, r'neighbours must lie in 1\.\.4 for sets of 5 and 9, but is 5'),
    (torch.zeros(5, 4), 0, 'but is 0'),
    (torch.full((5, 4), math.nan), 3, 'of its 5 rows'),
])
def test_refuses_what_has_no_manifold(features, neighbours, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(features, torch.zeros(9, 4), neighbours)
