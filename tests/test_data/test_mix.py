"""Several datasets in one run: proportions, orders, and losses by source."""
import itertools
import types
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from acme_plugin import config
from cache_support import toy_cfg
from mmengine.config import Config
from mmengine.dataset import BaseDataset, DefaultSampler, InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS, HOOKS
from mmengine.runner import Runner
from scale_support import init_gloo, launch
from tests_support import recording_optimizers, same_bits, tiny_backbone, tiny_method
from torch.utils.data import DataLoader, Dataset

from cdm_plugin.commands.compare.runs import Run, _read_event_scalars
from cdm_plugin.data import BucketBatchSampler, MixSampler, WeightedMixDataset, buckets
from cdm_plugin.data.embeddings.cache import read_prompts
from cdm_plugin.data.mix import quota_schedule
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.engine.refusals import refusals
from cdm_plugin.hooks.scalars_hook import ScalarsHook, _over_ranks
from cdm_plugin.methods.phases import Iteration


@DATASETS.register_module()
class MixTestRows(Dataset):
    """Numbered labels of one source, with sizes of pictures that nobody has to open."""

    def __init__(self, name='a', length=7, sizes=((8, 8),)):
        self.name, self.length, self.sizes = name, length, sizes

    def __len__(self):
        return self.length

    def get_data_info(self, i):
        height, width = self.sizes[i % len(self.sizes)]
        return dict(prompt=i % 3, height=height, width=width)

    def __getitem__(self, i):
        return dict(prompt=i % 3, meta=dict(name=self.name, number=i))


def sources(weights=(3, 1), lengths=(7, 5), **kwargs):
    return {name: dict(weight=weight, dataset=dict(type='MixTestRows', name=name, length=length, **kwargs))
            for name, weight, length in zip('abcdefgh', weights, lengths)}


def mix(weights=(3, 1), lengths=(7, 5), seed=1, **kwargs):
    return WeightedMixDataset(sources(weights, lengths, **kwargs), seed)


# Proportions


@pytest.mark.parametrize('k, most', [(1, 9), (2, 12), (3, 7), (4, 5)])
def test_every_prefix_and_window_has_its_proportions(k, most):
    """Tijdeman's bound, over all weights up to a size, in exact arithmetic."""
    for weights in itertools.product(range(1, most), repeat=k):
        total, schedule = sum(weights), quota_schedule(weights)
        counts = np.zeros((2 * total + 1, k), int)
        for n, source in enumerate(np.tile(schedule, 2)):
            counts[n + 1] = counts[n]
            counts[n + 1, source] += 1
        assert counts[total].tolist() == list(weights)
        off = np.array(counts * total - np.arange(2 * total + 1)[:, None] * weights)  # in W-ths
        bound = total * (1 - Fraction(1, max(2 * k - 2, 1)))
        assert abs(off).max() <= bound < total
        for start in range(total):
            assert abs(off[start:] - off[start]).max() <= 2 * bound < 2 * total


def test_weights_are_proportions_and_no_number_of_samples():
    assert mix((0.7, 0.3)).shares == mix((7, 3)).shares == mix((2.1, 0.9)).shares == dict(
        a=Fraction(7, 10), b=Fraction(3, 10))
    assert [s['source'] for s in itertools.islice(mix((0.75, 0.25)), 8)] == [
        s['source'] for s in itertools.islice(mix((30, 10), (700, 5)), 8)]
    assert mix((1, 3), (4, 4)).shares == dict(a=Fraction(1, 4), b=Fraction(3, 4))


