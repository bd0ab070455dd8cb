"""Captions that are drawn: one of several, in a template, or none; and all of them in a cache."""
import json
import random
from collections import Counter

import pytest
from cache_support import toy_cfg
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from scipy.stats import binom
from source_support import write_rows, write_tars
from stream_support import CountedStream  # noqa: F401  registers it

from cdm_plugin.conditioners import EmbeddingConditioner
from cdm_plugin.data import EmbeddingDataset, PackInputs, cache_embeddings
from cdm_plugin.data.captions import every_variant
from cdm_plugin.data.pairs import dataset_of

SEVERAL = ['a fox', 'a red fox', 'an animal']


def drawn(number=3000, prompt=SEVERAL, **kwargs):
    pack = PackInputs(**kwargs)
    return [pack(dict(prompt=prompt))['prompt'] for _ in range(number)]


def is_share(count, number, share):
    """Whether a count is not among the rarest one in a million."""
    return binom.ppf(5e-7, number, share) <= count <= binom.ppf(1 - 5e-7, number, share)


def test_each_caption_template_and_the_empty_text_has_its_share():
    random.seed(0)
    counts = Counter(drawn(template=['{}', 'a photo of {}'], dropout=0.25))
    assert counts.keys() == {'', *SEVERAL, *(f'a photo of {text}' for text in SEVERAL)}
    assert is_share(counts.pop(''), 3000, 0.25)
    assert all(is_share(count, 3000, 0.75 / 6) for count in counts.values())


def test_draws_follow_pythons_generator_which_mmengine_seeds():
    random.seed(5)
    first, state = drawn(50), random.getstate()
    random.seed(5)
    assert drawn(50) == first and random.getstate() == state


def test_nothing_is_drawn_of_a_single_caption():
    state = random.getstate()
    assert set(drawn(10, prompt='{a} fox', template='on {}')) == {'on {a} fox'}
    assert set(drawn(10, prompt=('a fox',))) == {'a fox'}
    assert random.getstate() == state


@pytest.mark.parametrize('template', ['a photo', '{} and {}', ['{}', 'x']])
def test_a_template_has_one_place_for_the_caption(template):
    with pytest.raises(ValueError, match='`template` of PackInputs needs one {}'):
        PackInputs(template=template)
    with pytest.raises(ValueError, match=r'dropout must be a number in \[0, 1\]'):
        PackInputs(dropout=1.5)


def test_every_variant_in_order():
    pack = PackInputs(template=['{}', 'x {}'], dropout=0.1)
    assert [s['prompt'] for s in every_variant(lambda: pack(dict(prompt=['a', 'b'])))] == ['a', 'x a', 'b', 'x b', '']
    assert [s['prompt'] for s in every_variant(lambda: PackInputs()(dict(prompt='a')))] == ['a']
    assert {pack(dict(prompt='a'))['prompt'] for _ in range(200)} == {'a', 'x a', ''}  # afterwards as before


# In workers of MMEngine's loader


def captions_file(folder, rows=8):
    file = folder / 'p.jsonl'
    file.write_text(''.join(json.dumps(dict(id=i, prompt=[f'{i} {c}' for c in 'abcd'])) + '\n' for i in range(rows)))
    return str(file)


def epochs(path, seed, workers=2, batches=12):
    """The prompts of the first batches in MMEngine's order."""
    loader = Runner.build_dataloader(dict(
        batch_size=4, num_workers=workers, sampler=dict(type='InfiniteSampler', shuffle=True),
        dataset=dict(type='PromptDataset', ann_file=path)), seed=seed)
    iterator = iter(loader)
    return [tuple(next(iterator)['prompt']) for _ in range(batches)]


def test_draws_of_workers_are_those_of_the_seed_and_change_from_epoch_to_epoch(tmp_path):
    path = captions_file(tmp_path)
    first = epochs(path, 0)
    assert epochs(path, 0) == first != epochs(path, 1)
    of_row = {}
    for prompt in (prompt for batch in first for prompt in batch):  # six epochs of 8
        of_row.setdefault(prompt.split()[0], []).append(prompt)
    assert all(len(prompts) == 6 for prompts in of_row.values())
    assert sum(len(set(prompts)) > 1 for prompts in of_row.values()) >= 6


