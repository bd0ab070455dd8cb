"""Streams: who reads what, in which order, and where one goes on."""
import json
import random
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from cache_support import toy_cfg
from mmengine.registry import DATASETS
from stream_support import CountedStream, counts, given, loader, readers, shards
from torch.utils.data import DataLoader

from cdm_plugin.data import PackInputs, cache_latents
from cdm_plugin.data.pairs import dataset_of
from cdm_plugin.data.sample import SampleError
from cdm_plugin.data.stream import POSITION, Position

UNEVEN = (1, 7, 2, 4, 5, 3)  # records of each shard
TOTAL = sum(UNEVEN)


@pytest.mark.parametrize('ranks, workers, lengths', [(2, 2, UNEVEN), (2, 2, (13,)), (2, 2, (3, 8)), (1, 1, UNEVEN),
                                                     (3, 2, UNEVEN), (4, 4, (3,))])
@pytest.mark.parametrize('shuffle', [0, 1, 4])
@pytest.mark.parametrize('share', [None, 'samples'])
def test_a_pass_has_every_sample_once(ranks, workers, lengths, shuffle, share):
    turns = 3
    found = counts(ranks, workers, lengths, turns, shuffle=shuffle, share=share)
    assert found == Counter({(turn, name): 1 for turn in range(turns) for name in shards(lengths)})


