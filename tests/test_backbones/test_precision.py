"""What networks round in half precision: time and guidance before their sinusoids, queries and keys under autocast."""
import contextlib
import math
import warnings

import pytest
import torch
from tests_support import recording_optimizers
from tiny_pipelines import PROMPTS
from torch import nn

from cdm_plugin.backbones.precision import keep_norms_exact, unrounded
from cdm_plugin.condition import Condition

# Who brings the time to the dtype of its tokens.
ROUNDING = ['flux_dev', 'longcat', 'qwen_image', *(
    pytest.param(name, marks=pytest.mark.slow) for name in ('flux', 'klein', 'flux2'))]
LEVELS = torch.arange(1, 1001) / 1000


def sinusoids(values):
    """Of 1000 times the values, cosines first, in float64."""
    turns = 1000 * values.double()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([turns.cos(), turns.sin()], dim=1)


def short_condition(backbone, rows):
    """Of 4 tokens, for many rows."""
    fields = backbone.condition(dict(prompt=PROMPTS[:1])).fields
    return Condition({name: t[:, :4] if t.ndim == 3 else t for name, t in fields.items()}).expand(rows)


@contextlib.contextmanager
def sinusoids_taken(network, backbone):
    seen = []
    with contextlib.ExitStack() as stack:
        module = network.get_submodule(f'{backbone.time_embedder}.time_proj')
        stack.callback(module.register_forward_hook(lambda m, args, out: seen.append(out.double())).remove)
        yield seen


@pytest.mark.parametrize('precision', ['bfloat16', 'autocast'])
@pytest.mark.parametrize('name', ROUNDING)
def test_the_network_hears_time_and_guidance_unrounded(name, precision, tinies):
    """Of its own, and nobody else's: rounded, half of a thousand levels are another one's, and are off by 2."""
    backbone = tinies(name).method().backbone
    network = backbone.build_network(torch.bfloat16 if precision == 'bfloat16' else torch.float32)
    condition = short_condition(backbone, 1000)
    x = torch.zeros(1000, backbone.latent_channels, 2, 2)
    autocast = torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast')
    with torch.no_grad(), autocast, sinusoids_taken(network, backbone) as seen:
        backbone.velocity(network, x, LEVELS, condition)
        told = [LEVELS]
        if name in ('flux_dev', 'flux2'):
            told.append(torch.full((1000,), backbone.embedded_guidance))
        assert len(seen) == len(told)
        for found, values in zip(seen, told):
            assert (found - sinusoids(values)).abs().max() < 1e-3
        assert len(seen[0].unique(dim=0)) == 1000
        seen.clear()  # without it, and nothing of it stays behind
        fields = {field: t.to(network.dtype) for field, t in condition.fields.items()}
        backbone.call(network, x.to(network.dtype), LEVELS, fields)
        rounds = precision == 'bfloat16' or name not in ('klein', 'flux2')  # these look at the dtype of their input
        assert (len(seen[0].unique(dim=0)) < 510) == rounds


@pytest.mark.parametrize('name', ['longcat', 'klein'])
def test_half_precision_is_nearer_to_float32(name, tinies):
    """Rounded times move the velocity more than all else that bfloat16 rounds."""
    backbone = tinies(name).method().backbone
    x = torch.randn(1, backbone.latent_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    condition, errors, sigma = short_condition(backbone, 100), [], LEVELS[::10] + 0.003
    x = x.expand(100, -1, -1, -1)
    with torch.no_grad():
        exact = backbone.velocity(backbone.build_network(), x, sigma, condition)
        for backbone.time_scale in (1000, None):
            half = backbone.velocity(backbone.build_network(torch.bfloat16), x, sigma, condition)
            errors.append(((half - exact).norm() / exact.norm()).item())
    assert errors[0] < 0.015 and errors[1] > 2 * errors[0]


def test_adapters_and_anchor_aware_networks_hear_it_too(longcat):
    method = longcat.method('CDM', student_every=1, lora=dict(rank=2), anchor_aware_fake=True,
                            backbone=dict(dtype='bfloat16')).train()
    method.seed, method.iteration = 0, 0
    told, velocity = [], method.backbone.velocity

    def recorded(network, x, sigma, condition):
        told.append(sigma)
        return velocity(network, x, sigma, condition)

    method.backbone.velocity = recorded
    with sinusoids_taken(method.base, method.backbone) as seen:
        method.train_step(dict(prompt=PROMPTS), recording_optimizers(method))
    assert len(seen) == len(told) > 5
    for found, sigma in zip(seen, told):
        assert (found - sinusoids(sigma)).abs().max() < 1e-3


def test_more_calls_than_values_and_an_error_leave_nothing_behind():
    module = nn.Identity()
    with pytest.raises(IndexError), unrounded(module, [torch.ones(2)]):
        assert module(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
        module(torch.zeros(2))
    assert not module._forward_pre_hooks
    with unrounded(module, [torch.ones(2)]):  # no wider than what it is given
        assert module(torch.zeros(2, dtype=torch.float64)).sum() == 0


@pytest.mark.parametrize('name', ['longcat', 'flux', 'klein'])
def test_queries_and_keys_are_normalised_exactly_under_autocast(name, tinies):
    method = tinies(name).method()
    norms = {n: m for n, m in method.student.named_modules() if type(m) is nn.RMSNorm}
    assert {n.rpartition('.')[2] for n in norms} == {'norm_q', 'norm_k', 'norm_added_q', 'norm_added_k'}
    seen = []
    for norm in norms.values():
        norm.register_forward_hook(lambda m, args, out: seen.append((m, args[0].double(), out)))
    with torch.autocast('cpu', torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter('error')  # torch's, of two dtypes in one norm
        velocity = method.backbone.velocity(method.student, tinies(name).noise(), torch.tensor([0.9, 0.3]),
                                            method.backbone.condition(dict(prompt=PROMPTS)))
        velocity.square().mean().backward()
    assert len(seen) == len(norms)
    for norm, x, out in seen:
        exact = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()
        assert torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-6)
        assert torch.equal(x, x.bfloat16().double()) and norm.weight.grad.abs().max() > 0


def test_norms_of_half_precision_stay_in_it():
    norm = keep_norms_exact(nn.Sequential(nn.RMSNorm(4))).bfloat16()
    assert norm(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
