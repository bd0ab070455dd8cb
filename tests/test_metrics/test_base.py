import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS
from scale_support import init_gloo, launch

from cdm_plugin.metrics import MissingMetric, ScoreMetric, SetMetric
from cdm_plugin.metrics.prepare import prepare_on_all_ranks


class Brightness(ScoreMetric):
    """Mean of the pixels plus the length of the prompt; counts its batches."""

    key = 'brightness'
    batches = 0

    def scores(self, images, prompts):
        self.batches += 1
        return images.flatten(1).mean(1) + torch.tensor([len(prompt) for prompt in prompts], device=images.device)


class Spread(SetMetric):
    key = 'spread'

    def features(self, images):
        return images.flatten(1)[:, :2]

    def value(self, rows, prompts, index):
        return dict(spread=(rows.amax(0) - rows.amin(0)).sum().item(), prompts=len(index.unique()))


class Absent(ScoreMetric):
    key = 'absent'

    def load(self):
        with self.needs('nobody/nothing', 'weights', 'hf download nobody/nothing judge.bin'):
            raise FileNotFoundError('gone')

    def scores(self, images, prompts):
        raise AssertionError('never called')


class Unpackaged(Absent):
    def load(self):
        with self.needs('nobody/nothing'):
            import cdm_no_such_package.part  # noqa: F401


def sample(value, index=None, size=4, **more):
    data = dict(image=torch.full((3, size, size), value), prompt='ab', **more)
    return data if index is None else dict(data, index=index)


def test_scores_and_their_mean_come_in_the_order_of_the_prompts():
    metric = Brightness(device='cpu', batch_size=2)
    # out of order, one prompt twice (a resume), one with two draws, two sizes
    order = [sample(0.5, 2), sample(-0.5, 0), sample(0.25, 1, size=6), sample(0.5, 2), sample(1.5, 1, draw=1)]
    metric.process(None, order[:3])
    metric.process(None, order[3:])
    assert metric.evaluate(4) == {'images/brightness': pytest.approx(2 + (0.5 - 0.5 + 0.25 + 1) / 4)}
    torch.testing.assert_close(metric.judged.rows, torch.tensor([1.5, 2.25, 3, 2.5]))  # 1.5 was clamped to 1
    assert metric.judged.index.tolist() == [0, 1, 1, 2] and metric.judged.draw.tolist() == [0, 0, 1, 0]
    assert metric.judged.prompts == ['ab'] * 4
    assert metric.batches == 3  # (0.5, -0.5), (0.25 of another size), (0.5, 1.5)
    assert metric.results == []


def test_without_index_the_data_set_has_its_length():
    metric = Brightness(device='cpu', prefix='student')
    metric.process(None, [sample(0.), sample(1.), sample(1.)])
    assert metric.evaluate(2) == {'student/brightness': 2.5}


def test_set_metrics_get_all_features_and_indices():
    metric = Spread(device='cpu', batch_size=1)
    metric.process(None, [sample(0., 7), sample(0.75, 3), sample(0.5, 3, draw=1)])
    assert metric.evaluate(3) == {'images/spread': 1.5, 'images/prompts': 2}


def test_what_is_missing_is_known_before_and_stops_nothing_else():
    metrics = [Brightness(device='cpu'), Absent(device='cpu'), Unpackaged(device='cpu'), Spread(device='cpu')]
    ready, missing = prepare_on_all_ranks(metrics)
    assert ready == [metrics[0], metrics[3]]
    assert missing == {
        'Absent': "Absent has no weights at 'nobody/nothing': run `hf download nobody/nothing judge.bin` where "
                  'there is a network, or set `weights` of Absent to where they lie',
        'Unpackaged': 'Unpackaged needs the package cdm_no_such_package: pip install cdm_no_such_package'}
    with pytest.raises(MissingMetric):
        metrics[1].rows([torch.zeros(3, 4, 4)], ['a'])


@pytest.mark.parametrize('images, prompts, message', [
    ([torch.zeros(2, 4, 4)], ['a'], r'shape \(3 or 1, H, W\), got \(2, 4, 4\)'),
    ([torch.zeros(3, 4, 4), torch.full((3, 4, 4), torch.nan)], ['a', 'b'], '1 of 2 images hold NaN'),
    ([torch.zeros(3, 4, 4)], [], 'got 1 images, 0 prompts'),
])
def test_what_cannot_be_judged_is_refused(images, prompts, message):
    with pytest.raises(ValueError, match=message):
        Brightness(device='cpu').rows(images, prompts)


def test_an_index_for_some_is_refused():
    metric = Brightness(device='cpu')
    metric.process(None, [sample(0.), sample(1., 1)])
    with pytest.raises(ValueError, match='1 of 2 samples have no `index`'):
        metric.evaluate(2)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match='Brightness.batch_size must be a whole number of 1 or more, but is 0'):
        Brightness(batch_size=0)


SHARES = [
    ([[4, 0, 1, 3], [2, 4]], True),  # unequal shares, one image twice
    ([[0, 2, 4], [1, 3, 9]], False),  # as MMEngine's sampler deals, the last is padding
]


def judge_shares():
    """Evaluates one rank's share of the images, for each of `SHARES`."""
    rank = init_gloo()
    METRICS.register_module(module=Brightness, force=True)
    found = []
    for shares, with_index in SHARES:
        evaluator = Evaluator([dict(type='Brightness', device='cpu', batch_size=2)])
        for i in shares[rank]:
            evaluator.process([sample(i / 10, i if with_index else None)])
        result, judged = evaluator.evaluate(5), evaluator.metrics[0].judged
        found.append((result, None if judged is None else judged.rows.tolist()))
    return found


def test_ranks_are_merged():
    for (result, rows), (other, nothing) in zip(*launch(judge_shares)):
        assert result == other == {'images/brightness': pytest.approx(2.2)}
        assert rows == pytest.approx([2, 2.1, 2.2, 2.3, 2.4]) and nothing is None
