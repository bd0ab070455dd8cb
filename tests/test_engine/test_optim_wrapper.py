"""Optimizers keyed by role: which there are, bfloat16 autocast on any device, clipping and accumulation."""
import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from tests_support import tiny_method
from torch import nn

from cdm_plugin.draws import Draws
from cdm_plugin.engine import AutocastOptimWrapper, RoleOptimWrapper, StudentEMA
from cdm_plugin.hooks import StudentEMAHook

SGD = dict(optimizer=dict(type='SGD', lr=0.05))
STILL = dict(optimizer=dict(type='SGD', lr=0.0))
AMP = dict(type='AmpOptimWrapper', dtype='bfloat16', **SGD)


def build(method, **roles):
    """The constructor as a runner builds it, from a config keyed by role."""
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='DistillationOptimWrapperConstructor', optim_wrapper_cfg=copy.deepcopy(roles)))
    return constructor(method)


def record_gradients(wrappers):
    """Keeps the gradients with which each role's optimizer last stepped, by role."""
    recorded = {}

    def keep(role):
        def hook(optimizer, args, kwargs):
            recorded[role] = [None if p.grad is None else p.grad.double() for g in optimizer.param_groups
                              for p in g['params']]
        return hook

    for role, wrapper in wrappers.items():
        wrapper.optimizer.register_step_pre_hook(keep(role))
    return recorded


# Which wrappers there are


def test_one_wrapper_a_role_with_its_own_parameters_and_settings():
    method = tiny_method()
    wrappers = build(method, student=dict(optimizer=dict(type='AdamW', lr=1e-5, betas=(0.9, 0.99))),
                     fake=dict(optimizer=dict(type='SGD', lr=5e-6), accumulative_counts=4))
    assert set(wrappers.keys()) == {'student', 'fake'}
    assert isinstance(wrappers['student'].optimizer, torch.optim.AdamW)
    assert wrappers['fake']._accumulative_counts == 4
    learning_rates = wrappers.get_lr()
    assert learning_rates['student.lr'] == [1e-5] and learning_rates['fake.lr'] == [5e-6]
    for role in ('student', 'fake'):
        parameters = [p for group in wrappers[role].optimizer.param_groups for p in group['params']]
        assert {id(p) for p in parameters} == {id(p) for p in getattr(method, role).parameters()}


def test_a_role_without_settings_is_an_error():
    with pytest.raises(ValueError, match=r"optim_wrapper\.fake is missing: CDM trains \['student', 'fake'\]"):
        build(tiny_method(), student=SGD)
    with pytest.raises(ValueError, match=r'optim_wrapper\.student is missing: FlowMatching trains'):
        build(tiny_method('FlowMatching'), fake=SGD)


@pytest.mark.parametrize('name', ['teacher', 'generator', 'optimizer'])
def test_an_unknown_role_is_an_error(name):
    with pytest.raises(ValueError, match=rf'optim_wrapper\.{name} is no role'):
        build(tiny_method(), student=SGD, fake=SGD, **{name: SGD})


def test_settings_of_a_role_that_a_method_does_not_train_are_left_aside():
    assert set(build(tiny_method('FlowMatching'), student=SGD, fake=SGD).keys()) == {'student'}


def test_paramwise_cfg_stands_under_a_role():
    with pytest.raises(ValueError, match=r'optim_wrapper\.student\.paramwise_cfg'):
        OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
            type='DistillationOptimWrapperConstructor', optim_wrapper_cfg=dict(student=SGD, fake=SGD),
            paramwise_cfg=dict(norm_decay_mult=0.0)))
    wrappers = build(tiny_method(), fake=SGD, student=dict(
        optimizer=dict(type='SGD', lr=0.05, weight_decay=0.1), paramwise_cfg=dict(bias_decay_mult=0.0)))
    decays = {group['weight_decay'] for group in wrappers['student'].optimizer.param_groups}
    assert decays == {0.0, 0.1}


