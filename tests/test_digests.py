"""The bits of a short training of every method, and files that the first round's code wrote (tests/data)."""
import json
from pathlib import Path

import digests
import pytest
import torch

from cdm_plugin.inference import load_method, student_weights

FIRST_ROUND = Path(__file__).parent / 'data' / 'first_round'


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digests')
    digests.pipelines(folder)
    return folder


@pytest.fixture(scope='module')
def recorded():
    return json.loads(digests.RECORDED.read_text())


@pytest.mark.parametrize('row', digests.ROWS)
def test_a_short_training_ends_in_the_recorded_bits(row, root, recorded):
    same_machine = digests.probe() == recorded['probe']
    assert digests.compare(row, digests.run(row, root), recorded['rows'][row], same_machine) == []


@pytest.fixture
def images():
    return torch.load(FIRST_ROUND / 'images.pth', weights_only=True)


def draw(method):
    return method.sample(method.backbone.condition(dict(prompt=torch.tensor([0, 1, 2]))))


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_a_checkpoint_of_the_first_round_loads(weights, images):
    method = load_method(str(FIRST_ROUND / 'config.py'), str(FIRST_ROUND / 'iter_4.pth'), device='cpu')
    with student_weights(method, ema=weights == 'ema'):
        assert torch.allclose(draw(method), images[weights], atol=1e-6)
    assert (images['ema'] - images['raw']).abs().max() > 1e-4


def test_a_folder_exported_in_the_first_round_loads(images):
    assert torch.allclose(draw(load_method(str(FIRST_ROUND / 'student'), device='cpu')), images['ema'], atol=1e-6)
