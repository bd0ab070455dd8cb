"""Records that cannot be read: counted, named, left out up to a limit."""
import logging
import types
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from acme_plugin import config
from mmengine.dataset import BaseDataset, DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, HOOKS, TRANSFORMS
from mmengine.runner import Runner
from picture_support import NOISE
from PIL import Image
from scale_support import init_gloo, launch
from tests_support import tiny_backbone
from torch.utils.data import DataLoader, IterableDataset

from cdm_plugin.data import BucketBatchSampler, PromptDataset, SkipBadRecords, WeightedMixDataset
from cdm_plugin.data.bad_records import skipping_datasets
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.data.sample import SampleError
from cdm_plugin.hooks import BadRecordsHook


@DATASETS.register_module()
class BadTestRows(BaseDataset):
    """Of 20 rows, every fifth has no picture that anybody could read."""

    def __init__(self, bad=(0, 5, 10, 15), length=20):
        self.broken, self.length, self.read = set(bad), length, []
        super().__init__(pipeline=[PackInputs(meta=['row'])])

    def load_data_list(self):
        return [dict(prompt=i, row=i, height=8 + 8 * (i % 2), width=8) for i in range(self.length)]

    def prepare_data(self, idx):
        self.read.append(idx)
        if idx in self.broken:
            raise OSError(f'picture {idx} is gone')
        return super().prepare_data(idx)


class BadTestStream(IterableDataset):
    def __iter__(self):
        yield dict(prompt=0)


@pytest.fixture
def logged(monkeypatch):
    """The lines that are logged."""
    lines = []
    monkeypatch.setattr('cdm_plugin.data.bad_records.print_log', lambda text, *_, **__: lines.append(text))
    return lines


def pictures(folder, count=12, broken=(), sizes=((8, 8),)):
    """A csv of captioned pictures; the broken ones are no pictures, the first of them is missing."""
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        Image.fromarray(np.full((height, width, 3), 10 * i, np.uint8)).save(folder / f'{i}.png')
    for i in broken:
        (folder / f'{i}.png').write_text('<html>404 not found</html>')
    if broken:
        (folder / f'{broken[0]}.png').unlink()
    (folder / 'rows.csv').write_text('prompt,image\n' + ''.join(f'{i % 3},{i}.png\n' for i in range(count)))
    return dict(type='PromptDataset', ann_file='rows.csv', data_root=str(folder), data_prefix=dict(image=''),
                pipeline=[dict(type='PackInputs', image='image')])


def test_without_it_a_bad_record_is_an_error(tmp_path):
    with pytest.raises(SampleError, match=r'7\.png.* is no readable image'):
        PromptDataset(**{k: v for k, v in pictures(tmp_path, broken=[3, 7]).items() if k != 'type'})[7]


def test_another_record_stands_in_for_a_bad_one(logged):
    whole = BadTestRows(bad=())
    dataset = SkipBadRecords(dict(type='BadTestRows'), limit=4)
    first = [dataset[i]['prompt'] for i in range(20)]
    assert [i for i in range(20) if first[i] != whole[i]['prompt']] == [0, 5, 10, 15]
    assert not {0, 5, 10, 15} & set(first) and len({first[i] for i in (0, 5, 10, 15)}) > 1  # not always the same
    assert dataset.bad == [0, 5, 10, 15] and len(dataset) == 20
    assert [dataset[i]['prompt'] for i in range(20)] == first
    # Bad ones are read once, and found in any order.
    assert Counter(dataset.dataset.read)[5] == 1
    other = SkipBadRecords(dict(type='BadTestRows'), limit=4)
    assert [other[i]['prompt'] for i in reversed(range(20))] == first[::-1]
    assert len(logged) == 8 and logged[0] == ('left out, because it cannot be read: record 0 of BadTestRows: picture 0 '
                                              'is gone')


@pytest.mark.parametrize('workers', [1, 3])
def test_workers_count_together(workers, logged):
    dataset = SkipBadRecords(dict(type='BadTestRows'))
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=lambda samples: samples)
    seen = [[s['prompt'] for batch in loader for s in batch] for _ in range(2)]
    assert dataset.bad == [0, 5, 10, 15] and not logged  # the workers have said it
    alone = SkipBadRecords(dict(type='BadTestRows'))
    assert seen == 2 * [[alone[i]['prompt'] for i in range(20)]]


