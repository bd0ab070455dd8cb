"""The bytes that benchmarks/communication.py counts are those of its formula."""
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip('deepspeed')

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import communication  # noqa: E402


def close(row, tolerance=0.01):
    return all(row['bytes'][name] == pytest.approx(value, rel=tolerance) for name, value in row['expected'].items())


def test_stage_3_gathers_a_network_for_each_call_and_each_pass():
    fake_step, student_step = communication.measure('DMD2', 3, True, iterations=5)[3:]
    assert not fake_step['student_step'] and student_step['student_step']
    assert close(fake_step) and close(student_step)
    # By hand: of the student's calls 1 to 4, one has a gradient in a student step; teacher and fake score are asked once.
    weights, aware = 580_848, 20_736
    assert fake_step['expected']['reduce-scatter'] == pytest.approx(4 * (weights + aware), rel=0.02)
    assert student_step['bytes']['all-gather'] > 4 * weights * (3 + 3 + 1 + 1)


def test_recorded_counts_are_the_formulas():
    results = json.loads((ROOT / 'docs/communication.json').read_text())
    assert {(r['method'], r['stage'], r['checkpointing']) for r in results} == set(communication.CASES)
    assert all(close(row) for result in results for row in result['iterations'])


def test_the_formula_by_hand():
    weights, calls = dict(student=10, fake=12, teacher=10), {('student', False): 5, ('fake', True): 1}
    updates = dict(fake=1, student=0)
    assert communication.expected_bytes(0, False, weights, calls, updates, 1) == {'all-reduce': 4 * 12}
    assert communication.expected_bytes(2, False, weights, calls, updates, 1) == {
        'all-reduce': 4 * 12, 'all-gather': 4 * (12 + 12)}
    assert communication.expected_bytes(3, True, weights, calls, updates, 1) == {
        'all-gather': 4 * (5 * 10 + 3 * 12), 'reduce-scatter': 4 * 12}