def test_a_wrapped_method_is_unwrapped():
    method = tiny_method()
    wrapper = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = method
    wrappers = build(wrapper, student=SGD, fake=SGD)
    assert wrappers['fake'].optimizer.param_groups[0]['params'][0] is next(method.fake.parameters())


def test_the_config_is_not_written_to():
    config = dict(student=dict(AMP, loss_scale='dynamic'), fake=dict(SGD))
    before = copy.deepcopy(config)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='DistillationOptimWrapperConstructor', optim_wrapper_cfg=config))
    constructor(tiny_method(dtype=torch.float32))
    assert config == before


# bfloat16


def test_amp_in_bfloat16_becomes_autocast_and_runs_on_the_cpu():
    wrappers = build(tiny_method(), student=dict(AMP, loss_scale='dynamic'), fake=SGD)
    assert type(wrappers['student']) is AutocastOptimWrapper and type(wrappers['fake']) is RoleOptimWrapper
    with wrappers['student'].optim_context(nn.Linear(2, 2)):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


def test_autocast_follows_the_network_and_not_the_machine(monkeypatch):
    """A network on the CPU of a machine with a GPU."""
    monkeypatch.setattr('mmengine.runner.amp.get_device', lambda: 'cuda')
    monkeypatch.setattr('torch.cuda.is_bf16_supported', lambda *args, **kwargs: True)
    network = nn.Linear(2, 2)
    with build(tiny_method(), student=AMP, fake=AMP)['student'].optim_context(network):
        assert network(torch.ones(1, 2)).dtype == torch.bfloat16


def test_autocast_takes_bfloat16_only():
    for dtype in ({}, dict(dtype='float16')):
        with pytest.raises(ValueError, match=r"optim_wrapper\.student\.dtype must be 'bfloat16'.*float16"):
            build(tiny_method(), student=dict(SGD, type='AmpOptimWrapper', **dtype), fake=SGD)
    with pytest.raises(ValueError, match=r"optim_wrapper\.\*\.dtype must be 'bfloat16'.*'float16'"):
        build(tiny_method(), student=dict(SGD, type='AutocastOptimWrapper', dtype='float16'), fake=SGD)


def one_cycle(config, labels, checkpointing, **kwargs):
    """Gradients of a fake step and of the student step after it."""
    method = tiny_method(dtype=torch.float32, activation_checkpointing=checkpointing, alpha=1.0, **kwargs)
    wrappers = build(method, student=config, fake=config)
    recorded, linear_dtypes = record_gradients(wrappers), set()
    method.student.proj_out.register_forward_hook(lambda m, args, out: linear_dtypes.add(out.dtype))
    for method.iteration in (0, 1):
        draws = method.sample_draws(5)
        logs = method.train_step(labels, wrappers)
    assert draws.rollout_steps > 0
    return method, recorded, logs, linear_dtypes


@pytest.mark.parametrize('checkpointing', [False, True], ids=['plain', 'checkpointing'])
@pytest.mark.parametrize('role', ['student', 'fake'])
def test_autocast_gradients_reach_every_parameter_and_are_close_to_float32(role, checkpointing, labels):
    """The rollout casts the weights without gradient first; a cache that outlived it would cut the gradients."""
    _, exact, exact_logs, exact_dtypes = one_cycle(SGD, labels, checkpointing)
    method, rounded, logs, dtypes = one_cycle(AMP, labels, checkpointing)
    assert exact_dtypes == {torch.float32} and dtypes == {torch.bfloat16}
    names = [name for name, _ in getattr(method, role).named_parameters()]
    assert len(exact[role]) == len(rounded[role]) == len(names)
    reached = [name for name, g in zip(names, exact[role]) if g is not None and g.abs().max() > 0]
    assert reached == [name for name, g in zip(names, rounded[role]) if g is not None and g.abs().max() > 0]
    assert len(reached) > len(names) / 2
    a, b = (torch.cat([g.flatten() for g in gradients[role] if g is not None]) for gradients in (exact, rounded))
    error = (a - b).norm() / a.norm()
    assert 1e-4 < error < 0.1
    assert logs[f'loss_{role}'].item() == pytest.approx(exact_logs[f'loss_{role}'].item(), rel=0.1)


