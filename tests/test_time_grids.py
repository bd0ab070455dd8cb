import re

import pytest
import torch
from mmengine.registry import MODELS, TASK_UTILS
from tests_support import tiny_backbone

from cdm_plugin.time_grids import DynamicTimeGrid, FixedTimeGrid, check_sigmas

BAD_SIGMAS = {
    'empty': ([], 'is empty'),
    'ascending': ([0.25, 1.0], 'descending'),
    'equal neighbours': ([1.0, 0.5, 0.5], 'descending'),
    'above 1': ([1.5, 1.0], r'\(0, 1\]'),
    'negative': ([1.0, -0.25], r'\(0, 1\]'),
    'zero': ([1.0, 0.5, 0.0], r'\(0, 1\]'),
    'not a number': ([1.0, float('nan')], r'\(0, 1\]'),
    'starts below 1': ([0.75, 0.5], 'start at 1'),
    'words': (['high', 'low'], 'list of numbers'),
    'none inside': ([1.0, None], 'list of numbers'),
    'nested': ([[1.0, 0.5]], 'list of numbers'),
    'a number': (1.0, 'list of numbers'),
    'none': (None, 'list of numbers'),
}


@pytest.mark.parametrize('name', BAD_SIGMAS)
def test_bad_sigmas_are_refused_with_the_config_key(name):
    sigmas, reason = BAD_SIGMAS[name]
    with pytest.raises(ValueError, match=rf'^model\.sample_sigmas .*{reason}'):
        check_sigmas(sigmas, 'model.sample_sigmas')
    # What is no number is found by the annotation, which names the one that is wrong.
    with pytest.raises(ValueError, match=rf'^model\.time_grid\.sigmas(\[\d\])? .*({reason}|number, but is)'):
        FixedTimeGrid(sigmas)


@pytest.mark.parametrize('name', BAD_SIGMAS)
def test_a_method_names_the_key_of_its_own_levels(name):
    with pytest.raises(ValueError, match=r'model\.sample_sigmas'):
        MODELS.build(dict(type='FlowMatching', backbone=tiny_backbone(), sample_sigmas=BAD_SIGMAS[name][0]))


@pytest.mark.parametrize('kwargs', [
    dict(min_steps=0), dict(max_steps=0), dict(min_steps=5, max_steps=4), dict(max_steps=-1),
    dict(low=0.0), dict(low=-0.1), dict(high=1.1), dict(low=0.9, high=0.3)], ids=str)
def test_bad_dynamic_grids_are_refused_with_the_config_key(kwargs):
    with pytest.raises(ValueError, match=r'^model\.time_grid[ .]') as error:
        TASK_UTILS.build(dict(type='DynamicTimeGrid', **kwargs))
    for name, value in kwargs.items():
        assert re.search(rf'\b{name}(=| must be .*, but is ){value}', str(error.value))


def test_fixed_grid_is_the_list_and_cannot_be_changed_from_outside():
    grid = TASK_UTILS.build(dict(type='FixedTimeGrid', sigmas=[1, 0.75, 0.5, 0.25]))
    grid.sample().zero_()
    assert grid.sample().tolist() == [1.0, 0.75, 0.5, 0.25] and grid.sample().dtype == torch.float64


def test_numbers_of_any_kind_are_accepted():
    assert check_sigmas(torch.tensor([1.0, 0.5]), 'key').tolist() == [1.0, 0.5]
    assert check_sigmas((1, 1e-6), 'key').tolist() == [1.0, 1e-6]


def test_dynamic_grids_start_at_one_descend_and_stay_in_their_range():
    grid, generator = DynamicTimeGrid(max_steps=6, min_steps=2, low=0.4, high=0.6), torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(300):
        sigmas = grid.sample(generator)
        assert sigmas[0] == 1 and sigmas.dtype == torch.float64
        assert (sigmas.diff() < 0).all()
        assert ((sigmas[1:] >= 0.4) & (sigmas[1:] <= 0.6)).all()
        lengths.add(len(sigmas))
    assert lengths == {2, 3, 4, 5, 6}


def test_dynamic_grid_of_one_length():
    grid = DynamicTimeGrid(max_steps=1, low=1.0, high=1.0)
    assert grid.sample(torch.Generator()).tolist() == [1.0]
    sampled = DynamicTimeGrid(max_steps=3, min_steps=3).sample(torch.Generator().manual_seed(0))
    assert len(sampled) == 3 and sampled[1:].max() <= 0.95 and sampled[1:].min() >= 0.25
