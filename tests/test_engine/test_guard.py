"""Steps that are not finite are left out as a whole: what remains is a training that never saw their iterations."""
import copy
import math

import pytest
import torch
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from tests_support import same_bits, tiny_method
from torch.utils._python_dispatch import TorchDispatchMode

from cdm_plugin.condition import Condition
from cdm_plugin.engine import StudentEMA
from cdm_plugin.engine.guard import StepGuard

ADAM = dict(type='AdamW', lr=1e-2)
# How a step is judged -> optimizer wrapper of either role.
WRAPPERS = {
    'on the host': dict(optimizer=ADAM, clip_grad=dict(max_norm=1.0)),
    'on the device': dict(optimizer=dict(ADAM, fused=True), clip_grad=dict(max_norm=1.0)),
    'without clipping': dict(optimizer=dict(ADAM, fused=True)),
    'clipped by value': dict(optimizer=ADAM, clip_grad=dict(type='value', clip_value=0.5)),
    'momentum': dict(optimizer=dict(type='SGD', lr=1e-2, momentum=0.9, fused=True)),
}


def nan_prompt(method):
    """The text encoder gives one NaN, in one of the samples."""
    condition = method.backbone.condition

    def spoilt(batch):
        fields = {name: t.clone() for name, t in condition(batch).fields.items()}
        next(iter(fields.values()))[1, ..., 0] = math.nan
        return Condition(fields)

    method.backbone.condition = spoilt
    return lambda: setattr(method.backbone, 'condition', condition)


def spoil(method, role, value):
    """One weight of a frozen copy of the role's network answers for it."""
    weight = next(getattr(method, role).parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = value
    return lambda: weight.data.copy_(kept)


def infinite_gradient(method):
    """Sound losses, but one gradient of each trained role overflows."""
    handles = [list(getattr(method, role).parameters())[-1].register_hook(lambda g: g * math.inf)
               for role in ('student', 'fake')]
    return lambda: [handle.remove() for handle in handles]


def huge_loss(method):
    """The losses overflow, while their gradients are clipped to something finite."""
    student, fake = method.student_loss, method.fake_loss_at
    method.student_loss = lambda *args: student(*args) * 1e308 * 10
    method.fake_loss_at = lambda *args: fake(*args) * 1e308 * 10
    return lambda: (delattr(method, 'student_loss'), delattr(method, 'fake_loss_at'))


FAULTS = {'prompt': nan_prompt, 'gradient': infinite_gradient, 'loss': huge_loss,
          'teacher': lambda method: spoil(method, 'teacher', math.inf)}


def build(method, wrapper, **fake):
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='DistillationOptimWrapperConstructor',
        optim_wrapper_cfg=dict(student=copy.deepcopy(wrapper), fake={**copy.deepcopy(wrapper), **fake})))
    wrappers = constructor(method)
    wrappers.initialize_count_status(method, 0, 100)
    return wrappers


def train(wrapper, iterations, fault=None, bad=(), left_out=(), fake=None, **model):
    """Trains these iterations, with the fault in the `bad` ones, as the hooks do; `left_out` ones never happen.

    Returns:
        tuple: Everything that a checkpoint would hold, and what the guards found, by role.
    """
    method = tiny_method(**{**dict(student_every=2, fake_merge=0.1), **model})
    wrappers = build(method, wrapper, **(fake or {}))
    method.student_ema = StudentEMA(method.student, 0.9)
    found = dict(student=[], fake=[])
    for iteration in [i for i in iterations if i not in left_out]:
        method.iteration = iteration
        mend = FAULTS[fault](method) if iteration in bad else lambda: None
        method.train_step(dict(prompt=torch.tensor([0, 1, 2])), wrappers)
        mend()
        if method.student_updated:
            method.student_ema.update(method.updated['student'])
        for role, own in found.items():
            while wrappers[role].guard.judgements:
                own.append(wrappers[role].guard.judgements.popleft())
    state = dict(weights=dict(method.state_dict()), ema=method.student_ema.state_dict(),
                 optimizers={role: w.optimizer.state_dict()['state'] for role, w in wrappers.items()})
    return state, {role: [bool(j.fine) for j in own] for role, own in found.items()}


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('fault', ['prompt', 'gradient', 'loss'])
def test_a_bad_iteration_is_as_if_it_had_never_been(wrapper, fault):
    """Weights, moments, their counts, the merge and the average, to the bit, of a fake step and of a cycle's both. The
    first steps are bad too, when the optimizers have no state yet."""
    expected, _ = train(WRAPPERS[wrapper], range(8), left_out=(0, 1, 4, 5))
    state, fine = train(WRAPPERS[wrapper], range(8), fault, bad=(0, 1, 4, 5))
    same_bits(state, expected)
    assert fine == dict(fake=[False, False, True, True] * 2, student=[False, True] * 2)


