"""Gaussian data have closed-form scores: the losses' gradients are known, and so is what training must end in.

With x0 ~ N(mean, covariance) the best denoiser is D(x, s) = mean + (1 - s) S C^-1 (x - (1 - s) mean), where S is the
covariance of x0 and C = (1 - s)^2 S + s^2 I that of x. The networks and the backbone here are in-house ones: nothing
of diffusers but the scheduler.
"""
import math

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from tests_support import recording_optimizers
from torch import nn

from cdm_plugin.backbones import Backbone
from cdm_plugin.codecs import Codec
from cdm_plugin.engine.optim_wrapper import RoleOptimWrapperDict
from cdm_plugin.rollout import rollout

MEAN = torch.tensor([1.0, -0.5], dtype=torch.float64)
ROOT = torch.tensor([[0.8, 0.0], [0.5, 0.4]], dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T
LEVELS = {1: [1.0], 2: [1.0, 0.5], 4: [1.0, 0.75, 0.5, 0.25]}


class GaussianNetwork(nn.Module):
    """The exact velocity (x - D) / s of Gaussian data."""

    def __init__(self, mean, covariance):
        super().__init__()
        self.mean, self.covariance = nn.Parameter(mean.clone()), nn.Parameter(covariance.clone())

    def forward(self, x, sigma):
        s = sigma[:, None]
        spread = (1 - s[..., None])**2 * self.covariance + s[..., None]**2 * torch.eye(len(self.mean)).to(x)
        whitened = torch.linalg.solve(spread, x - (1 - s) * self.mean)
        return (x - self.mean - (1 - s) * whitened @ self.covariance) / s


class LinearNetwork(nn.Module):
    """v = A x + b at every sigma: a student whose every state can be written down."""

    def __init__(self, matrix, bias):
        super().__init__()
        self.matrix, self.bias = nn.Parameter(matrix.clone()), nn.Parameter(bias.clone())

    def forward(self, x, sigma):
        return x @ self.matrix.T + self.bias


class AffineNetwork(nn.Module):
    """v = A(sigma) x + b(sigma), from a small MLP over features of sigma; contains every Gaussian's velocity."""

    def __init__(self, in_channels, width=32):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(5, width), nn.SiLU(), nn.Linear(width, width))
        self.head = nn.Linear(width, in_channels * (in_channels + 1))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x, sigma):
        angles = math.pi * sigma[:, None] * torch.arange(1, 3)
        embedding = self.time(torch.cat([sigma[:, None], angles.cos(), angles.sin()], 1))
        affine = self.head(nn.functional.silu(embedding)).unflatten(1, (x.shape[1], x.shape[1] + 1))
        return (affine[..., :-1] @ x[..., None])[..., 0] + affine[..., -1]


@MODELS.register_module()
class GaussianTestBackbone(Backbone):
    """An architecture of one's own: one latent of `in_channels` numbers, no condition."""
    network_class = AffineNetwork
    time_embedder = 'time'

    def build_network(self):
        return self.network_class(**self.config).to(self.dtype)

    def call(self, network, x, sigma, fields):
        return network(x.flatten(1), sigma.to(x.dtype)).view_as(x)

    def condition_widths(self):
        return {}

    def default_latent_size(self):
        return 1, 1

    def time_embedding_width(self):
        return self.config['width']


class NoCodec(Codec):
    """Latents are what is wanted."""

    def decode(self, latents):
        return latents


def make_method(dtype=torch.float64, **kwargs):
    """A method whose teacher is exact; student and fake score are fresh networks."""
    torch.manual_seed(0)
    method = MODELS.build(dict(kwargs, type='CDM', backbone=dict(
        type='GaussianTestBackbone', config=dict(in_channels=2), codec=NoCodec(),
        conditioner=dict(type='ClassConditioner', num_classes=1, num_tokens=1))))
    method.teacher = GaussianNetwork(MEAN, COVARIANCE).requires_grad_(False)
    method.seed, method.iteration = 3, 0
    return method.to(dtype).train()


