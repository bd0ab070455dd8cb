"""Datasets from configs, through MMEngine's wrappers and data loader, into the preprocessor."""
import json
from collections import Counter

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from mmengine.runner import Runner

from cdm_plugin.data import DistillationDataPreprocessor, write_embeddings

COLLATES = ['pseudo_collate', 'default_collate']


@pytest.fixture
def txt(tmp_path):
    (tmp_path / 'p.txt').write_text('一只猫 🐈\na dog\n', encoding='utf-8')
    return dict(type='PromptDataset', ann_file=str(tmp_path / 'p.txt'))


@pytest.fixture
def jsonl(tmp_path):
    rows = [dict(text=f'prompt {i}', kind='rare' if i == 0 else 'common', note=None) for i in range(8)]
    (tmp_path / 'p.jsonl').write_text('\n'.join(json.dumps(row) for row in rows), encoding='utf-8')
    return dict(type='PromptDataset', ann_file=str(tmp_path / 'p.jsonl'), column='text', category_column='kind')


@pytest.fixture
def embeddings(tmp_path):
    for shard in range(2):
        rows = torch.arange(shard * 5., shard * 5 + 5)
        write_embeddings(tmp_path / 'cache' / f'{shard}.safetensors',
                         dict(encoder_hidden_states=rows[:, None, None].expand(5, 3, 4),
                              pooled_projections=rows[:, None].expand(5, 2)),
                         prompts=[f'prompt {int(row)} 🐈' for row in rows])
    return dict(type='EmbeddingDataset', data_root=str(tmp_path / 'cache'))


@pytest.fixture
def images(tmp_path):
    pixels = np.arange(10, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    np.savez(tmp_path / 'x.npz', images=pixels, labels=np.arange(10) % 3)
    return dict(type='ImageLabelDataset', data_file=str(tmp_path / 'x.npz'))


def load(dataset, collate='pseudo_collate', num_workers=0, batch_size=4, shuffle=True):
    """All batches of an epoch, preprocessed."""
    loader = Runner.build_dataloader(
        dict(dataset=dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=dict(type=collate),
             sampler=dict(type='DefaultSampler', shuffle=shuffle)), seed=0)
    preprocessor = DistillationDataPreprocessor()
    return [preprocessor(batch, True) for batch in loader]


def all_prompts(batches):
    return sorted(prompt for batch in batches for prompt in batch['prompt'])


def test_concat_of_files_with_different_columns(txt, jsonl):
    dataset = dict(type='ConcatDataset', datasets=[txt, jsonl])
    expected = sorted(['一只猫 🐈', 'a dog'] + [f'prompt {i}' for i in range(8)])
    for collate in COLLATES:
        assert all_prompts(load(dataset, collate)) == expected


def test_repeat(txt):
    dataset = DATASETS.build(dict(type='RepeatDataset', dataset=txt, times=3))
    assert [dataset[i]['prompt'] for i in range(len(dataset))] == ['一只猫 🐈', 'a dog'] * 3


def test_class_balanced(jsonl):
    dataset = DATASETS.build(dict(type='ClassBalancedDataset', dataset=jsonl, oversample_thr=0.5))
    # MMEngine repeats a category of frequency f ceil(sqrt(0.5 / f)) times: twice for 1 of 8, once for 7 of 8.
    counts = Counter(dataset[i]['prompt'] for i in range(len(dataset)))
    assert counts == {'prompt 0': 2, **{f'prompt {i}': 1 for i in range(1, 8)}}


def test_wrappers_nest(txt, jsonl):
    balanced = dict(type='ClassBalancedDataset', dataset=jsonl, oversample_thr=0.5)
    dataset = dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[txt, balanced]))
    assert len(all_prompts(load(dataset))) == 2 * (2 + 9)


def test_class_balanced_labels_and_images(images):
    for inner in (images, dict(type='LabelDataset', num_classes=3, length=10)):
        dataset = DATASETS.build(dict(type='ClassBalancedDataset', dataset=inner, oversample_thr=0.35))
        # Labels 0, 1, 2 come 4, 3, 3 times among 10: those below 0.35 twice.
        assert Counter(dataset[i]['prompt'] for i in range(len(dataset))) == {0: 4, 1: 6, 2: 6}


@pytest.mark.parametrize('collate', COLLATES)
@pytest.mark.parametrize('num_workers', [0, 2])
def test_prompts_of_an_epoch(jsonl, collate, num_workers):
    batches = load(jsonl, collate, num_workers)
    assert [len(batch['prompt']) for batch in batches] == [4, 4]
    assert all_prompts(batches) == [f'prompt {i}' for i in range(8)]


