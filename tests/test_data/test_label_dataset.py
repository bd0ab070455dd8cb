from collections import Counter

import pytest
from mmengine.registry import DATASETS

from cdm_plugin.data import LabelDataset


def test_labels_cycle():
    dataset = DATASETS.build(dict(type='LabelDataset', num_classes=3, length=7))
    assert [dataset[i] for i in range(7)] == [dict(prompt=label) for label in [0, 1, 2, 0, 1, 2, 0]]
    assert type(dataset[0]['prompt']) is int
    with pytest.raises(IndexError):
        dataset[7]


def test_epoch_is_balanced():
    dataset = LabelDataset(10, length=1003)
    counts = Counter(dataset[i]['prompt'] for i in range(1003))
    assert set(counts.values()) == {100, 101} and sum(counts.values()) == 1003


def test_length_defaults_to_the_number_of_classes():
    assert len(LabelDataset(num_classes=5)) == 5


def test_categories_and_indices():
    dataset = LabelDataset(num_classes=4, indices=[3, 1])
    assert [dataset.get_cat_ids(i) for i in range(len(dataset))] == [[3], [1]]


@pytest.mark.parametrize('kwargs, key', [(dict(num_classes=0), 'num_classes'), (dict(num_classes=2.5), 'num_classes'),
                                         (dict(num_classes=3, length=0), 'length')])
def test_sizes_are_checked(kwargs, key):
    with pytest.raises(ValueError, match=f'LabelDataset.{key} must be a whole number'):
        LabelDataset(**kwargs)