def batch_of(size):
    return dict(prompt=torch.zeros(size, dtype=torch.long))


def denoised(mean, covariance, x, s):
    """D(x, s) of one sample."""
    spread = (1 - s)**2 * covariance + s**2 * torch.eye(2, dtype=torch.float64)
    return mean + (1 - s) * covariance @ torch.linalg.inv(spread) @ (x - (1 - s) * mean)


# Gradients


class OutputGradients:
    """Gradients of the loss with respect to the student's velocities, one tensor a call with gradient."""

    def __init__(self, network):
        self.calls = []
        network.register_forward_hook(self._keep)

    def _keep(self, module, args, output):
        if output.requires_grad:
            index = len(self.calls)
            self.calls.append(torch.zeros_like(output))
            output.register_hook(lambda gradient: self.calls[index].copy_(gradient))


FAKE_MEAN = torch.tensor([0.4, 0.1], dtype=torch.float64)
FAKE_COVARIANCE = torch.tensor([[0.5, -0.1], [-0.1, 0.9]], dtype=torch.float64)
STUDENT = dict(matrix=torch.tensor([[0.6, 0.3], [-0.2, 0.8]], dtype=torch.float64),
               bias=torch.tensor([-0.7, 0.9], dtype=torch.float64))


def gradient_by_hand(x0, z, s, batch, min_norm=0.1):
    """-2 w (D_teacher - D_fake) / numel / B of one sample."""
    teacher = denoised(MEAN, COVARIANCE, z, s)
    delta = teacher - denoised(FAKE_MEAN, FAKE_COVARIANCE, z, s)
    w = 1 / max((teacher - x0).abs().mean().item(), min_norm)
    return -2 * w * delta / 2 / batch


@pytest.mark.parametrize('name, others', [('dm', ('ca', 'cdm')), ('cdm', ('ca', 'dm'))], ids=['dm', 'cdm'])
def test_gradient_of_distribution_matching_is_the_closed_form(name, others):
    """With exact teacher and fake score, through the whole train_step, with respect to x0 and to the weights."""
    batch = 64
    method = make_method(losses={other: None for other in others}, student_every=1, fake_merge=0.0)
    method.student = LinearNetwork(**STUDENT)
    method.fake = GaussianNetwork(FAKE_MEAN, FAKE_COVARIANCE)
    outputs, optimizers = OutputGradients(method.student), recording_optimizers(method, lr=0.0)
    method.iteration = 4
    draws = method.sample_draws(batch)
    assert len(draws.sigmas) > 5
    method.train_step(batch_of(batch), optimizers)

    matrix, bias = STUDENT['matrix'], STUDENT['bias']
    by_hand, weights = [], dict(matrix=torch.zeros(2, 2).double(), bias=torch.zeros(2).double())
    for i in range(batch):
        x, anchor = draws.noise[i].flatten(), draws.anchor[i]
        for n in range(anchor):
            x = x + (draws.sigmas[n + 1] - draws.sigmas[n]) * (matrix @ x + bias)
        s = draws.sigmas[anchor]
        if name == 'cdm':
            point = draws.losses['cdm']['point_sigma'][i]
            x, s = x + (point - s) * (matrix @ x + bias), point
        x0 = x - s * (matrix @ x + bias)
        level = draws.losses[name]['sigma'][i]
        z = (1 - level) * x0 + level * draws.losses[name]['noise'][i].flatten()
        gradient = gradient_by_hand(x0, z, level, batch)
        by_hand.append(gradient)
        # x0 = x - s (A x + b), and nothing flows into x.
        weights['matrix'] -= s * torch.outer(gradient, x)
        weights['bias'] -= s * gradient

    sigma = draws.losses['cdm']['point_sigma'] if name == 'cdm' else draws.anchor_sigma
    by_hand = torch.stack(by_hand)
    ours = outputs.calls[-1] / -sigma[:, None]
    assert (ours - by_hand).abs().max() < 1e-12 * by_hand.abs().max()
    assert by_hand.abs().max() > 1e-4
    for gradient, expected in zip(optimizers['student'].gradients, (weights['matrix'], weights['bias'])):
        assert (gradient - expected).abs().max() < 1e-12 * expected.abs().max()
    if name == 'cdm':  # the velocity at the anchor, along which the point was extrapolated, carries no gradient
        assert len(outputs.calls) == 2 and (outputs.calls[0] == 0).all()


