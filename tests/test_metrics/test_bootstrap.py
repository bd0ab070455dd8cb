import itertools

import numpy as np
import pytest

from cdm_plugin.metrics.bootstrap import bootstrap_mean, jackknife, wins


def test_interval_of_a_mean_is_the_normal_one():
    """mean +- z s / sqrt(N), the limit of the percentile bootstrap for many values and resamples."""
    values = np.random.default_rng(1).normal(3, 2, 2000)
    error = values.std() / np.sqrt(len(values))
    for confidence, z in ((0.95, 1.959964), (0.68, 0.994458)):
        value, low, high = bootstrap_mean(values, confidence, resamples=20000)
        assert value == pytest.approx(values.mean(), abs=1e-12)
        assert low == pytest.approx(value - z * error, abs=0.05 * error)
        assert high == pytest.approx(value + z * error, abs=0.05 * error)


def test_interval_of_few_values_is_the_quantile_of_all_resamples():
    """Three values have 27 equally likely resamples: their exact 10% and 90% quantiles."""
    values = [0.0, 1.0, 5.0]
    means = [np.mean(drawn) for drawn in itertools.product(values, repeat=3)]
    _, low, high = bootstrap_mean(values, 0.8, resamples=20000)
    assert (low, high) == pytest.approx((np.quantile(means, 0.1), np.quantile(means, 0.9)), abs=1e-9)


def test_equal_seeds_draw_the_same_prompts():
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    value, low, high = bootstrap_mean(values, resamples=150)
    assert bootstrap_mean(2 * values + 1, resamples=150) == pytest.approx((2 * value + 1, 2 * low + 1, 2 * high + 1))


def test_jackknife_of_a_mean_has_the_closed_form():
    """With a group a value the deviation is exactly s / sqrt(N), s with N - 1; groups of several estimate the same."""
    values = np.random.default_rng(2).normal(size=40)

    def mean(indices):
        return dict(mean=values[indices].mean())

    value, low, high = jackknife(mean, 40, groups=40)['mean']
    error = 1.959964 * values.std(ddof=1) / np.sqrt(40)
    assert (value, low, high) == pytest.approx((values.mean(), values.mean() - error, values.mean() + error))
    many = np.random.default_rng(3).normal(size=4000)
    intervals = [jackknife(lambda i: dict(x=many[i].mean()), 4000, groups=20, seed=seed)['x'] for seed in range(20)]
    assert np.mean([high - low for _, low, high in intervals]) == pytest.approx(2 * 1.959964 / np.sqrt(4000), rel=0.1)


def test_jackknife_leaves_out_every_sample_once():
    seen = []
    jackknife(lambda i: seen.append(set(i.tolist())) or dict(x=0.0), 23)
    whole, parts = set(range(23)), [set(range(23)) - left for left in seen[:-1]]
    assert seen[-1] == whole and len(parts) == 10
    assert sorted(i for part in parts for i in part) == sorted(whole)


def test_wins_are_those_counted_one_by_one():
    generator = np.random.default_rng(0)
    ours, theirs = generator.integers(4, size=100), generator.integers(4, size=100)
    counted = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours.tolist(), theirs.tolist()))
    assert wins(ours, theirs).mean() == counted / 100
    assert np.array_equal(wins(ours, theirs) + wins(theirs, ours), np.ones(100))


@pytest.mark.parametrize('call, part', [
    (lambda: bootstrap_mean([]), 'finite values'), (lambda: bootstrap_mean([1.0, np.nan]), '1 NaN'),
    (lambda: bootstrap_mean([1.0], confidence=95), 'confidence'),
    (lambda: bootstrap_mean([1.0], resamples=0), '1 or more'),
    (lambda: jackknife(lambda i: dict(x=0.0), 1), '2 samples'), (lambda: wins([1.0], [1.0, 2.0]), 'same prompts')])
def test_what_has_no_interval_is_refused(call, part):
    with pytest.raises(ValueError, match=part):
        call()