def test_more_than_the_limit_is_an_error_that_lists_the_first(logged):
    dataset = SkipBadRecords(dict(type='BadTestRows', bad=range(0, 20, 2)), limit=6)
    with pytest.raises(SampleError) as info:
        [dataset[i] for i in range(20)]
    assert str(info.value).startswith('7 bad records are more than SkipBadRecords.limit=6: mend them')
    assert 'record 0 of BadTestRows: picture 0 is gone; record' in str(info.value) and '; and 2 more' in str(info.value)
    assert '\n' not in str(info.value)
    everything = SkipBadRecords(dict(type='BadTestRows', bad=range(20)))
    with pytest.raises(SampleError, match='no record is left to stand in for record 3'):
        everything[3]


# Named by file and line


def test_broken_pictures_are_named(tmp_path, logged):
    broken = ('html.png', 'cut.png', 'empty.png', 'lost.png')
    Image.new('RGB', (8, 8)).save(tmp_path / 'good.png')
    (tmp_path / 'html.png').write_text('<html>404 not found</html>')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'good.png').read_bytes()[:-30])
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'p.jsonl').write_text('\n'.join(f'{{"prompt": "x", "image": "{name}"}}' for name in (
        *broken, 'good.png')))
    dataset = SkipBadRecords(dict(
        type='PromptDataset', ann_file='p.jsonl', data_root=str(tmp_path), data_prefix=dict(image=''),
        pipeline=[dict(type='PackInputs', image='image')]))
    for i in range(len(broken)):
        assert (dataset[i]['image'] == -1).all()
    assert dataset.bad == list(range(len(broken)))
    for line, name in enumerate(broken, start=1):
        (found,) = [text for text in logged if f'p.jsonl, line {line}: ' in text]
        assert name in found and 'readable image' in found


def test_malformed_rows_are_left_out_and_named(tmp_path, logged):
    rows = ['{"prompt": "a"}', '{"prompt": ', '{"text": "no prompt"}', '[1]', '{"prompt": ""}', '{"prompt": "b"}']
    (tmp_path / 'p.jsonl').write_text('\n'.join(rows))
    (tmp_path / 'p.csv').write_text('prompt,tag\na,1\na, b,2\n,3\nc,4\n')
    (tmp_path / 'p.txt').write_text('x\n' + 'y' * 2**18 + '\nz\n')
    for name, prompts, bad in (('p.jsonl', ['a', 'b'], (2, 3, 4, 5)), ('p.csv', ['a', 'c'], (3, 4)),
                               ('p.txt', ['x', 'z'], (2,))):
        inner = dict(type='PromptDataset', ann_file=str(tmp_path / name))
        with pytest.raises(ValueError, match=f'line {bad[0]}: '):
            DATASETS.build(inner)
        del logged[:]
        dataset = SkipBadRecords(dict(type='RepeatDataset', times=1, dataset=inner), limit=4)
        assert [dataset[i]['prompt'] for i in range(len(dataset))] == prompts
        assert len(logged) == len(dataset.left_out) == len(bad)
        for text, line in zip(logged, bad):
            assert f'{name}, line {line}: ' in text
    with pytest.raises(SampleError, match=r'4 bad records are more than SkipBadRecords.limit=3: .*p\.jsonl, line 2'):
        SkipBadRecords(dict(type='PromptDataset', ann_file=str(tmp_path / 'p.jsonl')), limit=3)
    with pytest.raises(ValueError, match='line 2: '):  # afterwards, everything is as it was
        DATASETS.build(dict(type='PromptDataset', ann_file=str(tmp_path / 'p.jsonl')))


def test_what_is_no_record_stays_an_error(tmp_path):
    with pytest.raises(ValueError, match='SkipBadRecords.dataset is a BadTestStream, a stream'):
        SkipBadRecords(BadTestStream())
    with pytest.raises(FileNotFoundError):
        SkipBadRecords(dict(type='PromptDataset', ann_file=str(tmp_path / 'p.jsonl')))
    (tmp_path / 'p.csv').write_text('prompt\n"open\n')
    with pytest.raises(ValueError, match='malformed csv'):
        SkipBadRecords(dict(type='PromptDataset', ann_file=str(tmp_path / 'p.csv')))


# Beside other parts


