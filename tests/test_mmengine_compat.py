import logging
import os
import re
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
from mmengine.fileio import LocalBackend
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner import CheckpointLoader, FlexibleRunner, Runner
from mmengine.runner.checkpoint import _load_checkpoint, save_checkpoint

from cdm_plugin import mmengine_compat
from cdm_plugin.mmengine_compat import find_latest_checkpoint, pack_message_hub, plain, unpack_message_hub

mmengine_compat.apply()

ROOT = Path(__file__).parents[1]
TRUST = 'CDM_TRUST_CHECKPOINTS'


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


def test_message_hub_round_trip_is_exact(tmp_path):
    hub = MessageHub('compat_round_trip')
    for value in (0.1, float('nan'), float('inf'), -0.0, 1e-320):
        hub.update_scalar('loss', value, count=3)
    hub.update_scalar('whole', 7)
    hub.update_scalar('not resumed', 1.0, resumed=False)
    hub.log_scalars['short'] = HistoryBuffer([1, 2, 3], [1, 1, 1], max_length=3)
    hub.log_scalars['empty'] = HistoryBuffer()
    hub._resumed_keys.update(short=True, empty=True)
    hub.update_info_dict(dict(iter=5, keep_ckpt_ids=[1, 2], eta=np.float64(0.1), thing=object()))
    state = hub.state_dict()

    with pytest.warns(UserWarning, match="'thing' is left out of the checkpoint: object"):
        torch.save(pack_message_hub(state), tmp_path / 'hub.pth')
    unpacked = unpack_message_hub(torch.load(tmp_path / 'hub.pth', weights_only=True))
    again = MessageHub('compat_round_trip_again')
    again.load_state_dict(unpacked)

    assert list(again.log_scalars) == ['loss', 'whole', 'short', 'empty']
    for key, expected in state['log_scalars'].items():
        actual = again.get_scalar(key)
        assert actual.max_length == expected.max_length
        for ours, stock in zip(actual.data, expected.data):
            assert (ours.dtype, ours.shape, ours.tobytes()) == (stock.dtype, stock.shape, stock.tobytes())
    assert again.runtime_info == dict(iter=5, keep_ckpt_ids=[1, 2], eta=0.1)
    assert unpacked['resumed_keys'] == {k: v for k, v in state['resumed_keys'].items() if k != 'thing'}
    # The restored buffers are live: MMEngine appends to them and drops the oldest.
    again.update_scalar('short', 4)
    assert again.get_scalar('short').data[0].tolist() == [2, 3, 4]
    assert hub.get_scalar('short').data[0].tolist() == [1, 2, 3]


def test_unpacked_state_passes_through():
    state = dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])), runtime_info=dict(iter=1), resumed_keys={})
    assert unpack_message_hub(state) == state
    hub = MessageHub('compat_old')
    assert unpack_message_hub(hub) is hub


def test_copied_run_forgets_checkpoints_of_the_original(tmp_path):
    old, new = tmp_path / 'old', tmp_path / 'new'
    for directory, names in ((old, ['best_a.pth', 'best_b.pth', 'last_checkpoint']), (new, ['best_a.pth'])):
        directory.mkdir()
        for name in names:
            (directory / name).touch()
    info = dict(best_ckpt_a=str(old / 'best_a.pth'), best_ckpt_b=str(old / 'best_b.pth'), best_score_b=1.0)
    state = dict(log_scalars={}, runtime_info=info, resumed_keys=dict.fromkeys(info, True))
    unpacked = unpack_message_hub(state, str(new))
    assert unpacked['runtime_info'] == dict(best_ckpt_a=str(new / 'best_a.pth'), best_score_b=1.0)
    assert unpacked['resumed_keys'] == dict(best_ckpt_a=True, best_score_b=True)
    assert unpack_message_hub(state)['runtime_info'] == info


def test_plain_rejects_objects_in_lists_and_keeps_tensors():
    tensor = torch.ones(2)
    assert plain([tensor])[0] is tensor
    assert plain(Config(dict(a=dict(b=(np.int64(1), np.bool_(True)))))._cfg_dict) == dict(a=dict(b=(1, True)))
    with pytest.raises(TypeError, match='Path is not plain data'):
        plain([Path('x')])


class Marker:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path, )


def test_objects_are_unpickled_only_on_request(tmp_path, monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)
    file, trace = tmp_path / 'foreign.pth', tmp_path / 'ran'
    torch.save(dict(state_dict=dict(w=torch.ones(1)), extra=Marker(trace)), file)
    with pytest.raises(RuntimeError) as caught:
        _load_checkpoint(str(file))
    message = str(caught.value)
    assert str(file) in message and f'{TRUST}=1' in message and '\n' not in message
    assert not trace.exists()
    monkeypatch.setenv(TRUST, '1')
    assert torch.equal(_load_checkpoint(str(file))['state_dict']['w'], torch.ones(1))
    assert trace.exists()


