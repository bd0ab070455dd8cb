"""Roles and phases: what a plug-in adds from outside trains, each role in its own phase only."""
import copy

import pytest
import torch
from acme_plugin import config, picture
from mmengine.registry import MODELS
from mmengine.runner import Runner
from tests_support import recording_optimizers, same_bits, tiny_backbone, tiny_method

from cdm_plugin.export import export
from cdm_plugin.methods.phases import Phase
from cdm_plugin.roles.weights import unwrap

KINDS = {
    'of a method': dict(type='AcmeDMD2'),
    'of a loss': dict(type='DecoupledDMD', losses=dict(gan=dict(type='AcmeGANLoss', weight=0.5))),
    'of a loss, on adapters': dict(type='CDM', lora=dict(rank=2), losses=dict(gan=dict(type='AcmeGANLoss'))),
    'of a loss, checkpointed': dict(type='CDM', activation_checkpointing=True,
                                    losses=dict(gan=dict(type='AcmeGANLoss')))}


def batch(rows=4):
    return dict(prompt=torch.arange(rows) % 3, image=torch.stack([picture(i) for i in range(rows)]))


def gradients(method):
    return {role: [p.grad for p in unwrap(getattr(method, role)).parameters() if p.grad is not None]
            for role in ('student', 'fake', 'teacher', 'discriminator')}


@pytest.mark.parametrize('kind', KINDS)
def test_each_role_gets_a_gradient_only_in_its_own_phase(kind):
    method = tiny_method(student_every=2, **KINDS[kind])
    method.to(torch.float64)
    seen = []

    class Wrapper:
        """Keeps the gradients of one role's step instead of stepping."""

        def __init__(self, role):
            self.role = role

        def update_params(self, loss):
            method.zero_grad()
            loss.backward()
            seen.append((self.role, {role: len(grads) for role, grads in gradients(method).items() if grads}))

        def should_update(self):
            return False

        def optim_context(self, network):
            return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()

    wrappers = {role: Wrapper(role) for role in method.trained_roles}
    assert method.trained_roles == ('student', 'fake', 'discriminator')
    for method.iteration in range(2):
        method.train_step(batch(), wrappers)
    assert [role for role, _ in seen] == ['fake', 'fake', 'student', 'discriminator']
    for role, reached in seen:
        assert set(reached) == {role}, (role, reached)
    assert all(p.requires_grad for role in method.trained_roles for p in getattr(method, role).parameters())


def test_the_gan_loss_reaches_the_student_as_autograd_alone_says():
    """Of the student's phase with the fooling loss alone: the chain rule through a copy of the discriminator."""
    method = tiny_method(type='AcmeDMD2', student_every=1, losses=dict(dm=None))
    optimizers = recording_optimizers(method)
    data, copied = batch(), copy.deepcopy(method)
    draws = copied.sample_draws(4)
    logs = method.train_step(data, optimizers)
    # The same anchors, from the student before its step.
    iteration = copied.start(copied.data_preprocessor(data, True))
    noisy = 0.7 * iteration.anchor.x0 + 0.3 * draws.losses['fool']['noise']
    expected = 0.5 * torch.log1p(torch.exp(-copied.discriminator(noisy))).mean()
    expected.backward()
    assert float(logs['loss_student']) == pytest.approx(float(expected), rel=1e-12)
    pairs = list(zip(optimizers['student'].gradients, (p.grad for p in copied.student.parameters())))
    assert sum(float(g.abs().sum()) for _, g in pairs if g is not None) > 0
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None) and (ours is None or torch.allclose(ours, theirs, rtol=1e-10))


def test_turns_and_steps():
    phase = Phase('critic', lambda iteration, step: None, every=3, steps=2)
    assert [phase.is_due(i) for i in range(6)] == [False, False, True, False, False, True]
    assert [phase.steps_by(n) for n in (0, 2, 3, 7)] == [0, 0, 2, 4]


@pytest.mark.parametrize('kind', ['of a method', 'of a loss'])
def test_it_trains_resumes_to_the_bit_and_is_left_out_of_the_export(kind, tmp_path):
    def run(name, iterations, resume=False):
        torch.manual_seed(0)
        runner = Runner.from_cfg(config(tmp_path / name, iterations, resume, **KINDS[kind]))
        runner.train()
        return runner

    runner = run('whole', 8)
    run('parts', 4)
    run('parts', 8, resume=True)
    whole, parts = (torch.load(tmp_path / name / 'iter_8.pth', weights_only=True) for name in ('whole', 'parts'))
    for part in ('state_dict', 'optimizer', 'student_ema', 'param_schedulers'):
        same_bits(whole[part], parts[part], part)
    assert any(key.startswith('discriminator.') for key in whole['state_dict'])
    assert not any(key.startswith('losses.') for key in whole['state_dict'])
    start = torch.load(tmp_path / 'parts' / 'iter_4.pth', weights_only=True)['state_dict']
    assert any(not torch.equal(v, start[k]) for k, v in whole['state_dict'].items() if k.startswith('discriminator.'))
    steps = {role: max(float(s['step']) for s in state['state'].values()) for role, state in whole['optimizer'].items()}
    assert steps == dict(student=4, fake=8, discriminator=4)
    out = export(runner.model, tmp_path / 'out', config=runner.cfg)
    from safetensors import safe_open
    with safe_open(out / 'transformer' / 'diffusion_pytorch_model.safetensors', 'pt') as file:
        exported = set(file.keys())
    assert exported == set(MODELS.build(dict(tiny_backbone())).build_network().state_dict())


def test_a_missing_optimizer_is_named(tmp_path):
    cfg = config(tmp_path, 2)
    del cfg.optim_wrapper['discriminator']
    cfg.param_scheduler = None
    with pytest.raises(ValueError, match='optim_wrapper.discriminator is missing: AcmeDMD2 trains .*discriminator'):
        Runner.from_cfg(cfg).train()
