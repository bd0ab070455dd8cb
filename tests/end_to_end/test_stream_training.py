"""Training on sources of other libraries, through MMEngine's runner; streams go on where they stopped."""
import itertools
import json

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import FlexibleRunner, Runner
from source_support import content, write_rows, write_tar
from stream_support import CountedStream
from tests_support import same_bits, tiny_backbone

from cdm_plugin.cli import main

_names = (f'stream{i}' for i in itertools.count())
PIXELS = [dict(type='PackInputs', prompt='cls', image='png', channels=1)]


@HOOKS.register_module()
class SeenHook(Hook):
    """Keeps the prompts of every batch, by iteration."""
    seen = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        prompts = data_batch['prompt']
        self.seen[runner.iter] = prompts.tolist() if isinstance(prompts, torch.Tensor) else list(prompts)


@pytest.fixture(autouse=True)
def forget():
    SeenHook.seen = {}


def optimizer():
    return dict(optimizer=dict(type='AdamW', lr=1e-3))


def config(work_dir, dataset, iterations, method='FlowMatching', workers=0, batch_size=2, sampler=None, **changes):
    roles = ('student',) if method == 'FlowMatching' else ('student', 'fake')
    return Config(dict(dict(
        model=dict(type=method, backbone=tiny_backbone()), work_dir=str(work_dir),
        train_dataloader=dict(batch_size=batch_size, num_workers=workers, sampler=sampler, dataset=dataset,
                              **dict(persistent_workers=True) if workers else {}),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', **{role: optimizer() for role in roles}),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=iterations),
        custom_hooks=[dict(type='CDMHook'), dict(type='SeenHook')],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=3)),
        default_scope='mmengine', log_level='ERROR', randomness=dict(seed=0), experiment_name=next(_names)), **changes))


def train(cfg, runner=Runner):
    """Trains, and ends the workers: the garbage collector would wait five seconds for each."""
    run = runner.from_cfg(cfg)
    try:
        run.train()
    finally:
        run.train_dataloader._iterator = run.train_loop.dataloader_iterator = None


@pytest.fixture
def tars(tmp_path):
    """Pictures i with the class i mod 3, in shards of other lengths."""
    numbers = iter(range(12))
    for shard, length in enumerate((5, 1, 3)):
        files = {}
        for i in itertools.islice(numbers, length):
            files.update({f'{i}.png': content(i), f'{i}.cls': b'%d' % (i % 3)})
        write_tar(tmp_path / f'{shard}.tar', files)
    return dict(type='WebDataset', urls=str(tmp_path / '*.tar'), shuffle=3, pipeline=PIXELS)


def last(folder, iteration):
    return torch.load(folder / f'iter_{iteration}.pth', weights_only=True)


@pytest.mark.parametrize('runner, workers', [
    (Runner, 0), (Runner, 2), pytest.param(FlexibleRunner, 0, marks=pytest.mark.slow)])
def test_a_resumed_run_on_tars_ends_in_the_same_bits(runner, workers, tars, tmp_path):
    train(config(tmp_path / 'whole', tars, 6, workers=workers), runner)
    whole = SeenHook.seen
    train(config(tmp_path / 'run', tars, 3, workers=workers), runner)
    SeenHook.seen = {}
    train(config(tmp_path / 'run', tars, 6, workers=workers, resume=True), runner)
    assert SeenHook.seen == {i: whole[i] for i in (3, 4, 5)}
    states = last(tmp_path / 'whole', 6), last(tmp_path / 'run', 6)
    for part in ('state_dict', 'student_ema', 'optimizer', 'stream'):
        same_bits(states[0][part], states[1][part], part)


def test_what_was_trained_on_is_not_read_again(tmp_path, monkeypatch):
    dataset = dict(type='CountedStream', lengths=[4] * 9, pipeline=[
        lambda sample: {**sample, 'prompt': int(sample['prompt'].split('/')[1]) % 3}, dict(type='PackInputs')])
    train(config(tmp_path, dataset, 10, 'CDM', default_hooks=dict(
        checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=10))))
    opened, read = [], CountedStream.read
    monkeypatch.setattr(CountedStream, 'read', lambda self, shard: opened.append(shard) or read(self, shard))
    train(config(tmp_path, dataset, 11, 'CDM', resume=True))
    # 8 samples are looked at, and the last of the 20 that were trained on is passed over.
    assert opened == [0, 1, 4, 5]