def test_checkpoint_of_stock_mmengine_names_history_buffer(tmp_path, monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)
    save_checkpoint(dict(message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))), str(tmp_path / 'a.pth'))
    with pytest.raises(RuntimeError, match=f'history_buffer.HistoryBuffer.*{TRUST}=1'):
        _load_checkpoint(str(tmp_path / 'a.pth'))
    monkeypatch.setenv(TRUST, '1')
    assert _load_checkpoint(str(tmp_path / 'a.pth'))['message_hub']['log_scalars']['loss'].current() == 1.0


def damage(data, kind):
    middle = len(data) // 2
    return dict(
        truncated=data[:middle], empty=b'', text=b'<html>not found</html>', head=data[:1],
        overwritten=data[:64] + bytes(1000) + data[1064:])[kind]


@pytest.mark.parametrize('kind, legacy', [
    ('truncated', False), ('truncated', True), ('head', False), ('head', True), ('overwritten', False),
    ('empty', False), ('text', False)])
def test_damaged_checkpoint_is_one_clear_line(tmp_path, kind, legacy):
    file = tmp_path / 'iter_2.pth'
    torch.save(dict(w=torch.arange(1000.0)), file, _use_new_zipfile_serialization=not legacy)
    file.write_bytes(damage(file.read_bytes(), kind))
    with pytest.raises(RuntimeError, match='is damaged or was cut short: copy it again, or delete it') as caught:
        _load_checkpoint(str(file))
    assert str(file) in str(caught.value) and '\n' not in str(caught.value)


def test_other_errors_of_loading_are_not_called_damage(tmp_path):
    torch.save(dict(w=torch.ones(1)), tmp_path / 'a.pth')

    def broken(storage, location):
        raise RuntimeError('no such device')

    with pytest.raises(RuntimeError, match='^no such device$'):
        _load_checkpoint(str(tmp_path / 'a.pth'), map_location=broken)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / 'no.pth'))):
        _load_checkpoint(str(tmp_path / 'no.pth'))


def test_loader_of_the_host_stays(monkeypatch):
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))

    def load_from_cluster(filename, map_location):
        return 'from the cluster'

    CheckpointLoader.register_scheme(prefixes='', loader=load_from_cluster, force=True)
    mmengine_compat.apply()
    assert _load_checkpoint('any.pth') == 'from the cluster'


def make_work_dir(path, named, files):
    path.mkdir(exist_ok=True)
    for file in files:
        (path / file).touch()
    if named is not None:
        (path / 'last_checkpoint').write_text(str(named))
    return str(path)


def test_a_killed_save_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / 'iter_4.pth'
    backend = LocalBackend()
    backend.put(b'old', file)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            backend.put(b'new', file)
    assert file.read_bytes() == b'old'
    backend.put(b'new', file)
    assert file.read_bytes() == b'new'


def test_every_user_of_find_latest_checkpoint_has_ours():
    for name in ('runner', 'runner.runner', 'runner.checkpoint', 'runner._flexible_runner'):
        assert sys.modules[f'mmengine.{name}'].find_latest_checkpoint is find_latest_checkpoint


@pytest.mark.parametrize('files, expected', [
    (['iter_4.pth', 'iter_6.pth'], 'iter_4.pth'),
    (['iter_9.pth', 'iter_10.pth', 'epoch_30.pth', 'iter_x.pth', 'iter_99.pth.tmp'], 'iter_10.pth'),
    (['epoch_2.pth', 'best_iter_4.pth'], 'epoch_2.pth'),
    (['best_iter_4.pth'], None),
    ([], None),
])
def test_latest_checkpoint_of_a_copied_work_dir(tmp_path, files, expected):
    original = tmp_path / 'original'
    make_work_dir(original, original / 'iter_4.pth', ['iter_4.pth'])
    copy = make_work_dir(tmp_path / 'copy', original / 'iter_4.pth', files)
    assert find_latest_checkpoint(copy) == (None if expected is None else os.path.join(copy, expected))


def test_missing_last_checkpoint_is_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(mmengine_compat, 'print_log', lambda text, logger, level: said.append((text, level)))
    find_latest_checkpoint(make_work_dir(tmp_path, 'gone/iter_8.pth', ['iter_4.pth']))
    (text, level), = said
    assert 'iter_8.pth, named by last_checkpoint, is missing' in text and 'iter_4.pth' in text
    assert level == logging.WARNING


def test_latest_checkpoint_without_last_checkpoint_or_directory(tmp_path):
    assert find_latest_checkpoint(str(tmp_path)) is None
    assert find_latest_checkpoint(str(tmp_path / 'none')) is None
    assert find_latest_checkpoint(make_work_dir(tmp_path, None, ['iter_3.pth'])) == str(tmp_path / 'iter_3.pth')


