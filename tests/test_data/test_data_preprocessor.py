import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate, pseudo_collate
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS

from cdm_plugin.data import DistillationDataPreprocessor

COLLATES = [pseudo_collate, default_collate, list]


def make_sample(seed, prompt=None, length=3, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    condition = dict(encoder_hidden_states=torch.randn(length, width, generator=generator).to(dtype),
                     pooled_projections=torch.randn(6, generator=generator))
    return dict(prompt=f'猫 🐈 {seed}' if prompt is None else prompt, condition=condition,
                image=torch.rand(3, 4, 5, generator=generator), sample_idx=seed)


def preprocess(data):
    return MODELS.build(dict(type='DistillationDataPreprocessor'))(data, training=True)


def refused(data, *words):
    with pytest.raises(ValueError) as info:
        preprocess(data)
    assert '\n' not in str(info.value)
    assert [word for word in words if word not in str(info.value)] == []


@pytest.mark.parametrize('collate', COLLATES)
def test_every_collate_gives_the_same_batch(collate):
    samples = [make_sample(i) for i in range(4)]
    batch = preprocess(collate(samples))
    assert set(batch) == {'prompt', 'condition', 'image'}
    assert batch['prompt'] == [sample['prompt'] for sample in samples]
    assert batch['image'].shape == (4, 3, 4, 5) and torch.equal(batch['image'][2], samples[2]['image'])
    assert batch['condition']['encoder_hidden_states'].shape == (4, 3, 8)
    for name, values in batch['condition'].items():
        assert torch.equal(values, torch.stack([sample['condition'][name] for sample in samples]))


@pytest.mark.parametrize('collate', COLLATES)
@pytest.mark.parametrize('kind', [int, np.int64, torch.tensor])
def test_labels_become_a_long_tensor(collate, kind):
    batch = preprocess(collate([dict(prompt=kind(label)) for label in (3, 1, 4)]))
    assert set(batch) == {'prompt'}
    assert batch['prompt'].dtype == torch.long and batch['prompt'].tolist() == [3, 1, 4]


@pytest.mark.parametrize('collate', COLLATES)
def test_condition_alone(collate):
    batch = preprocess(collate([dict(condition=make_sample(i)['condition']) for i in range(2)]))
    assert set(batch) == {'condition'}


def test_dtypes():
    samples = [make_sample(i, dtype=torch.bfloat16) for i in range(2)]
    for sample in samples:
        sample['image'] = sample['image'].double()
    batch = preprocess(pseudo_collate(samples))
    assert batch['condition']['encoder_hidden_states'].dtype == torch.bfloat16
    assert batch['image'].dtype == torch.float32


def test_arrays_are_taken_as_tensors():
    batch = preprocess(pseudo_collate([dict(condition=dict(a=np.ones((2, 3), np.float32)))] * 2))
    assert torch.equal(batch['condition']['a'], torch.ones(2, 2, 3))


def test_a_batch_stays_as_it_is():
    batch = preprocess([make_sample(i, prompt=i) for i in range(2)])
    again = preprocess(batch)
    assert torch.equal(again['prompt'], batch['prompt']) and torch.equal(again['image'], batch['image'])


def test_tensors_move_to_the_device_of_the_model():
    preprocessor = DistillationDataPreprocessor()
    assert isinstance(preprocessor, BaseDataPreprocessor) and preprocessor._non_blocking
    preprocessor.to('meta')
    batch = preprocessor([make_sample(i, prompt=i) for i in range(2)])
    tensors = [batch['prompt'], batch['image'], *batch['condition'].values()]
    assert {tensor.device.type for tensor in tensors} == {'meta'}


@pytest.mark.parametrize('collate', [pseudo_collate, list])
def test_texts_and_labels_do_not_mix(collate):
    refused(collate([dict(prompt='cat'), dict(prompt=3)]), 'mixes text prompts and class labels', "['cat', 3]",
            'train_dataloader.dataset')


@pytest.mark.parametrize('collate', [pseudo_collate, list])
def test_embeddings_of_different_widths(collate):
    refused(collate([make_sample(0), make_sample(1, width=9)]), 'condition.encoder_hidden_states', '(3, 8)', '(3, 9)',
            'one text encoder')


@pytest.mark.parametrize('collate', [pseudo_collate, list])
def test_texts_of_different_lengths_are_padded_with_a_mask(collate):
    samples = [make_sample(0, dtype=torch.bfloat16), make_sample(1, length=5, dtype=torch.bfloat16)]
    ids = [torch.arange(3)[:, None], torch.arange(5)[:, None]]
    for sample, own in zip(samples, ids):
        sample['condition']['text_ids'] = own
    condition = preprocess(collate(samples))['condition']
    states = condition['encoder_hidden_states']
    assert states.shape == (2, 5, 8) and states.dtype == torch.bfloat16 and not states[0, 3:].any()
    for i, sample in enumerate(samples):
        assert torch.equal(states[i, :3 + 2 * i], sample['condition']['encoder_hidden_states'])
    assert condition['text_ids'].dtype == torch.long and condition['text_ids'][..., 0].tolist() == [
        [0, 1, 2, 0, 0], [0, 1, 2, 3, 4]]
    for name in ('encoder_hidden_states_mask', 'text_ids_mask'):
        assert condition[name].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert condition['pooled_projections'].shape == (2, 6) and len(condition) == 5


@pytest.mark.parametrize('collate', COLLATES)
def test_padding_that_a_mask_excludes_is_trimmed(collate):
    """Embeddings that were written with padding and mask, of 8 tokens."""
    samples = [dict(condition=dict(a=torch.ones(8, 2), a_mask=torch.arange(8) < length)) for length in (2, 4)]
    condition = preprocess(collate(samples))['condition']
    assert condition['a'].shape == (2, 4, 2) and condition['a_mask'].sum(1).tolist() == [2, 4]
    assert set(preprocess(collate(samples[:1]))['condition']) == {'a'}


def test_vectors_of_different_lengths():
    samples = [dict(condition=dict(pooled_projections=torch.ones(n))) for n in (6, 7)]
    refused(samples, 'condition.pooled_projections', '(6,)', '(7,)', 'one text encoder')


def test_embeddings_of_different_dtypes():
    refused([make_sample(0), make_sample(1, dtype=torch.float16)], 'encoder_hidden_states', 'float32', 'float16')


def test_images_of_different_sizes():
    refused([dict(make_sample(0)), dict(make_sample(1), image=torch.zeros(1, 4, 5))], 'image', '(3, 4, 5)', '(1, 4, 5)',
            'one size and number of channels')


def test_latents():
    refused([dict(prompt='x', latents=torch.zeros(4, 2, side)) for side in (2, 3)], 'latents differs', '(4, 2, 2)',
            '(4, 2, 3)', 'one size')
    refused([dict(prompt='x', latents=torch.zeros(4, 2, 2, dtype=torch.long))], 'latents of a batch must be float')
    refused(dict(prompt=['a', 'b'], latents=torch.zeros(3, 4, 2, 2)), "'latents': 3", "'prompt': 2")


def test_condition_in_some_samples_only():
    refused([make_sample(0), dict(prompt='x')], "has 'condition'", 'encoder_hidden_states: float32 (3, 8)',
            '{prompt: a str}', 'train_dataloader.dataset')
    without_pooled = dict(prompt='x', condition=dict(encoder_hidden_states=torch.ones(3, 8)))
    refused([make_sample(0), dict(without_pooled, image=torch.zeros(3, 4, 5))], "one condition", 'pooled_projections',
            'float32 (6,)', '{encoder_hidden_states: float32 (3, 8)}')


def test_rows_must_agree():
    refused(dict(prompt=['a', 'b'], condition=dict(x=torch.ones(3, 2))), "'condition.x': 3", "'prompt': 2")


@pytest.mark.parametrize('data, words', [
    (dict(caption=['a', 'b']), ["needs 'prompt' or 'condition'", "['caption']",
                                 "type='mmengine.PackInputs', prompt=..."]),
    ([dict(image=torch.zeros(3, 4, 4))], ["needs 'prompt' or 'condition'", "['image']"]),
    (dict(prompt=[0.5, 1.5]), ['must be texts or class labels', 'a list of a float']),
    (dict(prompt=torch.ones(2)), ['float32 (2,)']),
    (dict(prompt=[None, None]), ['a list of a NoneType']),
    (dict(prompt=['a'], image=['1.png']), ['image of a sample must be a tensor', 'a str']),
    (dict(prompt=['a'], image=torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), ['uint8 (1, 3, 4, 4)', 'image=...']),
    (dict(prompt=['a'], image=[torch.zeros(4, 4)]), ['float32 (1, 4, 4)']),
    (['a', 'b'], ['a sample must be a dict', 'a str']),
    (dict(prompt=['a', 'b'], condition=[dict(x=torch.ones(2)), None]), ['a condition must be a dict', 'NoneType']),
])
def test_other_errors(data, words):
    refused(data, *words)