def one_step_method(mean, root, fake_mean, fake_covariance):
    """A student that maps noise to mean + root noise in one step, and an exact Gaussian fake score."""
    method = make_method(losses=dict(ca=None, cdm=None), student_every=1, fake_merge=0.0,
                         fake_sigma=dict(type='UniformSigma', low=0.3),  # below, gradients are noisy: v has a 1 / s
                         time_grid=dict(type='FixedTimeGrid', sigmas=[1.0]))
    method.student = LinearNetwork(torch.eye(2).double() - root, -mean)
    method.fake = GaussianNetwork(fake_mean, fake_covariance)
    return method


def rotated(angle):
    cosine, sine = math.cos(angle), math.sin(angle)
    return ROOT @ torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)


@pytest.mark.parametrize('angle', [0.0, 2.0])
def test_gradient_vanishes_when_the_distributions_agree(angle):
    """However the student maps noise to samples: any root of the covariance gives the same distribution."""
    root = rotated(angle)
    method = one_step_method(MEAN, root, MEAN, root @ root.T)
    optimizers = recording_optimizers(method, lr=1.0)
    optimizers['fake'].optimizer.param_groups[0]['lr'] = 0.0  # so that it stays exact
    before = [p.clone() for p in method.student.parameters()]
    logs = method.train_step(batch_of(512), optimizers)
    assert logs['loss_dm'] < 1e-24
    for p, q, gradient in zip(method.student.parameters(), before, optimizers['student'].gradients):
        assert gradient.abs().max() < 1e-12 and (p - q).abs().max() < 1e-12


def test_equal_covariances_leave_the_difference_of_the_means():
    """Then D_teacher - D_fake = s^2 C^-1 (mean_teacher - mean_fake), whatever z is."""
    student_mean, batch = MEAN + torch.tensor([0.5, -0.3], dtype=torch.float64), 256
    method = one_step_method(student_mean, rotated(1.0), student_mean, COVARIANCE)
    outputs, optimizers = OutputGradients(method.student), recording_optimizers(method, lr=0.0)
    draws = method.sample_draws(batch)
    method.train_step(batch_of(batch), optimizers)
    for i in range(batch):
        s = draws.losses['dm']['sigma'][i]
        spread = (1 - s)**2 * COVARIANCE + s**2 * torch.eye(2, dtype=torch.float64)
        delta = s**2 * torch.linalg.inv(spread) @ (MEAN - student_mean)
        direction = outputs.calls[0][i]  # d loss / d v = -sigma d loss / d x0, and sigma is 1
        assert torch.allclose(direction / direction.norm(), delta / delta.norm(), rtol=0, atol=1e-11)
    # The student's mean is pulled towards the teacher's: v's gradient times -1 is that of x0.
    assert (optimizers['student'].gradients[1] * (student_mean - MEAN) < 0).all()


def test_the_exact_fake_score_is_where_its_training_ends():
    """The gradient of the fake step vanishes, up to the sampling error, at the distribution of the student's x0."""
    student_mean, root, norms = torch.tensor([0.2, 0.4]).double(), rotated(0.7), []
    for off in (0.0, 0.5):
        method = one_step_method(student_mean, root, student_mean + off, root @ root.T * (1 + off))
        optimizers = recording_optimizers(method, lr=0.0)
        method.train_step(batch_of(100000), optimizers)
        norms.append(max(g.abs().max().item() for g in optimizers['fake'].gradients))
    assert norms[0] < 0.1 * norms[1]


# Training


RECIPES = {
    # The teacher ignores the condition: guidance is zero at any alpha, and CA has nothing to add.
    'published': dict(),
    'consistent': dict(anchor_aware_fake=True, losses=dict(
        ca=dict(sigma=dict(type='UniformSigma')), cdm=dict(guided=True, point_sigma=dict(type='AnchorSigma')))),
}