def test_latest_checkpoint_in_out_dir_or_remote(tmp_path):
    apart = tmp_path / 'out' / 'run'
    apart.mkdir(parents=True)
    (apart / 'iter_4.pth').touch()
    work_dir = make_work_dir(tmp_path / 'run', apart / 'iter_4.pth', [])
    assert find_latest_checkpoint(work_dir) == str(apart / 'iter_4.pth')
    work_dir = make_work_dir(tmp_path / 'remote', 's3://bucket/run/iter_4.pth', [])
    assert find_latest_checkpoint(work_dir) == 's3://bucket/run/iter_4.pth'


@pytest.fixture
def no_pkg_resources(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)


def test_packages_are_found_without_pkg_resources(tmp_path, monkeypatch):
    (tmp_path / 'compat_loose').mkdir()
    (tmp_path / 'compat_loose' / '__init__.py').touch()
    (tmp_path / 'compat_space').mkdir()
    # A distribution whose builder wrote no top_level.txt.
    metadata = tmp_path / 'compat_named_apart-1.0.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text('Metadata-Version: 2.1\nName: compat-named-apart\nVersion: 1.0\n')
    (metadata / 'RECORD').write_text('compat_loose/__init__.py,,\ncompat_named_apart-1.0.dist-info/METADATA,,\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    utils = mmengine.utils
    assert utils.is_installed('mmengine') and utils.is_installed('compat_loose')
    assert not utils.is_installed('compat_space') and not utils.is_installed('compat_no_such_package')
    assert utils.get_installed_path('mmengine') == os.path.dirname(mmengine.__file__)
    assert utils.get_installed_path('compat_loose') == str(tmp_path / 'compat_loose')
    assert utils.is_installed('compat-named-apart')
    assert utils.get_installed_path('compat-named-apart') == str(tmp_path / 'compat_loose')
    assert utils.get_installed_path('opencv-python').endswith('cv2')
    with pytest.raises(RuntimeError, match='namespace package'):
        utils.get_installed_path('compat_space')
    with pytest.raises(ModuleNotFoundError, match='compat_no_such_package'):
        utils.get_installed_path('compat_no_such_package')


def test_recipes_are_linked_into_the_package():
    assert os.path.samefile(mmengine_compat.MIM / 'configs', ROOT / 'configs')


def test_recipe_as_base_and_from_the_hub(no_pkg_resources, tmp_path):
    (tmp_path / 'mine.py').write_text("_base_ = 'cdm_plugin::_base_/default_runtime.py'\nlog_level = 'DEBUG'\n")
    cfg = Config.fromfile(tmp_path / 'mine.py', import_custom_modules=False)
    assert cfg.log_level == 'DEBUG'
    assert cfg.default_hooks.checkpoint.interval == 500
    # With a scope MMEngine looks for child registries of cdm_plugin, and warns at every part that it builds.
    assert '_scope_' not in cfg.pretty_text
    from_hub = mmengine.hub.get_config('cdm_plugin::_base_/default_runtime.py')
    assert from_hub.log_processor == cfg.log_processor
    (tmp_path / 'bad.py').write_text("_base_ = 'cdm_plugin::_base_/nothing.py'\n")
    with pytest.raises(FileNotFoundError, match='nothing.py'):
        Config.fromfile(tmp_path / 'bad.py')


def test_recipe_as_lazy_base(no_pkg_resources, tmp_path):
    (tmp_path / 'lazy.py').write_text(
        'from mmengine.config import read_base\n\n'
        'with read_base():\n    from cdm_plugin.configs._base_.default_runtime import *\n\n'
        "log_level = 'DEBUG'\n")
    cfg = Config.fromfile(tmp_path / 'lazy.py')
    assert (cfg.log_level, cfg.default_hooks.checkpoint.interval) == ('DEBUG', 500)


def test_recipes_of_other_packages_keep_their_scope(tmp_path, monkeypatch):
    configs = tmp_path / 'mmcls/.mim/configs/a'
    configs.mkdir(parents=True)
    (tmp_path / 'mmcls/__init__.py').touch()
    (tmp_path / 'mmcls/.mim/model-index.yml').write_text('Import: []\n')
    (configs / 'b.py').write_text("model = dict(type='X')\n")
    (tmp_path / 'mine.py').write_text("_base_ = 'mmcls::a/b.py'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    assert Config.fromfile(tmp_path / 'mine.py').model == dict(type='X', _scope_='mmcls')


def test_apply_twice_changes_nothing():
    def state():
        return (dict(CheckpointLoader._schemes), mmengine.utils.is_installed, Config._get_cfg_path,
                mmengine.config.config.get_installed_path, mmengine.runner.find_latest_checkpoint)
    before = state()
    mmengine_compat.apply()
    assert state() == before


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
