"""The networks behind the roles: the anchor embedding of the fake score, and the merge of the student into it."""
import math

import pytest
import torch
from mmengine.registry import MODELS
from tests_support import perturb, tiny_backbone, tiny_method
from torch import nn

from cdm_plugin.roles.anchor_aware import AnchorEmbedding, anchored, make_anchor_aware
from cdm_plugin.roles.weights import merge_weights, unwrap


class Wrapper(nn.Module):
    """What a data-parallel wrapper looks like."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.fixture
def method():
    """An anchor-aware CDM whose fake score and teacher still have equal weights."""
    method = tiny_method(anchor_aware_fake=True)
    method.fake.load_state_dict(method.teacher.state_dict(), strict=False)
    embedding = method.fake.anchor_embedding.embedding
    nn.init.zeros_(embedding.linear_2.weight)
    nn.init.zeros_(embedding.linear_2.bias)
    return method


@pytest.fixture
def inputs(method, labels):
    condition = method.backbone.condition(labels)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(method.latent_shape(len(condition)), generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.1, 0.9, len(x), dtype=torch.float64), condition


def train_embedding(method):
    """Makes the last layer of the anchor embedding anything but zero."""
    torch.manual_seed(1)
    nn.init.normal_(method.fake.anchor_embedding.embedding.linear_2.weight, std=0.5)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=1e-13)


# Anchor embedding


def test_embedding_is_sinusoids_through_an_mlp():
    """cos and sin of 1000 sigma over 128 frequencies from 1 to nearly 1e-4, then linear, SiLU, linear."""
    torch.manual_seed(0)
    embedding = AnchorEmbedding(6).double()
    perturb(embedding)
    sigma = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = (1000 * sigma)[:, None].float() * frequencies
    mlp = embedding.embedding
    hidden = mlp.linear_1(torch.cat([angles.cos(), angles.sin()], 1).double())
    time = torch.randn(3, 6, dtype=torch.float64)
    with embedding.at(sigma):
        out = embedding(time)
    assert torch.allclose(out, time + mlp.linear_2(hidden * torch.sigmoid(hidden)), rtol=0, atol=1e-5)


def test_embedding_keeps_the_dtype_of_the_time_embedding():
    embedding = AnchorEmbedding(6)
    perturb(embedding)
    with embedding.at(torch.tensor([0.5])):
        assert embedding(torch.zeros(1, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert embedding.bfloat16()(torch.zeros(1, 6)).dtype == torch.float32


def test_embedding_starts_as_the_identity():
    embedding, time = AnchorEmbedding(6), torch.randn(2, 6)
    with embedding.at(torch.tensor([0.2, 1.0])):
        assert torch.equal(embedding(time), time)


def test_embedding_without_sigma_is_an_error_also_after_use():
    embedding = AnchorEmbedding(6)
    with pytest.raises(RuntimeError, match='without anchor_sigma'):
        embedding(torch.zeros(1, 6))
    with pytest.raises(KeyError):
        with embedding.at(torch.tensor([0.5])):
            raise KeyError('a failing network')
    with pytest.raises(RuntimeError, match='without anchor_sigma'):
        embedding(torch.zeros(1, 6))


def test_fake_score_starts_as_the_teacher(method, inputs):
    x, sigma, condition = inputs
    teacher = method.velocity('teacher', x, sigma, condition)
    for anchors in (sigma, torch.ones_like(sigma)):
        assert close(method.velocity('fake', x, sigma, condition, anchors), teacher)


def test_fresh_method_has_a_fake_score_equal_to_its_teacher():
    """As built, before the tests' perturbation."""
    torch.manual_seed(0)
    method = MODELS.build(dict(type='CDM', backbone=tiny_backbone(), anchor_aware_fake=True))
    embedding = method.fake.anchor_embedding.embedding
    assert embedding.linear_2.weight.abs().max() == embedding.linear_2.bias.abs().max() == 0
    assert embedding.linear_1.weight.abs().max() > 0
    for name, parameter in method.teacher.named_parameters():
        assert torch.equal(parameter, method.fake.get_parameter(name))
    assert all(p.requires_grad for p in method.fake.parameters())


