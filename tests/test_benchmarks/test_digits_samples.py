"""What is left in a student's samples: its measures, on what is known."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cdm_plugin import assets
from cdm_plugin.metrics import DigitClassifier, classifier_features, pixels_to_images


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


def test_samples_that_are_the_teachers_have_its_scale(samples):
    classifier = DigitClassifier.from_pretrained()
    with np.load(assets.resolve('asset:digits/digits_16.npz')) as data:
        images, labels = pixels_to_images(data['images'][:300]), torch.as_tensor(data['labels'][:300])
    features = classifier_features(images, classifier)
    teachers = {scale: features + abs(scale - 1.5) for scale in (1.0, 1.5, 2.0, 2.5)}
    found = samples.measures(images, SimpleNamespace(classifier=classifier, labels=labels), teachers, features + 1)
    # Features moved by d in each of 64 dimensions are at the distance 64 d^2.
    assert found['fd'] == pytest.approx({'1.0': 16, '1.5': 0, '2.0': 16, '2.5': 64}, abs=0.05)
    assert (found['scale'], found['fd_real']) == pytest.approx((1.5, 64), abs=0.01) and found['accuracy'] > 0.95
    table = samples.samples(dict(rows=dict(me={'4 steps': found})))
    assert '| me, 4 steps | 1.50 | 16.0 | 0.0 | 16.0 | 64.0 | 64.0 |' in table.replace('-0.0', '0.0')
