"""A short form of `cdm demo`; the figures of the full form are in the README."""
import json

import pytest
from diffusers import SD3Transformer2DModel

from cdm_plugin.demo import run


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('demo')
    options = {'train_cfg.max_iters': 60, 'param_scheduler.student.1.end': 60, 'param_scheduler.fake.1.end': 60}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('OMP_NUM_THREADS', '1')  # more threads than free cores wait for each other
        results = run(str(work_dir), options, num_samples=250)
    rows = {(row['model'], row['steps']): row for row in json.loads(results.read_text())['rows']}
    return work_dir, rows


def test_results_hold_the_table(demo):
    _, rows = demo
    assert {('teacher', n) for n in (1, 2, 4, 50)} | {('student', n) for n in (1, 2, 4)} <= rows.keys()
    for (model, steps), row in rows.items():
        assert row.keys() == {'model', 'steps', 'calls', 'fd', 'accuracy', 'ms_per_image'}
        assert row['calls'] == steps * (2 if model == 'teacher' else 1)
        assert row['ms_per_image'] > 0


def test_the_shipped_teacher_is_a_good_one(demo):
    _, rows = demo
    assert rows['teacher', 50]['accuracy'] >= 0.98
    assert rows['teacher', 50]['fd'] < rows['teacher', 4]['fd'] < rows['teacher', 1]['fd']


def test_sixty_student_steps_already_beat_the_teacher_at_one_and_two_steps(demo):
    _, rows = demo
    assert rows['student', 1]['fd'] <= 0.5 * rows['teacher', 1]['fd']
    assert rows['student', 2]['fd'] <= 0.7 * rows['teacher', 2]['fd']
    assert rows['student', 4]['accuracy'] >= 0.97


def test_the_demo_leaves_its_work_behind(demo):
    work_dir, _ = demo
    assert (work_dir / 'samples.png').stat().st_size > 1000
    assert list(work_dir.rglob('events.out.tfevents.*'))
    assert (work_dir / 'iter_60.pth').is_file()
    network = SD3Transformer2DModel.from_pretrained(work_dir / 'student', subfolder='transformer')
    assert sum(p.numel() for p in network.parameters()) == 581_328
