"""Draws as a pure function of (seed, rank, iteration), and their laws.

Every test of a law draws from fixed seeds and rejects at a level of 1e-4.
"""
import math
from collections import Counter

import pytest
import torch
from mmengine.registry import TASK_UTILS

from cdm_plugin.draws import DrawContext, Draws, FlowMatchingDraws, stream
from cdm_plugin.flow import shift_sigmas
from cdm_plugin.losses import CALoss, CDMLoss, DMLoss
from cdm_plugin.sigma_samplers import (
    AnchorSigma,
    CappedUniformSigma,
    LogitNormalSigma,
    SigmaSampler,
    StepSigma,
    UniformSigma,
)
from cdm_plugin.time_grids import DynamicTimeGrid, FixedTimeGrid

LOSSES = dict(ca=CALoss(), dm=DMLoss(), cdm=CDMLoss())
NORMAL_QUANTILE = 3.719  # of 1 - 1e-4


def shift3(sigmas):
    return shift_sigmas(sigmas, 3.0)


def sample(**kwargs):
    arguments = dict(seed=1, rank=0, iteration=7, shape=(16, 2, 2, 2), time_grid=DynamicTimeGrid(),
                     fake_sigma=UniformSigma(), losses=LOSSES, shift=shift3)
    return Draws.sample(**{**arguments, **kwargs})


def flat(draws):
    """All tensors that are drawn, by name; those of losses as loss.name. `order` follows from `anchor`."""
    tensors = {name: value for name, value in vars(draws).items()
               if isinstance(value, torch.Tensor) and name != 'order'}
    for loss, named in draws.losses.items():
        tensors.update({f'{loss}.{name}': value for name, value in named.items()})
    return tensors


def equal_names(a, b):
    a, b = flat(a), flat(b)
    return {name for name in a.keys() & b.keys() if a[name].shape == b[name].shape and torch.equal(a[name], b[name])}


NAMES = {'sigmas', 'anchor', 'noise', 'fake_sigma', 'fake_noise', 'ca.sigma', 'ca.noise', 'dm.sigma', 'dm.noise',
         'cdm.sigma', 'cdm.noise', 'cdm.point_sigma'}


def test_what_is_drawn():
    draws = sample()
    assert flat(draws).keys() == NAMES
    assert draws.noise.shape == draws.losses['ca']['noise'].shape == (16, 2, 2, 2)
    assert draws.anchor.shape == draws.losses['cdm']['point_sigma'].shape == (16,)
    assert draws.fake_noise.shape == (1, 16, 2, 2, 2) and draws.fake_sigma.shape == (1, 16)
    assert draws.sigmas[0] == 1 and (draws.sigmas.diff() < 0).all()
    assert 0 <= draws.anchor.min() and draws.anchor.max() < len(draws.sigmas)
    assert torch.equal(draws.anchor_sigma, torch.stack([draws.sigmas[n] for n in draws.anchor]))
    levels = shift_sigmas(torch.tensor([0.25, 0.95], dtype=torch.float64), 3.0)
    assert (draws.sigmas[1:] >= levels[0]).all() and (draws.sigmas[1:] <= levels[1]).all()


def test_no_two_tensors_share_a_stream():
    """Equal noise in two places would correlate terms that the method wants independent."""
    draws = flat(sample(fake_steps=3))
    noises = [*draws['fake_noise'], *(draws[name] for name in NAMES - {'fake_noise'} if name.endswith('noise'))]
    sigmas = [*draws['fake_sigma'], *(draws[name] for name in ('dm.sigma', 'cdm.sigma', 'cdm.point_sigma'))]
    for group in (noises, sigmas):
        assert all(not torch.equal(a, b) for i, a in enumerate(group) for b in group[:i])


def test_more_fake_steps_change_no_other_draw():
    one, three = sample(), sample(fake_steps=3)
    assert equal_names(one, three) == NAMES - {'fake_sigma', 'fake_noise'}
    assert torch.equal(three.fake_sigma[:1], one.fake_sigma) and torch.equal(three.fake_noise[:1], one.fake_noise)


# A pure function of (seed, rank, iteration)