def test_a_source_comes_pass_by_pass_in_orders_of_its_own():
    dataset, seen = mix((3, 1), (7, 5)), dict(a=[], b=[])
    for draw in range(4 * 70):
        sample = dataset[draw]
        assert sample['source'] == sample['meta']['name']
        seen[sample['source']].append(sample['meta']['number'])
    for name, length in dict(a=7, b=5).items():
        passes = [tuple(seen[name][i:i + length]) for i in range(0, 70, length)]
        assert all(sorted(one) == list(range(length)) for one in passes)
        assert len(set(passes)) > 8  # shuffled anew
    assert len(dataset) == 4 * 5  # the first whole schedule after which all of b and of a has come
    assert {(s['source'], s['meta']['number']) for s in dataset} == {
        *(('a', i) for i in range(7)), *(('b', i) for i in range(5))}
    orders = {seed: [mix(seed=seed).locate(i) for i in range(40)] for seed in (1, 2)}
    assert orders[1] == [dataset.locate(i) for i in range(40)] != orders[2]
    # In any order of asking, as workers and resumed runs do.
    assert [dataset.locate(i) for i in reversed(range(40))] == orders[1][::-1]


def test_what_cannot_be_mixed_is_named():
    rows = dict(type='MixTestRows')
    for given, message in (
            ({}, 'sources is empty'), (dict(a=rows), r'sources\.a must be dict\(dataset=..., weight=...\)'),
            ({'a/b': dict(dataset=rows)}, 'without a slash'),
            (dict(a=dict(dataset=rows, weight=0)), r'sources\.a\.weight must be a number above 0, but is 0; leave'),
            (dict(a=dict(dataset=rows, weight=float('nan'))), 'weight must be'),
            (dict(a=dict(dataset=rows, weight='1')), 'weight must be'),
            (dict(a=dict(dataset=rows, weight=1 / 3), b=dict(dataset=rows)), 'round them, such as to'),
            (dict(a=dict(dataset=[])), r'sources\.a\.dataset is empty'),
            (dict(a=dict(dataset=iter([1]))), 'no length')):
        with pytest.raises(ValueError, match=message) as info:
            WeightedMixDataset(given)
        assert '\n' not in str(info.value)
    with pytest.raises(ValueError, match="samples that are a int: end its pipeline with dict"):
        WeightedMixDataset(dict(a=dict(dataset=[1, 2])))[0]
    with pytest.raises(IndexError):
        mix()[-1]


# The sampler


def draws(rank, world, count, monkeypatch, dataset, seed=3):
    monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (rank, world))
    return list(itertools.islice(MixSampler(dataset, seed=seed), count))


def test_ranks_together_have_the_draws_in_their_order(monkeypatch):
    dataset = mix((3, 1), seed=None)
    assert draws(0, 1, 50, monkeypatch, dataset) == list(range(50)) and dataset.seed == 3
    ranks = [draws(rank, 4, 200, monkeypatch, dataset) for rank in range(4)]
    for n, together in enumerate(zip(*ranks)):
        assert sorted(together) == list(range(4 * n, 4 * n + 4))
    # The schedule is as long as there are ranks, and still each of them has of both sources.
    for rank in ranks:
        assert 20 < Counter(dataset.locate(i)[0] for i in rank)[1] < 80
    assert ranks[0] == draws(0, 4, 200, monkeypatch, dataset)
    assert mix(seed=5).seed == 5 and draws(0, 1, 1, monkeypatch, own := mix(seed=5)) and own.seed == 5


@pytest.mark.parametrize('workers', [0, 2])
def test_a_loader_keeps_the_order(workers):
    dataset = mix((2, 1))
    loader = DataLoader(dataset, batch_size=4, sampler=MixSampler(dataset, seed=0), num_workers=workers,
                        collate_fn=lambda samples: samples)
    seen = [(s['source'], s['meta']['number']) for batch in itertools.islice(loader, 6) for s in batch]
    assert seen == [(dataset[i]['source'], dataset[i]['meta']['number']) for i in range(24)]


def run_config(dataset, sampler, **loader):
    return Config(dict(model=dict(type='CDM'), train_dataloader=dict(dataset=dataset, sampler=sampler, **loader)))


