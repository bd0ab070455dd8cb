"""The floor: particles under exact Gaussian scores, whose fixed point is known; a Gaussian field from a level on."""
import pytest
import torch

from cdm_plugin.flow import add_noise, expand_sigma

# Every coordinate of the teacher's samples is N(mean, std^2); with the null condition the mean is another.
MEAN, NULL_MEAN, STD = 0.3, 0.1, 0.4


@pytest.fixture(scope='module')
def floor(benchmark):
    return benchmark('guidance_floor')


def gaussian_velocity(x, sigma, mean, std):
    """(x - E[x0 | x]) / sigma for x0 ~ N(mean, std^2), noise ~ N(0, 1): linear regression of x0 on x."""
    s = expand_sigma(sigma, x)
    gain = (1 - s) * std**2 / ((1 - s)**2 * std**2 + s**2)
    return (x - mean - gain * (x - (1 - s) * mean)) / s


@pytest.fixture(params=[0.0, 1.0], ids=lambda alpha: f'alpha-{alpha:g}')
def method(floor, request):
    """The benchmark's method with exact scores: the fake score is that of the particles' own mean and spread, which
    the test keeps in `method.particles`."""
    method = floor.build(request.param, fake_steps=1)
    null = method.null_condition(1).fields['pooled_projections']

    def velocity(role, x, sigma, condition, anchor_sigma=None):
        if role == 'fake':
            return gaussian_velocity(x, sigma, *method.particles)
        is_null = (condition.fields['pooled_projections'] == null).all(1)
        mean = torch.where(is_null, NULL_MEAN, MEAN).reshape(-1, 1, 1, 1)
        return gaussian_velocity(x, sigma, mean, STD)

    method.velocity = velocity
    return method


def test_particles_rest_at_the_guided_teachers_mean_and_spread(floor, method):
    """Guidance moves a Gaussian's mean by alpha times the difference of the means and leaves its spread, at every noise
    level alike: this guided field is that of one distribution, and it is the fixed point."""
    x0, labels = 1 + 0.7 * torch.randn(50, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [0] * 50
    method.seed = 0
    for method.iteration in range(100):
        method.particles = x0.mean(), x0.std()
        x0 = floor.moved(method, floor.iteration_of(method, x0, labels), 0.3)
    assert x0.mean().item() == pytest.approx(MEAN + method.alpha * (MEAN - NULL_MEAN), abs=0.005)
    assert x0.std().item() == pytest.approx(STD, abs=0.01)


def test_sampling_goes_on_from_a_level(floor, method):
    """The Gaussian field's own solution: what lies k deviations from the mean at a level ends k deviations from it."""
    sigma, shape, generator = 0.5, (20, 4, 8, 8), torch.Generator().manual_seed(0)
    x0, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    z, guided = add_noise(x0, noise, torch.full((20,), sigma)), MEAN + method.alpha * (MEAN - NULL_MEAN)
    ends = floor.sampled(method, z, [0] * 20, method.alpha, sigma, steps=500)
    deviations = (z - (1 - sigma) * guided) / ((1 - sigma)**2 * STD**2 + sigma**2)**0.5
    assert (ends - guided - STD * deviations).abs().max() < 0.05 * STD
