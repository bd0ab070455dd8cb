"""The mathematics of the straight path against hand calculations and diffusers' FlowMatchEulerDiscreteScheduler."""
import inspect
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

from cdm_plugin.flow import (
    add_noise,
    diffuse,
    expand_sigma,
    extrapolate,
    full_precision,
    shift_sigmas,
    stretch_sigmas,
    to_x0,
)
from cdm_plugin.sampling import euler_sample, renoise_sample

SIGMA = torch.tensor([0.0, 0.02, 0.5, 0.98, 1.0], dtype=torch.float64)


def latents(*shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def test_values_by_hand():
    x0, noise, sigma = torch.tensor([[2.0, -1.0]]), torch.tensor([[6.0, 3.0]]), torch.tensor([0.25])
    assert add_noise(x0, noise, sigma).tolist() == [[3.0, 0.0]]
    assert to_x0(torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, -8.0]]), sigma).tolist() == [[2.0, 2.0]]
    moved = extrapolate(torch.tensor([[3.0, 0.0]]), torch.tensor([[4.0, -8.0]]), sigma, torch.tensor([0.75]))
    assert moved.tolist() == [[5.0, -4.0]]
    assert shift_sigmas(torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]), 3.0).tolist() == pytest.approx(
        [1.0, 0.9, 0.75, 0.5, 0.0], abs=1e-7)


def test_true_velocity_leads_back_to_x0_and_to_any_other_level():
    x0, noise = latents(5, 3, 2, 2), latents(5, 3, 2, 2, seed=1)
    x, velocity = add_noise(x0, noise, SIGMA), noise - x0
    assert torch.allclose(to_x0(x, velocity, SIGMA), x0, rtol=0, atol=1e-14)
    for to_sigma in (SIGMA.flip(0), torch.zeros_like(SIGMA), torch.ones_like(SIGMA)):
        moved = extrapolate(x, velocity, SIGMA, to_sigma)
        assert torch.allclose(moved, add_noise(x0, noise, to_sigma), rtol=0, atol=1e-14)


