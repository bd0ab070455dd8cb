"""The rollout against whole trajectories of every sample, and what it spares."""
from dataclasses import replace

import pytest
import torch

from cdm_plugin.draws import Draws
from cdm_plugin.rollout import rollout

GRID = [1.0, 0.83, 0.61, 0.4, 0.26]


def make_draws(anchor, rollout_steps=None, sigmas=GRID, dtype=torch.float64):
    anchor = torch.tensor(anchor)
    noise = torch.randn(len(anchor), 2, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    steps = int(anchor.max()) if rollout_steps is None else rollout_steps
    return Draws(sigmas=torch.tensor(sigmas, dtype=dtype), anchor=anchor, rollout_steps=steps, noise=noise.to(dtype),
                 fake_sigma=None, fake_noise=None)


class Velocity:
    """Nonlinear in x and sigma, different for every sample of the batch; keeps a list of its calls."""

    def __init__(self, batch):
        self.scale = torch.linspace(0.5, 2.0, batch, dtype=torch.float64).requires_grad_()
        self.calls = []

    def __call__(self, x, sigma, index):
        self.calls.append((index.tolist(), sigma.tolist()))
        return self.of(x, sigma, self.scale[index])

    @staticmethod
    def of(x, sigma, scale):
        s, c = sigma[:, None, None, None], scale[:, None, None, None]
        return torch.sin(c * x + 3 * s) + s * x.flip(-1)**2


def whole_trajectory(draws, velocity):
    """All states of all samples, (N, B, ...): no sample stops."""
    states = [draws.noise]
    for sigma, next_sigma in zip(draws.sigmas[:-1], draws.sigmas[1:]):
        x = states[-1]
        v = velocity.of(x, sigma.expand(len(x)), velocity.scale.detach())
        states.append(x + (next_sigma - sigma) * v)
    return torch.stack(states)


ANCHORS = {
    'mixed': [2, 0, 4, 1, 2], 'all at noise': [0, 0, 0], 'all at the end': [4, 4], 'one sample': [3],
    'one straggler': [0, 0, 4, 0]}


@pytest.mark.parametrize('name', ANCHORS)
@pytest.mark.parametrize('more_steps', [0, 2], ids=['own steps', 'steps of a longer rank'])
def test_equals_whole_trajectories(name, more_steps):
    anchor = ANCHORS[name]
    steps = min(max(anchor) + more_steps, len(GRID) - 1)
    draws, velocity = make_draws(anchor, steps), Velocity(len(anchor))
    x, sigma = rollout(velocity, draws)
    expected = whole_trajectory(draws, velocity)[draws.anchor, torch.arange(len(anchor))]
    assert torch.allclose(x, expected, rtol=0, atol=1e-14)
    assert sigma.tolist() == [GRID[n] for n in anchor]
    assert not x.requires_grad and x.dtype == torch.float64


@pytest.mark.parametrize('name', ANCHORS)
def test_steps_that_noise_anew_equal_whole_trajectories(name):
    anchor = ANCHORS[name]
    noise = torch.randn(4, len(anchor), 2, 3, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    draws, velocity = make_draws(anchor), Velocity(len(anchor))
    draws = replace(draws, step_noise=[step[draws.order[:k]] for step, k in zip(noise, draws.moving)])
    x, sigma = rollout(velocity, draws)
    states = [draws.noise]
    for step, (level, next_level) in enumerate(zip(GRID[:-1], GRID[1:])):
        v = velocity.of(states[-1], torch.full((len(anchor),), level, dtype=torch.float64), velocity.scale.detach())
        states.append((1 - next_level) * (states[-1] - level * v) + next_level * noise[step])
    expected = torch.stack(states)[draws.anchor, torch.arange(len(anchor))]
    assert torch.allclose(x, expected, rtol=0, atol=1e-14) and sigma.tolist() == [GRID[n] for n in anchor]


def test_calls_shrink_as_samples_arrive():
    draws, velocity = make_draws([2, 0, 4, 1, 2]), Velocity(5)
    rollout(velocity, draws)
    assert [(sorted(index), sigma) for index, sigma in velocity.calls] == [
        ([0, 2, 3, 4], [1.0] * 4), ([0, 2, 4], [0.83] * 3), ([2], [0.61]), ([2], [0.4])]


@pytest.mark.parametrize('anchor, steps', [([2, 0, 4, 1, 2], 4), ([1, 1], 4), ([0, 0, 0], 3), ([0], 0)], ids=str)
def test_number_of_calls_and_of_samples_moved(anchor, steps):
    """One call a step on every rank; a rank whose samples have all arrived sends one dummy a call."""
    draws, velocity = make_draws(anchor, steps), Velocity(len(anchor))
    rollout(velocity, draws)
    assert len(velocity.calls) == steps
    dummies = steps - max(anchor)
    assert sum(len(index) for index, _ in velocity.calls) == sum(anchor) + dummies


def test_samples_at_anchor_zero_are_the_noise_to_the_bit_and_cost_nothing():
    draws, velocity = make_draws([0, 3, 0, 2]), Velocity(4)
    noise = draws.noise.clone()
    x, sigma = rollout(velocity, draws)
    assert torch.equal(x[0], noise[0]) and torch.equal(x[2], noise[2]) and sigma[0] == sigma[2] == 1
    assert not {0, 2} & {i for index, _ in velocity.calls for i in index}
    assert torch.equal(draws.noise, noise)  # the draws are not written to


def test_dummies_change_nothing():
    few, many = make_draws([0, 0, 1], 1), make_draws([0, 0, 1], 4)
    x_few, x_many = rollout(Velocity(3), few)[0], rollout(Velocity(3), many)[0]
    assert torch.equal(x_few, x_many)


def test_half_precision_answers_are_integrated_in_full_precision():
    draws = make_draws([4, 4], dtype=torch.float32)
    x, sigma = rollout(lambda x, s, i: torch.full_like(x, 1 / 3).bfloat16(), draws)
    third = torch.tensor(1 / 3).bfloat16().double()
    assert x.dtype == torch.float32 and sigma.dtype == torch.float32
    assert torch.allclose(x.double(), draws.noise.double() + (0.26 - 1) * third, rtol=0, atol=1e-6)