def test_a_stream_that_is_shared_in_another_way_is_refused_by_key(tars, tmp_path):
    train(config(tmp_path / 'run', tars, 3))
    for change, workers, key in (
            ({}, 2, 'train_dataloader.num_workers is 2, and was 1'),
            (dict(shuffle=4), 0, 'train_dataloader.dataset.shuffle is 4, and was 3'),
            (dict(seed=1), 0, 'train_dataloader.dataset.seed is 1, and was 0'),
            (dict(share='samples'), 0, "train_dataloader.dataset.share is 'samples', and was None"),
            (dict(urls=[str(tmp_path / f'{i}.tar') for i in range(2)]), 0,
             "train_dataloader.dataset is '.*0.tar and 1 more tar files .*', and was '.*0.tar and 2 more .*'")):
        cfg = config(tmp_path / 'run', {**tars, **change}, 4, workers=workers, resume=True)
        with pytest.raises(ValueError, match=f'the stream cannot go on where the checkpoint was saved: {key}; resume'):
            train(cfg)
    train(config(tmp_path / 'run', tars, 4, workers=1, batch_size=1, resume=True))  # still one reader
    assert len(SeenHook.seen[3]) == 1


def test_a_map_style_source_and_a_stream_of_rows(tmp_path):
    """Both through the command; text prompts are class labels here, and the stream has the same rows as the dataset."""
    write_rows(tmp_path, (3, 2))
    source = dict(path='parquet', options=dict(data_files=str(tmp_path / '*.parquet'), cache_dir=str(tmp_path / 'c')),
                  pipeline=[dict(type='PackInputs', prompt='label', image='image', channels=1)])
    for kind, sampler in (('HFDataset', dict(type='InfiniteSampler', shuffle=False)), ('HFStream', None)):
        cfg = config(tmp_path / kind, dict(type=kind, **source), 3, batch_size=3, sampler=sampler)
        cfg.dump(str(tmp_path / f'{kind}.py'))
        assert main(['train', str(tmp_path / f'{kind}.py'), '--work-dir', str(tmp_path / kind)]) == 0
        assert SeenHook.seen == {0: [0, 1, 0], 1: [1, 0, 0], 2: [1, 0, 1]}
        assert ('stream' in last(tmp_path / kind, 3)) == (kind == 'HFStream')


def test_pictures_of_a_stream_are_looked_at_before_training(tars, tmp_path):
    wrong = dict(tars, pipeline=[*PIXELS, lambda sample: {**sample, 'image': 127.5 * (sample['image'] + 1)}])
    with pytest.raises(ValueError, match=r'must have pixels in \[-1, 1\], but they lie in \[0, '):
        train(config(tmp_path / 'run', wrong, 3))


def test_a_pipeline_that_leaves_out_all_is_no_hang(tars, tmp_path):
    with pytest.raises(ValueError, match='train_dataloader.dataset gives no sample in a whole pass'):
        Runner.from_cfg(config(tmp_path / 'run', dict(tars, pipeline=[lambda sample: None]), 3)).train()


def test_a_collate_function_that_loses_the_position_is_named(tars, tmp_path):
    cfg = config(tmp_path / 'run', tars, 3)
    cfg.train_dataloader.collate_fn = lambda samples: dict(
        prompt=[sample['prompt'] for sample in samples], image=torch.stack([sample['image'] for sample in samples]))
    with pytest.raises(ValueError, match="a batch of the stream has no '__position__': train_dataloader.collate_fn"):
        train(cfg)
    cfg = config(tmp_path / 'list', tars, 3)
    cfg.train_dataloader.collate_fn = list
    cfg.custom_hooks = [dict(type='CDMHook')]
    train(cfg)
    assert json.loads(json.dumps(last(tmp_path / 'list', 3)['stream']['positions']))