def test_samplers_that_break_the_order_are_refused_by_key():
    one = dict(type='WeightedMixDataset', sources=sources())
    for sampler in (dict(type='InfiniteSampler'), dict(type='InfiniteSampler', shuffle=True), DefaultSampler,
                    dict(type=InfiniteSampler), dict(type='DefaultSampler', shuffle=True)):
        (line,) = refusals(run_config(one, sampler))
        assert line.startswith('train_dataloader.sampler shuffles') and "dict(type='MixSampler')" in line
    for sampler in (dict(type='MixSampler'), dict(type=MixSampler), dict(type='DefaultSampler', shuffle=False),
                    dict(type='InfiniteSampler', shuffle=False)):
        assert not list(refusals(run_config(one, sampler)))
    for outer in (dict(type='RepeatDataset', times=2, dataset=one), dict(type='ConcatDataset', datasets=[one]),
                  dict(type='SkipBadRecords', dataset=dict(type='RepeatDataset', times=2, dataset=one))):
        (line,) = refusals(run_config(outer, dict(type='DefaultSampler', shuffle=False)))
        assert 'inside of another dataset' in line
    assert not list(refusals(run_config(dict(type='RepeatDataset', times=2, dataset=dict(type='MixTestRows')),
                                        dict(type='DefaultSampler'))))
    with pytest.raises(ValueError, match='MixSampler.dataset must be WeightedMixDataset, but is .*MixTestRows'):
        MixSampler(MixTestRows())


