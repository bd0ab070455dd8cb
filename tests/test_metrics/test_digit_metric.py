import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import METRICS
from mmengine.structures import BaseDataElement

from cdm_plugin import assets
from cdm_plugin.metrics import (
    DigitClassifier,
    DigitMetric,
    class_accuracy,
    classifier_features,
    frechet_distance,
    pixels_to_images,
)

DIGITS = 'asset:digits/digits_16.npz'


@pytest.fixture(scope='module')
def digits():
    with np.load(assets.resolve(DIGITS)) as file:
        return file['images'], file['labels']


@pytest.fixture(scope='module')
def held_out(digits):
    return pixels_to_images(digits[0][9000:9200]), digits[1][9000:9200].astype(int).tolist()


@pytest.fixture(scope='module')
def thousand(digits, tmp_path_factory):
    """A reference of 1,000 of them: all take ten times as long to look at."""
    path = tmp_path_factory.mktemp('digits') / 'thousand.npz'
    return write(path, images=digits[0][:1000], labels=digits[1][:1000])


def evaluate(images, prompts, batch_size=64, **metric):
    evaluator = Evaluator(dict(type='DigitMetric', **metric))
    samples = [dict(image=image, prompt=prompt) for image, prompt in zip(images, prompts)]
    for start in range(0, len(samples), batch_size):
        evaluator.process(data_samples=samples[start:start + batch_size])
    return evaluator.evaluate(len(samples))


def write(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_is_registered_by_the_import():
    assert METRICS.get('DigitMetric') is DigitMetric


def test_accuracy_alone_without_a_reference(held_out):
    images, prompts = held_out
    metrics = evaluate(images, prompts)
    assert set(metrics) == {'digits/accuracy'}
    assert metrics['digits/accuracy'] == class_accuracy(images, prompts, DigitClassifier.from_pretrained())
    assert metrics['digits/accuracy'] > 0.95


def test_accuracy_is_about_the_prompt(held_out):
    images, prompts = held_out
    assert evaluate(images, [(prompt + 1) % 10 for prompt in prompts])['digits/accuracy'] < 0.05


def test_distance_to_reference_images(held_out, digits, tmp_path):
    images, prompts = held_out
    reference = write(tmp_path / 'images.npz', images=digits[0][:500], labels=digits[1][:500])
    classifier = DigitClassifier.from_pretrained()
    expected = frechet_distance(classifier_features(images, classifier),
                                classifier_features(pixels_to_images(digits[0][:500]), classifier))
    assert evaluate(images, prompts, reference=reference)['digits/fd'] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('count, says_little', [(10, True), (64, True), (65, False)])  # of 64 features
def test_a_distance_of_few_images_says_so(count, says_little, held_out, thousand, caplog):
    caplog.handler.setLevel('WARNING')
    MMLogger.get_instance('few').addHandler(caplog.handler)
    images, prompts = (part[:count] for part in held_out)
    evaluate(images, prompts)
    assert not caplog.messages  # an accuracy means something
    evaluate(images, prompts, reference=thousand)
    assert [f'DigitMetric of {count} images says little' in text for text in caplog.messages] == [True] * says_little


def test_distance_to_its_own_features_is_zero(held_out, tmp_path):
    images, prompts = held_out
    features = classifier_features(images, DigitClassifier.from_pretrained())
    reference = write(tmp_path / 'features.npz', features=features.numpy())
    assert evaluate(images, prompts, reference=reference)['digits/fd'] < 1e-4


def test_distance_orders_real_noisy_and_missing_digits(held_out, thousand):
    images, prompts = held_out
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    fd_real = evaluate(images, prompts, reference=thousand)['digits/fd']
    fd_noisy = evaluate(images + 0.5 * noise, prompts, reference=thousand)['digits/fd']
    threes = images[torch.tensor(prompts) == 3]
    fd_one_class = evaluate(threes, [3] * prompts.count(3), reference=thousand)['digits/fd']
    assert fd_real < 0.5 * fd_noisy
    assert fd_real < 0.5 * fd_one_class


def test_takes_data_elements_and_array_or_tensor_prompts(held_out):
    images, prompts = held_out
    evaluator = Evaluator(dict(type='DigitMetric', prefix='student'))
    evaluator.process([
        BaseDataElement(image=images[0], prompt=torch.tensor(prompts[0])),
        BaseDataElement(image=images[1], prompt=np.uint8(prompts[1])),
    ])
    assert set(evaluator.evaluate(2)) == {'student/accuracy'}


def test_padding_of_the_last_batch_is_not_judged(held_out):
    images, prompts = held_out
    predicted = DigitClassifier.from_pretrained()(images[:4]).argmax(1).tolist()
    evaluator = Evaluator(dict(type='DigitMetric'))
    wrong = (predicted[3] + 1) % 10
    evaluator.process([dict(image=image, prompt=prompt) for image, prompt in zip(images, [*predicted[:3], wrong])])
    assert evaluator.evaluate(3) == {'digits/accuracy': 1}


@pytest.mark.parametrize('prompt', [10, -1, 'three', 2.5, torch.tensor(2.5)])
def test_a_prompt_that_is_no_digit_is_refused(held_out, prompt):
    with pytest.raises(ValueError, match='integer from 0 to 9'):
        evaluate(held_out[0][:1], [prompt])


def test_a_diverged_generator_is_reported(held_out):
    images = held_out[0][:3].clone()
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match='1 of 3 images hold NaN'):
        evaluate(images, [1, 2, 3])


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match='no samples'):
        Evaluator(dict(type='DigitMetric')).evaluate(0)


def test_one_sample_has_no_distance(held_out):
    with pytest.raises(ValueError, match='at least 2 samples'):
        evaluate(held_out[0][:1], held_out[1][:1], reference=DIGITS)


@pytest.mark.parametrize('arrays, message', [
    (dict(labels=np.zeros(3)), 'neither `images` nor `features`'),
    (dict(features=np.zeros((3, 32))), r'shape \(N, 64\), got \(3, 32\)'),
    (dict(images=np.zeros((3, 28, 28), np.uint8)), r'got \(3, 1, 28, 28\)'),
    (dict(images=np.zeros((3, 1, 16, 16), np.float32)), 'uint8 pixels'),
])
def test_a_reference_of_another_kind_is_refused_at_once(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        DigitMetric(reference=write(tmp_path / 'reference.npz', **arrays))


def test_a_missing_reference_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError):
        DigitMetric(reference=str(tmp_path / 'absent.npz'))