@pytest.mark.parametrize('collate', COLLATES)
@pytest.mark.parametrize('num_workers', [0, 2])
def test_embeddings_of_an_epoch(embeddings, collate, num_workers):
    batches = load(embeddings, collate, num_workers)
    assert len(all_prompts(batches)) == len(set(all_prompts(batches))) == 10
    for batch in batches:
        rows = torch.tensor([float(prompt.split()[1]) for prompt in batch['prompt']])
        states, pooled = batch['condition']['encoder_hidden_states'], batch['condition']['pooled_projections']
        assert torch.equal(states, rows[:, None, None].expand(-1, 3, 4))
        assert torch.equal(pooled, rows[:, None].expand(-1, 2))


def test_workers_open_shards_of_a_dataset_that_was_read_before(embeddings):
    dataset = DATASETS.build(embeddings)
    dataset[0], dataset[9]
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, collate_fn=list)
    read = [sample['condition']['pooled_projections'][0].item() for batch in loader for sample in batch]
    assert read == list(range(10))


@pytest.mark.parametrize('collate', COLLATES)
@pytest.mark.parametrize('num_workers', [0, 2])
def test_images_of_an_epoch(images, collate, num_workers):
    batches = load(images, collate, num_workers, batch_size=5)
    assert [batch['image'].shape for batch in batches] == [(5, 1, 4, 4)] * 2
    for batch in batches:
        pixels = ((batch['image'][:, 0, 0, 0] + 1) * 127.5).round().long()
        assert torch.equal(pixels % 3, batch['prompt'])


@pytest.mark.parametrize('collate', COLLATES)
def test_labels_of_an_epoch(collate):
    batches = load(dict(type='LabelDataset', num_classes=10, length=20), collate, batch_size=10)
    assert all(batch['prompt'].dtype == torch.long for batch in batches)
    assert all_prompts(batches) == sorted(2 * list(range(10)))


class CaptionDataset(BaseDataset):
    """Somebody's own dataset, which knows nothing of this package."""

    def load_data_list(self):
        return [dict(caption=f'图 {i} 🎨', picture=np.full((4, 6, 3), i, np.uint8), box=[i]) for i in range(6)]


@pytest.fixture
def own_dataset():
    DATASETS.register_module(name='CaptionDataset', module=CaptionDataset)
    yield dict(type='CaptionDataset', pipeline=[dict(type='PackInputs', prompt='caption', image='picture')])
    DATASETS.module_dict.pop('CaptionDataset')


@pytest.mark.parametrize('collate', COLLATES)
def test_own_dataset_needs_pack_inputs_only(own_dataset, collate):
    batches = load(own_dataset, collate, batch_size=3)
    assert all_prompts(batches) == [f'图 {i} 🎨' for i in range(6)]
    assert batches[0]['image'].shape == (3, 3, 4, 6) and batches[0]['image'].max() < -0.95


def test_own_dataset_mixes_with_ours(own_dataset, txt):
    own_dataset['pipeline'][0]['image'] = None
    assert len(all_prompts(load(dict(type='ConcatDataset', datasets=[txt, own_dataset])))) == 8


def test_own_dataset_without_pack_inputs(own_dataset):
    with pytest.raises(ValueError, match="needs 'prompt' or 'condition', but has .*'caption'.*PackInputs"):
        load(dict(own_dataset, pipeline=[]))


def test_kinds_that_do_not_mix(txt):
    dataset = dict(type='ConcatDataset', datasets=[txt, dict(type='LabelDataset', num_classes=2)])
    with pytest.raises(ValueError, match='mixes text prompts and class labels'):
        load(dataset)


@pytest.mark.parametrize('collate', COLLATES)
def test_embeddings_and_prompts_do_not_mix(embeddings, txt, collate):
    dataset = dict(type='ConcatDataset', datasets=[embeddings, txt])
    with pytest.raises(KeyError, match="a sample has no 'condition', only .*prompt.*train_dataloader.dataset"):
        load(dataset, collate, batch_size=12, shuffle=False)


def test_embeddings_of_different_encoders_do_not_mix(embeddings, tmp_path):
    write_embeddings(tmp_path / 'wide.safetensors', dict(encoder_hidden_states=torch.ones(2, 3, 4)), ['a', 'b'])
    dataset = dict(type='ConcatDataset', datasets=[embeddings, dict(embeddings, data_root=str(tmp_path))])
    with pytest.raises(KeyError, match="a sample has no 'pooled_projections', only .*encoder_hidden_states"):
        load(dataset, batch_size=12, shuffle=False)
    write_embeddings(tmp_path / 'wide.safetensors', dict(encoder_hidden_states=torch.ones(2, 3, 5),
                                                         pooled_projections=torch.ones(2, 2)), ['a', 'b'])
    with pytest.raises(ValueError, match=r'condition.encoder_hidden_states differs .*\(3, 4\) and float32 \(3, 5\)'):
        load(dataset, batch_size=12, shuffle=False)
