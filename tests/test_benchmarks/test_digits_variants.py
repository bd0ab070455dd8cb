"""The variants of the study on the digits: each starts as plain DMD2, and adds what it says."""
import pytest
import torch
from literal import anchors_by_full_rollout
from mmengine.registry import MODELS
from tests_support import recording_optimizers, tiny_backbone, tiny_method

SETTINGS = dict(alpha=1.0, student_every=1, fake_steps=2, anchor_aware_fake=True)


@pytest.fixture(scope='module', autouse=True)
def variants(benchmark):
    return benchmark('digits_variants')


@pytest.fixture
def plain():
    return tiny_method('DMD2', **SETTINGS)


def started(type, plain, **kwargs):
    """A variant as it is built, with the weights of a plain DMD2 where that has some."""
    variant = MODELS.build(dict(type=type, backbone=tiny_backbone(), **SETTINGS, **kwargs)).to(torch.float64).train()
    for role in ('student', 'fake', 'teacher'):
        loaded = getattr(variant, role).load_state_dict(getattr(plain, role).state_dict(), strict=False)
        assert not loaded.unexpected_keys
    variant.seed, variant.iteration = plain.seed, plain.iteration
    return variant


def step(method, labels, lr=0.0):
    """Losses of an iteration, and the last gradients by role and name."""
    optimizers = recording_optimizers(method, lr)
    logs = method.train_step(labels, optimizers)
    return logs, {role: dict(zip(dict(getattr(method, role).named_parameters()), optimizers[role].gradients))
                  for role in ('student', 'fake')}


@pytest.mark.parametrize('type, role, new', [
    ('AnchorInputDMD2', 'fake', ['anchor_input.projection.weight']),
    ('NextLevelDMD2', 'student', [f'anchor_embedding.embedding.linear_{i}.{kind}' for i in (1, 2)
                                  for kind in ('weight', 'bias')])])
def test_a_variant_starts_as_plain_dmd2_and_leaves_it_after_a_step(type, role, new, plain, labels):
    variant = started(type, plain)
    (logs, gradients), (expected, reference) = step(variant, labels), step(plain, labels)
    for name in ('loss_fake', 'loss_dm'):
        torch.testing.assert_close(logs[name], expected[name], rtol=1e-12, atol=0)
    added = {name: gradients[role].pop(name) for name in new}
    assert added[new[-1]].abs().sum() > 0
    for one in ('student', 'fake'):
        assert gradients[one].keys() == reference[one].keys()
        for name, gradient in reference[one].items():
            torch.testing.assert_close(gradients[one][name], gradient, rtol=1e-6, atol=1e-10, msg=name)
    for method in (variant, plain):
        step(method, labels, lr=0.05)
    (logs, _), (expected, _) = step(variant, labels), step(plain, labels)
    for name in ('loss_fake', 'loss_dm'):
        assert abs(logs[name] - expected[name]) > 1e-6 * expected[name]


# The anchor's input

def test_the_fake_score_sees_the_anchors_input_wherever_it_is_called(plain, labels):
    variant, seen = started('AnchorInputDMD2', plain), []
    variant.fake.anchor_input.projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    step(variant, labels)
    condition = variant.backbone.condition(labels)
    x, _ = anchors_by_full_rollout(variant.student, variant.sample_draws(len(condition)), condition.fields)
    assert len(seen) == 3  # two fake-score steps, and the question
    for found in seen:
        torch.testing.assert_close(found, x)
    with pytest.raises(RuntimeError, match='called without it'):
        variant.velocity('fake', x, torch.ones(len(x)).double(), condition, torch.ones(len(x)).double())


def test_the_input_is_embedded_as_the_patches_are(plain, labels):
    """A projection with the patches' own weights sees the sum of the two latents."""
    variant, condition = started('AnchorInputDMD2', plain), plain.backbone.condition(labels)
    x, other = torch.randn(2, *plain.latent_shape(5), dtype=torch.float64)
    sigma, anchor = torch.rand(2, 5, dtype=torch.float64)
    with torch.no_grad(), variant.fake.anchor_input.at(other):
        variant.fake.anchor_input.projection.weight.copy_(variant.fake.pos_embed.proj.weight)
        found = variant.velocity('fake', x, sigma, condition, anchor)
    torch.testing.assert_close(found, plain.velocity('fake', x + other, sigma, condition, anchor))


def test_two_noisy_latents_are_as_one(variants):
    """Of x0 ~ N(m, s^2): the mean given both, by Bayes' rule for three Gaussians, is that given the one."""
    m, s = 0.7, 1.3
    torch.manual_seed(0)
    x, other = torch.randn(2, 50, 1, dtype=torch.float64)
    sigma, other_sigma = 0.01 + 0.98 * torch.rand(2, 50, dtype=torch.float64)
    other_sigma[0] = 1  # says nothing

    def denoised(*observed):
        precision, total = torch.full((50,), s**-2).double(), torch.full((50,), m / s**2).double()
        for y, level in observed:
            precision = precision + (1 - level)**2 / level**2
            total = total + (1 - level) * y[:, 0] / level**2
        return total / precision

    y, level = variants.both_observed(x, sigma, other, other_sigma)
    torch.testing.assert_close(denoised((y, level)), denoised((x, sigma), (other, other_sigma)))
    assert (level <= torch.minimum(sigma, other_sigma)).all()
    torch.testing.assert_close((y[0], level[0]), (x[0], sigma[0]))