@pytest.mark.parametrize('world', [1, 2])
def test_buckets_take_the_draws_in_their_order(world, monkeypatch):
    sizes = [8, (16, 8)]
    dataset = mix((3, 1), (8, 6), sizes=((8, 8), (8, 8), (16, 8)))

    def batches(rank, count):
        monkeypatch.setattr(buckets, 'get_dist_info', lambda: (rank, world))
        made = BucketBatchSampler(MixSampler(dataset, seed=0), 2, sizes)
        return list(itertools.islice(made, count))

    ranks = [batches(rank, 400 // world) for rank in range(world)]
    together = [[i for part in step for i in part] for step in zip(*ranks)]
    for batch in together:
        assert len({dataset.get_data_info(i)['height'] for i in batch}) == 1
    seen = [i for batch in together for i in batch]
    assert len(set(seen)) == len(seen) == 800
    # All draws come, but for those that wait: less than a batch of all ranks a size.
    assert set(range(max(seen) + 1)) - set(seen) <= set(range(max(seen) - 8 * world, max(seen)))
    for n in range(1, 801, 7):
        shares = Counter(dataset.locate(i)[0] for i in seen[:n])
        assert abs(shares[1] - n / 4) < 1 + 2 * 2 * world


# Losses by source


def test_losses_by_source_are_means_over_their_samples():
    iteration = Iteration(dict(source=['a', 'b', 'a', 'a']), None, None)
    iteration.per_sample['fake'] = [torch.tensor([1.0, 5, 2, 6]), torch.tensor([3.0, 7, 2, 4])]
    iteration.log_sources('fake')
    iteration.log_sources('student')  # not its turn
    assert {name: float(value) for name, value in iteration.logs.items()} == {
        'loss_fake/a': 3, 'loss_fake/b': 6, 'count/a': 3, 'count/b': 1}
    plain = Iteration(dict(prompt=['a']), None, None)
    plain.per_sample['fake'] = [torch.ones(1)]
    plain.log_sources('fake')
    assert not plain.logs


@pytest.mark.parametrize('type, kwargs', [
    ('CDM', dict(student_every=1, fake_steps=2)), ('FlowMatching', {}),
    ('DMD2', dict(student_every=1, losses=dict(gan=dict(type='GANLoss'))))])
def test_a_method_logs_what_its_losses_are_made_of(type, kwargs):
    """The mean over all samples is the loss itself."""
    method = tiny_method(type, **kwargs)
    rows = [dict(prompt=i % 3, image=torch.rand(1, 8, 8) * 2 - 1, source='abcab'[i]) for i in range(5)]
    logs = method.train_step(rows, recording_optimizers(method))
    by_source = dict(a=2, b=2, c=1)
    assert {name: logs[f'count/{name}'] for name in by_source} == by_source
    trained = ('student',) if type == 'FlowMatching' else ('student', 'fake')
    for role in trained:
        own = {name: float(logs[f'loss_{role}/{name}']) for name in by_source}
        assert len(set(own.values())) == 3
        whole = sum(count * own[name] for name, count in by_source.items()) / 5
        expected = float(logs[f'loss_{role}'])
        if role == 'fake' and 'losses' in kwargs:  # the discriminator's part is of no single sample
            expected -= method.losses['gan'].fake_weight * float(logs['loss_discriminator'])
        assert whole == pytest.approx(expected, rel=1e-5)
    without = tiny_method(type, **kwargs).train_step(
        [{k: v for k, v in row.items() if k != 'source'} for row in rows], recording_optimizers(method))
    assert not [name for name in without if '/' in name]


def test_compared_runs_show_them_as_training():
    run, names = Run('a'), ('loss_student/web', 'count/web', 'CLIPScore/score')
    _read_event_scalars(types.SimpleNamespace(
        Tags=lambda: dict(scalars=names), Scalars=lambda name: [types.SimpleNamespace(step=1, value=2.0)]), run)
    assert set(run.scalars) == set(names) and run.metrics == {'CLIPScore/score'}


def test_means_over_ranks_weigh_samples():
    logs = [{'loss_fake/a': 1.0, 'count/a': 3.0, 'loss_fake': 1.0}, {'loss_fake/a': 5.0, 'count/a': 1.0,
                                                                       'loss_fake': 2.0}]
    assert _over_ranks('loss_fake/a', logs) == 2 and _over_ranks('count/a', logs) == 4
    assert _over_ranks('loss_fake', logs) == 1.5 and _over_ranks('loss_fake/b', [{'loss_fake/b': 7.0}]) == 7


@HOOKS.register_module()
class MixTestHook(Hook):
    """What came in each iteration, and what it logged on this rank."""

    def __init__(self):
        self.seen, self.logs = [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seen.append(list(data_batch['source']))
        self.logs.append({name: float(value) for name, value in outputs.items()})


def train(folder, iterations, resume=False, world=1, **changes):
    torch.manual_seed(0)
    cfg = config(folder, iterations, resume)
    cfg.model = dict(type='CDM', backbone=tiny_backbone(), student_every=1)
    cfg.custom_hooks.append(dict(type='MixTestHook'))
    cfg.train_dataloader = dict(
        batch_size=2, num_workers=0, sampler=dict(type='MixSampler'), collate_fn=dict(type='default_collate'),
        dataset=dict(type='WeightedMixDataset', sources=dict(
            web=dict(dataset=dict(type='LabelDataset', num_classes=3, length=8), weight=3),
            art=dict(dataset=dict(type='AcmeLabels'), weight=1))))
    cfg.optim_wrapper.pop('discriminator')
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=2)
    cfg.merge_from_dict(changes)
    if world > 1:
        cfg.update(launcher='pytorch', model_wrapper_cfg=dict(type='DistillationDataParallel'))
    runner = Runner.from_cfg(cfg)
    runner.train()
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, MixTestHook)]
    history = {key.removeprefix('train/'): buffer.data[0].tolist()
               for key, buffer in runner.message_hub.log_scalars.items()}
    return hook, history


@DATASETS.register_module()
class AcmeLabels(BaseDataset):
    """Another team's dataset."""

    def __init__(self):
        super().__init__(pipeline=[PackInputs()])

    def load_data_list(self):
        return [dict(prompt=i % 2) for i in range(5)]


