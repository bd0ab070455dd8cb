"""What is left in a student's samples: its two measures, on what is known."""
import pytest
import torch


@pytest.fixture(scope='module')
def samples(benchmark):
    return benchmark('digits_samples')


@pytest.mark.parametrize('lowest', [1.1, 1.7, 2.4])
def test_the_nearest_scale_is_the_vertex_of_a_parabola(samples, lowest):
    assert samples.nearest(samples.SCALES, [3 + 2 * (s - lowest)**2 for s in samples.SCALES]) == pytest.approx(lowest)


def test_sharpness_of_known_pictures(samples):
    ramp = torch.linspace(-1, 1, 8).expand(2, 1, 8, 8)
    assert samples.sharpness(ramp) == pytest.approx(0, abs=1e-10)  # no second difference
    board = 2.0 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2) - 1
    assert samples.sharpness(board[None, None]) == pytest.approx(16)  # 4 - 0 or 0 - 4, on [0, 1]
