"""A stream shared by two processes of two workers each, uneven shards, killed and resumed."""
import itertools
from collections import Counter

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS
from mmengine.runner import FlexibleRunner, Runner
from scale_support import init_gloo, launch
from stream_support import shards
from tests_support import same_bits, tiny_backbone

LENGTHS = [3, 9, 1, 4, 7]


@HOOKS.register_module()
class ReadHook(Hook):
    """Keeps what this rank has trained on."""
    read = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.read += data_batch['meta']['name'] if isinstance(data_batch['meta'], dict) else [
            meta['name'] for meta in data_batch['meta']]


@TRANSFORMS.register_module()
class LabelledRecord:
    """The records' names as `meta`, and a class label."""

    def __call__(self, sample):
        return {**sample, 'name': sample['prompt'], 'prompt': 1}


SHARDED = dict(strategy=dict(type='DistillationDeepSpeedStrategy', zero_optimization=dict(stage=2)))


def train(folder, name, iterations, resume, shuffle, sharing):
    optimizer = dict(optimizer=dict(type='AdamW', lr=1e-3))
    cls = FlexibleRunner if 'strategy' in sharing else Runner
    cls.from_cfg(Config(dict(
        model=dict(type='CDM', backbone=tiny_backbone()), work_dir=f'{folder}/{name}', launcher='pytorch',
        resume=resume, env_cfg=dict(dist_cfg=dict(backend='gloo')), **sharing,
        train_dataloader=dict(
            batch_size=3, num_workers=2, sampler=None, dataset=dict(
                type='CountedStream', lengths=LENGTHS, shuffle=shuffle, pipeline=[
                    dict(type='LabelledRecord'), dict(type='PackInputs', meta=['name'])])),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=optimizer, fake=optimizer),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        custom_hooks=[dict(type='CDMHook'), dict(type='ReadHook')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=5)),
        default_scope='mmengine', log_level='ERROR', randomness=dict(seed=0),
        experiment_name=f'{name}{iterations}{resume}'))).train()


def run(*args):
    init_gloo()
    train(*args)
    return ReadHook.read


@pytest.mark.slow
@pytest.mark.parametrize('shuffle, sharing', [
    (0, dict(model_wrapper_cfg=dict(type='DistillationDataParallel'))), (4, SHARDED)], ids=['ddp', 'deepspeed'])
def test_two_ranks_of_two_workers_go_on_to_the_sample_with_nothing_lost_or_twice(shuffle, sharing, tmp_path):
    """5 shards of 24 records for 4 readers: 0 to 3 begin with a shard each, and the first goes on with the fifth."""
    whole = launch(run, str(tmp_path), 'whole', 12, False, shuffle, sharing)
    first = launch(run, str(tmp_path), 'run', 5, False, shuffle, sharing)  # the fifth batch is the first worker's
    rest = launch(run, str(tmp_path), 'run', 12, True, shuffle, sharing)
    for rank in range(2):
        assert first[rank] + rest[rank] == whole[rank] and len(whole[rank]) == 36
    if not shuffle:
        states = [torch.load(tmp_path / name / 'iter_12.pth', weights_only=True) for name in ('whole', 'run')]
        for part in ('state_dict', 'optimizer', 'stream'):
            same_bits(states[0][part], states[1][part], part)
        readers = [itertools.cycle(part) for part in readers_of(LENGTHS, 4)]
        for rank in range(2):
            expected = [next(readers[2 * rank + i % 2]) for i in range(12) for _ in range(3)]
            assert whole[rank] == expected
    assert Counter(itertools.chain(*whole)).keys() == set(shards(LENGTHS))


def readers_of(lengths, number):
    """By hand: shard s is that of reader s modulo their number."""
    return [[name for name in shards(lengths) if int(name.split('/')[0]) % number == reader]
            for reader in range(number)]
