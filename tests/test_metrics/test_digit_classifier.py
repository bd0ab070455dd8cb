from pathlib import Path

import numpy as np
import pytest
import torch

from cdm_plugin import assets
from cdm_plugin.metrics import DigitClassifier, class_accuracy, classifier_features, pixels_to_images


@pytest.fixture(scope='module')
def classifier():
    return DigitClassifier.from_pretrained()


@pytest.fixture(scope='module')
def digits():
    with np.load(assets.resolve('asset:digits/digits_16.npz')) as file:
        return file['images'], file['labels']


def test_shipped_digits_are_what_their_readme_says(digits):
    images, labels = digits
    assert images.shape == (10000, 16, 16) and images.dtype == np.uint8
    assert labels.shape == (10000,) and labels.dtype == np.uint8
    assert sorted(set(labels[:9000])) == sorted(set(labels[9000:])) == list(range(10))
    assert images.max() == 255 and (images[:, 0] == 0).mean() > 0.99  # bright strokes on a black margin


def test_shipped_files_are_small():
    sizes = {name: Path(assets.resolve(f'asset:digits/{name}')).stat().st_size
             for name in ('digits_16.npz', 'classifier.safetensors')}
    assert sizes['digits_16.npz'] < 1_700_000
    assert sizes['classifier.safetensors'] < 500_000


def test_shipped_classifier_knows_held_out_digits(classifier, digits):
    images, labels = digits
    assert class_accuracy(pixels_to_images(images[9000:]), labels[9000:], classifier) >= 0.97


def test_shipped_classifier_is_frozen_and_in_eval_mode(classifier):
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_logits_are_the_head_of_the_features(classifier, digits):
    images = pixels_to_images(digits[0][:6])
    features = classifier.features(images)
    assert features.shape == (6, 64)
    torch.testing.assert_close(classifier(images), classifier.head(features))


def test_every_feature_is_alive(classifier, digits):
    features = classifier_features(pixels_to_images(digits[0][9000:]), classifier)
    assert features.var(dim=0).min() > 0.1


def test_features_do_not_depend_on_the_batches(classifier, digits):
    images = pixels_to_images(digits[0][:10])
    features = classifier_features(images, classifier, batch_size=3)
    torch.testing.assert_close(features, classifier.features(images))
    torch.testing.assert_close(features[4:5], classifier_features(images[4:5], classifier))


def test_overshoot_is_clamped_and_low_precision_taken(classifier, digits):
    images = pixels_to_images((digits[0][:10] > 127).astype(np.uint8) * 255)  # -1 and 1 only
    expected = classifier.features(images)
    torch.testing.assert_close(classifier_features(1.5 * images, classifier), expected)
    torch.testing.assert_close(classifier_features(images.bfloat16(), classifier), expected)


def test_accuracy_counts_the_labels_that_match(classifier, digits):
    images = pixels_to_images(digits[0][9000:9100])
    predicted = classifier(images).argmax(1)
    wrong = (predicted + torch.tensor([1] * 25 + [0] * 75)) % 10
    assert class_accuracy(images, predicted, classifier) == 1
    assert class_accuracy(images, wrong.tolist(), classifier) == 0.75


def test_pixels_become_images_in_minus_one_to_one():
    images = pixels_to_images(np.array([[[0, 255, 51]]], dtype=np.uint8))
    torch.testing.assert_close(images, torch.tensor([[[[-1., 1., -0.6]]]]))


@pytest.mark.parametrize('pixels', [np.zeros((2, 16, 16)), np.zeros((16, 16), np.uint8)])
def test_pixels_of_another_kind_are_refused(pixels):
    with pytest.raises(ValueError, match=r'uint8 pixels of shape \(N, H, W\)'):
        pixels_to_images(pixels)


@pytest.mark.parametrize('images, labels, message', [
    (torch.zeros(2, 16, 16), [1, 2], r'shape \(N, 1, 16, 16\), got \(2, 16, 16\)'),
    (torch.full((2, 1, 16, 16), torch.nan), [1, 2], '2 of 2 images hold NaN'),
    (torch.zeros(2, 1, 16, 16), [1], '2 images, 1 labels'),
    (torch.zeros(0, 1, 16, 16), [], '0 images'),
    (torch.zeros(2, 1, 16, 16), [1, 10], 'from 0 to 9, got 10'),
    (torch.zeros(2, 1, 16, 16), [1, 2.5], 'from 0 to 9, got 2.5'),
])
def test_accuracy_refuses_what_it_cannot_judge(classifier, images, labels, message):
    with pytest.raises(ValueError, match=message):
        class_accuracy(images, labels, classifier)


def test_missing_weights_are_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        DigitClassifier.from_pretrained(str(tmp_path / 'absent.safetensors'))