# In a cache


def test_a_cache_has_every_prompt_that_training_may_draw(make_cfg, tmp_path):
    cfg, out = make_cfg(), str(tmp_path / 'out')
    dataset = dict(type='PromptDataset', ann_file=captions_file(tmp_path, 3), pipeline=[
        dict(type='PackInputs', template=['{}', 'a photo of {}'], dropout=0.1)])
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(type='ConcatDataset', datasets=[
        dataset]))
    assert cache_embeddings(cfg, out, device='cpu').prompts == 3 * 4 * 2 + 1
    conditioner = EmbeddingConditioner(out)
    data = DATASETS.build(dataset)
    drawn = {data[i]['prompt'] for i in range(3) for _ in range(100)}
    assert len(drawn) == 25
    fields = conditioner.encode(sorted(drawn)).fields  # in the order of the alphabet, '' first
    assert all(len(field) == 25 for field in fields.values())
    null = conditioner.null().fields
    assert all((fields[name][:1] == null[name]).all() for name in fields)


@pytest.mark.parametrize('kind', ['WebDataset', 'HFStream'])
def test_a_stream_is_cached_in_one_pass(kind, tmp_path):
    if kind == 'WebDataset':
        write_tars(tmp_path, (2, 1))
        source, column = dict(urls=str(tmp_path / '*.tar')), 'json.meta.captions'
    else:
        write_rows(tmp_path, (2, 1))
        source = dict(path='parquet', options=dict(data_files=str(tmp_path / '*.parquet'), cache_dir=str(tmp_path)))
        column = 'meta.captions'
    cfg = toy_cfg(dataset=dict(type=kind, shuffle=2, **source, pipeline=[
        dict(type='PackInputs', prompt=column, dropout=0.5)]))
    assert cache_embeddings(cfg, str(tmp_path / 'out'), device='cpu').prompts == 7
    dataset = EmbeddingDataset(data_root=str(tmp_path / 'out'))
    assert {dataset[i]['prompt'] for i in range(7)} == {'', *(f'{c}{i}' for i in range(3) for c in 'ab')}
    report = cache_embeddings(cfg, str(tmp_path / 'out'), device='cpu')
    assert report.reused_shards == report.shards == 1


def test_what_another_transform_draws_is_refused_of_a_stream_too(tmp_path):
    cfg = toy_cfg(dataset=dict(type='CountedStream', lengths=[30], pipeline=[
        lambda sample: dict(prompt=random.choice('abc')), dict(type='PackInputs')]))
    with pytest.raises(ValueError, match='train_dataloader.dataset draws its prompts: sample .*let PackInputs draw'):
        cache_embeddings(cfg, str(tmp_path / 'out'), device='cpu')


def test_pairs_are_of_one_prompt_each(tmp_path):
    cfg = toy_cfg(dataset=dict(type='PromptDataset', ann_file=captions_file(tmp_path), indices=2))
    with pytest.raises(ValueError, match='train_dataloader.dataset draws its prompts, and a pair is of one'):
        dataset_of(cfg, 'train_dataloader.dataset')
    cfg.train_dataloader.dataset.column = 'prompt.0'
    assert len(dataset_of(cfg, 'train_dataloader.dataset')) == 2


def test_what_another_transform_draws_is_refused_still(tmp_path):
    cfg = toy_cfg(dataset=dict(type='PromptDataset', ann_file=captions_file(tmp_path), pipeline=[
        lambda sample: dict(prompt=random.choice(sample['prompt'])), dict(type='PackInputs', dropout=0.5)]))
    with pytest.raises(ValueError, match='train_dataloader.dataset draws its prompts: sample .*let PackInputs draw'):
        cache_embeddings(cfg, str(tmp_path / 'out'), device='cpu')
