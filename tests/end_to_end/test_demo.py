"""A short form of `cdm demo`; the figures of the full form are in the README."""
import contextlib
import io
import json
import re

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image

from cdm_plugin.commands.demo.distil import distil_and_judge
from cdm_plugin.draws import stream
from cdm_plugin.inference import load_method
from cdm_plugin.sheets import to_pixels


def demo(tmp_path_factory, iterations, num_samples):
    """The folder and the table of a demo."""
    work_dir = tmp_path_factory.mktemp('demo')
    options = {'train_cfg.max_iters': iterations, 'train_cfg.val_interval': iterations // 2,
               **{f'param_scheduler.{role}.1.end': iterations for role in ('student', 'fake')}}
    threads, out, err = torch.get_num_threads(), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.delenv('OMP_NUM_THREADS', raising=False)
        patch.setattr('os.cpu_count', lambda: 4)  # more threads than free cores wait for each other
        results = distil_and_judge(str(work_dir), options, num_samples=num_samples)
        assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    (work_dir / 'out.txt').write_text(out.getvalue())
    (work_dir / 'err.txt').write_text(err.getvalue())
    rows = {(row['model'], row['steps']): row for row in json.loads(results.read_text())['rows']}
    return work_dir, rows


ITERATIONS = dict(brief=12, short=60)


@pytest.fixture(scope='module')
def brief(tmp_path_factory):
    return demo(tmp_path_factory, ITERATIONS['brief'], 20)


@pytest.fixture(scope='module')
def short(tmp_path_factory):
    return demo(tmp_path_factory, ITERATIONS['short'], 250)


FORMS = pytest.mark.parametrize('form', ['brief', pytest.param('short', marks=pytest.mark.slow)])


@FORMS
def test_results_hold_the_table(form, request):
    _, rows = request.getfixturevalue(form)
    assert {('teacher', n) for n in (1, 2, 4, 50)} | {('student', n) for n in (1, 2, 4)} <= rows.keys()
    for (model, steps), row in rows.items():
        assert row.keys() == {'model', 'steps', 'calls', 'fd', 'accuracy', 'ms_per_image'}
        assert row['calls'] == steps * (2 if model == 'teacher' else 1)
        assert row['ms_per_image'] > 0


@pytest.mark.slow
def test_the_shipped_teacher_is_a_good_one(short):
    _, rows = short
    assert rows['teacher', 50]['accuracy'] >= 0.98
    assert rows['teacher', 50]['fd'] < rows['teacher', 4]['fd'] < rows['teacher', 1]['fd']


@pytest.mark.slow
def test_sixty_student_steps_already_beat_the_teacher_at_one_and_two_steps(short):
    _, rows = short
    assert rows['student', 1]['fd'] <= 0.5 * rows['teacher', 1]['fd']
    assert rows['student', 2]['fd'] <= 0.7 * rows['teacher', 2]['fd']
    assert rows['student', 4]['accuracy'] >= 0.97


@FORMS
def test_the_demo_leaves_its_work_behind(form, request):
    work_dir, _ = request.getfixturevalue(form)
    assert (work_dir / 'samples.png').stat().st_size > 1000
    assert list(work_dir.rglob('events.out.tfevents.*'))
    assert (work_dir / f'iter_{ITERATIONS[form]}.pth').is_file()
    network = SD3Transformer2DModel.from_pretrained(work_dir / 'student', subfolder='transformer')
    assert sum(p.numel() for p in network.parameters()) == 581_328


def test_the_exported_student_has_a_card_whose_pictures_it_draws(brief):
    student = brief[0] / 'student'
    card = (student / 'README.md').read_text()
    for part in ('distilled to make images in 4 steps', "load_method('.')", '| iterations | 12 |', '## Config',
                 '![9](samples/0009.png)'):
        assert part in card
    method = load_method(str(student), device='cpu')
    noise = torch.randn(method.latent_shape(10), generator=stream(0, 'sample'))
    again = to_pixels(method.sample(method.backbone.conditioner.encode([0]), noise[:1]))[0]
    assert np.abs(again.astype(int) - np.asarray(Image.open(student / 'samples/0000.png').convert('RGB'))).max() <= 1


def test_the_console_has_a_bar_with_the_distance_the_table_and_what_comes_next(brief):
    bars, text = ((brief[0] / name).read_text() for name in ('err.txt', 'out.txt'))
    distances = [float(number) for number in re.findall(r'distance of 200 digits ([\d.]+) at \d+', bars)]
    assert len(set(distances)) == 2 and max(distances) < brief[1]['student', 4]['fd']  # of 20
    lines = text.strip().splitlines()
    assert len(lines) < 25 and lines[0].startswith('Guidance scale') and 'fewer' in lines[0] + lines[1]
    for command in ('cdm sample', 'cdm compare', 'cdm init'):
        assert any(command in line for line in lines[-5:])
    assert 'mmengine' not in text and 'System environment' in (brief[0] / 'log.txt').read_text()


def test_the_picture_has_the_teacher_at_few_steps_too(brief):
    height, width, _ = np.asarray(Image.open(brief[0] / 'samples.png')).shape
    assert height == 7 * 82 and width > 16 * 82