def test_equal_keys_give_equal_draws_whatever_was_drawn_before():
    first = sample()
    torch.manual_seed(99)
    torch.randn(3)
    sample(iteration=6)
    second = sample()
    assert equal_names(first, second) == NAMES and first.rollout_steps == second.rollout_steps


def test_global_random_state_is_left_alone():
    state = torch.get_rng_state()
    sample()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('key', [dict(iteration=8), dict(seed=2)], ids=str)
def test_another_iteration_or_seed_changes_everything(key):
    assert equal_names(sample(), sample(**key)) == set()


def test_keys_do_not_run_into_each_other():
    """(seed 1, rank 11) is not (seed 11, rank 1), and iteration 0 of seed 1 not iteration 1 of seed 0."""
    keys = [dict(seed=1, rank=11), dict(seed=11, rank=1), dict(seed=0, iteration=1), dict(seed=1, iteration=0)]
    draws = [sample(**key) for key in keys]
    assert all(not equal_names(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert not torch.equal(torch.rand(9, generator=stream(1, 23)), torch.rand(9, generator=stream(12, 3)))


@pytest.mark.parametrize('world_size', [2, 4])
def test_ranks_share_the_grid_and_the_number_of_calls_and_nothing_else(world_size):
    largest_differ = False
    for iteration in range(20):
        ranks = [sample(rank=r, world_size=world_size, iteration=iteration, shape=(3, 2)) for r in range(world_size)]
        assert all(torch.equal(draws.sigmas, ranks[0].sigmas) for draws in ranks)
        largest = [int(draws.anchor.max()) for draws in ranks]
        assert [draws.rollout_steps for draws in ranks] == [max(largest)] * world_size
        assert equal_names(ranks[0], ranks[1]) <= {'sigmas', 'anchor'}
        if len(ranks[0].sigmas) > 8:
            assert not torch.equal(ranks[0].anchor, ranks[1].anchor)
        largest_differ |= len(set(largest)) > 1
    assert largest_differ  # otherwise the maximum over ranks would not have been needed


def test_a_rank_draws_the_same_in_any_world_except_for_its_calls():
    alone, among = sample(rank=1), sample(rank=1, world_size=4)
    assert equal_names(alone, among) == NAMES
    assert alone.rollout_steps == alone.anchor.max() <= among.rollout_steps


@pytest.mark.parametrize('losses', [dict(dm=DMLoss()), dict(cdm=CDMLoss(), ca=CALoss()), {},
                                    dict(a_new_one=DMLoss(), **LOSSES)], ids=lambda losses: '+'.join(losses) or 'none')
def test_adding_or_removing_a_loss_changes_no_other_draw(losses):
    draws = sample(losses=losses)
    assert equal_names(sample(), draws) == NAMES & flat(draws).keys()
    assert draws.losses.keys() == losses.keys()


def test_another_sigma_law_of_one_loss_changes_no_other_draw():
    draws = sample(losses={**LOSSES, 'cdm': CDMLoss(point_sigma=AnchorSigma())})
    assert equal_names(sample(), draws) >= NAMES - {'cdm.point_sigma', 'cdm.sigma', 'cdm.noise'}


# Moving


def test_to_changes_device_and_dtype_of_floating_tensors_only():
    draws = sample()
    moved = draws.to(torch.device('cpu'))
    assert {name: t.dtype for name, t in flat(moved).items() if name != 'anchor'} == {
        name: torch.float32 for name in NAMES - {'anchor'}}
    assert moved.anchor.dtype == torch.int64 and moved.rollout_steps == draws.rollout_steps
    assert torch.equal(moved.sigmas, draws.sigmas.float())
    double = draws.to(torch.device('cpu'), torch.float64)
    assert torch.equal(double.sigmas, draws.sigmas) and torch.equal(double.noise, draws.noise.double())
    elsewhere = draws.to(torch.device('meta'))
    assert {t.device.type for t in flat(elsewhere).values()} == {'meta'}
    assert {t.device.type for t in flat(draws).values()} == {'cpu'}  # a copy: the original stays


# Laws


def chi_square_limit(degrees):
    """Quantile of 1 - 1e-4 (Wilson & Hilferty 1931)."""
    return degrees * (1 - 2 / (9 * degrees) + NORMAL_QUANTILE * math.sqrt(2 / (9 * degrees)))**3


def chi_square(counts, expected):
    return sum((count - expected)**2 / expected for count in counts)


def ks_distance(values, cdf):
    """One-sample Kolmogorov-Smirnov statistic."""
    values = values.double().sort().values
    n, f = len(values), cdf(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return max((steps[1:] - f).max(), (f - steps[:-1]).max()).item()


def two_sample_ks_distance(a, b):
    levels = torch.cat([a, b]).double().unique()
    cdf_a, cdf_b = (torch.searchsorted(v.double().sort().values, levels, right=True) / len(v) for v in (a, b))
    return (cdf_a - cdf_b).abs().max().item()


def ks_limit(n, m=None):
    """Asymptotic quantile of 1 - 1e-4, of one sample of n or two of n and m."""
    return math.sqrt(-math.log(1e-4 / 2) / 2) * math.sqrt(1 / n + (1 / m if m else 0))


def uniform(low, high):
    return lambda x: ((x - low) / (high - low)).clamp(0, 1)


def assert_share(count, n, probability):
    assert abs(count - n * probability) < (NORMAL_QUANTILE + 0.2) * math.sqrt(n * probability * (1 - probability))


def test_the_statistics_reject_what_is_false():
    values = torch.rand(2000, generator=stream(0))
    assert ks_distance(values, uniform(0, 1)) < ks_limit(2000) < ks_distance(values**1.2, uniform(0, 1))
    assert two_sample_ks_distance(values[:1000], values[1000:]) < ks_limit(1000, 1000)
    assert two_sample_ks_distance(values[:1000], 0.85 * values[1000:]) > ks_limit(1000, 1000)
    assert chi_square_limit(27) == pytest.approx(63.16, rel=0.01)  # exact: 63.164


@pytest.fixture(scope='module')
def iterations():
    """The draws of 4000 iterations of 8 samples, unshifted."""
    return [sample(iteration=i, shape=(8, 1), losses={}, shift=lambda s: s) for i in range(4000)]


def test_law_of_the_grids_length(iterations):
    counts = Counter(len(draws.sigmas) for draws in iterations)
    assert counts.keys() == set(range(1, 29))
    assert chi_square(counts.values(), len(iterations) / 28) < chi_square_limit(27)


def test_lengths_of_successive_iterations_are_independent(iterations):
    lengths = torch.tensor([float(len(draws.sigmas)) for draws in iterations])
    correlation = torch.corrcoef(torch.stack([lengths[:-1], lengths[1:]]))[0, 1]
    assert abs(correlation) < NORMAL_QUANTILE / math.sqrt(len(lengths))


def test_law_of_the_interior_levels(iterations):
    assert all(draws.sigmas[0] == 1 for draws in iterations)
    interior = torch.cat([draws.sigmas[1:] for draws in iterations])
    assert ks_distance(interior, uniform(0.25, 0.95)) < ks_limit(len(interior))


def test_law_of_the_anchor_given_the_grid(iterations):
    statistic = degrees = 0
    for n in range(2, 29):
        anchors = torch.cat([draws.anchor for draws in iterations if len(draws.sigmas) == n])
        counts = torch.bincount(anchors, minlength=n)
        assert len(counts) == n
        statistic, degrees = statistic + chi_square(counts.tolist(), len(anchors) / n), degrees + n - 1
    assert statistic < chi_square_limit(degrees)


def test_anchors_of_a_fixed_grid_are_uniform_over_all_ranks():
    anchors = torch.cat([sample(rank=rank, iteration=i, shape=(8, 1), losses={},
                                time_grid=FixedTimeGrid([1.0, 0.75, 0.5, 0.25])).anchor
                         for i in range(250) for rank in range(2)])
    assert chi_square(torch.bincount(anchors).tolist(), len(anchors) / 4) < chi_square_limit(3)


def test_laws_of_noise_and_of_the_fake_steps_level():
    draws = sample(shape=(20000, 1), losses=LOSSES)
    normal = torch.distributions.Normal(0.0, 1.0)
    for noise in (draws.noise, draws.fake_noise, draws.losses['dm']['noise']):
        assert ks_distance(noise.flatten(), normal.cdf) < ks_limit(20000)
    for sigma in (draws.fake_sigma[0], draws.losses['dm']['sigma'], draws.losses['cdm']['sigma'],
                  draws.losses['cdm']['point_sigma']):
        assert ks_distance(sigma, lambda s: s) < ks_limit(20000) + 0.02  # 2 % of the mass moves to each clamp
        assert sigma.min() == 0.02 and sigma.max() == 0.98
        assert_share((sigma == 0.02).sum().item(), 20000, 0.02)
        assert_share((sigma == 0.98).sum().item(), 20000, 0.02)


# Sigma samplers


def draw(sampler, anchor_sigma, seed=0, grid=DynamicTimeGrid()):
    return sampler(context(anchor_sigma, seed, grid))


def context(anchor_sigma, seed=0, grid=DynamicTimeGrid(), **kwargs):
    return DrawContext(stream(seed), anchor_sigma, lambda generator: shift3(grid.sample(generator)),
                       (len(anchor_sigma), 1), **kwargs)


@pytest.mark.parametrize('type', ['UniformSigma', 'CappedUniformSigma', 'LogitNormalSigma', 'AnchorSigma'])
def test_samplers_obey_their_clamps(type):
    sigma = draw(TASK_UTILS.build(dict(type=type, low=0.6, high=0.9)), torch.full((500,), 1.0))
    assert sigma.shape == (500,) and sigma.dtype == torch.float64
    assert sigma.min() == 0.6 and sigma.max() == 0.9


@pytest.mark.parametrize('type', [UniformSigma, CappedUniformSigma, LogitNormalSigma])
def test_default_clamps_are_the_published_ones(type):
    assert (type().low, type().high) == (0.02, 0.98)


@pytest.mark.parametrize('kwargs', [dict(low=0.5, high=0.5), dict(low=-0.1), dict(high=1.1), dict(low=0.99)], ids=str)
def test_bad_clamps_are_refused(kwargs):
    message = r'UniformSigma(\.(low|high) must be .* in \[0, 1\]| needs 0 <= low < high <= 1)'
    with pytest.raises(ValueError, match=message):
        UniformSigma(**kwargs)


def test_a_sampler_without_a_law():
    with pytest.raises(NotImplementedError):
        draw(SigmaSampler(), torch.ones(1))


def test_capped_uniform_is_uniform_below_each_samples_own_anchor():
    anchor_sigma = 0.25 + 0.75 * torch.rand(20000, generator=stream(1), dtype=torch.float64)
    sampler = CappedUniformSigma()
    assert (draw(sampler, anchor_sigma) <= anchor_sigma).all()
    ratio = sampler.law(context(anchor_sigma)) / anchor_sigma
    assert ks_distance(ratio, uniform(0, 1)) < ks_limit(20000)


def test_ca_draws_are_capped_by_the_samples_own_anchor():
    draws = sample(shape=(2000, 1), time_grid=DynamicTimeGrid(min_steps=6, max_steps=6))
    share = draws.losses['ca']['sigma'] / draws.anchor_sigma
    assert share.max() <= 1
    assert ks_distance(share, uniform(0, 1)) < ks_limit(2000) + 0.02 / draws.sigmas.min().item()


def test_anchor_sigma_has_the_law_of_the_anchors():
    n = 4000
    anchors = torch.cat([sample(iteration=i, shape=(1, 1), losses={}).anchor_sigma for i in range(n)])
    drawn = draw(AnchorSigma(), torch.ones(n))
    assert two_sample_ks_distance(anchors, drawn) < ks_limit(n, n)
    # The anchor is pure noise with probability mean_N(1 / N), the 28th harmonic number over 28.
    at_noise = sum(1 / k for k in range(1, 29)) / 28
    for values in (anchors, drawn):
        assert_share((values == 1).sum().item(), n, at_noise)
        interior = values[values < 1]
        assert ks_distance(interior / (3 - 2 * interior), uniform(0.25, 0.95)) < ks_limit(len(interior))


def test_anchor_sigma_draws_a_grid_of_its_own_for_every_sample():
    drawn = draw(AnchorSigma(), torch.ones(200), grid=DynamicTimeGrid(min_steps=2, max_steps=2))
    interior = drawn[drawn < 1]
    assert len(interior.unique()) == len(interior) > 50


def test_logit_normal_law():
    drawn = draw(LogitNormalSigma(mean=0.5, std=0.8, low=0.0, high=1.0), torch.ones(20000))
    normal = torch.distributions.Normal(0.5, 0.8)
    assert ks_distance(torch.logit(drawn), normal.cdf) < ks_limit(20000)
    with pytest.raises(ValueError, match='std must be a number above 0, but is 0'):
        LogitNormalSigma(std=0)


# Levels before the scheduler's shift


GRID = shift3(torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64))


def unshifted(sigma):
    return sigma / (3 - 2 * sigma)


def test_a_shifted_cap_is_the_anchors_level_before_the_shift():
    """Z-Image's issue 78: of 4 steps with a shift of 3 the last anchor is 0.5, which was 0.25; levels are drawn below
    0.25 and then shifted."""
    anchors = GRID[torch.randint(4, (20000,), generator=stream(2))]
    sampler = CappedUniformSigma(low=0.0, high=1.0, shift='scheduler')
    drawn = sampler(context(anchors, scheduler_shift=3.0))
    last = drawn[anchors == GRID[3]]
    assert GRID[3] == 0.5 and last.max() <= 0.5
    assert ks_distance(unshifted(last), uniform(0, 0.25)) < ks_limit(len(last)) < ks_distance(last, uniform(0, 0.5))
    assert ks_distance(unshifted(drawn) / unshifted(anchors), uniform(0, 1)) < ks_limit(20000)


@pytest.mark.parametrize('type', [UniformSigma, LogitNormalSigma])
def test_what_a_shifted_law_draws_is_the_shift_of_what_it_drew_and_then_clamped(type):
    plain, shifted = (type(shift=shift)(context(torch.ones(500), scheduler_shift=3.0)) for shift in (
        'none', 'scheduler'))
    within = (plain > 0.02) & (plain < 0.98)
    assert torch.allclose(shifted[within], shift3(plain[within]).clamp(0.02, 0.98), rtol=0, atol=1e-15)
    assert shifted.max() == 0.98 and shifted.min() >= 0.02


def test_the_methods_shift_is_that_of_samplers_without_one():
    by_method = dict(scheduler_shift=3.0, sigma_shift='scheduler')
    own, none, default = (UniformSigma(shift=shift)(context(torch.ones(50), **by_method)) for shift in (
        'scheduler', 'none', None))
    assert torch.equal(default, own) and not torch.equal(default, none)
    assert torch.equal(UniformSigma()(context(torch.ones(50), scheduler_shift=3.0)), none)
    # A grid has had its shift.
    assert torch.equal(AnchorSigma()(context(torch.ones(50), **by_method)), draw(AnchorSigma(), torch.ones(50)))


def test_shifted_laws_reach_losses_and_fake_steps_and_leave_noise_and_grid_alone():
    plain, shifted = sample(), sample(scheduler_shift=3.0, sigma_shift='scheduler')
    assert NAMES - equal_names(plain, shifted) == {'fake_sigma', 'ca.sigma', 'dm.sigma', 'cdm.sigma', 'cdm.point_sigma'}


def test_a_sampler_with_other_arguments_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match=r'Old.law\(self, generator, anchor_sigma, draw_grid\) must take '):
        class Old(SigmaSampler):
            def law(self, generator, anchor_sigma, draw_grid):
                pass


# Within a sampling step


@pytest.mark.parametrize('shift', ['none', 'scheduler'])
def test_step_sigma_is_uniform_between_the_ends_of_the_anchors_own_step(shift):
    index = torch.randint(4, (20000,), generator=stream(3))
    ends = torch.cat([GRID, torch.zeros(1)])[index + 1]
    levels = context(GRID[index], sigmas=GRID, scheduler_shift=3.0)
    assert torch.equal(levels.end_sigma, ends)
    drawn = StepSigma(low=0.0, high=1.0, shift=shift)(levels)
    assert (drawn >= ends).all() and (drawn <= GRID[index]).all()
    low, high, drawn = (f(v) for f in [unshifted if shift == 'scheduler' else torch.clone]
                        for v in (ends, GRID[index], drawn))
    assert ks_distance((drawn - low) / (high - low), uniform(0, 1)) < ks_limit(20000)


def test_no_level_leaves_its_step_for_the_clamp():
    """Steps that lie outside of [0.02, 0.98] as a whole: the dynamic grid's first and a last one near clean."""
    grid = torch.tensor([1.0, 0.99, 0.5, 0.015, 0.01], dtype=torch.float64)
    index = torch.arange(5).repeat(200)
    ends = torch.cat([grid[1:], torch.zeros(1)])[index]
    drawn = StepSigma()(context(grid[index], sigmas=grid))
    assert (drawn >= ends).all() and (drawn <= grid[index]).all() and drawn.min() > 0
    assert set(drawn[index == 0].tolist()) == {0.99} and set(drawn[index == 4].tolist()) == {0.01}
    assert drawn[index == 1].max() == 0.98  # the clamp holds where it can
    assert drawn[index == 2].min() >= 0.02
    moved = sample(fake_sigma=StepSigma(), time_grid=FixedTimeGrid([1.0, 0.995, 0.5, 0.004])).to(torch.device('cpu'))
    assert (moved.fake_sigma >= moved.end_sigma).all()  # rounded to float32 too


def test_a_rollout_that_noises_anew_draws_noise_for_what_moves_and_changes_no_other_draw():
    plain, renoised = sample(), sample(rollout='renoise')
    assert equal_names(plain, renoised) == NAMES and plain.step_noise == []
    assert [len(noise) for noise in renoised.step_noise] == list(renoised.moving)
    assert all(noise.shape[1:] == (2, 2, 2) for noise in renoised.step_noise)
    values = torch.cat([noise.flatten() for noise in sample(rollout='renoise', shape=(500, 4)).step_noise])
    assert ks_distance(values, torch.distributions.Normal(0.0, 1.0).cdf) < ks_limit(len(values))
    moved = renoised.to(torch.device('cpu'), torch.float64)
    assert {noise.dtype for noise in moved.step_noise} == {torch.float64}
    among = sample(rollout='renoise', rank=1, world_size=4)
    assert len(among.step_noise) == among.rollout_steps


def test_a_context_gives_losses_the_anchors_and_grids_of_the_iteration():
    """A loss of a plug-in sees what the built-in ones see."""
    seen = {}

    class Spy:

        def draw(self, context: DrawContext):
            seen.update(anchor_sigma=context.anchor_sigma, grid=context.draw_grid(context.generator))
            return dict(value=torch.rand(2, generator=context.generator))

    draws = sample(losses=dict(spy=Spy()))
    assert torch.equal(seen['anchor_sigma'], draws.anchor_sigma)
    assert seen['grid'][0] == 1 and not torch.equal(seen['grid'], draws.sigmas)
    assert torch.equal(draws.losses['spy']['value'], sample(losses=dict(spy=Spy())).losses['spy']['value'])


# Flow matching


def flow_matching(**kwargs):
    arguments = dict(seed=1, rank=0, iteration=7, shape=(16, 2), sigma=LogitNormalSigma(), drop_rate=0.1, shift=shift3)
    return FlowMatchingDraws.sample(**{**arguments, **kwargs})


def test_flow_matching_draws_are_pure_too():
    assert equal_flow(flow_matching(), flow_matching()) == [True, True]
    for key in (dict(seed=2), dict(rank=1), dict(iteration=8)):
        assert equal_flow(flow_matching(), flow_matching(**key)) == [False, False]


def equal_flow(a, b):
    return [torch.equal(a.sigma, b.sigma), torch.equal(a.noise, b.noise)]


def test_flow_matching_laws():
    draws = flow_matching(shape=(20000, 1), sigma=LogitNormalSigma(low=0.0, high=1.0))
    normal = torch.distributions.Normal(0.0, 1.0)
    unshifted = draws.sigma / (3 - 2 * draws.sigma)
    assert ks_distance(torch.logit(unshifted), normal.cdf) < ks_limit(20000)
    assert ks_distance(draws.noise.flatten(), normal.cdf) < ks_limit(20000)
    assert draws.drop.dtype == torch.bool
    assert_share(draws.drop.sum().item(), 20000, 0.1)
    assert not flow_matching(drop_rate=0.0).drop.any() and flow_matching(drop_rate=1.0).drop.all()