def test_a_run_resumes_to_the_sample(tmp_path):
    whole, history = train(tmp_path / 'whole', 8)
    counts = Counter(source for batch in whole.seen for source in batch)
    assert counts == dict(web=12, art=4)
    assert history['count/web'] == [float(batch.count('web')) for batch in whole.seen if 'web' in batch]
    assert history['loss_fake/art'] == [logs['loss_fake/art'] for logs in whole.logs if 'loss_fake/art' in logs]
    first, _ = train(tmp_path / 'parts', 4)
    rest, continued = train(tmp_path / 'parts', 8, resume=True)
    assert first.seen + rest.seen == whole.seen and first.logs + rest.logs == whole.logs
    clocks = {name: values for name, values in continued.items() if 'time' in name or name == 'memory'}
    assert continued == {**history, **clocks}
    state = [torch.load(tmp_path / name / 'iter_8.pth', weights_only=True) for name in ('whole', 'parts')]
    for part in ('state_dict', 'optimizer', 'student_ema'):
        same_bits(state[0][part], state[1][part], part)


def flush_on_two_ranks():
    """The history that a ScalarsHook makes of what each of two ranks has logged in three iterations."""
    rank, hub = init_gloo(), MessageHub('mix')
    runner = types.SimpleNamespace(message_hub=hub, model=tiny_method())
    hook, loss = ScalarsHook(), torch.tensor
    hook._waiting = [
        [{'loss_fake/web': loss(1.0), 'count/web': 2.0}, {'loss_fake/web': loss(4.0), 'count/web': 1.0,
                                                           'loss_fake/art': loss(2.0), 'count/art': 1.0}],
        [{'loss_fake/web': loss(2.0), 'count/web': 2.0}, {'loss_fake/web': loss(8.0), 'count/web': 2.0}],
        [{'loss_fake/web': loss(3.0), 'count/web': 2.0}, {'loss_fake/art': loss(7.0), 'count/art': 2.0}]]
    hook._waiting = [both[rank] for both in hook._waiting]
    hook._flush(runner)
    return {key: buffer.data[0].tolist() for key, buffer in hub.log_scalars.items()}


def test_a_source_that_one_rank_has_not_neither_hangs_nor_biases():
    for history in launch(flush_on_two_ranks, timeout=120):  # both ranks know of both sources
        assert history == {
            'train/loss_fake/web': [2, 5, 3], 'train/count/web': [3, 4, 2], 'train/loss_fake/art': [2, 7],
            'train/count/art': [1, 2]}


def two_ranks(folder):
    init_gloo()
    hook, history = train(folder, 6, world=2, **{'train_dataloader.batch_size': 1})
    return hook.seen, hook.logs, history


@pytest.mark.slow
def test_two_ranks_log_sources_that_one_of_them_has(tmp_path):
    (seen_0, logs_0, history), (seen_1, logs_1, _) = launch(two_ranks, str(tmp_path), timeout=120)
    together = [source for step in zip(seen_0, seen_1) for batch in step for source in batch]
    assert Counter(together) == dict(web=9, art=3)
    assert any(one != other for one, other in zip(seen_0, seen_1))
    for name in ('web', 'art'):
        for role in ('student', 'fake'):
            key = f'loss_{role}/{name}'
            means = [[logs[key] for logs in step if key in logs] for step in zip(logs_0, logs_1)]
            assert history[key] == pytest.approx([sum(values) / len(values) for values in means if values], rel=1e-6)
        assert history[f'count/{name}'] == [
            float(sum(batch.count(name) for batch in step)) for step in zip(seen_0, seen_1)
            if any(name in batch for batch in step)]


def test_the_prompts_of_a_mix_are_cached_once_each():
    captions = [dict(type='CacheTestCaptions', captions=list(texts), field='prompt', pipeline=[dict(type='PackInputs')])
                for texts in ('abc', 'cd')]
    cfg = toy_cfg(dataset=dict(type='WeightedMixDataset', sources={
        name: dict(dataset=dataset, weight=weight) for name, dataset, weight in zip('xy', captions, (99, 1))}))
    assert read_prompts(cfg, 'train_dataloader.dataset') == ['a', 'b', 'c', 'd']
