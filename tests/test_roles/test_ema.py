"""The student's moving average against a literal float64 loop."""
import copy

import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn

from cdm_plugin.engine import StudentEMA


def make_network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)


def step(network, seed):
    """Moves every weight by something that bfloat16 can express."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.add_((0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype))


def literal_average(network, steps, max_decay):
    """Averages in float64, with the decay of each step."""
    network = copy.deepcopy(network)
    average = {name: p.detach().double().clone() for name, p in network.named_parameters()}
    for k in range(1, steps + 1):
        step(network, k)
        decay = min((1 + k) / (10 + k), max_decay)
        for name, p in network.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach().double()
    return average


def run(network, ema, steps):
    for k in range(1, steps + 1):
        step(network, k)
        ema.update()


def test_first_steps_by_hand():
    """Decays 2/11 and 3/12 after the first and the second step."""
    network = nn.Linear(1, 1, bias=False).double()
    values = iter([11.0, 0.0, 8.0])

    def set_next():
        with torch.no_grad():
            network.weight.fill_(next(values))

    set_next()
    ema = StudentEMA(network)
    for expected in (2.0, 6.5):  # 2/11 * 11 + 9/11 * 0; 3/12 * 2 + 9/12 * 8
        set_next()
        ema.update()
        assert ema.weights['weight'].item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize('max_decay', [0.999, 0.5, 0.0])
def test_equals_the_literal_loop(dtype, max_decay):
    network = make_network(dtype)
    expected = literal_average(network, 60, max_decay)
    ema = StudentEMA(network, max_decay)
    run(network, ema, 60)
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert ema.weights.keys() == expected.keys() == {'0.weight', '0.bias', '1.weight', '1.bias'}
    for name, average in ema.weights.items():
        assert average.dtype == stored
        assert torch.allclose(average.double(), expected[name], rtol=0, atol=tolerance)


def test_the_decay_reaches_its_limit_and_stays_there():
    """(1 + k) / (10 + k) passes 0.999 at k = 8990; a constant student is then approached by 0.001 a step."""
    network = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        network.weight.fill_(0.0)
    ema = StudentEMA(network)
    with torch.no_grad():
        network.weight.fill_(1.0)
    for steps, decay in ((8988, 8990 / 8999), (8989, 0.999), (10**6, 0.999)):
        ema.steps = steps
        ema.weights['weight'].zero_()
        ema.update()
        assert ema.weights['weight'].item() == pytest.approx(1 - decay, rel=1e-9)


def test_small_updates_of_a_bfloat16_student_are_not_lost():
    """In bfloat16, 1 + 0.001 * 2^-7 is 1: the average has to be kept in float32."""
    network = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        network.weight.fill_(1.0)
    ema = StudentEMA(network)
    ema.steps = 10**6
    with torch.no_grad():
        network.weight.fill_(1 + 2**-7)
    for _ in range(100):
        ema.update()
    assert ema.weights['weight'].item() == pytest.approx(1 + 2**-7 * (1 - 0.999**100), abs=2e-5)
    assert network.weight.item() == 1 + 2**-7


def test_the_average_is_a_copy():
    network = make_network()
    ema = StudentEMA(network)
    before = {name: w.clone() for name, w in ema.weights.items()}
    step(network, 1)
    assert all(torch.equal(ema.weights[name], before[name]) for name in before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_applied_puts_the_average_in_and_the_own_weights_back_to_the_bit(dtype):
    network = make_network(dtype)
    ema = StudentEMA(network)
    run(network, ema, 3)
    own = [p.clone() for p in network.parameters()]
    with ema.applied():
        for name, p in network.named_parameters():
            assert torch.equal(p, ema.weights[name].to(dtype))
        assert any(not torch.equal(p, q) for p, q in zip(network.parameters(), own))
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), own))
    with pytest.raises(KeyError):
        with ema.applied():
            raise KeyError('validation fails')
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), own))
    assert all(p.requires_grad for p in network.parameters())


def test_frozen_parameters_are_left_out_and_left_alone():
    network = make_network()
    network[0].requires_grad_(False)
    ema = StudentEMA(network)
    assert ema.weights.keys() == {'1.weight', '1.bias'}
    before = network[0].weight.clone()
    run(network, ema, 2)
    moved = network[0].weight.clone()
    assert not torch.equal(before, moved)
    with ema.applied():
        assert torch.equal(network[0].weight, moved)


def test_a_wrapped_student_has_the_names_of_the_student():
    network = make_network()
    wrapper = nn.Module()
    wrapper.module = network
    ema = StudentEMA(wrapper)
    run(network, ema, 2)
    expected = literal_average(make_network(), 2, 0.999)
    assert ema.weights.keys() == expected.keys()
    for name, average in ema.weights.items():
        assert torch.allclose(average.double(), expected[name], rtol=0, atol=1e-6)


def test_state_round_trip_continues_to_the_bit():
    network = make_network()
    ema = StudentEMA(network)
    run(network, ema, 3)
    state = copy.deepcopy(ema.state_dict())
    other_network = make_network(seed=5)
    other_network.load_state_dict(network.state_dict())
    other = StudentEMA(other_network)
    other.load_state_dict(state)
    for own, owner in ((ema, network), (other, other_network)):
        step(owner, 99)
        own.update()
    assert other.steps == ema.steps == 4
    assert all(torch.equal(other.weights[name], w) for name, w in ema.weights.items())


def test_state_survives_a_file_of_tensors_and_plain_data(tmp_path):
    network = make_network()
    ema = StudentEMA(network)
    run(network, ema, 3)
    torch.save(ema.state_dict(), tmp_path / 'ema.pth')
    state = torch.load(tmp_path / 'ema.pth', weights_only=True)
    assert state['steps'] == 3
    assert all(torch.equal(state['weights'][name], w) for name, w in ema.weights.items())


def test_reset_starts_again_from_the_student():
    network = make_network()
    ema = StudentEMA(network)
    run(network, ema, 5)
    ema.reset()
    start = copy.deepcopy(network)
    assert ema.steps == 0 and all(torch.equal(ema.weights[n], p) for n, p in network.named_parameters())
    expected = literal_average(start, 2, 0.999)
    run(network, ema, 2)
    assert all(torch.allclose(w.double(), expected[n], rtol=0, atol=1e-6) for n, w in ema.weights.items())


@pytest.mark.parametrize('layers', [(nn.Linear(4, 3),), (nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2))],
                         ids=['fewer', 'more'])
def test_another_students_state_is_refused_and_changes_nothing(layers):
    ema = StudentEMA(make_network())
    before = {name: w.clone() for name, w in ema.weights.items()}
    state = StudentEMA(nn.Sequential(*layers)).state_dict()
    with pytest.raises(ValueError, match="other parameters than the student, for example .*model.backbone"):
        ema.load_state_dict(state)
    assert ema.steps == 0 and all(torch.equal(ema.weights[name], before[name]) for name in before)


@pytest.mark.parametrize('layer', [nn.Linear(4, 1), nn.Linear(5, 3)], ids=['broadcasts', 'does not fit'])
def test_a_student_of_another_width_is_refused(layer):
    ema = StudentEMA(nn.Linear(4, 3))
    with pytest.raises(ValueError, match='model.backbone'):
        ema.load_state_dict(StudentEMA(layer).state_dict())


@pytest.mark.parametrize('decay', [1.0, -0.1, 2.0])
def test_bad_decays_are_refused_with_the_config_key(decay):
    with pytest.raises(ValueError, match=rf'StudentEMA\.max_decay must be a number in \[0, 1\), but is {decay}'):
        StudentEMA(make_network(), decay)
    with pytest.raises(ValueError, match=rf'CDMHook\.ema_decay must be a number in \[0, 1\) or None, but is {decay}'):
        HOOKS.build(dict(type='CDMHook', ema_decay=decay))
