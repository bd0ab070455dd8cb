"""`cdm evaluate` on the digits teacher and on a tiny text-to-image pipeline."""
import csv
import itertools
import json
import shutil

import evaluation_support  # noqa: F401  registers the metrics
import numpy as np
import pytest
import torch
from PIL import Image
from recipes import CDM, TEACHER
from tiny_pipelines import save_tiny_sd3

from cdm_plugin.assets import resolve
from cdm_plugin.cli import main
from cdm_plugin.commands.evaluate import generate
from cdm_plugin.commands.evaluate.entries import parse_entries
from cdm_plugin.draws import stream
from cdm_plugin.inference import load_method
from cdm_plugin.metrics import DigitClassifier, class_accuracy, classifier_features, frechet_distance
from cdm_plugin.metrics.bootstrap import bootstrap_mean
from cdm_plugin.sheets import to_pixels

COUNT = 24
REFERENCE = 'asset:digits/teacher_features.npz'
NAMES = ['teacher', 'cdm-1step', 'cdm-2step']


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """Labels, and metrics with arguments."""
    root = tmp_path_factory.mktemp('files')
    (root / 'labels.txt').write_text('\n'.join(str(i % 10) for i in range(COUNT)))
    (root / 'metrics.py').write_text(f"metrics = [dict(type='DigitMetric', reference={REFERENCE!r})]\n")
    return root


def command(files, out, *changes):
    """The call that the tests compare with, or one with other models and options."""
    models = [f'cdm={CDM}', '--teacher', '--teacher-steps', '2', '--steps', '1', '2', '--batch-size', '5']
    return ['evaluate', *(changes or models), '--prompts', str(files / 'labels.txt'), '--out', str(out), '--metrics',
            str(files / 'metrics.py'), 'InkMetric', 'AbsentMetric', 'PairsMetric']


@pytest.fixture(scope='module')
def out(files, tmp_path_factory):
    """The folder of an evaluation that nothing has disturbed."""
    folder = tmp_path_factory.mktemp('evaluation') / 'out'
    assert main(command(files, folder)) == 0
    return folder


def pictures(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob('images/*/*.png'))}


def read(folder, name):
    """A model's pictures, (N, 1, 16, 16) in [-1, 1]."""
    pixels = np.stack([np.asarray(Image.open(p)) for p in sorted((folder / 'images' / name).glob('*.png'))])
    return torch.from_numpy(pixels).float()[:, None] / 127.5 - 1


def results(folder):
    return json.loads((folder / 'results.json').read_text())


def test_images_are_those_of_the_models_on_the_same_noise(out):
    method = load_method(CDM, device='cpu', roles=('student', 'teacher'))
    noise = torch.cat([torch.randn(method.latent_shape(1), generator=stream(0, 'sample', i)) for i in range(COUNT)])
    condition = method.backbone.condition(dict(prompt=torch.arange(COUNT) % 10))
    settings = dict(zip(NAMES, [([1, 0.5], 'teacher', 2), ([1], 'student', 1), ([1, 0.5], 'student', 1)]))
    for name, (sigmas, role, guidance) in settings.items():
        images = method.sample(condition, noise, torch.tensor(sigmas, dtype=torch.float64), role, guidance)
        drawn = ((read(out, name)[:, 0] + 1) * 127.5).round()
        # A whole batch rounds otherwise than batches of five.
        assert (drawn - torch.from_numpy(to_pixels(images)[..., 0]).float()).abs().max() <= 1
    models = {model['name']: model for model in results(out)['models']}
    assert list(models) == NAMES
    assert [[models[n][key] for key in ('steps', 'guidance_scale', 'calls')] for n in NAMES] == [
        [2, 2, 4], [1, 1, 1], [2, 1, 2]]