@pytest.mark.parametrize('lengths', [UNEVEN, (13,)])
@pytest.mark.parametrize('shuffle', [0, 4])
def test_shared_by_samples_no_sample_is_ahead_of_another(lengths, shuffle):
    """At any time: readers that take turns, as batches of one do, have read each as often, but for a window."""
    streams = [iter_of(reader, 4, lengths, shuffle=shuffle, share='samples') for reader in range(4)]
    seen = Counter()
    for n in range(1, 60):
        seen.update(next(stream)['prompt'] for stream in streams)
        if shuffle == 0:  # what has been read is a prefix of the files, again and again
            expected = Counter(shards(lengths)[i % sum(lengths)] for i in range(4 * n))
            assert seen == expected
    assert max(seen.values()) - min(seen.values()) <= 1 + bool(shuffle) * -(-4 * shuffle // sum(lengths))


def iter_of(reader, ranks, lengths, **kwargs):
    stream = CountedStream(lengths, **kwargs)
    stream.rank, stream.world_size = reader, ranks
    return iter(stream)


@pytest.mark.parametrize('shuffle', [0, 1, 4, 100])
@pytest.mark.parametrize('share', ['shards', 'samples'])
@pytest.mark.parametrize('stop', [0, 1, 3, 4, 5, 17, 18, 19, 40])
def test_a_reader_goes_on_behind_any_sample(shuffle, share, stop):
    kwargs = dict(shuffle=shuffle, share=share)
    whole = list(islice(iter_of(1, 2, UNEVEN, **kwargs), 60))
    worker, *position = json.loads(whole[stop][POSITION])
    rest = CountedStream(UNEVEN, **kwargs)
    rest.rank, rest.world_size = 1, 2
    rest.go_on({worker: Position(*position)}, 0)
    assert list(islice(rest, 59 - stop)) == whole[stop + 1:]


def test_the_order_is_that_of_the_files_or_another_one_each_pass():
    def passes(**kwargs):
        names = [sample['prompt'] for sample in islice(iter_of(0, 1, UNEVEN, **kwargs), 3 * TOTAL)]
        return [names[i:i + TOTAL] for i in range(0, 3 * TOTAL, TOTAL)]

    assert passes() == [shards(UNEVEN)] * 3
    mixed = passes(shuffle=5)
    assert [sorted(part) for part in mixed] == [sorted(shards(UNEVEN))] * 3
    assert len({tuple(part) for part in (*mixed, shards(UNEVEN))}) == 4
    assert passes(shuffle=5) == mixed != passes(shuffle=5, seed=1)


def test_a_pass_of_one_reader_is_the_same_in_a_worker_of_a_training():
    stream = CountedStream(UNEVEN)
    stream.rank, stream.world_size = 1, 2
    stream.go_on({0: Position(5, 1, 1, 20, 0)}, 0)
    assert [sample['prompt'] for sample in stream.once()] == shards(UNEVEN)
    assert all(POSITION not in sample for sample in stream.once())


def test_too_few_shards_for_the_readers_is_an_error_if_they_are_to_be_shared():
    with pytest.raises(ValueError, match="`share` of CountedStream is 'shards', of which there are 6 for 7 readers"):
        next(iter_of(0, 7, UNEVEN, share='shards'))
    assert readers(4, UNEVEN, share=None) == readers(4, UNEVEN, share='shards') != readers(4, UNEVEN, share='samples')
    assert readers(7, UNEVEN, share=None) == readers(7, UNEVEN, share='samples')


def test_empty_shards_are_passed_over():
    assert counts(2, 2, (0, 3, 0, 0, 2, 0), 9, shuffle=2) == Counter(
        {(turn, name): 1 for turn in range(9) for name in ('1/0', '1/1', '1/2', '4/0', '4/1')})


@pytest.mark.parametrize('share', ['shards', 'samples'])
def test_nothing_to_read_is_an_error_not_a_hang(share):
    with pytest.raises(ValueError, match="no record in its shards of 0, 0, 4: .* or set share='samples'"):
        list(islice(iter_of(0, 3, (0, 0, 4), share='shards'), 1))
    with pytest.raises(ValueError, match='no record in its shards of 0, 0'):
        next(iter_of(0, 2, (0, 0), share=share))


@pytest.mark.parametrize('shuffle, collate', [(0, 'default_collate'), (5, 'pseudo_collate')])
def test_workers_share_and_go_on_whatever_they_have_read_ahead(shuffle, collate):
    """2 ranks x 2 workers of torch's loader, stopped after an odd number of batches."""
    samples, rest = {}, {}
    for rank in range(2):
        whole = iter(loader(rank, 2, UNEVEN, collate, shuffle=shuffle))
        batches = [next(whole) for _ in range(14)]
        samples[rank] = [name for batch in batches for name in batch['prompt']]
        positions = {}
        for batch in batches[:5]:
            worker, *position = json.loads(batch[POSITION][-1])
            positions[worker] = Position(*position)
        second = loader(rank, 2, UNEVEN, collate, shuffle=shuffle)
        second.dataset.go_on(positions, (worker + 1) % 2)
        rest[rank] = [name for batch in islice(iter(second), 9) for name in batch['prompt']]
        assert rest[rank] == samples[rank][15:]
    assert set(samples[0]) | set(samples[1]) == set(shards(UNEVEN))


def test_a_record_that_fails_is_named_and_left_out_up_to_a_limit(monkeypatch):
    stream = iter(CountedStream((2, 3), bad=('1/1',)))
    message = ("1/1 of a test: a sample has no field 'prompt', only ['text']: name the field that holds the prompt in "
               "the dataset's pipeline, dict(type='PackInputs', prompt=...)")
    assert [next(stream)['prompt'] for _ in range(3)] == ['0/0', '0/1', '1/0']
    with pytest.raises(SampleError, match=re.escape(message)):
        next(stream)
    lines = []
    monkeypatch.setattr('cdm_plugin.data.stream.print_log', lambda text, *args, **kwargs: lines.append(text))
    stream = iter(CountedStream((2, 3), bad=('1/1',), max_bad=2))
    assert [next(stream)['prompt'] for _ in range(20)] == 5 * ['0/0', '0/1', '1/0', '1/2']  # once, whatever the passes
    assert lines == ['left out, because it cannot be read: ' + message]
    stream = iter(CountedStream((2, 3), bad=('0/1', '1/1', '1/2'), max_bad=2))
    assert [next(stream)['prompt'] for _ in range(2)] == ['0/0', '1/0']
    with pytest.raises(SampleError, match='1/2 of a test'):
        next(stream)


@pytest.mark.parametrize('stop', [1, 17, 18, 30])
def test_what_a_pipeline_draws_goes_on_too_and_is_another_each_pass(stop):
    def draw(sample):
        return {**sample, 'prompt': f'{random.random()} {np.random.rand()} {torch.rand(()).item()}'}

    kwargs = dict(shuffle=3, pipeline=[draw, PackInputs()])
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    whole = list(islice(iter_of(1, 2, UNEVEN, **kwargs), 40))
    assert len({sample['prompt'] for sample in whole}) == 40
    rest = CountedStream(UNEVEN, **kwargs)
    rest.rank, rest.world_size = 1, 2
    rest.go_on({0: Position(*json.loads(whole[stop][POSITION])[1:])}, 0)
    assert list(islice(rest, 39 - stop)) == whole[stop + 1:]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_what_a_pipeline_leaves_out_is_not_given_and_what_is_no_sample_is_an_error():
    stream = CountedStream((4,), pipeline=[lambda sample: None if sample['prompt'] == '0/1' else sample])
    assert [sample['prompt'] for sample in stream.once()] == ['0/0', '0/2', '0/3']
    assert given(stream, 4) == ['0/0', '0/2', '0/3', '0/0']
    with pytest.raises(SampleError, match='0/0 of a test: the pipeline of CountedStream gives a str'):
        next(iter(CountedStream((4,), pipeline=[lambda sample: 'text'])))


def test_arguments_are_checked():
    for kwargs, message in ((dict(shuffle=-1), 'shuffle must be a whole number of 0 or more'),
                            (dict(share='rows'), "share must be 'shards' or 'samples'")):
        with pytest.raises(ValueError, match=message):
            DATASETS.build(dict(type='CountedStream', lengths=(1,), **kwargs))


def test_a_stream_is_no_dataset_with_numbered_samples(tmp_path):
    stream = dict(type='CountedStream', lengths=UNEVEN)
    for wrapper in (dict(type='SkipBadRecords', dataset=stream),
                    dict(type='WeightedMixDataset', sources=dict(one=dict(dataset=stream)))):
        with pytest.raises(ValueError, match='mix datasets, not streams|a stream without numbers'):
            DATASETS.build(wrapper)
    with pytest.raises(ValueError, match='train_dataloader.dataset is a stream .*whose samples have no numbers'):
        cache_latents(toy_cfg(dataset=stream), str(tmp_path / 'latents'))
    with pytest.raises(ValueError, match='train_dataloader.dataset must have a length of 1 or more'):
        dataset_of(toy_cfg(dataset=stream), 'train_dataloader.dataset')


def test_a_spawned_worker_knows_its_rank():
    import pickle
    stream = CountedStream(UNEVEN)
    stream.rank, stream.world_size = 1, 2
    copy = pickle.loads(pickle.dumps(stream))
    assert given(copy, 10) == given(stream, 10)
    assert isinstance(DataLoader(copy), DataLoader)
