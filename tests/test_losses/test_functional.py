"""The losses as functions, against hand calculations; their gradient is -2 w delta / numel."""
import math

import pytest
import torch

from cdm_plugin.flow import full_precision
from cdm_plugin.losses.functional import direction_loss, flow_matching_loss, huber_direction_loss, reference_norm


def dm_loss(x0, teacher, fake, min_norm=0.1):
    return direction_loss(x0, full_precision(teacher) - full_precision(fake), teacher, min_norm)


def ca_loss(x0, cond, null, alpha, min_norm=0.1):
    return direction_loss(x0, alpha * (full_precision(cond) - full_precision(null)), cond, min_norm)


def latents(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Two samples of two entries. Sample 0: |reference - x0| = (1, 3), mean 2, w = 1/2; sample 1: (0.02, 0.06), mean 0.04,
# below the clamp of 0.1, w = 10.
X0 = torch.tensor([[1.0, 2.0], [0.5, -0.5]], dtype=torch.float64)
REFERENCE = torch.tensor([[2.0, -1.0], [0.52, -0.44]], dtype=torch.float64)
OTHER = torch.tensor([[1.5, 1.0], [0.5, -0.5]], dtype=torch.float64)
# reference - other = (0.5, -2), (0.02, 0.06); scaled (0.25, -1), (0.2, 0.6); squares' means (0.0625 + 1) / 2,
# (0.04 + 0.36) / 2
BY_HAND = [0.53125, 0.2]


def test_reference_norm_by_hand():
    assert reference_norm(X0, REFERENCE).tolist() == pytest.approx([2.0, 0.04], abs=1e-15)


def test_dm_loss_by_hand():
    assert dm_loss(X0, REFERENCE, OTHER).tolist() == pytest.approx(BY_HAND, rel=1e-14)


def test_ca_loss_by_hand():
    assert ca_loss(X0, REFERENCE, OTHER, alpha=1.0).tolist() == pytest.approx(BY_HAND, rel=1e-14)
    assert ca_loss(X0, REFERENCE, OTHER, alpha=7.0).tolist() == pytest.approx([49 * b for b in BY_HAND], rel=1e-14)
    assert ca_loss(X0, REFERENCE, OTHER, alpha=0.0).tolist() == [0.0, 0.0]


def test_the_pseudo_huber_distance_by_hand():
    """c = 3: delta 4 has the distance 5 - 3, delta 0 none; w = 1 / 2 and 10 as above."""
    delta = torch.tensor([[4.0, 0.0], [-4.0, float('nan')]], dtype=torch.float64)
    x0 = X0.clone().requires_grad_()
    loss = huber_direction_loss(x0, delta, REFERENCE, 3.0)
    assert loss.tolist() == pytest.approx([0.5 * 2 / 2, 10 * 2 / 2], rel=1e-14)
    loss.sum().backward()  # -w delta / sqrt(delta^2 + c^2) / numel
    assert x0.grad.flatten().tolist() == pytest.approx([-0.5 * 0.8 / 2, 0, 10 * 0.8 / 2, 0], rel=1e-14)


def test_flow_matching_loss_by_hand():
    velocity = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    x0, noise = torch.tensor([[1.0, 1.0], [1.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, -2.0]])
    # noise - x0 = (2, -1), (0, -4); differences (-1, 3), (0, 4)
    assert flow_matching_loss(velocity, x0, noise).tolist() == [5.0, 8.0]


@pytest.mark.parametrize('min_norm, weight', [(0.1, 10.0), (0.5, 2.0), (0.01, 25.0)])
def test_the_normaliser_is_clamped_from_below(min_norm, weight):
    """w of sample 1 is 1 / max(0.04, min_norm); w of sample 0 stays 1 / 2 throughout."""
    expected = [BY_HAND[0], ((weight * 0.02)**2 + (weight * 0.06)**2) / 2]
    assert dm_loss(X0, REFERENCE, OTHER, min_norm).tolist() == pytest.approx(expected, rel=1e-12)
    assert ca_loss(X0, REFERENCE, OTHER, 1.0, min_norm).tolist() == pytest.approx(expected, rel=1e-12)


def losses_of(x0, a, b):
    """Every distribution-matching loss, with the update direction and the reference that it stands for."""
    return dict(dm=(dm_loss(x0, a, b), a - b, a), ca=(ca_loss(x0, a, b, 3.0), 3 * (a - b), a),
                direction=(direction_loss(x0, a * b, b), a * b, b))


@pytest.mark.parametrize('name', ['dm', 'ca', 'direction'])
@pytest.mark.parametrize('shape', [(3, 5), (4, 2, 3, 3)], ids=str)
def test_gradient_is_minus_two_w_delta_over_numel(name, shape):
    x0 = latents(0, *shape).requires_grad_()
    # Scales from far below the clamp to far above it.
    scale = torch.logspace(-3, 1, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    a, b = x0.detach() + scale * latents(1, *shape), x0.detach() + scale * latents(2, *shape)
    loss, delta, reference = losses_of(x0, a, b)[name]
    loss.sum().backward()
    numel = math.prod(shape[1:])
    for i in range(shape[0]):
        w = 1 / max((reference[i] - x0[i]).abs().mean().item(), 0.1)
        assert torch.allclose(x0.grad[i], -2 * w * delta[i] / numel, rtol=1e-11, atol=0)


def test_a_step_against_the_gradient_moves_towards_the_teacher_and_away_from_the_fake_score():
    x0 = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    dm_loss(x0, torch.full((1, 4), 2.0), torch.full((1, 4), -1.0)).sum().backward()
    assert (x0.grad < 0).all()


@pytest.mark.parametrize('name', ['dm', 'ca', 'direction'])
def test_no_gradient_flows_to_the_answers(name):
    x0, a, b = (latents(seed, 2, 6).requires_grad_() for seed in range(3))
    losses_of(x0, a, b)[name][0].sum().backward()
    assert x0.grad is not None and a.grad is None and b.grad is None


def test_flow_matching_gradient_goes_to_the_velocity():
    velocity = latents(0, 2, 6).requires_grad_()
    x0, noise = latents(1, 2, 6), latents(2, 2, 6)
    flow_matching_loss(velocity, x0, noise).sum().backward()
    assert torch.allclose(velocity.grad, 2 * (velocity - (noise - x0)) / 6, rtol=1e-13, atol=0)


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf], ids=str)
def test_entries_that_are_no_numbers_move_nothing(bad):
    """One bad entry has no gradient; the sample's other entries and the other samples keep theirs."""
    x0 = latents(0, 2, 4).requires_grad_()
    delta, reference = latents(1, 2, 4), latents(2, 2, 4)
    clean = torch.autograd.grad(direction_loss(x0, delta, reference).sum(), x0)[0]
    delta[0, 1] = bad
    gradient = torch.autograd.grad(direction_loss(x0, delta, reference).sum(), x0)[0]
    assert gradient[0, 1] == 0
    clean[0, 1] = 0
    assert torch.equal(gradient, clean) and (gradient != 0).sum() == 7