def test_every_sample_has_its_own_level():
    x0, noise = latents(2, 3, 4, 4), latents(2, 3, 4, 4, seed=1)
    x = add_noise(x0, noise, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.equal(x[0], x0[0]) and torch.equal(x[1], noise[1])


@pytest.mark.parametrize('dtype, expected', [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.int64, torch.float32),
    (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_dtypes(dtype, expected):
    a, b, sigma = latents(2, 8).to(dtype), latents(2, 8, seed=1).to(dtype), torch.tensor([1.0, 0.0]).to(dtype)
    assert full_precision(a).dtype == expected
    for result in (add_noise(a, b, sigma), to_x0(a, b, sigma), extrapolate(a, b, sigma, sigma.flip(0))):
        assert result.dtype == expected


def test_half_precision_inputs_are_widened_before_the_arithmetic():
    # 1 + 2^-7 and 255 are exact in bfloat16; their difference is not.
    x, velocity = (torch.tensor([[value]], dtype=torch.bfloat16) for value in (1 + 2**-7, 255.0))
    assert to_x0(x, velocity, torch.ones(1)).item() == 1 + 2**-7 - 255.0
    third = torch.tensor([0.3])  # sigma itself stays in float32 beside bfloat16 latents
    expected = x.double() - third.double() * velocity.double()
    assert abs(to_x0(x, velocity, third).item() - expected.item()) < 1e-5


@pytest.mark.parametrize('shape', [(), (1,), (4,), (3, 1)], ids=str)
@pytest.mark.parametrize('function', [
    lambda x, s: add_noise(x, x, s), lambda x, s: to_x0(x, x, s), lambda x, s: extrapolate(x, x, s, torch.zeros(3)),
    lambda x, s: extrapolate(x, x, torch.zeros(3), s)], ids=['add_noise', 'to_x0', 'extrapolate', 'extrapolate_to'])
def test_sigma_must_have_one_value_a_sample(function, shape):
    with pytest.raises(ValueError, match=r'sigma must have shape \(3,\)'):
        function(torch.zeros(3, 2, 2), torch.full(shape, 0.5))


def test_expand_sigma_adds_dimensions_at_the_end():
    assert expand_sigma(torch.full((3,), 0.5), torch.zeros(3, 4, 5, 6)).shape == (3, 1, 1, 1)
    assert expand_sigma(torch.full((3,), 0.5), torch.zeros(3, 4)).shape == (3, 1)


@pytest.mark.parametrize('shift', [1.0, 3.0, 0.5])
def test_shift_equals_the_scheduler_of_sd3(shift):
    sigmas = [1.0, 0.93, 0.75, 0.5, 0.25, 0.02]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=sigmas)
    ours = shift_sigmas(torch.tensor(sigmas, dtype=torch.float64), shift)
    assert torch.allclose(ours.float(), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    assert torch.allclose(1000 * ours.float(), scheduler.timesteps, rtol=0, atol=1e-3)


@pytest.mark.parametrize('mu', [0.5, 0.9, 1.15])
def test_shift_by_exp_mu_is_the_dynamic_exponential_shift(mu):
    sigmas = [1.0, 0.93, 0.75, 0.5, 0.25, 0.02]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type='exponential')
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    ours = shift_sigmas(torch.tensor(sigmas, dtype=torch.float64), math.exp(mu))
    assert torch.allclose(ours.float(), scheduler.sigmas[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize('sigmas', [[1.0, 0.93, 0.75, 0.5, 0.25, 0.02], [1.0, 0.75, 0.5, 0.25], [1.0, 0.5]], ids=len)
@pytest.mark.parametrize('last', [0.02, 0.3])
def test_stretching_is_the_schedulers(last, sigmas):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, shift_terminal=last)
    scheduler.set_timesteps(sigmas=sigmas)
    ours = stretch_sigmas(shift_sigmas(torch.tensor(sigmas, dtype=torch.float64), 3.0), last)
    assert torch.allclose(ours.float(), scheduler.sigmas[:-1], rtol=0, atol=1e-6)
    assert ours[0] == 1 and ours[-1] == pytest.approx(last)


def test_a_list_of_one_level_is_not_stretched():
    assert stretch_sigmas(torch.ones(1), 0.02).tolist() == [1.0]


def curved(x, sigma):
    """A velocity that depends on every entry of x and on sigma."""
    return torch.tanh(x.flip(-1) + 2 * sigma[:, None, None, None]) - 0.3 * x


@pytest.mark.parametrize('sigmas', [[1.0], [1.0, 0.5], [1.0, 0.75, 0.5, 0.25], [1.0, 0.9, 0.2, 0.1, 0.03]], ids=len)
def test_euler_sample_equals_the_schedulers_loop(sigmas):
    noise = latents(3, 4, 2, 2, dtype=torch.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=sigmas)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(curved(x, timestep.expand(3) / 1000), timestep, x, return_dict=False)[0]
    ours = euler_sample(curved, noise, shift_sigmas(torch.tensor(sigmas, dtype=torch.float64), 3.0))
    assert ours.dtype == torch.float32 and torch.allclose(ours, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize('kind', [FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler], ids=lambda k: k.__name__)
@pytest.mark.parametrize('sigmas', [[1.0], [1.0, 0.5], [1.0, 0.75, 0.5, 0.25], [1.0, 0.9, 0.2, 0.1, 0.03]], ids=len)
def test_renoise_sample_equals_the_stochastic_schedulers_loop(sigmas, kind, monkeypatch):
    noise, drawn = latents(3, 4, 2, 2, dtype=torch.float32), []
    randn = torch.randn
    monkeypatch.setattr(torch, 'randn', lambda *args, **kwargs: drawn.append(randn(*args, **kwargs)) or drawn[-1])
    ours = renoise_sample(curved, noise, shift_sigmas(torch.tensor(sigmas, dtype=torch.float64), 3.0))
    assert len(drawn) == 3 * (len(sigmas) - 1) and all(row.shape == (4, 2, 2) for row in drawn)
    steps = [torch.stack(drawn[i:i + 3]) for i in range(0, len(drawn), 3)] + [torch.zeros(3, 4, 2, 2)]  # the last is 0
    monkeypatch.setattr(inspect.getmodule(kind), 'randn_tensor', lambda *args, **kwargs: steps.pop(0))
    scheduler = kind(shift=3.0, **(dict(stochastic_sampling=True) if kind is FlowMatchEulerDiscreteScheduler else {}))
    scheduler.set_timesteps(sigmas=sigmas)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(curved(x, timestep.expand(3) / 1000), timestep, x, return_dict=False)[0]
    assert not steps and ours.dtype == torch.float32 and torch.allclose(ours, x, rtol=0, atol=1e-5)


def test_the_later_noise_of_a_sample_depends_on_its_first_alone():
    noise, levels = latents(3, 4, 2, 2, dtype=torch.float32), torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64)
    whole = renoise_sample(curved, noise, levels)
    assert torch.equal(renoise_sample(curved, noise[1:2], levels), whole[1:2])
    twice = renoise_sample(lambda x, sigma: 0 * x, noise[:1].repeat(2, 1, 1, 1), levels)
    assert torch.equal(twice[0], twice[1])
    # With v = 0 the last x0 is (1 - .3) ((1 - .6) noise + .6 e_1) + .3 e_2: e_1 and e_2 are normal and independent.
    many = latents(2000, 1, 1, 1, dtype=torch.float32)
    end = renoise_sample(lambda x, sigma: 0 * x, many, levels).flatten()
    variance = (0.7 * 0.4)**2 + (0.7 * 0.6)**2 + 0.3**2
    assert end.mean().abs() < 3.7 * (variance / 2000)**0.5
    assert end.var().item() == pytest.approx(variance, rel=3.7 * (2 / 2000)**0.5)
    assert torch.corrcoef(torch.stack([end, many.flatten()]))[0, 1].item() == pytest.approx(
        0.7 * 0.4 / variance**0.5, abs=3.7 / 2000**0.5)


def test_diffusion_leads_from_level_to_level_of_the_path():
    """From x_s, whose signal is 1 - s and noise s, to signal 1 - t and variance t^2; of the old noise a s is left."""
    x0, old, new = (latents(4, 1, 2, 2, seed=i) for i in range(3))
    s, t = torch.tensor([0.0, 0.5, 0.3, 0.9]).double(), torch.tensor([0.4, 0.5, 0.8, 1.0]).double()
    out = diffuse(add_noise(x0, old, s), new, s, t)
    a = (1 - t) / (1 - s)
    rest = (t**2 - (a * s)**2).clamp(min=0).sqrt()
    s, t, a, rest = (v[:, None, None, None] for v in (s, t, a, rest))
    assert torch.allclose(out, (1 - t) * x0 + a * s * old + rest * new, rtol=0, atol=1e-14)
    assert torch.equal(out[1], add_noise(x0, old, s.flatten())[1])  # nowhere to go: to the bit
    assert torch.equal(out[3], new[3]) and torch.allclose(out[0], add_noise(x0, new, t.flatten())[0])


def test_euler_sample_sees_every_level_once_keeps_the_noise_and_records_no_graph():
    noise, seen, weight = latents(2, 1, 2, 2), [], torch.ones((), dtype=torch.float64, requires_grad=True)
    before = noise.clone()

    def velocity(x, sigma):
        seen.append(sigma.tolist())
        return weight * x

    out = euler_sample(velocity, noise, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert seen == [[1.0, 1.0], [0.5, 0.5]]
    assert torch.equal(noise, before) and not out.requires_grad and out.dtype == torch.float64
    assert torch.allclose(out, before * 0.5 * 0.5, rtol=0, atol=1e-15)  # two steps of x - x / 2


def test_euler_sample_of_a_straight_path_is_exact_in_any_number_of_steps():
    x0, noise = latents(2, 1, 2, 2), latents(2, 1, 2, 2, seed=1)
    for sigmas in ([1.0], [1.0, 0.9, 0.3]):
        out = euler_sample(lambda x, sigma: noise - x0, noise, torch.tensor(sigmas, dtype=torch.float64))
        assert torch.allclose(out, x0, rtol=0, atol=1e-14)
