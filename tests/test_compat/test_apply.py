import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mmengine.hub
import mmengine.runner
import mmengine.utils
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner

from cdm_plugin import compat
from cdm_plugin.compat import pack_message_hub, plain, unpack_message_hub
from cdm_plugin.compat.checkpoints import save_checkpoint
from cdm_plugin.compat.good_checkpoint import find_good_checkpoint
from cdm_plugin.files import find_latest_checkpoint

compat.apply()

ROOT = Path(__file__).parents[2]


@MODELS.register_module(force=True)
class CompatToyModel(BaseModel):

    def __init__(self):
        super().__init__()
        self.student = torch.nn.Linear(4, 4)
        self.fake = torch.nn.Linear(4, 4)

    def forward(self, inputs, mode='tensor'):
        return self.student(inputs)

    def train_step(self, data, optim_wrapper):
        logs = {}
        for role in ('student', 'fake'):
            loss = (getattr(self, role)(data['inputs']) - data['inputs']).square().mean()
            optim_wrapper[role].update_params(loss)
            logs[f'loss_{role}'] = loss.detach()
        return logs


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class CompatToyConstructor:

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.cfg = optim_wrapper_cfg

    def __call__(self, model):
        roles = {role: dict(self.cfg[role]) for role in ('student', 'fake')}
        return OptimWrapperDict(**{role: build_optim_wrapper(getattr(model, role), cfg) for role, cfg in roles.items()})


@HOOKS.register_module(force=True)
class CompatToyHook(Hook):
    """What CDMHook does about checkpoints, and one image for the visualizer."""

    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['message_hub'] = pack_message_hub(checkpoint['message_hub'])
        for key in {'meta', 'optimizer', 'param_schedulers'} & checkpoint.keys():
            checkpoint[key] = plain(checkpoint[key])

    def after_load_checkpoint(self, runner, checkpoint):
        if 'message_hub' in checkpoint:
            checkpoint['message_hub'] = unpack_message_hub(checkpoint['message_hub'], runner.work_dir)

    def before_train(self, runner):
        runner.started_at = runner.iter

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 1:
            runner.visualizer.add_image('samples', np.full((8, 8, 3), 200, np.uint8), step=runner.iter)


@DATASETS.register_module(force=True)
class CompatToyData(torch.utils.data.Dataset):
    metainfo = dict(classes=('zero', 'one'), palette=np.arange(6).reshape(2, 3), scale=np.float32(2))

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return dict(inputs=torch.randn(4, generator=torch.Generator().manual_seed(index)))


