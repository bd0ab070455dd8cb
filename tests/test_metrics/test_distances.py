import itertools
import sys
from importlib.util import find_spec
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_judges import literal_pixels, random_images, tiny_clip
from transformers import CLIPModel

from cdm_plugin.metrics import FID, KID, Diversity, MissingMetric, PrecisionRecall, frechet_distance, precision_recall
from cdm_plugin.metrics.distances import kernel_distance
from cdm_plugin.metrics.diversity import mean_distance_within
from cdm_plugin.metrics.features import _torch_fidelity


def features(count, seed, width=5, shift=0.0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_kernel_distance_is_the_unbiased_sum_over_pairs():
    a, b = features(7, 0), features(9, 1, shift=0.5)

    def kernel(x, y):
        return float((x @ y / 5 + 1) ** 3)

    same = [np.mean([kernel(x, y) for x, y in itertools.permutations(rows, 2)]) for rows in (a, b)]
    between = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(same) - 2 * between, rel=1e-12)
    with pytest.raises(ValueError, match='as wide'):
        kernel_distance(a, b[:, :3])


def test_kernel_distance_is_unbiased():
    """Sets of one distribution are 0 apart on average, unlike the Fréchet distance."""
    values = [kernel_distance(features(20, 2 * i), features(20, 2 * i + 1)) for i in range(300)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 300 ** 0.5
    assert kernel_distance(features(200, 1), features(200, 2, shift=1.0)) > 10 * np.std(values)


def test_diversity_is_the_mean_of_the_prompts_means():
    rows, groups = features(6, 0), torch.tensor([3, 1, 3, 3, 1, 7])

    def mean(*indices):
        return np.mean([float((rows[i] - rows[j]).norm()) for i, j in itertools.combinations(indices, 2)])

    assert mean_distance_within(rows, groups) == pytest.approx((mean(0, 2, 3) + mean(1, 4)) / 2)
    with pytest.raises(ValueError, match='two images of a prompt'):
        mean_distance_within(rows[:2], torch.tensor([0, 1]))


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp('judges') / 'clip')


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """A folder of pictures, and what is in it."""
    folder, images = tmp_path_factory.mktemp('reference'), random_images(8, seed=5)
    for i, image in enumerate(images):
        pixels = ((image.numpy().transpose(1, 2, 0) + 1) * 127.5).round().astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
    return folder, images


def embedded(clip, images):
    """Unit image embeddings of transformers' whole model."""
    model = CLIPModel.from_pretrained(clip).eval()
    pixels = torch.stack([literal_pixels(image) for image in images])
    with torch.no_grad():
        found = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    return found / found.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize('metric, expected', [
    (FID, lambda a, b: dict(fd_clip=frechet_distance(a, b))),
    (KID, lambda a, b: dict(kid=kernel_distance(a, b))),
    (PrecisionRecall, lambda a, b: dict(zip(('precision', 'recall'), precision_recall(a, b))))])
def test_values_are_those_of_the_features(metric, expected, clip, reference, tmp_path):
    folder, pictures = reference
    images = random_images(6, seed=6)
    wanted = expected(embedded(clip, images), embedded(clip, pictures))
    np.savez(tmp_path / 'stored.npz', features=embedded(clip, pictures).numpy())
    for place in (folder, tmp_path / 'stored.npz'):
        judge = metric(reference=str(place), space='clip', pretrained=clip, device='cpu', batch_size=4)
        judge.prepare()
        rows = judge.rows(list(images), [''] * 6)
        assert judge.value(rows, [''] * 6, torch.arange(6)) == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_diversity_of_images(clip):
    images = random_images(4, seed=7)
    judge = Diversity(pretrained=clip, device='cpu')
    judge.prepare()
    rows = judge.rows(list(images), ['a', 'a', 'b', 'b'])
    e = embedded(clip, images)
    expected = (float((e[0] - e[1]).norm()) + float((e[2] - e[3]).norm())) / 2
    found = judge.value(rows, list('aabb'), torch.tensor([0, 0, 1, 1]))
    assert found == pytest.approx(dict(diversity=expected), rel=1e-3)


def test_inception_says_how_to_get_its_package_or_weights(reference, tmp_path):
    with pytest.raises(MissingMetric, match='torch.fidelity|pretrained'):
        FID(reference=str(reference[0]), pretrained=str(tmp_path / 'none.pth'), device='cpu').prepare()


@pytest.mark.skipif(find_spec('torch_fidelity') is None, reason='pip install --no-deps torch-fidelity')
def test_inception_features_are_torch_fidelity_s(reference, tmp_path):
    """The real network with random weights, on 8-bit pixels as it takes them; nothing of the package but that is
    imported."""
    extractor = _torch_fidelity('feature_extractor_inceptionv3').FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with mock.patch.object(torch.nn.Module, 'load_state_dict'), mock.patch.object(torch, 'load'):
        network = extractor('inception', ['2048'], feature_extractor_weights_path='none')
    for parameter in network.parameters():
        if parameter.ndim == 4:  # torch's own initial weights let images vanish on the way
            torch.nn.init.kaiming_normal_(parameter)
    torch.save(network.state_dict(), tmp_path / 'inception.pth')
    folder, pictures = reference
    images = random_images(3, seed=6)
    rows = [network(((torch.stack(list(part)) + 1) * 127.5).round().byte())[0] for part in (images, pictures)]
    assert rows[0].shape == (3, 2048) and (rows[0][0] - rows[0][1]).abs().max() > 1e-4
    judge = FID(reference=str(folder), pretrained=str(tmp_path / 'inception.pth'), device='cpu', batch_size=2)
    judge.prepare()
    found = judge.rows(list(images), [''] * 3)
    assert torch.allclose(found, rows[0], rtol=1e-4, atol=1e-5)
    ((name, value),) = judge.value(found, [''] * 3, torch.arange(3)).items()
    assert name == 'fid' and value == pytest.approx(frechet_distance(*rows), rel=1e-3)
    assert 'torch_fidelity' not in sys.modules and 'torchvision' not in sys.modules


def test_references_that_are_none(clip, tmp_path):
    np.savez(tmp_path / 'other.npz', images=np.zeros((2, 2)))
    with pytest.raises(ValueError, match='holds no `features`'):
        KID(reference=str(tmp_path / 'other.npz'), space='clip', pretrained=clip, device='cpu').prepare()
    with pytest.raises(ValueError, match="must be 'inception' or 'clip'"):
        KID(reference='x', space='vgg')