def test_weights_and_losses_stay_in_float32(labels):
    method, recorded, logs, _ = one_cycle(AMP, labels, False)
    for role in ('student', 'fake', 'teacher'):
        assert {p.dtype for p in getattr(method, role).parameters()} == {torch.float32}
    assert all(value.dtype == torch.float32 for name, value in logs.items() if name.startswith('loss'))


def test_the_teacher_runs_under_the_students_autocast(labels):
    method = tiny_method(dtype=torch.float32, student_every=1)
    dtypes = {}
    for role in ('student', 'fake', 'teacher'):
        getattr(method, role).proj_out.register_forward_hook(
            lambda m, args, out, role=role: dtypes.setdefault(role, set()).add(out.dtype))
    method.train_step(labels, build(method, student=AMP, fake=SGD))
    assert dtypes == dict(student={torch.bfloat16}, teacher={torch.bfloat16}, fake={torch.float32})


# Clipping


def test_clipping_is_by_role_and_logs_the_norm_before_it(labels):
    limits, recorded = dict(student=0.01, fake=0.02), []
    for clip in (False, True):
        method = tiny_method(student_every=1)
        wrappers = build(method, **{
            role: dict(STILL, **(dict(clip_grad=dict(max_norm=limit)) if clip else {}))
            for role, limit in limits.items()})
        recorded.append(record_gradients(wrappers))
        logs = method.train_step(labels, wrappers)
        assert ('grad_norm_fake' in logs) == clip
    for role, limit in limits.items():
        whole, clipped = (torch.cat([g.flatten() for g in gradients[role] if g is not None]).norm().item()
                          for gradients in recorded)
        assert whole > 2 * limit  # so that clipping happens
        assert clipped == pytest.approx(limit, rel=1e-4)  # torch divides by norm + 1e-6
        assert logs[f'grad_norm_{role}'].item() == pytest.approx(whole, rel=1e-6)


# Accumulation


def concatenate(a: Draws, b: Draws) -> Draws:
    """The draws of two batches on the same grid as those of one."""
    assert torch.equal(a.sigmas, b.sigmas)
    return Draws(a.sigmas, torch.cat([a.anchor, b.anchor]), max(a.rollout_steps, b.rollout_steps),
                 torch.cat([a.noise, b.noise]), torch.cat([a.fake_sigma, b.fake_sigma], 1),
                 torch.cat([a.fake_noise, b.fake_noise], 1))


def weights(network):
    return [p.detach().clone() for p in network.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b))


FIXED = dict(time_grid=dict(type='FixedTimeGrid', sigmas=[1.0, 0.75, 0.5, 0.25]), student_every=100)


def test_two_accumulated_fake_steps_equal_one_of_the_doubled_batch(labels):
    """Exact, because neither the student nor the fake score moves in between. The merge comes with the update."""
    method = tiny_method(**FIXED)
    wrappers = build(method, student=SGD, fake=dict(SGD, accumulative_counts=2))
    recorded, before, draws = record_gradients(wrappers), weights(method.fake), []
    for method.iteration in (0, 1):
        assert equal(weights(method.fake), before)  # neither a step nor a merge before the second iteration
        draws.append(method.sample_draws(5))
        method.train_step(labels, wrappers)

    doubled = tiny_method(**FIXED)
    assert equal(weights(doubled.fake), before)
    doubled.sample_draws = lambda batch, latent_size=None: concatenate(*draws)
    wrappers = build(doubled, student=SGD, fake=SGD)
    expected = record_gradients(wrappers)
    doubled.train_step(dict(prompt=torch.cat([labels['prompt']] * 2)), wrappers)
    for ours, theirs in zip(recorded['fake'], expected['fake']):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    for p, q, start, student in zip(weights(method.fake), weights(doubled.fake), before, weights(method.student)):
        assert torch.allclose(p, q, rtol=0, atol=1e-13)
    assert not equal(weights(method.fake), before)


