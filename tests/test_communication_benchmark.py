"""The bytes that benchmarks/communication.py counts are those of its formula."""
import json
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / 'benchmarks'))

import communication  # noqa: E402
from scale_support import launch  # noqa: E402


def close(row, tolerance=0.01):
    return all(row['bytes'][name] == pytest.approx(value, rel=tolerance) for name, value in row['expected'].items())


def train(folder):
    """One of the benchmark's processes."""
    communication.train(int(os.environ['RANK']), int(os.environ['MASTER_PORT']), 'DMD2', 3, False, 2, folder)


@pytest.mark.slow
def test_stage_3_gathers_a_network_for_each_call_and_each_pass(tmp_path):
    launch(train, str(tmp_path))
    fake_step, student_step = json.loads((tmp_path / 'rows.json').read_text())
    assert not fake_step['student_step'] and student_step['student_step']
    assert close(fake_step, 0.002) and close(student_step, 0.002)
    # By hand: a student step has one call of the student with gradient; teacher and fake score are asked once each.
    weights, aware = 581_328, 20_608
    assert fake_step['expected']['reduce-scatter'] == 4 * (weights + aware)
    assert student_step['bytes']['all-gather'] > 4 * weights * (2 + 2 + 1 + 1)


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
