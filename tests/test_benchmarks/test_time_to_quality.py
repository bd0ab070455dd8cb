"""Time to quality: read from the study's raw data, whose arithmetic is repeated here by hand."""
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope='module')
def quality():
    folder = str(ROOT / 'benchmarks')
    spec = importlib.util.spec_from_file_location('time_to_quality', ROOT / 'benchmarks/time_to_quality.py')
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


def result(curves, student_steps=40, forwards=2.0):
    """A row whose runs are judged after each quarter; the end has other numbers of steps too."""
    return dict(student_steps=student_steps, forwards_a_step=forwards, runs=[dict(
        curve=[dict(student_steps=student_steps * (i + 1) // 4, steps=4, fd=fd) for i, fd in enumerate(curve[:-1])],
        final=[dict(steps=1, fd=1.0), dict(steps=4, fd=curve[-1])]) for curve in curves])


def test_a_curve_is_the_mean_of_the_seeds_at_4_steps(quality):
    assert quality.curve(result([[8, 6, None, 5], [6, 4, 3, 2]])) == [(10, 7), (20, 5), (40, 3.5)]


def test_the_first_judged_point_at_the_bar_and_the_one_before(quality):
    points = [(10, 7.0), (20, 5.0), (30, 6.0), (40, 3.0)]
    assert [quality.reached([points], bar) for bar in (8, 7, 5.5, 4, 2)] == [
        (0, 10), (0, 10), (10, 20), (30, 40), None]
    assert quality.reached([[(40, 3.0)], [(10, 9.0), (30, 8.0)]], 5) == (30, 40)  # a shorter row was not there


def test_the_table_by_hand(quality, tmp_path, monkeypatch, capsys):
    rows = dict(a=result([[30, 20, 25, 26]], 40, 2.0), b=result([[21, 12, 12, 12]], 8, 3.0),
                long_b=result([[19, 11, 11, 11]], 80, 3.0), c=result([[90, 80, 70, 60]]))
    for name, row in rows.items():
        (tmp_path / f'{name}.json').write_text(json.dumps(row))
    monkeypatch.setattr(quality, 'METHODS', {'DMD2, published': ('a',), 'B': ('long_b', 'b'), 'C': ('c',)})
    monkeypatch.setattr(quality.plan, 'ROWS', dict.fromkeys(rows))
    monkeypatch.setattr(quality, 'calls_a_step', lambda row: 9.0)
    call = ['--study', str(tmp_path), '--figure', str(tmp_path / 'curves.png')]
    with pytest.raises(SystemExit, match='cpu-seconds.json is missing: --measure makes it'):
        quality.main(call)
    answers = iter([1.0, 2.0, 3.0, 2.0, 2.5, 3.0])  # round by round
    monkeypatch.setattr(quality, 'cpu_seconds', lambda row, student_steps: next(answers))
    quality.main([*call, '--measure'])
    capsys.readouterr()
    assert json.loads((tmp_path / 'cpu-seconds.json').read_text()) == {
        'DMD2, published': [1.0, 2.0], 'B': [2.0, 2.5], 'C': [3.0, 3.0]}
    quality.main(call)
    table = capsys.readouterr().out.strip()
    assert table.startswith('Bar: 20.0, `a` after 20 student steps.')
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[4:]]
    assert cells == [['DMD2, published', '2', '9.0', '1.50', '20 to 40', '1.00', '15 to 30', '20.0'],
                     # 4 steps of the short run, not 20 of the long one
                     ['B', '3', '9.0', '2.25', '6 to 12', '0.30', '4 to 9', '11.0'],
                     ['C', '2', '9.0', '3.00', 'never', '', '', '60.0']]
    assert Image.open(tmp_path / 'curves.png').size == (800, 440)


def test_cpu_seconds_are_those_of_student_steps(quality, monkeypatch):
    """By a clock that moves with every iteration: a student step is two."""
    clock = [0.0]
    forward = quality.digits_study.MODELS.get('DMD2').train_step

    def train_step(self, *args, **kwargs):
        clock[0] += 1.5
        return forward(self, *args, **kwargs)
    monkeypatch.setattr(quality.digits_study.MODELS.get('DMD2'), 'train_step', train_step)
    monkeypatch.setattr(quality.time, 'process_time', lambda: clock[0])
    row = quality.plan.Row('DMD2', {'train_dataloader.batch_size': 2})
    assert quality.cpu_seconds(row, 11) == 3.0
    assert clock[0] == 33.0


def test_every_row_that_it_reads_is_there(quality):
    names = [name for names in quality.METHODS.values() for name in names]
    assert set(names) <= quality.plan.ROWS.keys()
    assert quality.load(ROOT / 'docs/study').keys() == set(names)


def test_the_table_in_the_docs_is_of_the_results(quality):
    study = ROOT / 'docs/study'
    table = quality.table(quality.load(study), json.loads((study / 'cpu-seconds.json').read_text()))
    assert table in (ROOT / 'docs/performance.md').read_text(encoding='utf-8'), 'run benchmarks/time_to_quality.py'