def config(work_dir, name, max_iters, **changes):
    cfg = Config.fromfile(ROOT / 'configs/_base_/default_runtime.py', import_custom_modules=False)
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint.interval = 2
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-2))
    cfg.update(
        experiment_name=name,
        work_dir=str(work_dir),
        model=dict(type='CompatToyModel'),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=max_iters),
        train_dataloader=dict(
            batch_size=4, num_workers=0, dataset=dict(type='CompatToyData'), collate_fn=dict(type='default_collate'),
            sampler=dict(type='InfiniteSampler', shuffle=True)),
        optim_wrapper=dict(constructor='CompatToyConstructor', student=wrapper, fake=wrapper),
        param_scheduler=dict(
            student=[dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4)],
            fake=[dict(type='OneCycleLR', eta_max=0.1, total_steps=6, by_epoch=False, end=6)]),
        custom_hooks=[dict(type='CompatToyHook')])
    cfg.update(changes)
    return cfg


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A run of 6 iterations, and the work_dir of the same run ended after 4, moved away from where it was written."""
    root = tmp_path_factory.mktemp('runs')
    whole = Runner.from_cfg(config(root / 'whole', 'compat_whole', 6))
    whole.train()
    # Both schedules are told where they end, so this run stops early as if it had been killed.
    Runner.from_cfg(config(root / 'written', 'compat_half', 4)).train()
    return whole, (root / 'written').rename(root / 'half')


def test_checkpoints_of_a_run_load_without_unpickling_objects(runs):
    _, half = runs
    checkpoint = torch.load(half / 'iter_4.pth', weights_only=True)
    info = checkpoint['message_hub']['runtime_info']
    assert info['iter'] == 3
    assert type(info['eta']) is float
    assert checkpoint['meta']['dataset_meta'] == dict(
        classes=('zero', 'one'), palette=[[0, 1, 2], [3, 4, 5]], scale=2.0)
    assert 'anneal_func' not in checkpoint['param_schedulers']['fake'][0]


def test_moved_run_resumes_from_its_own_files_to_the_bit(runs, tmp_path):
    whole, half = runs
    runner = Runner.from_cfg(config(shutil.copytree(half, tmp_path / 'copy'), 'compat_copy', 6, resume=True))
    runner.train()
    assert (runner.started_at, runner.iter) == (4, 6)
    for (name, expected), actual in zip(whole.model.state_dict().items(), runner.model.state_dict().values()):
        assert torch.equal(expected, actual), name
    for key in ('train/loss_student', 'train/loss_fake', 'train/fake.lr'):
        expected, actual = whole.message_hub.get_scalar(key), runner.message_hub.get_scalar(key)
        assert isinstance(actual, HistoryBuffer)
        assert len(actual.data[0]) == 6
        np.testing.assert_array_equal(actual.data, expected.data)


def test_flexible_runner_resumes_a_moved_run(tmp_path):
    FlexibleRunner.from_cfg(config(tmp_path / 'first', 'compat_flexible', 2, param_scheduler=None)).train()
    moved = (tmp_path / 'first').rename(tmp_path / 'moved')
    runner = FlexibleRunner.from_cfg(config(moved, 'compat_flexible_copy', 4, param_scheduler=None, resume=True))
    runner.train()
    assert runner.started_at == 2
    assert len(runner.message_hub.get_scalar('train/loss_student').data[0]) == 4


def test_flexible_runner_takes_the_configs_that_runner_takes(tmp_path):
    cfg = config(tmp_path, 'compat_bare', 2, param_scheduler=None)
    for key in ('env_cfg', 'launcher'):
        cfg.pop(key, None)
    FlexibleRunner.from_cfg(cfg).train()
    assert (tmp_path / 'iter_2.pth').is_file()
    assert 'env_cfg' not in cfg and 'launcher' not in cfg


def test_tensorboard_and_images_are_written(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    _, half = runs
    events = EventAccumulator(str(next(half.glob('*/vis_data'))))
    events.Reload()
    assert [event.step for event in events.Scalars('loss_student')] == [1, 2, 3, 4]
    assert (events.Images('samples')[0].width, events.Images('samples')[0].height) == (8, 8)


@pytest.mark.parametrize('ours', [find_latest_checkpoint, save_checkpoint])
def test_every_user_of_a_replaced_function_has_ours(ours):
    for name in ('runner', 'runner.runner', 'runner.checkpoint', 'runner._flexible_runner'):
        module = vars(sys.modules[f'mmengine.{name}'])
        if ours is find_latest_checkpoint and name in ('runner.runner', 'runner._flexible_runner'):
            assert module[ours.__name__] is find_good_checkpoint
        elif ours is find_latest_checkpoint or ours.__name__ in module:
            assert module[ours.__name__] is ours


def test_apply_twice_changes_nothing():
    def state():
        return (dict(CheckpointLoader._schemes), mmengine.utils.is_installed, Config._get_cfg_path,
                mmengine.config.config.get_installed_path, mmengine.runner.find_latest_checkpoint)
    before = state()
    compat.apply()
    assert state() == before


def test_compat_imports_little_of_the_package():
    """Everything else may need an MMEngine that is repaired."""
    for file in (ROOT / 'cdm_plugin/compat').glob('*.py'):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith('cdm_plugin'):
                assert node.module.startswith(('cdm_plugin.compat.', 'cdm_plugin.files', 'cdm_plugin.locks',
                                               'cdm_plugin.ranks')), file
            assert not isinstance(node, ast.Import) or 'cdm_plugin' not in ast.unparse(node), file


@pytest.mark.slow
def test_transformers_and_mmengine_import_in_any_order():
    # MMEngine registers the Adafactor of torch and the one of transformers.
    check = ("from mmengine.registry import OPTIMIZERS as o; print(o.get('Adafactor').__module__, "
             "o.get('TorchAdafactor') is __import__('torch').optim.Adafactor)")
    orders = ['from transformers import Adafactor; import mmengine.optim', 'import mmengine.optim, transformers']
    env = dict(os.environ, OMP_NUM_THREADS='1')
    started = [subprocess.Popen([sys.executable, '-c', f'{order}; {check}'], env=env, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for order in orders]
    answers = [process.communicate(timeout=120) for process in started]
    for order, process, (out, err) in zip(orders, started, answers):
        assert process.returncode == 0, f'{order}: {err}'
        assert out.split()[-2:] == ['transformers.optimization', 'True'], order
