"""The optimised iteration against tests/literal.py: losses and every gradient, given the same draws."""
import pytest
import torch
from literal import fake_loss, merge, student_losses, tdm_fake_loss, tdm_loss
from tests_support import recording_optimizers, tiny_method

RECIPES = dict(
    CDM=dict(type='CDM', alpha=2.0),
    CDM_consistent=dict(
        type='CDM', alpha=1.0, anchor_aware_fake=True,
        losses=dict(ca=dict(sigma=dict(type='UniformSigma')),
                    cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma')))),
    CDM_noised=dict(type='CDM', alpha=2.0, anchor_aware_fake=True, losses=dict(cdm=dict(points='noised'))),
    CDM_on_trajectory=dict(type='CDM', alpha=2.0, anchor_aware_fake=True,
                           losses=dict(cdm=dict(points='on-trajectory'))),
    DecoupledDMD=dict(type='DecoupledDMD', alpha=2.0),
    DMD2=dict(type='DMD2', alpha=2.0, student_every=2),
    DMD2_renoised=dict(type='DMD2', alpha=2.0, student_every=2, rollout='renoise'),
    DMD2_anchor_aware=dict(type='DMD2', alpha=2.0, student_every=2, anchor_aware_fake=True),
)
GUIDED = dict(CDM_consistent=('cdm',), DMD2=('dm',), DMD2_renoised=('dm',), DMD2_anchor_aware=('dm',))
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def relative_error(ours, theirs):
    """Largest difference of two lists of tensors, relative to the largest entry over all of them."""
    ours, theirs = ([torch.zeros(1) if t is None else t.flatten() for t in ts] for ts in (ours, theirs))
    a, b = torch.cat(ours).double(), torch.cat(theirs).double()
    return ((a - b).abs().max() / b.abs().max()).item()


def gradients(network):
    return [p.grad for p in network.parameters()]


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('checkpointing', [False, True], ids=['plain', 'checkpointing'])
@pytest.mark.parametrize('recipe', RECIPES)
def test_one_cycle_equals_the_literal_implementation(recipe, checkpointing, dtype, labels, networks_copy):
    method = tiny_method(dtype=dtype, activation_checkpointing=checkpointing, **RECIPES[recipe])
    if hasattr(method.fake, 'anchor_embedding'):  # a zero-initialised embedding would hide a wrong anchor
        torch.nn.init.normal_(method.fake.anchor_embedding.embedding.linear_2.weight, std=0.1)
    networks = networks_copy(method)
    for network in networks.values():
        network.disable_gradient_checkpointing()
    optimizers, tolerance, lr = recording_optimizers(method), TOLERANCE[dtype], 0.05
    condition = method.backbone.condition(labels)
    fields = {k: v.to(dtype) for k, v in condition.fields.items()}
    null_fields = {k: v.to(dtype) for k, v in method.null_condition(len(condition)).fields.items()}
    for iteration in (0, 1):
        method.iteration = iteration
        draws = method.sample_draws(len(condition))
        logs = method.train_step(labels, optimizers)

        loss = fake_loss(networks, draws, fields)
        networks['fake'].zero_grad()
        loss.backward()
        assert abs(logs['loss_fake'] - loss) <= tolerance * abs(loss)
        assert relative_error(optimizers['fake'].gradients, gradients(networks['fake'])) < tolerance
        with torch.no_grad():
            for p in networks['fake'].parameters():
                p -= lr * p.grad
        merge(networks['fake'], networks['student'], method.fake_merge)
    losses = student_losses(networks, draws, fields, null_fields, method.alpha, GUIDED.get(recipe, ()))
    assert losses.keys() == method.losses.keys()
    sum(losses.values()).backward()
    for name, loss in losses.items():
        assert abs(logs[f'loss_{name}'] - loss) <= tolerance * abs(loss), name
    assert relative_error(optimizers['student'].gradients, gradients(networks['student'])) < tolerance
    assert sum(g.abs().sum() for g in optimizers['student'].gradients if g is not None) > 0
    assert relative_error(method.fake.parameters(), networks['fake'].parameters()) < tolerance


def test_fake_steps_on_one_rollout_equal_the_literal_implementation(labels, networks_copy):
    """Three of them, then the student step, in one iteration."""
    method = tiny_method(alpha=2.0, fake_steps=3, student_every=1, fake_merge=0.1, anchor_aware_fake=True)
    networks, optimizers, lr = networks_copy(method), recording_optimizers(method), 0.05
    condition = method.backbone.condition(labels)
    draws = method.sample_draws(len(condition))
    logs = method.train_step(labels, optimizers)
    losses = []
    for step in range(3):
        losses.append(fake_loss(networks, draws, condition.fields, step))
        networks['fake'].zero_grad()
        losses[-1].backward()
        with torch.no_grad():
            for p in networks['fake'].parameters():
                p -= 0 if p.grad is None else lr * p.grad
        merge(networks['fake'], networks['student'], 0.1)
    assert logs['loss_fake'].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    assert relative_error(method.fake.parameters(), networks['fake'].parameters()) < 1e-12
    null = method.null_condition(len(condition)).fields
    sum(student_losses(networks, draws, condition.fields, null, 2.0, ()).values()).backward()
    assert relative_error(optimizers['student'].gradients, gradients(networks['student'])) < 1e-12


@pytest.mark.parametrize('settings', [
    dict(), dict(anchor_aware_fake=True), dict(time_grid=dict(type='DynamicTimeGrid', max_steps=6, low=0.01, high=1.0)),
    dict(rollout='renoise'),
    dict(fake_steps=2, sigma_shift='scheduler', activation_checkpointing=True)], ids=str)
def test_tdm_equals_its_literal_implementation(settings, labels, networks_copy):
    """A cycle of TDM: point, importance weights and pseudo-Huber distance as they are written."""
    method = tiny_method('TDM', alpha=2.0, **settings)
    if hasattr(method.fake, 'anchor_embedding'):
        torch.nn.init.normal_(method.fake.anchor_embedding.embedding.linear_2.weight, std=0.1)
    networks, optimizers, lr = networks_copy(method), recording_optimizers(method), 0.05
    for network in networks.values():
        network.disable_gradient_checkpointing()
    condition = method.backbone.condition(labels)
    null = method.null_condition(len(condition)).fields
    draws = method.sample_draws(len(condition))
    logs = method.train_step(labels, optimizers)
    losses = []
    for step in range(method.fake_steps):
        losses.append(tdm_fake_loss(networks, draws, condition.fields, step))
        networks['fake'].zero_grad()
        losses[-1].backward()
        with torch.no_grad():
            for p in networks['fake'].parameters():
                p -= 0 if p.grad is None else lr * p.grad
    assert logs['loss_fake'].item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-12)
    assert relative_error(method.fake.parameters(), networks['fake'].parameters()) < 1e-12
    loss = tdm_loss(networks, draws, condition.fields, null, 2.0)
    loss.backward()
    assert logs['loss_dm'].item() == pytest.approx(loss.item(), rel=1e-12)
    assert relative_error(optimizers['student'].gradients, gradients(networks['student'])) < 1e-11
    assert sum(g.abs().sum() for g in optimizers['student'].gradients if g is not None) > 0
