"""Settings of the config in the state of a resumed run: against closed forms, with MMEngine's own schedules."""
import copy
import math

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler import CosineAnnealingLR, LinearLR, MultiStepLR

from cdm_plugin.engine import settings
from cdm_plugin.engine.settings import settle

STOP = 5


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(settings, 'print_log', lambda text, logger, level: lines.append(text))
    return lines


def cosine(end, warmup=3):
    return lambda wrapper: [LinearLR(wrapper, 0.1, by_epoch=False, begin=0, end=warmup),
                            CosineAnnealingLR(wrapper, eta_min=0, by_epoch=False, begin=warmup, end=end)]


def expected(lr, iteration, end, warmup=3):
    """What the two are by definition."""
    if iteration < warmup:
        return lr * (0.1 + 0.9 * iteration / (warmup - 1))  # MMEngine's `end` is the first one without
    return lr * (1 + math.cos(math.pi * (iteration - warmup) / (end - warmup))) / 2


class Run:
    """One role's optimizer and schedules, as a config would build them."""

    def __init__(self, build=None, sizes=(1, 1), type=torch.optim.AdamW, **settings):
        groups = [dict(params=[torch.zeros(2, requires_grad=True) for _ in range(n)]) for n in sizes]
        self.wrapper = OptimWrapper(type(groups, **settings))
        self.schedules = [] if build is None else build(self.wrapper)

    def train(self, iterations):
        """The learning rate of each."""
        rates = []
        for _ in range(iterations):
            rates.append(self.group['lr'])
            self.wrapper.optimizer.step()
            for schedule in self.schedules:
                schedule.step()
        return rates

    @property
    def group(self):
        return self.wrapper.optimizer.param_groups[0]

    def resume(self, earlier, iterations=STOP):
        """Takes over the state of an earlier run, as MMEngine's Runner does."""
        optimizer = copy.deepcopy(earlier.wrapper.state_dict())
        saved = [copy.deepcopy(s.state_dict()) for s in earlier.schedules]
        states = settle(dict(student=self.wrapper), dict(student=self.schedules), dict(student=optimizer),
                        dict(student=saved), iterations, 0, 100)
        self.wrapper.load_state_dict(optimizer)
        for schedule, state in zip(self.schedules, states['student']):
            schedule.load_state_dict(state)
        return self


@pytest.mark.parametrize('lr, end', [(1e-3, 10), (1e-3, 40), (2e-4, 40)])
def test_a_changed_learning_rate_or_schedule_holds_from_its_beginning(lr, end, said):
    earlier = Run(cosine(10), lr=2e-4)
    assert earlier.train(STOP) == pytest.approx([expected(2e-4, i, 10) for i in range(STOP)])
    resumed = Run(cosine(end), lr=lr).resume(earlier)
    assert resumed.train(4) == pytest.approx([expected(lr, STOP + i, end) for i in range(4)])
    assert resumed.group['initial_lr'] == lr
    text = '\n'.join(said)
    key = 'optim_wrapper.student.optimizer.lr'
    assert (f'{key} is {lr:.4g} from now on, as the config says (until now 0.0002)' in text) == (lr != 2e-4)
    end_said = 'param_scheduler.student[1].end is 40 from now on, as the config says (until now 10)'
    assert (end_said in text) == (end != 10)
    assert f'{key} goes on with {expected(lr, STOP, end):.4g}' in text
    assert len(said) == len(set(said))


def test_what_has_not_changed_goes_on_to_the_bit_and_in_silence(said):
    earlier = Run(cosine(10), lr=2e-4, betas=(0.5, 0.9))
    whole = Run(cosine(10), lr=2e-4, betas=(0.5, 0.9))
    earlier.train(STOP)
    assert Run(cosine(10), lr=2e-4, betas=(0.5, 0.9)).resume(earlier).train(4) == whole.train(STOP + 4)[STOP:]
    assert not said


def test_other_schedules_or_none(said):
    earlier = Run(cosine(10), lr=2e-4)
    earlier.train(STOP)
    constant = Run(lr=2e-4).resume(earlier)
    assert constant.train(2) == [2e-4, 2e-4] and 'the number of schedules is 0 from now on' in said[0]
    steps = Run(lambda w: [MultiStepLR(w, [3, 6], 0.1, by_epoch=False)], lr=2e-4).resume(constant)
    assert steps.train(3) == pytest.approx([2e-5, 2e-6, 2e-6])
    other = Run(lambda w: [MultiStepLR(w, [3, 6], 0.1, by_epoch=False), cosine(10)(w)[0]], lr=2e-4)
    said.clear()
    other.resume(earlier)
    assert 'param_scheduler.student[0] is another schedule from now on, as the config says: MultiStepLR' in said


def test_settings_of_the_optimizer(said):
    earlier = Run(cosine(10), lr=2e-4, weight_decay=0.1)
    earlier.train(STOP)
    rate = earlier.group['lr']
    resumed = Run(cosine(10), lr=2e-4, weight_decay=0.5, betas=(0.1, 0.2)).resume(earlier)
    assert (resumed.group['weight_decay'], resumed.group['betas'], resumed.group['lr']) == (0.5, (0.1, 0.2), rate)
    assert said == ['optim_wrapper.student.optimizer.betas is (0.1, 0.2) from now on, as the config says (until now '
                    '(0.9, 0.999))',
                    'optim_wrapper.student.optimizer.weight_decay is 0.5 from now on, as the config says (until now '
                    '0.1)']


@pytest.mark.parametrize('changes, text', [
    (dict(sizes=(2,)), r'optimizer: the checkpoint has 2 parameter groups of \[1, 1\] weights, the config makes 1 of '
                       r'\[2\]: resume with the paramwise_cfg'),
    (dict(sizes=(1, 2)), r'the config makes 2 of \[1, 2\]'),
    (dict(type=torch.optim.SGD), r'optimizer\.type is SGD, with .*momentum.*, but the checkpoint .* with .*betas')],
    ids=['groups', 'weights', 'type'])
def test_another_optimizer_is_refused(changes, text):
    with pytest.raises(ValueError, match=rf'optim_wrapper\.student\..*{text}'):
        Run(lr=0.1, **changes).resume(Run(lr=0.1))
