"""A role that a plug-in adds, in two processes: as in one, by DDP and by ZeRO 2 and 3; resumed to the bit."""
import os

import acme_plugin
import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner, Runner

pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')

from deepspeed_support import ShareDraws, checkpoint, logged  # noqa: E402
from scale_support import init_gloo, launch, slow  # noqa: E402
from tests_support import same_bits  # noqa: E402

STRATEGIES = dict(ddp=None, zero2=2, zero3=3)
KINDS = dict(method={}, loss=dict(type='CDM', fake_merge=0.05, anchor_aware_fake=True, time_grid=dict(max_steps=4),
                                  losses=dict(gan=dict(type='AcmeGANLoss', weight=0.5))),
             gan=dict(type='DMD2', losses=dict(gan=dict(type='GANLoss', weight=0.5, fake_weight=0.5, width=16))))


def train(root, name, strategy, iterations=8, resume=False):
    """One process of a run; its losses."""
    world_size, rank = int(os.environ.get('WORLD_SIZE', 1)), int(os.environ.get('RANK', 0))
    cfg = acme_plugin.config(f'{root}/{name}', iterations, resume, 4 // world_size, False, **KINDS[name.split()[0]])
    if name.startswith('gan'):  # two networks against each other: roundings grow quickly
        cfg.optim_wrapper.discriminator.optimizer.update(lr=3e-3, eps=1e-3)
    if world_size > 1:
        cfg.launcher = 'pytorch'
        if strategy is None and not torch.distributed.is_initialized():
            init_gloo()
        cfg.update(dict(model_wrapper_cfg=dict(type='DistillationDataParallel')) if strategy is None else dict(
            strategy=dict(type='DistillationDeepSpeedStrategy', zero_optimization=dict(
                stage=strategy, stage3_param_persistence_threshold=100))))
    if 'strategy' in cfg:  # which would draw the weights at another time
        torch.manual_seed(0)
        runner = FlexibleRunner(**{**cfg, 'model': MODELS.build(cfg.model)}, cfg=cfg)
    else:
        runner = Runner.from_cfg(cfg)
    runner.register_hook(ShareDraws(rank, world_size))
    runner.train()
    return logged(runner)


def train_all(root, kind):
    return {name: train(root, f'{kind} {name}', strategy) for name, strategy in STRATEGIES.items()}


@pytest.fixture(scope='module', params=['method', *slow('loss', 'gan')])
def runs(request, tmp_path_factory):
    root, kind = tmp_path_factory.mktemp('runs'), request.param
    return root, kind, train(root, f'{kind} single', None), launch(train_all, str(root), kind)


def test_two_processes_train_it_as_one(runs):
    root, kind, losses, logs = runs
    whole = checkpoint(root / f'{kind} single' / 'iter_8.pth')
    start = checkpoint(root / f'{kind} single' / 'iter_4.pth')['state_dict']
    assert {'loss_discriminator', 'loss_student', 'loss_fake'} <= {key.split('/')[1] for key in losses}
    for name in STRATEGIES:
        parts = checkpoint(root / f'{kind} {name}' / 'iter_8.pth')
        assert parts['state_dict'].keys() == whole['state_dict'].keys()
        moved = 0
        for key, weight in whole['state_dict'].items():
            assert torch.allclose(weight, parts['state_dict'][key], rtol=0, atol=2e-5), (name, key)
            moved = max(moved, float((weight - start[key]).abs().max())) if key.startswith('discriminator') else moved
        assert moved > 1e-3
        for own in logs:
            for key, values in losses.items():
                assert own[name][key] == pytest.approx(values, rel=1e-4, abs=1e-5), (name, key)


def resume_zero3(root, kind):
    """A run that is stopped half-way and resumed."""
    train(root, f'{kind} stopped', 3, 4)
    train(root, f'{kind} stopped', 3, 8, resume=True)


def test_resumed_at_stage_3_it_ends_in_the_same_bits(runs):
    root, kind, _, _ = runs
    if kind == 'loss':
        pytest.skip('the role of a loss resumes by the code that the role of a method does, which the other case runs')
    launch(resume_zero3, str(root), kind)
    a, b = (checkpoint(root / f'{kind} {name}' / 'iter_8.pth') for name in ('zero3', 'stopped'))
    same_bits(dict(a['state_dict']), dict(b['state_dict']))