@pytest.mark.parametrize('bad', [math.nan, math.inf], ids=str)
def test_a_bad_teacher_answer_moves_nothing_in_its_sample(bad):
    """The normaliser of the whole sample is lost with it."""
    x0 = latents(0, 2, 4).requires_grad_()
    teacher, fake = latents(1, 2, 4), latents(2, 2, 4)
    teacher[0, 1] = bad
    loss = dm_loss(x0, teacher, fake)
    loss.sum().backward()
    assert loss[0] == 0 and (x0.grad[0] == 0).all()
    assert torch.isfinite(loss).all() and (x0.grad[1] != 0).all()


def test_half_precision_answers_are_widened_first():
    """The difference of two bfloat16 numbers need not be one: 1 + 2^-7 - 2^-9."""
    x0 = torch.zeros(1, 1)
    teacher, fake = torch.tensor([[1 + 2**-7]]).bfloat16(), torch.tensor([[2**-9]]).bfloat16()
    loss = dm_loss(x0, teacher, fake)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(((1 + 2**-7 - 2**-9) / (1 + 2**-7))**2, rel=1e-6)
    assert flow_matching_loss(teacher, teacher, fake).dtype == torch.float32
    assert dm_loss(X0, REFERENCE, OTHER).dtype == torch.float64


def test_samples_do_not_mix():
    x0, a, b = (latents(seed, 3, 2, 2) for seed in range(3))
    for function in (dm_loss, lambda *args: ca_loss(*args, 2.0), flow_matching_loss):
        together = function(x0, a, b)
        assert together.shape == (3,)
        apart = torch.cat([function(x0[i:i + 1], a[i:i + 1], b[i:i + 1]) for i in range(3)])
        assert torch.allclose(together, apart, rtol=1e-14, atol=0)
