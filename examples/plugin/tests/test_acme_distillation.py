"""The plug-in is found, and each of its parts does what it says."""
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from cdm_plugin import plugins
from cdm_plugin.cli import main
from cdm_plugin.config import load_config

CONFIG = str(Path(__file__).parents[1] / 'acme_config.py')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A runner after the config's training, and the weights that it started from."""
    runner = Runner.from_cfg(load_config(CONFIG, {'work_dir': str(tmp_path_factory.mktemp('run')),
                                                  'log_level': 'WARNING'}))
    before = {role: [p.detach().clone() for p in getattr(runner.model, role).parameters()]
              for role in ('student', 'fake', 'discriminator', 'teacher')}
    runner.train()
    return runner, before


def test_the_plugin_is_loaded():
    info = {info.name: info for info in plugins.loaded()}['acme-distillation:acme']
    assert (info.status, info.error) == ('loaded', '')
    assert info.registered == ('DATASETS.AcmePictures', 'MODELS.AcmeBackbone', 'MODELS.AcmeGANLoss',
                               'MODELS.AcmeRewardLoss')


def test_every_trained_role_learns_and_the_teacher_does_not(trained):
    runner, before = trained
    for role, weights in before.items():
        moved = any(not torch.equal(p, q) for p, q in zip(getattr(runner.model, role).parameters(), weights))
        assert moved == (role != 'teacher'), role


def test_the_observer_and_the_losses_are_in_the_log(trained):
    runner, _ = trained
    logged = {name: runner.message_hub.get_scalar(f'train/{name}').current() for name in (
        'loss_student', 'loss_fake', 'loss_reward', 'reward_reward', 'loss_gan', 'acme_gap')}
    assert logged['acme_gap'] == pytest.approx(logged['loss_student'] - logged['loss_fake'], abs=1e-5)
    assert logged['loss_reward'] == pytest.approx(-logged['reward_reward']) and logged['loss_gan'] > 0


def test_the_command_counts(capsys):
    assert main(['acme', CONFIG, '--cfg-options', 'train_dataloader.dataset.length=7']) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == ['0: 3', '1: 2', '2: 2']
