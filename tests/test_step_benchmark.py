"""benchmarks/step.py: both of its loops train alike, and make the calls that the draws say. Never its times."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tests_support import TINY_SD3

BATCH, CYCLES, SEED = 3, 2, 4
SMALL = dict(network=dict(TINY_SD3), tokens=3, batch=BATCH, cycles=CYCLES, dtype='float64', device='cpu')


@pytest.fixture(scope='module')
def step():
    path = Path(__file__).parents[1] / 'benchmarks' / 'step.py'
    spec = importlib.util.spec_from_file_location('step_benchmark', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def draws(step):
    """Of each measured cycle (cycle 0 warms up): grid lengths, steps down to the last anchor, and anchors, summed."""
    method, _ = step.build(SMALL['network'], 3, BATCH, seed=SEED, dtype='float64', checkpointing=False, device='cpu')
    cycles = []
    for cycle in range(1, 1 + CYCLES):
        iterations = []
        for method.iteration in (2 * cycle, 2 * cycle + 1):
            drawn = method.sample_draws(BATCH)
            iterations.append((len(drawn.sigmas), int(drawn.anchor.max()), int(drawn.anchor.sum())))
        cycles.append([sum(values) for values in zip(*iterations)])
    return cycles


@pytest.mark.parametrize('checkpointing', [False, True], ids=['plain', 'checkpointing'])
def test_both_loops_train_alike_with_the_calls_that_the_draws_say(step, draws, checkpointing):
    result = step.compare(**SMALL, seed=SEED, checkpointing=checkpointing)
    assert result['weights']['difference'] < 1e-10
    assert result['weights']['moved'] > 1e-5
    for (levels, deepest, moved), literal, optimised in zip(draws, *result['rows'].values()):
        # A rollout of every sample through the whole grid, twice; a student call a loss; a call a question.
        calls = {('student', False): levels, ('student', True): 3, ('fake', True): 2, ('teacher', False): 4,
                 ('fake', False): 2}
        assert literal['calls'] == calls
        assert literal['samples'] == {key: n * BATCH for key, n in calls.items()}
        # Down to the last anchor, and once more at the anchors where no gradient is wanted; the losses on the
        # trajectory share a student call, and all questions of one role a call.
        assert optimised['calls'] == {
            ('student', False): deepest + 1, ('student', True): 2, ('fake', True): 2, ('teacher', False): 1,
            ('fake', False): 1}
        assert optimised['samples'] == {
            ('student', False): moved + BATCH, ('student', True): 2 * BATCH, ('fake', True): 2 * BATCH,
            ('teacher', False): 4 * BATCH, ('fake', False): 2 * BATCH}
    # With gradient: 2 + 3 calls in the literal loop, 2 + 2 in the optimised one.
    with_gradient = 4 if checkpointing else 3
    levels, _, moved = map(sum, zip(*draws))
    assert result['forward_equivalents'] == pytest.approx(dict(
        literal=levels / CYCLES + 6 + 5 * with_gradient,
        optimised=moved / (BATCH * CYCLES) + 1 + 6 + 4 * with_gradient))


def test_the_literal_loop_may_train_the_methods_own_weights(step):
    """As on a GPU where two sets do not fit."""
    result = step.compare(**SMALL, seed=SEED, shared=True)
    assert result['weights'] is None
    assert [set(rows[0]['calls']) for rows in result['rows'].values()] == [{
        ('student', False), ('student', True), ('fake', True), ('fake', False), ('teacher', False)}] * 2


def test_autocast_reaches_both_loops(step):
    """bfloat16 has 8 bits: the loops agree as far as AdamW's steps of one learning rate allow."""
    result = step.compare(**{**SMALL, 'dtype': 'bfloat16', 'cycles': 1})
    assert 0 < result['weights']['difference'] < 0.1 * result['weights']['moved']