def test_the_merge_waits_for_a_real_update(labels):
    """With a zero learning rate the merge is all that moves the fake score."""
    method = tiny_method(fake_merge=0.25, **FIXED)
    wrappers = build(method, student=SGD, fake=dict(STILL, accumulative_counts=3))
    expected = [p.double() for p in weights(method.fake)]
    student = weights(method.student)
    for method.iteration in range(7):
        method.train_step(labels, wrappers)
        if method.iteration in (2, 5):
            expected = [0.75 * p + 0.25 * q for p, q in zip(expected, student)]
        for p, q in zip(method.fake.parameters(), expected):
            assert torch.allclose(p, q, rtol=0, atol=1e-14)


def test_the_students_average_waits_for_a_real_update(labels):
    """student_every=2 and two accumulated student steps: the student moves in iterations 3 and 7."""
    method = tiny_method()
    wrappers = build(method, student=dict(SGD, accumulative_counts=2), fake=SGD)
    method.student_ema = StudentEMA(method.student)
    hook, updated = StudentEMAHook(), []
    for method.iteration in range(8):
        runner = SimpleNamespace(model=method)
        before = weights(method.student)
        method.train_step(labels, wrappers)
        assert equal(weights(method.student), before) == (not method.student_updated)
        hook.after_train_iter(runner, method.iteration)
        updated.append(method.student_ema.steps)
    assert updated == [0, 0, 0, 1, 1, 1, 1, 2]


def test_accumulated_student_steps_average_their_gradients(labels):
    """Both student steps see the same student; the fake score stands still."""
    method = tiny_method(student_every=1, fake_merge=0.0)
    wrappers = build(method, student=dict(SGD, accumulative_counts=2), fake=STILL)
    recorded = record_gradients(wrappers)
    for method.iteration in (0, 1):
        method.train_step(labels, wrappers)
    separate = []
    for iteration in (0, 1):
        alone = tiny_method(student_every=1, fake_merge=0.0)
        alone.iteration = iteration
        wrappers = build(alone, student=SGD, fake=STILL)
        separate.append(record_gradients(wrappers))
        alone.train_step(labels, wrappers)
    for ours, one, two in zip(recorded['student'], *(s['student'] for s in separate)):
        assert ours is None or torch.allclose(ours, (one + two) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize('iteration, expected', [
    (0, dict(student=0, fake=0)), (7, dict(student=3, fake=7)), (8, dict(student=4, fake=8))], ids=str)
def test_counters_after_a_resume(iteration, expected):
    """The student has made one step in two iterations."""
    method = tiny_method()
    wrappers = build(method, student=dict(SGD, accumulative_counts=2), fake=SGD)
    wrappers.initialize_count_status(method, iteration, 20)
    assert {role: wrapper.inner_count for role, wrapper in wrappers.items()} == expected
    assert (wrappers['student']._max_counts, wrappers['fake']._max_counts) == (10, 20)


def test_the_fake_score_counts_every_step_of_an_iteration():
    method = tiny_method(fake_steps=3, student_every=1)
    wrappers = build(method, student=dict(SGD, accumulative_counts=2), fake=SGD)
    wrappers.initialize_count_status(method, 7, 20)
    assert {role: wrapper.inner_count for role, wrapper in wrappers.items()} == dict(student=7, fake=21)
    assert (wrappers['student']._max_counts, wrappers['fake']._max_counts) == (20, 60)


def test_steps_on_one_rollout_are_not_accumulated():
    with pytest.raises(ValueError, match=r'model\.fake_steps=2 .*optim_wrapper\.fake\.accumulative_counts=4'):
        build(tiny_method(fake_steps=2), student=SGD, fake=dict(SGD, accumulative_counts=4))