def train(method, iterations, batch=128, student_lr=2e-3, fake_lr=5e-3):
    """Adam with a linear decay; the fake score is the faster one."""
    rates = dict(student=student_lr, fake=fake_lr)
    wrappers = RoleOptimWrapperDict(**{
        role: OptimWrapper(torch.optim.Adam(getattr(method, role).parameters(), lr=rate, betas=(0.9, 0.99)))
        for role, rate in rates.items()})
    for method.iteration in range(iterations):
        for role, rate in rates.items():
            for group in wrappers[role].optimizer.param_groups:
                group['lr'] = rate * max(1 - method.iteration / iterations, 0.02)
        logs = method.train_step(batch_of(batch), wrappers)
    return logs


def errors(x):
    """Largest error of the mean's and of the covariance's entries."""
    x = x.flatten(1).double()
    return (x.mean(0) - MEAN).abs().max().item(), (torch.cov(x.T) - COVARIANCE).abs().max().item()


def sample_errors(method, steps, size=20000):
    condition = method.backbone.condition(batch_of(size))
    return errors(method.sample(condition, sigmas=torch.tensor(LEVELS[steps], dtype=torch.float64)))


def pooled_errors(method):
    """Of the student's x0 over all anchors, of which the published fake score knows the mixture only."""
    x0 = []
    for method.iteration in range(10**6, 10**6 + 40):
        draws, condition = method.sample_draws(1000), method.backbone.condition(batch_of(1000))
        x, sigma = rollout(lambda x, s, i: method.velocity('student', x, s, condition[i]), draws)
        with torch.no_grad():
            x0.append(method.predict(x, sigma, condition).x0)
    return errors(torch.cat(x0))


def make_trainable(recipe):
    return make_method(torch.float32, time_grid=dict(max_steps=4), **RECIPES[recipe])


def test_untrained_students_are_wrong():
    """They return the noise, N(0, I): off by 1 in the mean and by 0.59 in a variance (0.41 against 1)."""
    method = make_trainable('published')
    for steps in LEVELS:
        mean, covariance = sample_errors(method, steps)
        assert mean == pytest.approx(1.0, abs=0.05) and covariance == pytest.approx(0.59, abs=0.05)
    assert pooled_errors(method)[0] > 0.9


def test_teacher_sampled_in_many_steps_has_the_datas_distribution():
    """Its ODE leads to the data: the exact network, the sampler and the statistics agree."""
    method = make_method(torch.float32)
    condition = method.backbone.condition(batch_of(20000))
    sigmas = torch.linspace(1, 0.005, 200, dtype=torch.float64)
    mean, covariance = errors(method.sample(condition, sigmas=sigmas, role='teacher'))
    assert mean < 0.03 and covariance < 0.03


@pytest.mark.parametrize('iterations', [400, pytest.param(800, marks=pytest.mark.slow)])
def test_published_recipe_matches_the_mixture_over_anchors(iterations):
    """A fake score that pools all anchors sees their mixture, which is matched; each anchor is on its way."""
    method = make_trainable('published')
    logs = train(method, iterations)
    assert logs['loss_ca'] == 0 and logs['loss_dm'] > 0 and logs['loss_cdm'] > 0
    assert max(pooled_errors(method)) < 0.12
    for steps in LEVELS:
        mean, covariance = sample_errors(method, steps)
        assert mean < 0.5 and covariance < 0.35


@pytest.mark.parametrize('iterations', [600, pytest.param(1200, marks=pytest.mark.slow)])
def test_consistent_recipe_matches_the_data_at_1_2_and_4_steps(iterations):
    """A fake score that knows the anchor matches each anchor's distribution, and so the samples of any grid."""
    method = make_trainable('consistent')
    train(method, iterations)
    for steps in LEVELS:
        mean, covariance = sample_errors(method, steps)
        assert mean < 0.15 and covariance < 0.15
    assert max(pooled_errors(method)) < 0.1