def test_answers_that_the_loss_leaves_out_are_seen():
    """`nan_to_num` in the direction hides a broken teacher: the student loss stays finite, and its step is left out."""
    state, fine = train(WRAPPERS['on the host'], range(4), 'teacher', bad=(3,))
    assert fine == dict(fake=[True] * 4, student=[True, False])
    assert all(w.isfinite().all() for w in state['weights'].values())
    moved, _ = train(WRAPPERS['on the host'], range(3))
    same_bits({k: w for k, w in state['weights'].items() if k.startswith('student.')},
              {k: w for k, w in moved['weights'].items() if k.startswith('student.')})


@pytest.mark.parametrize('role, terms', [
    ('teacher', {'loss_ca', 'loss_dm', 'loss_cdm'}), ('fake', {'loss_dm', 'loss_cdm'})])
def test_the_terms_that_are_not_finite_are_named(role, terms):
    method = tiny_method(student_every=1)
    wrappers = build(method, WRAPPERS['on the host'])
    mend = spoil(method, role, math.nan)
    logs = method.train_step(dict(prompt=torch.tensor([0, 1, 2])), wrappers)
    mend()
    judgement, = wrappers['student'].guard.judgements
    assert {name for name, fine in judgement.terms.items() if not fine} == terms
    assert logs['loss_student'].isfinite()  # nan_to_num, as in the published code
    judgement, = wrappers['fake'].guard.judgements
    assert bool(judgement.fine) == (role == 'teacher')


@pytest.mark.parametrize('wrapper', ['on the host', 'on the device'])
@pytest.mark.parametrize('bad', [2, 3], ids=['first micro-batch', 'last micro-batch'])
def test_a_bad_micro_batch_drops_the_whole_update(wrapper, bad):
    options = dict(fake=dict(accumulative_counts=2), student_every=100)
    expected, _ = train(WRAPPERS[wrapper], range(6), left_out=(2, 3), **options)
    state, fine = train(WRAPPERS[wrapper], range(6), 'prompt', bad=(bad,), **options)
    same_bits(state, expected)
    assert fine['fake'] == [True, False, True]


def test_a_sound_loss_keeps_its_bits_and_its_gradients():
    x = torch.randn(7, dtype=torch.float32, requires_grad=True)
    plain, checked = x.square().sum(), StepGuard().checked(x.square().sum(), dict(a=torch.tensor(True)))
    assert torch.equal(plain, checked) and checked.dtype == torch.float32
    assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss in (plain, checked)))


class Reads(TorchDispatchMode):
    """Counts how often Python asks a tensor for its number."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_only_an_optimizer_that_cannot_learn_it_on_the_device_waits():
    counts = {}
    for name in ('on the host', 'on the device'):
        method = tiny_method(student_every=1, fake_merge=0.1)
        wrappers = build(method, WRAPPERS[name])
        method.student_ema = StudentEMA(method.student)
        method.train_step(dict(prompt=torch.tensor([0, 1, 2])), wrappers)
        with Reads() as mode:
            for wrapper in wrappers.values():
                wrapper.step()
            method._merge(wrappers['fake'].guard.taken)
            method.student_ema.update(wrappers['student'].guard.taken)
        counts[name] = mode.count
        assert [wrapper.waits for wrapper in wrappers.values()] == [name == 'on the host'] * 2
    assert counts['on the device'] == 0 < counts['on the host']
