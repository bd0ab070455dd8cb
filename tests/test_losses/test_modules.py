"""The registered losses: what they ask, where they train the student, and what they make of the answers."""
import pytest
import torch
from mmengine.registry import MODELS

from cdm_plugin.draws import DrawContext, stream
from cdm_plugin.losses import CALoss, CDMLoss, DMLoss, FlowMatchingLoss, LossInputs, ScoreLoss, TDMLoss
from cdm_plugin.rollout import Prediction
from cdm_plugin.sigma_samplers import AnchorSigma, CappedUniformSigma, UniformSigma

BATCH = 3
SHAPE = (BATCH, 2, 2, 2)


def latents(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(values):
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


def inputs_of(prediction, draws=(), answers=()):
    """What a loss sees; the answers are estimates of x0 at z, by name."""
    level = torch.tensor(Z_SIGMA, dtype=torch.float64)
    answers = {name: Prediction(latents(20), level, (latents(20) - x0) / column(Z_SIGMA), x0)
               for name, x0 in dict(answers).items()}
    return LossInputs(prediction, dict(draws), {}, None, None, None, answers)


def value_of(loss, prediction, answers):
    return loss(inputs_of(prediction, answers=answers))


SIGMA, Z_SIGMA, POINT_SIGMA = [1.0, 0.6, 0.3], [0.9, 0.5, 0.02], [0.1, 0.98, 0.3]


@pytest.fixture
def prediction():
    """A student's prediction at an anchor, whose x0 and velocity carry gradient."""
    x, velocity = latents(0), latents(1).requires_grad_()
    return Prediction(x, torch.tensor(SIGMA, dtype=torch.float64), velocity, x - column(SIGMA) * velocity)


@pytest.fixture
def draws():
    return dict(sigma=torch.tensor(Z_SIGMA, dtype=torch.float64), noise=latents(2),
                point_sigma=torch.tensor(POINT_SIGMA, dtype=torch.float64))


@pytest.fixture
def answers():
    return {name: latents(10 + i) for i, name in enumerate(['teacher', 'fake', 'null'])}


QUERIES = {
    'CALoss': (CALoss(), dict(teacher=('teacher', False), null=('teacher', True))),
    'DMLoss': (DMLoss(), dict(teacher=('teacher', False), fake=('fake', False))),
    'DMLoss guided': (DMLoss(guided=True), dict(
        teacher=('teacher', False), fake=('fake', False), null=('teacher', True))),
    'CDMLoss': (CDMLoss(), dict(teacher=('teacher', False), fake=('fake', False))),
    'CDMLoss guided': (CDMLoss(guided=True), dict(
        teacher=('teacher', False), fake=('fake', False), null=('teacher', True))),
}


@pytest.mark.parametrize('name', QUERIES)
def test_queries(name, prediction, draws):
    loss, expected = QUERIES[name]
    queries = loss.queries(inputs_of(prediction.detach(), draws))
    assert {key: (query.role, query.null) for key, query in queries.items()} == expected
    z = (1 - column(Z_SIGMA)) * prediction.x0.detach() + column(Z_SIGMA) * draws['noise']
    for query in queries.values():
        assert torch.allclose(query.x, z, rtol=0, atol=1e-15) and not query.x.requires_grad
        assert query.sigma.tolist() == Z_SIGMA


def test_on_trajectory_losses_train_the_shared_prediction(prediction, draws):
    assert CALoss().point(inputs_of(prediction, draws)) is None and DMLoss().point(inputs_of(prediction, draws)) is None


def test_the_point_of_cdm_is_extrapolated_and_carries_no_gradient(prediction, draws):
    x, sigma = CDMLoss().point(inputs_of(prediction, draws))
    assert sigma.tolist() == POINT_SIGMA
    expected = prediction.x + (column(POINT_SIGMA) - column(SIGMA)) * prediction.velocity.detach()
    assert torch.allclose(x, expected, rtol=0, atol=1e-15)
    assert not x.requires_grad and prediction.velocity.requires_grad
    assert torch.equal(x[2], prediction.x[2])  # sigma_c of sample 2 is its anchor's level


def test_points_that_the_ablations_put_in_place_of_the_extrapolated(prediction, draws):
    anchor = prediction.detach()
    assert CDMLoss(points='on-trajectory').point(inputs_of(anchor, draws)) is None
    noise = latents(3)
    x, sigma = CDMLoss(points='noised').point(inputs_of(anchor, dict(draws, point_noise=noise)))
    expected = (1 - column(POINT_SIGMA)) * anchor.x0 + column(POINT_SIGMA) * noise
    assert sigma.tolist() == POINT_SIGMA and torch.allclose(x, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize('points, names', [
    ('extrapolated', {'sigma', 'noise', 'point_sigma'}), ('on-trajectory', {'sigma', 'noise'}),
    ('noised', {'sigma', 'noise', 'point_sigma', 'point_noise'})])
def test_draws_of_the_points(points, names):
    anchors = torch.tensor(SIGMA, dtype=torch.float64)
    context = DrawContext(stream(0, 'points'), anchors, lambda generator: torch.ones(1), SHAPE)
    draws = CDMLoss(points=points, sigma=dict(type='CappedUniformSigma', low=0.0)).draw(context)
    assert set(draws) == names
    cap = draws.get('point_sigma', anchors)  # on the trajectory, the loss's own point is the anchor
    assert (draws['sigma'] <= cap).all()
    if points == 'noised':
        assert draws['point_noise'].shape == SHAPE and not torch.equal(draws['point_noise'], draws['noise'])


def test_unknown_points_are_refused():
    with pytest.raises(ValueError, match="CDMLoss.points must be 'extrapolated' or .*, but is 'somewhere'"):
        CDMLoss(points='somewhere')


def regression(x0, delta, reference, min_norm=0.1):
    """Written out: mean over the entries of (w delta)^2, w = 1 / max(mean|reference - x0|, min_norm)."""
    norm = [max((reference[i] - x0[i]).abs().mean().item(), min_norm) for i in range(BATCH)]
    return torch.stack([(delta[i] / norm[i]).square().mean() for i in range(BATCH)])


def close(a, b):
    return torch.allclose(a, b, rtol=1e-13, atol=0)


@pytest.mark.parametrize('alpha', [0.0, 1.0, 7.0])
def test_ca_loss(alpha, prediction, answers):
    values, _ = value_of(CALoss(alpha=alpha), prediction, answers)
    assert close(values, regression(prediction.x0, alpha * (answers['teacher'] - answers['null']), answers['teacher']))


@pytest.mark.parametrize('type', [DMLoss, CDMLoss])
def test_unguided_distribution_matching(type, prediction, answers):
    values, _ = value_of(type(alpha=5.0), prediction, answers)
    assert close(values, regression(prediction.x0, answers['teacher'] - answers['fake'], answers['teacher']))


@pytest.mark.parametrize('type', [DMLoss, CDMLoss])
@pytest.mark.parametrize('alpha', [0.0, 1.0, 7.0])
def test_guided_distribution_matching(type, alpha, prediction, answers):
    """The guided real score is the reference of DMD2's normaliser; the CDM loss measures against D_teacher(z, c)."""
    values, _ = value_of(type(guided=True, alpha=alpha), prediction, answers)
    real = (1 + alpha) * answers['teacher'] - alpha * answers['null']
    assert torch.allclose(values, regression(
        prediction.x0, real - answers['fake'], real if type is DMLoss else answers['teacher']), rtol=1e-12)


@pytest.mark.parametrize('name', QUERIES)
def test_gradient_reaches_the_student_only(name, prediction, answers):
    for answer in answers.values():
        answer.requires_grad_()
    value_of(QUERIES[name][0], prediction, answers)[0].sum().backward()
    assert prediction.velocity.grad.abs().min() > 0
    assert all(answer.grad is None for answer in answers.values())


@pytest.mark.parametrize('name', QUERIES)
def test_share_of_clamped_samples_is_logged(name, prediction, answers):
    """Sample 1 lies within 0.1 of its reference, samples 0 and 2 do not."""
    loss = QUERIES[name][0]
    for key in ('teacher', 'null'):
        answers[key][1] = prediction.x0[1].detach() + 0.05
        answers[key][2] = prediction.x0[2].detach() + 0.15
    values, logs = value_of(loss, prediction, answers)
    assert logs.keys() == {'clamp', 'left_out'} and logs['left_out'] == 0
    assert logs['clamp'].item() == pytest.approx(1 / 3) and not logs['clamp'].requires_grad
    assert value_of(type(loss)(min_norm=0.2), prediction, answers)[1]['clamp'].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize('type', [DMLoss, CDMLoss])
def test_share_of_clamped_samples_is_of_the_reference(type, prediction, answers):
    """The unguided answer, the CDM loss's reference, lies 0.05 from x0, the guided one 0.05 + 2 * 0.05: above the
    clamp."""
    answers['teacher'], answers['null'] = prediction.x0.detach() + 0.05, prediction.x0.detach()
    assert value_of(type(guided=True, alpha=2.0), prediction, answers)[1]['clamp'] == (type is CDMLoss)
    assert value_of(type(guided=False, alpha=2.0), prediction, answers)[1]['clamp'] == 1


@pytest.mark.parametrize('type', [CALoss, DMLoss, CDMLoss])
def test_min_norm_is_the_clamp(type, prediction, answers):
    for key in ('teacher', 'null'):
        answers[key] = prediction.x0.detach() + 0.01 * answers[key]
    a, b = (value_of(type(min_norm=m), prediction, answers)[0] for m in (1.0, 0.5))
    assert close(b, 4 * a)


def test_defaults_are_the_published_recipe():
    assert (CALoss().alpha, CALoss().min_norm, CALoss().weight) == (7.0, 0.1, 1.0)
    assert isinstance(CALoss().sigma, CappedUniformSigma)
    for loss in (DMLoss(), CDMLoss()):
        assert (loss.guided, loss.min_norm, loss.weight) == (False, 0.1, 1.0)
        assert isinstance(loss.sigma, UniformSigma)
    assert isinstance(CDMLoss().point_sigma, UniformSigma)


def test_every_level_of_the_published_recipe_is_clamped():
    """To [0.02, 0.98], as the authors' sampler does; the share at either end is what U(0, 1) has beyond it."""
    shape = (4000, 1, 1, 1)
    anchors = torch.ones(4000, dtype=torch.float64)
    drawn = CDMLoss().draw(DrawContext(stream(0, 'clamp'), anchors, lambda generator: torch.ones(1), shape))
    for name in ('sigma', 'point_sigma'):
        assert drawn[name].min() == 0.02 and drawn[name].max() == 0.98
        for end in (0.02, 0.98):  # 80 of 4000, standard deviation 8.9
            assert 50 < (drawn[name] == end).sum() < 110


def context(seed=0):
    def draw_grid(generator):
        return torch.tensor([1.0, 0.5], dtype=torch.float64)
    return DrawContext(stream(seed), torch.tensor(SIGMA, dtype=torch.float64), draw_grid, SHAPE)


@pytest.mark.parametrize('loss, names', [
    (CALoss(), {'sigma', 'noise'}), (DMLoss(), {'sigma', 'noise'}), (CDMLoss(), {'sigma', 'noise', 'point_sigma'})],
    ids=['CALoss', 'DMLoss', 'CDMLoss'])
def test_draws(loss, names):
    drawn = loss.draw(context())
    assert drawn.keys() == names and drawn['noise'].shape == SHAPE
    assert all(drawn[name].shape == (BATCH,) for name in names - {'noise'})
    again, other = loss.draw(context()), loss.draw(context(1))
    assert all(torch.equal(drawn[name], again[name]) and not torch.equal(drawn[name], other[name]) for name in names)


def test_samplers_come_from_the_config():
    loss = MODELS.build(dict(type='CDMLoss', point_sigma=dict(type='AnchorSigma'),
                             sigma=dict(type='LogitNormalSigma', low=0.4, high=0.5)))
    drawn = loss.draw(context())
    assert isinstance(loss.point_sigma, AnchorSigma) and set(drawn['point_sigma'].tolist()) <= {1.0, 0.5}
    assert (0.4 <= drawn['sigma']).all() and (drawn['sigma'] <= 0.5).all()


@pytest.mark.parametrize('type', ['CALoss', 'DMLoss', 'CDMLoss'])
def test_weight_of_a_score_loss_is_the_methods_business(type, prediction, answers):
    """The module's value is unweighted, so that logs compare across weights."""
    a, b = (value_of(MODELS.build(dict(type=type, weight=w)), prediction, answers)[0] for w in (0.0, 2.5))
    assert torch.equal(a, b)
    with pytest.raises(ValueError, match=f'{type}.weight must be a number of 0 or more, but is -1'):
        MODELS.build(dict(type=type, weight=-1))


@pytest.mark.parametrize('loss', ['CALoss', 'DMLoss', 'CDMLoss', 'TDMLoss'])
def test_a_loss_in_velocity_is_the_squared_distance_of_velocities(loss, prediction, answers):
    """x0 and target x0 + w delta belong to velocities v and v - w delta / sigma at the same x."""
    kwargs = dict(huber=None) if loss == 'TDMLoss' else {}
    velocity, x0 = (MODELS.build(dict(type=loss, space=space, **kwargs)) for space in ('velocity', 'x0'))
    delta, reference = x0.direction(inputs_of(prediction, answers=answers))
    w = 1 / (reference - prediction.x0.detach()).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.1)
    target = prediction.velocity.detach() - w * delta / column(SIGMA)
    expected = (prediction.velocity - target).square().mean((1, 2, 3))
    ours, plain = value_of(velocity, prediction, answers)[0], value_of(x0, prediction, answers)[0]
    assert close(ours, expected) and close(plain, expected * column(SIGMA).flatten().square())
    # With respect to v its gradient, 2 w delta / sigma, carries 1 / sigma where that of the loss in x0 carries sigma.
    grads = [torch.autograd.grad(value.sum(), prediction.velocity, retain_graph=True)[0] for value in (ours, plain)]
    numel = prediction.velocity[0].numel()
    assert close(grads[0], 2 * w * delta / column(SIGMA) / numel)
    assert close(grads[1], 2 * w * delta * column(SIGMA) / numel)


def test_the_huber_distance_in_velocity_pulls_alike_at_every_level(prediction, answers):
    """By hand: sqrt((dv)^2 + (c / sigma)^2) - c / sigma for dv = delta / sigma, over the normaliser."""
    loss, c = TDMLoss(space='velocity'), 1e-3 / column(SIGMA)
    delta, reference = loss.direction(inputs_of(prediction, answers=answers))
    norm = (reference - prediction.x0.detach()).abs().mean((1, 2, 3)).clamp(min=0.1)
    expected = (((delta / column(SIGMA)).square() + c**2).sqrt() - c).mean((1, 2, 3)) / norm
    assert close(value_of(loss, prediction, answers)[0], expected)


def test_the_point_of_tdm_is_the_steps_end_diffused_within_the_step(prediction):
    """By hand: x_e = x + (e - s) v; signal (1 - t) / (1 - e) of it, and noise for the rest of the variance."""
    end, level = [0.6, 0.3, 0.0], [0.8, 0.3, 0.02]
    draws = dict(sigma=column(level).flatten(), noise=latents(2), end_sigma=column(end).flatten())
    asked = TDMLoss().queries(inputs_of(prediction.detach(), draws))
    assert asked.keys() == {'teacher', 'fake', 'null'} and asked['null'].null
    keep = (1 - column(level)) / (1 - column(end))
    at_end = prediction.x + (column(end) - column(SIGMA)) * prediction.velocity
    z = keep * at_end + (column(level)**2 - (keep * column(end))**2).clamp(min=0).sqrt() * latents(2)
    assert all(close(query.x, z) and query.sigma is draws['sigma'] for query in asked.values())
    assert close(z[1], at_end[1]) and close(z[2], 0.98 * prediction.x0[2] + 0.02 * latents(2)[2])


def test_the_draws_of_tdm_and_the_laws_that_it_refuses():
    anchors, grid = column(SIGMA).flatten(), column(SIGMA).flatten()
    drawn = TDMLoss().draw(DrawContext(stream(0), anchors, lambda generator: grid, SHAPE, grid))
    assert drawn['end_sigma'].tolist() == [0.6, 0.3, 0.0]
    assert (drawn['end_sigma'] <= drawn['sigma']).all() and (drawn['sigma'] <= anchors).all()
    with pytest.raises(ValueError, match=r"sigma is UniformSigma, but TDM needs .*type='StepSigma'"):
        TDMLoss(sigma=dict(type='UniformSigma'))


def test_flow_matching_loss_and_its_weight():
    velocity, x0, noise = latents(0), latents(1), latents(2)
    expected = (velocity - (noise - x0)).square().mean((1, 2, 3))
    assert close(FlowMatchingLoss()(velocity, x0, noise), expected)
    assert close(MODELS.build(dict(type='FlowMatchingLoss', weight=0.5))(velocity, x0, noise), 0.5 * expected)
    with pytest.raises(ValueError, match='FlowMatchingLoss.weight must be a number above 0, but is 0'):
        FlowMatchingLoss(weight=0)


def test_a_term_of_a_plug_in_needs_forward_only(prediction):
    loss = ScoreLoss(weight=0.5)
    assert loss.draw(context()) == {} and loss.queries(inputs_of(prediction)) == {}
    assert loss.point(inputs_of(prediction, {})) is None
    with pytest.raises(NotImplementedError):
        loss(inputs_of(prediction))


def test_a_loss_with_other_arguments_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match=r'Old.forward\(self, prediction, answers\) must take \(self, inputs\)'):
        class Old(ScoreLoss):
            def forward(self, prediction, answers):
                pass