def test_scores_are_those_of_the_pictures_on_the_disk(out):
    classifier = DigitClassifier.from_pretrained()
    with np.load(resolve(REFERENCE)) as file:
        reference = file['features']
    for model in results(out)['models']:
        images, metrics = read(out, model['name']), model['metrics']
        assert set(metrics) == {'digits/accuracy', 'digits/fd', 'images/ink'}
        ink = images.flatten(1).mean(1).double()
        assert metrics['images/ink']['value'] == pytest.approx(float(ink.mean()), abs=1e-6)
        error = 1.96 * float(ink.std()) / COUNT ** 0.5
        assert metrics['images/ink']['low'] == pytest.approx(float(ink.mean()) - error, abs=0.2 * error)
        accuracy = class_accuracy(images, [i % 10 for i in range(COUNT)], classifier)
        assert metrics['digits/accuracy']['value'] == pytest.approx(accuracy)
        fd = frechet_distance(classifier_features(images, classifier), reference)
        assert metrics['digits/fd']['value'] == pytest.approx(fd, rel=1e-5)
        assert metrics['digits/fd']['low'] < fd < metrics['digits/fd']['high']


def test_win_rates_are_counted_over_the_prompts(out):
    with open(out / 'scores.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    scores = {name: [float(r['images/ink']) for r in rows if r['model'] == name] for name in NAMES}
    assert [(r['index'], r['draw'], r['prompt']) for r in rows[:COUNT]] == [
        (str(i), '0', str(i % 10)) for i in range(COUNT)]
    for name in NAMES:
        assert scores[name] == pytest.approx(read(out, name).flatten(1).mean(1).tolist(), abs=1e-6)
    wins = {(win['model'], win['over']): win['rate'] for win in results(out)['wins']}
    assert set(wins) == set(itertools.permutations(NAMES, 2))
    for (a, b), rate in wins.items():
        pairs = list(zip(scores[a], scores[b]))
        assert rate['value'] == pytest.approx(sum(1 if x > y else 0.5 if x == y else 0 for x, y in pairs) / COUNT)
        assert 0 <= rate['low'] <= rate['value'] <= rate['high'] <= 1
        assert rate['low'] == pytest.approx(1 - wins[b, a]['high'])


def test_the_page_has_the_table_and_what_is_missing(out, capsys):
    page, metrics = (out / 'results.md').read_text(), results(out)
    assert metrics['missing'] == {'AbsentMetric': 'AbsentMetric has no weights: run `hf download absent/weights`',
                                  'PairsMetric': 'cdm-2step: PairsMetric needs two images a prompt'}
    assert 'AbsentMetric has no value: AbsentMetric has no weights' in page
    assert '| model | steps | network calls | images | digits/accuracy | digits/fd | images/ink |' in page
    (line,) = [line for line in page.splitlines() if line.startswith('| cdm-2step | 2 | 2 |')]
    (model,) = [model for model in metrics['models'] if model['name'] == 'cdm-2step']
    fd = model['metrics']['digits/fd']
    assert f'| {fd["value"]:.4g} [{fd["low"]:.4g}, {fd["high"]:.4g}] |' in line
    with Image.open(out / 'grid.png') as sheet:
        assert sheet.height == 3 * 50 and sheet.width > 10 * 50


def test_a_stopped_evaluation_goes_on_to_the_same_bits(out, files, tmp_path, monkeypatch):
    """Stopped in the middle of a batch; then only what is missing is made."""
    written, save = [], generate.save_png

    def stopping(pixels, path):
        if len(written) == COUNT + 7:
            raise KeyboardInterrupt
        written.append(path.relative_to(tmp_path))
        return save(pixels, path)

    monkeypatch.setattr(generate, 'save_png', stopping)
    with pytest.raises(KeyboardInterrupt):
        main(command(files, tmp_path))
    assert len(pictures(tmp_path)) == COUNT + 7 and not (tmp_path / 'results.json').exists()
    first, written[:] = list(written), []
    monkeypatch.setattr(generate, 'save_png', lambda pixels, path: written.append(
        path.relative_to(tmp_path)) or save(pixels, path))
    assert main(command(files, tmp_path)) == 0
    assert len(written) == 2 * COUNT - 7 and not set(first) & set(written)
    assert pictures(tmp_path) == pictures(out)
    assert (tmp_path / 'results.json').read_text() == (out / 'results.json').read_text()
    monkeypatch.setattr(generate, 'load_method', None)  # nothing is left to make
    assert main(command(files, tmp_path)) == 0


def test_order_and_company_change_no_image(out, files, tmp_path):
    models = [f'other={TEACHER}', f'cdm-2step={CDM}']
    assert main(command(files, tmp_path, *models, '--steps', '2', '--batch-size', '5')) == 0
    whole, part = pictures(out), pictures(tmp_path)
    assert len(part) == 2 * COUNT
    own = {name for name in part if 'cdm-2step' in name}
    assert len(own) == COUNT and all(part[name] == whole[name] for name in own)
    assert not any(part[name] == part[name.replace('cdm-2step', 'other')] for name in own)


def test_the_batch_size_changes_rounding_at_most(out, files, tmp_path):
    assert main(command(files, tmp_path, f'cdm-2step={CDM}', '--steps', '2', '--batch-size', '24')) == 0
    difference = (read(tmp_path, 'cdm-2step') - read(out, 'cdm-2step')).abs() * 127.5
    assert difference.max() < 1.01 and (difference > 0.01).float().mean() < 0.01


def test_several_images_a_prompt_are_averaged_before_the_interval(out, files, tmp_path):
    """Intervals are over prompts: of the means of three images each; the set's values know which belong together."""
    assert main(command(files, tmp_path, f'cdm-1step={CDM}', '--steps', '1', '--num', '3', '--batch-size', '72')) == 0
    ink = read(tmp_path, 'cdm-1step').flatten(1).mean(1).reshape(COUNT, 3).double().mean(1).numpy()
    (model,) = results(tmp_path)['models']
    assert model['metrics']['images/ink'] == pytest.approx(bootstrap_mean(ink)._asdict(), abs=1e-6)
    images, classifier = read(tmp_path, 'cdm-1step'), DigitClassifier.from_pretrained()
    accuracy = class_accuracy(images, [i // 3 % 10 for i in range(3 * COUNT)], classifier)
    assert model['metrics']['digits/accuracy']['value'] == pytest.approx(accuracy)
    assert model['metrics']['images/pairs']['value'] == COUNT
    with open(tmp_path / 'scores.csv', newline='') as file:
        assert [(r['index'], r['draw']) for r in csv.DictReader(file)][2:5] == [('0', '2'), ('1', '0'), ('1', '1')]


@pytest.mark.parametrize('changes, part', [
    ((f'cdm-2step={CDM}', '--steps', '2', '--num', '2'), 'were made with num 1, not 2'),
    ((f'cdm-2step={CDM}', '--steps', '4'), "'cdm-2step' in {out!r} were made with steps 2, not 4"),
    ((f'cdm-2step={CDM}', '--steps', '2', '--seed', '1'), 'were made with seed 0, not 1'),
    ((f'cdm-2step={CDM}', '--steps', '2', '--height', '32'), 'image_size None, not [32, 32]'),
    ((f'cdm-2step={CDM}', '--steps', '2', '--cfg-options', 'model.alpha=3'), 'another config'),
    (('cdm-2step=asset:digits/teacher', '--steps', '2'), 'another config'),
    ((f'cdm-2step={CDM}@{{weights}}', '--steps', '2'), 'other weights')])
def test_a_folder_of_other_images_is_refused(out, files, tmp_path, changes, part, capsys):
    (tmp_path / 'weights.pth').write_bytes(b'weights')
    before = pictures(out)
    changes = [text.format(weights=tmp_path / 'weights.pth') for text in changes]
    assert main(command(files, out, *changes)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert part.format(out=str(out)) in error and '--out' in error
    assert pictures(out) == before


@pytest.mark.parametrize('changes, part', [
    (['--metrics', 'InkMetrik'], "'InkMetrik' is not registered; did you mean 'InkMetric'?"),
    (['--metrics', 'InkMetric', 'InkMetric'], 'another `prefix`'),
    (['--metrics', 'AbsentMetric'], 'no metric can run. AbsentMetric: AbsentMetric has no weights'),
    (['--prompts', 'no.txt'], 'no.txt does not exist'), (['--prompts', '{empty}'], 'holds no prompts'),
    (['--prompts', 'a red fox'], '.txt file'), (['--steps', '2', '2'], 'different numbers'),
    (['models', 'no.py'], 'no shipped recipe'), (['models', f'x={CDM}@runs/none'], 'runs/none'),
    (['models', CDM, CDM], 'two models have the name'),
    (['models', f'a/b={CDM}'], 'is no file and no shipped recipe'), (['models', f'a b={CDM}'], 'use letters, digits'),
    (['models', 'asset:digits/teacher', '--teacher'], '--teacher needs the config'),
    (['models', TEACHER, '--teacher'], '--teacher needs the config'),
    (['models', 'asset:digits/teacher@x.pth'], 'has its weights')])
def test_mistakes_are_one_line_before_any_image(changes, part, files, tmp_path, capsys):
    (files / 'empty.txt').write_text('\n')
    option, *values = [text.format(empty=files / 'empty.txt') for text in changes]
    arguments = {'models': [CDM], '--prompts': [str(files / 'labels.txt')], '--metrics': ['InkMetric'],
                 '--steps': ['1'], '--out': [str(tmp_path / 'out')]}
    arguments[option] = values
    models = arguments.pop('models')
    assert main(['evaluate', *models, *(t for key, own in arguments.items() for t in (key, *own))]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert part in error
    assert not (tmp_path / 'out').exists()


def test_zero_steps_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(['evaluate', CDM, '--prompts', 'x.txt', '--out', 'x', '--steps', '0'])
    assert 'must be 1 or more' in capsys.readouterr().err


def test_a_diverged_model_is_named(files, tmp_path, capsys):
    shutil.copytree(resolve('asset:digits/teacher'), tmp_path / 'broken')
    method = load_method(str(tmp_path / 'broken'), device='cpu')
    with torch.no_grad():
        next(method.student.parameters()).fill_(float('nan'))
    method.student.save_pretrained(tmp_path / 'broken/transformer')
    assert main(command(files, tmp_path / 'out', str(tmp_path / 'broken'), '--steps', '1')) == 2
    assert 'broken has weights that are not finite, student.' in capsys.readouterr().err


def test_names_come_from_the_paths(tmp_path):
    (tmp_path / 'runs/a').mkdir(parents=True)
    (tmp_path / 'runs/a/iter_8.pth').write_bytes(b'')
    texts = [CDM, f'{CDM}@{tmp_path}/runs/a', f'{CDM}@{tmp_path}/runs/a/iter_8.pth', 'asset:digits/teacher',
             f'mine={CDM}@{tmp_path}/runs/a']
    assert [parse_entries([text])[0].name for text in texts] == [
        CDM.split('/')[1].removesuffix('.py'), 'a', 'a', 'teacher', 'mine']
    entry = parse_entries([texts[-1]], [4])[0]
    assert (entry.source, entry.checkpoint, entry.steps) == (CDM, f'{tmp_path}/runs/a', 4)


def test_text_prompts_and_a_pipeline_of_diffusers(tmp_path):
    """Two copies of a pipeline: the same images, and every comparison is a tie."""
    save_tiny_sd3(tmp_path / 'sd3')
    shutil.copytree(tmp_path / 'sd3', tmp_path / 'copy')
    (tmp_path / 'prompts.jsonl').write_text('{"prompt": "a red fox"}\n{"prompt": "a | \\"b\\""}\n{"prompt": "été"}\n')
    assert main(['evaluate', str(tmp_path / 'sd3'), f'copy={tmp_path / "copy"}', '--prompts',
                 str(tmp_path / 'prompts.jsonl'), '--steps', '2', '--metrics', 'InkMetric', '--out',
                 str(tmp_path / 'out')]) == 0
    images = pictures(tmp_path / 'out')
    assert len(images) == 6 and len(set(images.values())) == 3
    with Image.open(tmp_path / 'out/images/sd3/000002.png') as image:
        assert image.mode == 'RGB' and image.size == (16, 16)
    assert [win['rate'] for win in results(tmp_path / 'out')['wins']] == [dict(value=0.5, low=0.5, high=0.5)] * 2
    with open(tmp_path / 'out/scores.csv', newline='', encoding='utf-8') as file:
        assert [row['prompt'] for row in csv.DictReader(file)][:3] == ['a red fox', 'a | "b"', 'été']
