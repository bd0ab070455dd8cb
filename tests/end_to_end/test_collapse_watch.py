"""Collapses that are known are reported, and sound training is not."""
import logging
import re

import pytest
import torch

from cdm_plugin.hooks import CollapseWatchHook

PUBLISHED = {'model.anchor_aware_fake': False, 'model.losses': dict(_delete_=True)}


@pytest.fixture
def said(monkeypatch):
    """What the hook has said."""
    lines = []
    monkeypatch.setattr('cdm_plugin.hooks.collapse_watch_hook.print_log',
                        lambda text, logger, level: lines.append(text) if level == logging.WARNING else None)
    return lines


def stripes(low, high):
    """Two images of half `low` and half `high`: their standard deviation is (high - low) / 2 and a little more."""
    images = torch.full((2, 1, 8, 8), float(low))
    images[..., 4:] = high
    return images


def rows(own, teacher=(-0.5, 0.5)):
    return {'student, 4 steps': stripes(0, 0), 'EMA, 4 steps': stripes(*own), 'teacher, 28 steps': stripes(*teacher)}


@pytest.mark.parametrize('grids, text', [
    ([(-0.5, 0.5), (-0.45, 0.45), (-0.39, 0.39)], r"iteration 3: the samples have 0\.78 of .* after 1\.00: they fade"),
    ([(-0.5, 0.5), (-0.8, 0.8)], r"iteration 2: the samples have 1\.60 of the teacher's contrast"),
    ([(-0.5, 0.5), (-0.5, 1.0)], r"iteration 2: 50% of the samples' values are black or white, 0% of the teacher's"),
    ([(-0.5, 0.5), (-0.41, 0.41), (-0.7, 0.7)], None),  # within the limits
    ([(-0.2, 0.2), (-0.22, 0.22)], None)], ids=['fades', 'glares', 'saturates', 'sound', 'starts faint'])
def test_grids(grids, text, said):
    hook = CollapseWatchHook()
    for iteration, own in enumerate(grids, 1):
        hook.judge_images(iteration, rows(own))
    assert len(said) == (text is not None)
    assert text is None or re.search(text, said[0]) and 'docs/symptoms.md' in said[0]


@pytest.mark.parametrize('windows, text', [
    ([dict(clamp_ca=0.5), dict(clamp_ca=0.95)], r'clamp_ca is 0\.95: .*model\.losses\.ca\.min_norm'),
    ([dict(loss_fake=0.5), dict(loss_fake=0.3), dict(loss_fake=0.7)], r'loss_fake has grown from 0\.3 to 0\.7'),
    ([dict(loss_fake=0.3), dict(loss_fake=float('inf'))], r'loss_fake has grown from 0\.3 to inf'),
    ([dict(cosine_ca_dm=-0.95)], r'cosine_ca_dm is -0\.95'),
    ([dict(loss_fake=0.3, loss_student=1.0, cosine_ca_dm=-0.2), dict(loss_fake=0.5, loss_student=9.0)], None)], ids=str)
def test_scalars(windows, text, said):
    hook = CollapseWatchHook()
    for i, window in enumerate(windows, 1):
        hook.judge_scalars(50 * i, window, {'loss_fake'})
    assert len(said) == (text is not None)
    assert text is None or re.search(f'iteration {50 * len(windows)}: {text}', said[0])


def test_a_warning_is_given_where_something_begins(said):
    hook = CollapseWatchHook()
    for iteration, clamped in enumerate([0.95, 0.96, 0.5, 0.97]):
        hook.judge_scalars(iteration, dict(clamp_dm=clamped), set())
    assert [line.split(':')[0] for line in said] == ['iteration 0', 'iteration 3']


def test_it_sees_the_means_of_a_run_and_its_grids(short_run, monkeypatch):
    scalars, grids = [], []
    monkeypatch.setattr(CollapseWatchHook, 'judge_scalars', lambda self, *args: scalars.append(args))
    monkeypatch.setattr(CollapseWatchHook, 'judge_images', lambda self, *args: grids.append(args))
    monkeypatch.setattr('cdm_plugin.hooks.collapse_watch_hook.WINDOW', 2)
    runner = short_run(iters=4, **{'custom_hooks': [
        dict(type='CDMHook'), dict(type='SampleGridHook', interval=2, prompts=[0, 1], num_images=2, teacher_steps=2)]})
    runner.train()
    history = runner.message_hub.get_scalar('train/loss_fake').data[0]
    assert [iteration for iteration, *_ in scalars] == [2, 4]
    assert [means['loss_fake'] for _, means, _ in scalars] == pytest.approx([history[:2].mean(), history[2:].mean()])
    assert scalars[0][2] == {'loss_fake', 'loss_teacher'} and 'clamp_cdm' in scalars[0][1]
    assert [iteration for iteration, _ in grids] == [0, 2, 4]
    assert list(grids[0][1])[:2] == ['student, 4 steps', 'EMA, 4 steps']


@pytest.mark.slow
@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('name, options', [
    ('published', PUBLISHED), ('consistent', {}), ('dmd2, aware', {'model.type': 'DMD2'}),
    ('decoupled dmd, aware', {'model.type': 'DecoupledDMD'})], ids=['published', 'consistent', 'dmd2', 'decoupled'])
def test_the_published_recipes_drift_on_the_digits_is_reported_and_sound_ones_raise_nothing(
        name, options, seed, short_run, said):
    """100 student steps. The study has published CDM at a distance of 523 then, and sound recipes below 30."""
    short_run(iters=200, **{
        'randomness.seed': seed, 'train_dataloader.batch_size': 32, 'train_cfg.val_interval': 1000,
        'custom_hooks': [dict(type='CDMHook'), dict(type='SampleGridHook', interval=40, prompts=list(range(10)),
                                                    num_images=10)], **options}).train()
    if name == 'published':
        assert any("of the teacher's contrast" in line and 'they fade' in line for line in said), said
    else:
        assert not said