def test_in_buckets_a_picture_of_the_same_size_stands_in(tmp_path, logged):
    sizes = [8, (16, 8)]
    inner = pictures(tmp_path, 16, broken=[2], sizes=((8, 8), (8, 8), (16, 8)))
    Image.fromarray(NOISE).save(tmp_path / '4.png', 'JPEG')
    data = (tmp_path / '4.png').read_bytes()
    (tmp_path / '4.png').write_bytes(data[:len(data) // 2])  # its header is whole
    dataset = SkipBadRecords(inner)
    sampler = BucketBatchSampler(DefaultSampler(dataset, shuffle=False, seed=0), 1, sizes)
    assert dataset.bad == [2] and not [batch for batch in sampler if 2 in batch]
    stand_in = dataset[4]['image']
    assert stand_in.shape == (3, 8, 8) and dataset.bad == [2, 4] and 'rows.csv, line 6' in logged[-1]
    for index in range(16):
        if index != 2:
            assert dataset[index]['image'].shape[1] == (16 if index % 3 == 2 else 8)


@pytest.mark.parametrize('outer', [
    lambda inner: dict(type='RepeatDataset', times=2, dataset=inner),
    lambda inner: dict(type='SkipBadRecords', dataset=dict(type='ConcatDataset', datasets=[inner])),
    lambda inner: dict(type='WeightedMixDataset', sources=dict(a=dict(dataset=inner)))])
def test_in_buckets_it_must_stand_outermost(outer, tmp_path):
    dataset = DATASETS.build(outer(dict(type='SkipBadRecords', dataset=pictures(tmp_path, 4))))
    with pytest.raises(ValueError, match='SkipBadRecords must stand around all other wrappers of train_dataloader'):
        BucketBatchSampler(DefaultSampler(dataset, shuffle=False, seed=0), 1, [8, (16, 8)])


def test_it_is_found_in_a_mix():
    one, other = (SkipBadRecords(BadTestRows()) for _ in range(2))
    mix = WeightedMixDataset(dict(a=dict(dataset=one), b=dict(dataset=BadTestRows()), c=dict(dataset=other)))
    assert skipping_datasets(mix) == [one, other] and skipping_datasets(BadTestRows()) == []
    assert skipping_datasets(SkipBadRecords(mix.datasets[1])) != []


@TRANSFORMS.register_module()
class BadTestLabel:
    def __call__(self, sample):
        return dict(sample, prompt=int(sample['prompt']))


@HOOKS.register_module()
class BadTestHook(Hook):
    def __init__(self):
        self.prompts = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.prompts += data_batch['prompt']


def train(folder, pictures_cfg, iterations, resume=False, workers=0):
    torch.manual_seed(0)
    cfg = config(folder, iterations, resume)
    cfg.model = dict(type='FlowMatching', backbone=tiny_backbone(), image_size=8)
    cfg.custom_hooks.append(dict(type='BadTestHook'))
    cfg.train_dataloader = dict(
        batch_size=2, num_workers=workers, sampler=dict(type='InfiniteSampler', seed=1), dataset=dict(
            type='SkipBadRecords', limit=2, dataset=pictures_cfg))
    cfg.optim_wrapper = dict(constructor=cfg.optim_wrapper.constructor, student=cfg.optim_wrapper.student)
    runner = Runner.from_cfg(cfg)
    runner.train()
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, BadTestHook)]
    return hook.prompts, runner.message_hub.get_scalar('train/bad_records').data[0].tolist()


def test_a_run_goes_on_without_them_and_resumes(tmp_path):
    cfg = pictures(tmp_path, 12, broken=[3, 7])
    cfg['pipeline'] = [dict(type='BadTestLabel'), dict(type='PackInputs', image='image', channels=1)]
    dataset = SkipBadRecords(cfg)
    first, counts = train(tmp_path / 'run', cfg, 4, workers=1)
    rest, more = train(tmp_path / 'run', cfg, 8, resume=True)
    assert first + rest == [dataset[i]['prompt'] for i in islice(InfiniteSampler(dataset, seed=1), 16)]
    assert counts[0] == 0 and more[-1] == len(dataset.bad) == 2


def count_on_two_ranks(limit):
    """Each rank has found others of the bad records, and one that both have."""
    rank = init_gloo()
    MMLogger.get_instance('bad', log_level=logging.ERROR)
    dataset, scalars = SkipBadRecords(BadTestRows(), limit=limit), []
    hub = types.SimpleNamespace(update_scalar=lambda name, value: scalars.append((name, value)))
    hook, runner = BadRecordsHook(), types.SimpleNamespace(
        train_dataloader=types.SimpleNamespace(dataset=dataset), message_hub=hub, iter=49, max_iters=100)
    hook.before_train(runner)
    for i in ((0, 5), (5, 10))[rank]:
        dataset[i]
    try:
        hook.after_train_iter(runner, 49)
    except SampleError as error:
        return str(error)
    return scalars


def test_ranks_count_together():
    assert launch(count_on_two_ranks, 3, timeout=120) == 2 * [[('train/bad_records', 0), ('train/bad_records', 3)]]


@pytest.mark.slow
def test_the_limit_is_that_of_all_ranks():
    for text in launch(count_on_two_ranks, 2, timeout=120):
        assert text.startswith('3 bad records are more than SkipBadRecords.limit=2') and text.count('is gone') == 3