def test_fake_score_knows_each_samples_anchor_once_trained(method, inputs):
    x, sigma, condition = inputs
    train_embedding(method)
    anchors = torch.linspace(0.2, 1.0, len(x), dtype=torch.float64)
    one = method.velocity('fake', x, sigma, condition, anchors)
    changed = anchors.clone()
    changed[1] = 0.77
    two = method.velocity('fake', x, sigma, condition, changed)
    assert (one - two)[1].abs().max() > 1e-3
    assert close(one[[0, 2, 3, 4]], two[[0, 2, 3, 4]])


def test_anchor_embedding_learns_from_the_fake_loss(method, inputs):
    """From the zero start, the last layer gets a gradient; once it is not zero, the first one does."""
    x, sigma, condition = inputs
    layers = method.fake.anchor_embedding.embedding
    for layer in (layers.linear_2, layers.linear_1):
        method.velocity('fake', x, sigma, condition, sigma).square().mean().backward()
        assert layer.weight.grad.abs().max() > 0
        train_embedding(method)


def test_anchor_aware_network_without_anchors_is_an_error(method, inputs):
    x, sigma, condition = inputs
    with pytest.raises(RuntimeError, match='anchor-aware fake score was called without anchor_sigma'):
        method.velocity('fake', x, sigma, condition)
    assert method.velocity('student', x, sigma, condition).shape == x.shape  # others need none


def test_anchored_sees_through_a_wrapper_and_leaves_plain_networks_alone():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    with anchored(network, torch.ones(1)) as embedding:
        assert embedding is None
    make_anchor_aware(network, '0', 4)
    assert unwrap(Wrapper(network)) is network and unwrap(network) is network
    with anchored(Wrapper(network), torch.tensor([0.25])):
        assert network.anchor_embedding.sigma.tolist() == [0.25]
    assert network.anchor_embedding.sigma is None


def test_make_anchor_aware_follows_the_networks_dtype_and_joins_its_parameters():
    network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    make_anchor_aware(network, '0', 4)
    names = [name for name, p in network.named_parameters() if name.startswith('anchor_embedding.')]
    assert len(names) == 4 and {p.dtype for p in network.parameters()} == {torch.float64}


# Merge


def test_merge_weights_is_a_weighted_mean():
    target, source = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    before = {name: p.clone() for name, p in target.named_parameters()}
    merge_weights(target, source, 0.25)
    for name, p in target.named_parameters():
        assert torch.allclose(p, 0.75 * before[name] + 0.25 * source.get_parameter(name), rtol=0, atol=1e-15)


@pytest.mark.parametrize('wrap', ['none', 'target', 'source', 'both'])
def test_merge_weights_sees_through_wrappers(wrap):
    target, source = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
    expected = 0.9 * target.weight + 0.1 * source.weight
    merge_weights(Wrapper(target) if wrap in ('target', 'both') else target,
                  Wrapper(source) if wrap in ('source', 'both') else source, 0.1)
    assert torch.allclose(target.weight, expected, rtol=0, atol=1e-15)


def test_merge_weights_at_its_ends():
    source = nn.Linear(3, 2)
    for rate in (0.0, 1.0):
        target = nn.Linear(3, 2)
        expected = (source if rate else target).weight.clone()
        merge_weights(target, source, rate)
        assert torch.equal(target.weight, expected)


def test_merge_leaves_the_source_and_the_gradients_alone():
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    before = source.weight.clone()
    merge_weights(target, source, 0.5)
    assert torch.equal(source.weight, before)
    assert target.weight.requires_grad and target.weight.is_leaf and target.weight.grad is None


def test_merge_takes_a_student_of_another_dtype():
    target, source = nn.Linear(3, 2), nn.Linear(3, 2).bfloat16()
    expected = 0.999 * target.weight.double() + 0.001 * source.weight.double()
    merge_weights(target, source, 0.001)
    assert target.weight.dtype == torch.float32
    assert torch.allclose(target.weight.double(), expected, rtol=0, atol=1e-7)


def test_merge_does_not_touch_the_anchor_embedding(method):
    train_embedding(method)
    before = {name: p.clone() for name, p in method.fake.named_parameters()}
    merge_weights(method.fake, method.student, 0.5)
    student = dict(method.student.named_parameters())
    for name, p in method.fake.named_parameters():
        if name.startswith('anchor_embedding.'):
            assert name not in student and torch.equal(p, before[name])
        else:
            assert torch.allclose(p, (before[name] + student[name]) / 2, rtol=0, atol=1e-15)
    assert any(name.startswith('anchor_embedding.') for name in before)