def test_command_line(step, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(step.CONFIGS, 'tiny', SMALL)
    out = tmp_path / 'new' / 'step.json'
    step.main(['--cycles', '1', '--seed', str(SEED), '--json', str(out)])
    result = json.loads(out.read_text())
    assert result['cycles'] == 1 and result['seed'] == SEED and len(result['rows']['literal']) == 1
    assert result['rows']['optimised'][0]['calls']['teacher, no gradient'] == 1
    assert result['ratio']['low'] <= result['ratio']['median'] <= result['ratio']['high']
    printed = capsys.readouterr().out
    assert 'literal / optimised' in printed and 'teacher, no gradient' in printed


def test_recipes_make_the_calls_that_they_say(step, monkeypatch, capsys):
    """By hand, of a cycle on the fixed grid: the rollout to the anchors, two fake-score steps, what the student
    predicts, and the questions; a gradient counts as 3."""
    demo, dmd2 = 'CDM, consistent, fixed grid, one rollout (the demo)', 'DMD2, aware, one rollout'
    monkeypatch.setattr(step, 'RECIPES', {'CDM, published': {}, **{name: step.RECIPES[name] for name in (demo, dmd2)}})
    table = {row['recipe']: row for row in step.compare_recipes(**SMALL, seed=SEED)}
    step.report_recipes(list(table.values()))
    assert list(table) == ['the literal loop', 'CDM, published', demo, dmd2] and demo in capsys.readouterr().out
    assert table['the literal loop']['share']['median'] == 1
    method, _ = step.build(SMALL['network'], 3, BATCH, seed=SEED, dtype='float64', checkpointing=False, device='cpu',
                           **step.RECIPES[demo])
    anchors = []
    for method.iteration in (1, 2):
        anchors.append(method.sample_draws(BATCH).anchor.double())
    rollout, deepest = torch.stack(anchors).mean().item(), torch.stack(anchors).amax(1).mean().item()
    expected = {demo: (rollout + 2 * 3 + 2 * 3 + 5 + 2, deepest + 2 + 2 + 2),
                dmd2: (rollout + 2 * 3 + 3 + 2 + 1, deepest + 2 + 1 + 2)}
    for name, (forwards, calls) in expected.items():
        assert (table[name]['forward_equivalents'], table[name]['calls']) == pytest.approx((forwards, calls)), name


def test_recipes_of_the_full_size_are_refused(step, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'none')
    with pytest.raises(SystemExit):
        step.main(['--config', 'sd3-medium', '--recipes'])
    assert 'too many of the size of --config sd3-medium' in capsys.readouterr().err


def test_the_full_size_needs_a_gpu(step, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        step.main(['--config', 'sd3-medium'])
    assert 'needs a GPU' in capsys.readouterr().err


def test_sweep_measures_each_setting_and_names_what_does_not_run(step, monkeypatch, capsys):
    def failing(method):
        raise RuntimeError('no compiler here\nand a long story')

    monkeypatch.setattr(step, 'compile_blocks', failing)
    table = step.sweep(**{**SMALL, 'dtype': 'float32', 'cycles': 1})
    assert [row['setting'].split('=')[0] for row in table] == [
        'model.activation_checkpointing', 'optim_wrapper.*.type', 'optim_wrapper.*.optimizer.fused',
        'torch.compile of the repeated blocks']
    assert all('ratio' in row for row in table[:3])
    assert table[3]['failed'] == 'RuntimeError: no compiler here'
    step.report_sweep(table)
    assert 'does not run here: RuntimeError: no compiler here' in capsys.readouterr().out


@pytest.mark.parametrize('checkpointing', [False, True])
def test_sweep_flips_and_restores_checkpointing(step, checkpointing):
    method, _ = step.build(SMALL['network'], 3, 1, seed=0, dtype='float32', checkpointing=checkpointing, device='cpu')
    with step.checkpointing_set(method, not checkpointing):
        assert method.student.is_gradient_checkpointing is method.fake.is_gradient_checkpointing is not checkpointing
    assert method.student.is_gradient_checkpointing is method.fake.is_gradient_checkpointing is checkpointing