def test_the_posterior_loss_asks_the_teacher_at_both_and_the_fake_score_at_one(variants, plain, labels, monkeypatch):
    variant = started('AnchorInputDMD2', plain, losses=dict(dm=dict(type='PosteriorDMLoss', guided=True, alpha=1.0)))
    asked, answer = {}, variant._ask
    monkeypatch.setattr(variant, '_ask', lambda role, queries, *args: (
        asked.update({role: queries}), answer(role, queries, *args))[1])
    step(variant, labels)
    condition = variant.backbone.condition(labels)
    draws = variant.sample_draws(len(condition))
    x, sigma = anchors_by_full_rollout(variant.student, draws, condition.fields)
    (fake,) = asked['fake']
    assert torch.equal(fake.sigma, draws.losses['dm']['sigma'])
    assert len(asked['teacher']) == 2
    for query in asked['teacher']:
        expected = variants.both_observed(fake.x, fake.sigma, x, sigma)
        torch.testing.assert_close((query.x, query.sigma), expected)


# The next level

def test_the_student_knows_where_its_step_leads(plain, labels):
    variant, seen = started('NextLevelDMD2', plain), []
    embedding = variant.student.anchor_embedding
    embedding.projection.register_forward_pre_hook(lambda module, args: seen.append(args[0] / 1000))
    grid = [1.0, 0.9, 0.75, 0.5, 0.0]  # 1, 3/4, 1/2, 1/4 after the shift of 3
    after = dict(zip(grid[:-1], grid[1:]))
    step(variant, labels)
    draws = variant.sample_draws(5)
    *rollout, anchors = seen
    assert [float(level[0]) for level in rollout] == pytest.approx(grid[1:1 + draws.rollout_steps])
    assert anchors.tolist() == pytest.approx([after[round(float(s), 9)] for s in draws.anchor_sigma])
    seen.clear()
    condition = variant.backbone.condition(labels)
    variant.sample(condition, sigmas=torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert [level.tolist() for level in seen] == [pytest.approx([0.75] * 5), [0.0] * 5]
    seen.clear()
    variant.sample(condition)
    assert [float(level[0]) for level in seen] == pytest.approx(grid[1:])


# Low anchors

def test_low_anchors_are_drawn_more_often_and_nothing_else_changes(plain):
    variant, n = started('LowAnchorsDMD2', plain), 300
    counts = torch.zeros(4)
    for iteration in range(n):
        variant.iteration = plain.iteration = iteration
        draws, other = variant.sample_draws(8), plain.sample_draws(8)
        counts += torch.bincount(draws.anchor, minlength=4)
        assert draws.rollout_steps == draws.anchor.max() == len(draws.moving)
        assert draws.moving == tuple(int((draws.anchor > s).sum()) for s in range(draws.rollout_steps))
        assert torch.equal(draws.noise, other.noise) and torch.equal(draws.fake_sigma, other.fake_sigma)
        assert all(torch.equal(draws.losses['dm'][key], other.losses['dm'][key]) for key in other.losses['dm'])
    # 1 / 1, 1 / 0.9, 1 / 0.75 and 1 / 0.5 of their sum, 49 / 9.
    share = torch.tensor([9, 10, 12, 18]) / 49
    spread = (share * (1 - share) / (8 * n)).sqrt()
    assert ((counts / (8 * n) - share).abs() < 4 * spread).all()
    assert variant.extra_forwards == pytest.approx((10 + 2 * 12 + 3 * 18) / 49 - 1.5)


def test_on_given_draws_low_anchors_are_plain_dmd2(plain, labels, monkeypatch):
    variant = started('LowAnchorsDMD2', plain)
    logs, gradients = step(variant, labels)
    own, _ = step(plain, labels)
    assert own['loss_dm'] != logs['loss_dm']
    monkeypatch.setattr(plain, 'sample_draws', variant.sample_draws)
    expected, reference = step(plain, labels)
    for name in ('loss_fake', 'loss_dm'):
        torch.testing.assert_close(logs[name], expected[name], rtol=1e-12, atol=0)
    for role in ('student', 'fake'):
        for name, gradient in reference[role].items():
            torch.testing.assert_close(gradients[role][name], gradient, rtol=1e-6, atol=1e-10, msg=name)


# Compiled, as the study runs them

@pytest.mark.slow
@pytest.mark.parametrize('type', ['AnchorInputDMD2', 'NextLevelDMD2'])
def test_compiled_variants_compute_the_same(type, plain, labels, benchmark):
    study, variant = benchmark('digits_study'), started(type, plain)
    for name, parameter in (*variant.student.named_parameters(), *variant.fake.named_parameters()):
        if name.startswith(('anchor_embedding', 'anchor_input')):
            torch.nn.init.normal_(parameter, std=0.1)
    expected, reference = step(variant, labels)
    names = ('recompile_limit', 'skip_nnmodule_hook_guards')  # put back after
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in names}):
        study.compile_networks(variant, backend='eager')
        logs, gradients = step(variant, labels)
    for name in ('loss_fake', 'loss_dm'):
        torch.testing.assert_close(logs[name], expected[name])
    for role in ('student', 'fake'):
        for name, gradient in reference[role].items():
            torch.testing.assert_close(gradients[role][name], gradient, msg=name)
