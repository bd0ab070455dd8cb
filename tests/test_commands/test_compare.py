"""`cdm compare` on two short real trainings: one that was resumed, one that logs to TensorBoard alone."""
import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from mmengine.runner import Runner
from PIL import Image
from recipes import CDM, DMD2

from cdm_plugin.cli import main
from cdm_plugin.commands.compare import page, runs
from cdm_plugin.commands.compare.page import page_data
from cdm_plugin.commands.compare.runs import Run, config_differences
from cdm_plugin.config import load_config

HOSTILE = '</script><script>document.title = "owned"</script><img src="http://example.com/x.png">'

needs_chromium = pytest.mark.skipif(shutil.which('chromium') is None, reason='no chromium on PATH')


def train(recipe, work_dir, **options):
    defaults = {
        'train_dataloader.batch_size': 4, 'default_hooks.logger.interval': 1, 'log_processor.window_size': 1,
        'custom_hooks.0.histogram_interval': 2, 'custom_hooks.1.interval': 2, 'custom_hooks.1.teacher_steps': 4,
        'val_dataloader.dataset.length': 10, 'log_level': 'ERROR', 'work_dir': str(work_dir),
        'experiment_name': f'{work_dir.name}{len(options)}'}
    runner = Runner.from_cfg(load_config(recipe, {**defaults, **options}))
    runner.train()
    return runner


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """CDM for 6 iterations, then from the checkpoint of iteration 4 for 5; DMD2 for 5 with `hostile` in its config."""
    root = tmp_path_factory.mktemp('runs')
    checkpoint = {'default_hooks.checkpoint.interval': 4}
    train(CDM, root / 'cdm', **checkpoint, **{'train_cfg.max_iters': 6, 'train_cfg.val_interval': 2})
    (root / 'cdm/last_checkpoint').write_text(str(root / 'cdm/iter_4.pth'))
    train(CDM, root / 'cdm', **checkpoint, **{'train_cfg.max_iters': 5, 'resume': True, 'custom_hooks.1.steps': []})
    dmd2 = train(DMD2, root / 'dmd2', hostile=HOSTILE, **{
        'train_cfg.max_iters': 5, 'train_cfg.val_interval': 2,
        'visualizer.vis_backends': [dict(type='TensorboardVisBackend')]})
    return root, dmd2


@pytest.fixture(scope='module')
def html(trained, tmp_path_factory):
    """The page of the two runs, as a file."""
    out = tmp_path_factory.mktemp('page') / 'new/compare.html'
    assert main(['compare', str(trained[0] / 'cdm'), str(trained[0] / 'dmd2'), '--out', str(out)]) == 0
    return out


@pytest.fixture(scope='module')
def data(html):
    """What is embedded in it."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html.read_text(), re.S)[1])


def pixels(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(',')[1]))))


def test_numbers_are_the_logs_and_a_resumed_run_is_one(trained, data):
    """Iterations 1 to 4 are of the first start, and 5 is of the second; the 6th was undone by resuming."""
    first, second = ([json.loads(line) for line in (folder / 'vis_data/scalars.json').read_text().splitlines()]
                     for folder in sorted(p for p in (trained[0] / 'cdm').iterdir() if p.is_dir()))
    assert [line['step'] for line in second] == [5, 5]  # and MMEngine validates at the end
    lines = [line for line in first if line['step'] <= 4] + second
    run = data['runs'][0]
    assert run['restarts'] == [4] and run['iterations'] == 5 and run['student_every'] == 2
    for name in ('loss_fake', 'loss_student', 'student.lr', 'grid_steps', 'time'):
        logged = {line['step']: line[name] for line in lines if 'iter' in line and name in line}
        assert run['scalars'][name] == dict(steps=list(logged), values=list(logged.values())), name
    assert run['scalars']['loss_fake']['steps'] == [1, 2, 3, 4, 5]
    assert first[-1]['step'] == 6  # a validation's line, after the last training's
    assert run['metrics'] == ['digits/accuracy', 'digits/fd']
    for name in run['metrics']:
        values = {line['step']: line[name] for line in lines if name in line}
        assert run['scalars'][name] == dict(steps=[2, 4, 5], values=[values[2], values[4], values[5]])


def test_numbers_of_tensorboard_alone_are_the_message_hubs(trained, data):
    run, hub = data['runs'][1], trained[1].message_hub
    assert run['student_every'] == 2 and run['method'] == 'DMD2' and run['restarts'] == []
    for name in ('loss_fake', 'grad_norm_fake', 'time'):
        values, _ = hub.get_scalar(f'train/{name}').data
        assert run['scalars'][name]['values'] == pytest.approx(values, rel=1e-6), name
    values, _ = hub.get_scalar('train/loss_student').data  # of iterations 2 and 4; the logger repeats the last one
    assert run['scalars']['loss_student'] == dict(steps=[2, 3, 4, 5], values=pytest.approx(
        [values[0]] * 2 + [values[1]] * 2, rel=1e-6))
    assert run['scalars']['loss_fake']['steps'] == [1, 2, 3, 4, 5] and 'iter' not in run['scalars']
    assert run['metrics'] == ['digits/accuracy', 'digits/fd']
    for name in run['metrics']:
        values, _ = hub.get_scalar(f'val/{name}').data
        assert run['scalars'][name] == dict(
            steps=[2, 4, 5], values=pytest.approx(values, rel=1e-6))  # MMEngine validates at the end too


def test_grids_are_the_hooks_pictures_at_their_iterations(trained, data):
    starts = sorted(p for p in (trained[0] / 'cdm').iterdir() if p.is_dir())
    grids = data['runs'][0]['grids']
    assert {name: list(urls) for name, urls in grids.items()} == {
        'samples': ['0', '2', '4'], **{f'samples_{n}_steps': ['0', '2', '4'] for n in (1, 2, 8)}}
    for step, folder in (('0', starts[0]), ('2', starts[0]), ('4', starts[1])):
        written = np.asarray(Image.open(folder / f'vis_data/vis_image/samples_{step}.png'))
        assert np.array_equal(pixels(grids['samples'][step]), written)
    hook = next(h for h in trained[1].hooks if type(h).__name__ == 'SampleGridHook')
    images = data['runs'][1]['grids']
    assert list(images['samples_8_steps']) == ['0', '2', '4']
    # The teacher's row is the same at all times, the student's is not.
    height = pixels(images['samples_8_steps']['0']).shape[0] // len(hook.rows(trained[1], 8))
    teacher = [pixels(url)[-2 * height:] for url in images['samples_8_steps'].values()]
    student = [pixels(url)[:height] for url in images['samples_8_steps'].values()]
    assert np.array_equal(teacher[0], teacher[2]) and not np.array_equal(student[0], student[2])


def test_histograms_hold_the_anchors(data):
    """DMD2's anchors are at the shifted levels 1, 0.9, 0.75 and 0.5 only; two iterations of four samples each."""
    histograms = data['runs'][1]['histograms']
    assert list(histograms) == ['2', '4']
    for histogram in histograms.values():
        edges, counts = histogram['edges'], histogram['counts']
        assert len(edges) == len(counts) + 1 and sum(counts) == 8
        for low, high, n in zip(edges, edges[1:], counts):
            assert not n or any(low <= level + 1e-6 and level - 1e-6 <= high for level in (1, .9, .75, .5))


def test_differences_are_those_of_the_configs(data):
    rows = {row['key']: row for row in data['config']}
    assert {key for key, row in rows.items() if row['differs']} == {
        'custom_hooks.1.steps', 'default_hooks.checkpoint.interval', 'experiment_name', 'hostile', 'model.type',
        'resume', 'visualizer.vis_backends.0.type', 'visualizer.vis_backends.1.type',
        'train_cfg.val_interval'}
    assert rows['model.type']['values'] == ["'CDM'", "'DMD2'"]
    assert rows['visualizer.vis_backends.1.type']['values'] == ["'TensorboardVisBackend'", None]
    assert rows['hostile']['values'] == [None, repr(HOSTILE)]
    assert rows['optim_wrapper.fake.optimizer.lr'] == dict(
        key='optim_wrapper.fake.optimizer.lr', differs=False, values=['0.0004', '0.0004'])
    assert config_differences([{'a': '1', 'work_dir': 'x'}, {'a': '1', 'b': 'None', 'work_dir': 'y'}]) == dict(
        a=False, b=True)


def test_page_loads_nothing_and_logs_stay_text(html):
    text = html.read_text()
    assert HOSTILE not in text and '</script><script>' not in text

    class Links(HTMLParser):
        tags, links = [], []

        def handle_starttag(self, tag, attributes):
            self.tags.append(tag)
            self.links += [value for key, value in attributes if key in ('src', 'href', 'srcset', 'action', 'data')]

    Links().feed(text)
    assert Links.links == [] and Links.tags.count('script') == 2 and not {'img', 'link'} & set(Links.tags)
    template = (Path(page.__file__).parent / 'page.html').read_text()
    assert re.findall(r'https?://[^\'"\s]*', template) == ['http://www.w3.org/2000/svg']  # a name, never loaded
    assert "default-src 'none'" in template and not re.search(r'fetch\(|import |@import|url\(|innerHTML', template)


@pytest.mark.parametrize('make, message', [
    (lambda folder: None, 'is no folder'),
    (lambda folder: folder.mkdir(), 'has no logs'),
    (lambda folder: (folder / 'a/vis_data').mkdir(parents=True), 'has no logs'),
    (lambda folder: ((folder / 'vis_data').mkdir(parents=True),
                     (folder / 'vis_data/scalars.json').write_text('{"a": 1, "step": 1}\nhalf\n{"a": 1, "step": 2}')),
     'scalars.json, line 2, is no JSON'),
])
def test_a_folder_without_logs_is_one_clear_line(make, message, tmp_path, capsys):
    make(tmp_path / 'run')
    assert main(['compare', str(tmp_path / 'run'), '--out', str(tmp_path / 'compare.html')]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and str(tmp_path / 'run') in error and '\n' not in error
    assert not (tmp_path / 'compare.html').exists()


def test_a_folder_to_write_to_is_one_clear_line(trained, tmp_path, capsys):
    assert main(['compare', str(trained[0] / 'cdm'), '--out', str(tmp_path)]) == 2
    assert f"--out must be the HTML file to write, but '{tmp_path}' is a folder" in capsys.readouterr().err


def test_the_page_is_written_again_while_a_run_trains(tmp_path, monkeypatch, capsys):
    (tmp_path / 'run/vis_data').mkdir(parents=True)
    out, log, seen = tmp_path / 'compare.html', tmp_path / 'run/vis_data/scalars.json', []

    def wait(seconds):
        assert seconds == 7
        page_now = json.loads(re.search(r'id="data">(.*?)</script>', out.read_text(), re.S)[1]) if out.exists() else {}
        seen.append((page_now.get('reload'), [run['iterations'] for run in page_now.get('runs', [])]))
        if len(seen) == 3:
            raise KeyboardInterrupt
        log.write_text(''.join(f'{{"loss": {i}, "iter": {i}, "step": {i}}}\n' for i in range(len(seen) + 1)))

    monkeypatch.setattr('time.sleep', wait)
    assert main(['compare', str(tmp_path / 'run'), '--out', str(out), '--watch', '7']) == 0
    assert seen == [(None, []), (7, [1]), (7, [2])]
    assert '"reload":null' in out.read_text()  # what is left at the end is read no more
    assert 'has no logs' in capsys.readouterr().out


def test_a_killed_runs_half_line_and_values_that_are_not_finite(tmp_path):
    """Validations count epochs where LoggerHook.log_metric_by_epoch is on: they are put at the last iteration."""
    (tmp_path / 'a/vis_data').mkdir(parents=True)
    (tmp_path / 'a/vis_data/scalars.json').write_text(
        '{"loss": NaN, "time": 1.0, "iter": 10, "step": 10}\n{"fd": Infinity, "time": 9.0, "step": 1}\n{"lo')
    (run,) = runs.read_runs([str(tmp_path)])
    assert run.name == tmp_path.name and run.student_every is None
    shown = page_data([run])['runs'][0]
    assert shown['scalars'] == dict(
        fd=dict(steps=[10], values=[None]), loss=dict(steps=[10], values=[None]), time=dict(steps=[10], values=[1.0]))
    assert shown['metrics'] == ['fd']


def test_names_are_the_ends_that_differ(tmp_path):
    names = runs._short_names
    assert names(['x/a', 'x/b/']) == ['a', 'b'] and names(['x/a/1', 'y/a/1']) == ['x/a/1', 'y/a/1']
    assert names(['x/a', './x/a']) == ['a', 'a'] and names(['/']) == ['']


def test_config_is_read_as_it_is_dumped_and_never_run():
    flat = runs.flat_config("a = dict({'x y': 1, 'b': dict(c=[1, 2], d=[dict(t='u')])})\nb = {}\nc = open('x', 'w')\n")
    assert flat == {'a.x y': '1', 'a.b.c': '[1, 2]', 'a.b.d.0.t': "'u'", 'b': '{}', 'c': "open('x', 'w')"}


def test_long_curves_keep_their_extremes_and_their_end():
    series = {step: float(np.sin(step)) for step in range(1, 100_001)}
    series[777], series[5000] = 50.0, float('nan')
    thin = page._thin(series)
    assert len(thin['steps']) <= page.MAX_POINTS and thin['steps'][-1] == 100_000
    assert max(thin['values']) == 50 and all(series[s] == v for s, v in zip(thin['steps'], thin['values']))
    assert thin['steps'] == sorted(set(thin['steps']))


@pytest.mark.parametrize('kind, name, every', [
    ('CDM', 'CDM', 2), ('mmengine.DMD2', 'DMD2', 5), ('cdm_plugin.methods.DMD2', 'DMD2', 5),
    ('cdm_plugin.methods.flow_matching.FlowMatching', 'FlowMatching', 1), ('acme.methods.CDM', 'CDM', None)])
def test_the_method_of_a_config_may_be_a_path(kind, name, every):
    run = Run(config={'model.type': repr(kind)}, scalars={'loss': {4: 1.0}})
    assert run.student_every == every and page_data([run])['runs'][0]['method'] == name


def test_large_grids_fit_on_the_page(monkeypatch):
    """Six runs of 50 grids of noise, which nothing compresses, at common student steps."""
    monkeypatch.setattr(page, 'MAX_IMAGE_BYTES', 1_000_000)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 200, 3), np.uint8)).save(buffer, 'png')
    made = []
    for every in (1, 2, 2, 2, 5, 5):
        run = Run(config={'model.type': "'CDM'", 'model.student_every': str(every)})
        times = range(0, 500 if every > 1 else 200, 10)
        run.grids['samples'] = {time * every: buffer.getvalue() for time in times}
        made.append(run)
    embedded = page_data(made)
    times = [[int(step) / run['student_every'] for step in run['grids']['samples']] for run in embedded['runs']]
    assert times[1] == times[5] and len(times[1]) == page.MAX_TIMES and (times[1][0], times[1][-1]) == (0, 490)
    assert times[0][-1] == 190 and set(times[0][:-1]) <= set(times[1])
    urls = [url for run in embedded['runs'] for url in run['grids']['samples'].values()]
    assert 600_000 < sum(map(len, urls)) <= 1_000_000 * 4 / 3 * 1.01
    assert pixels(urls[0]).shape[1] / pixels(urls[0]).shape[0] == pytest.approx(4 / 3, rel=0.02)
    times, size = embedded['notes']
    assert times == 'Sample grids are shown at 24 of 50 points of training time.'
    shrunk = re.fullmatch(r'Sample grids are shrunk, down to (\d+)% of their width, to keep the page small.', size)[1]
    assert abs(int(shrunk) / 100 - pixels(urls[0]).shape[1] / 200) < 0.01


# Moves the controls as a reader would, and leaves in an attribute what the page shows then.
DRIVE = '''
<script>
const report = {}, set = (node, value) => { node.value = value; node.dispatchEvent(new Event('input')); };
const cells = () => [...document.querySelectorAll('#panels table')].map(
  table => [...table.rows].slice(1).map(row => [...row.cells].map(cell => cell.textContent)));
const look = () => ({time: $('time-text').textContent, cells: cells(), titles: [...document.querySelectorAll(
  '#panels select')].map(s => s.value), images: [...document.images].map(image => image.src),
  captions: [...document.querySelectorAll('figcaption')].map(node => node.textContent)});
report.last = look();
set($('time'), 0);
report.first = look();
set($('axis'), 'iteration');
set($('time'), 2);
set($('grid'), 'samples_2_steps');
report.iterations = look();
document.querySelector('#runs tbody input').click();
report.hidden = look();
report.curves = [...document.querySelectorAll('#panels path.curve')].map(path => path.getAttribute('d'));
$('all-keys').click();
report.keys = [...document.querySelectorAll('#config-table tbody tr')].map(row => row.cells[0].textContent);
document.body.dataset.report = JSON.stringify(report);
</script></body>'''


# Chooses things, keeps them as before a reload, starts over and restores them.
RELOAD = '''
<script>
const report = {}, set = (node, value) => { node.value = value; node.dispatchEvent(new Event('input')); };
const look = () => [document.querySelector('main, body').innerText, ...controls().map(value),
                    ...[...document.images].map(image => image.src)];
report.before = look();
set($('axis'), 'iteration');
set($('time'), 1);
set($('grid'), 'samples_2_steps');
set(panels[1].scale, 'logarithmic');
set(panels[1].smoothing, .5);
document.querySelector('#runs tbody input').click();
report.chosen = look();
keep();
document.querySelector('#runs tbody input').click();
set($('axis'), 'student step');
set(panels[1].smoothing, 0);
restore();
report.restored = look();
report.smoothed = document.querySelectorAll('#panels path.raw').length;
set($('time'), $('time').max);
keep();
report.atEnd = JSON.parse(decodeURIComponent(location.hash.slice(1))).atEnd;
document.body.dataset.report = JSON.stringify(report);
</script></body>'''
def in_chromium(html, script, tmp_path, *flags):
    """The page's document after a script at its end has run; nothing may have been refused or have failed."""
    driven = tmp_path / 'driven.html'
    driven.write_text(html.read_text().replace('</body>', script))
    done = subprocess.run(
        ['chromium', '--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync', *flags,
         '--enable-logging=stderr', f'--user-data-dir={tmp_path / "profile"}', '--dump-dom', driven.as_uri()],
        capture_output=True, text=True, timeout=120)
    assert 'CONSOLE' not in done.stderr, done.stderr  # neither errors nor what the page's policy refuses
    return done.stdout


def reported(text):
    """What a script has left in the document."""
    return json.loads(unescape(re.search(r'<body data-report="(.*?)"', text, re.S)[1]))


@needs_chromium
def test_what_is_chosen_outlasts_a_reload(html, tmp_path):
    report = reported(in_chromium(html, RELOAD, tmp_path))
    assert report['restored'] == report['chosen'] != report['before']
    assert report['smoothed'] == 1 and report['atEnd']


@needs_chromium
def test_chromium_draws_the_page(html, data, tmp_path):
    text = in_chromium(html, DRIVE, tmp_path)

    class Body(HTMLParser):
        report, title, inside, images = None, '', False, []

        def handle_starttag(self, tag, attributes):
            self.inside = tag == 'title'
            if tag == 'body':
                Body.report = json.loads(dict(attributes)['data-report'])
            if tag == 'img':
                Body.images.append(dict(attributes)['src'])

        def handle_data(self, text):
            if self.inside:
                Body.title, self.inside = text, False

    Body().feed(text)
    report, (cdm, dmd2) = Body.report, data['runs']
    assert Body.title == 'cdm, dmd2 – cdm compare'
    assert report['last']['titles'] == ['digits/accuracy', 'fitted', 'loss_student', 'fitted']
    assert (report['last']['time'], report['first']['time']) == ('student step 2', 'student step 0')
    assert report['last']['images'] == [cdm['grids']['samples']['4'], dmd2['grids']['samples']['4']]
    assert report['first']['images'] == [cdm['grids']['samples']['0'], dmd2['grids']['samples']['0']]
    assert report['last']['captions'] == [f'{name} – student step 2, its last' for name in ('cdm', 'dmd2')]
    (metrics, losses) = report['last']['cells']
    accuracy, series = cdm['scalars']['digits/accuracy'], cdm['scalars']['loss_student']
    assert [row[0] for row in metrics] == ['cdm', 'dmd2'] and [row[0] for row in losses] == ['cdm', 'dmd2']
    assert [float(cell) for cell in metrics[0][1:3]] == pytest.approx([accuracy['values'][1]] * 2, rel=1e-3)
    values = series['values']
    assert [float(cell) for cell in losses[0][1:]] == pytest.approx(
        [values[series['steps'].index(4)], values[-1], min(values), max(values)], rel=1e-3)
    assert report['first']['cells'][1][0][1] == '–'  # nothing is logged at step 0
    assert report['iterations']['time'] == 'iteration 4'
    assert report['iterations']['images'] == [run['grids']['samples_2_steps']['4'] for run in (cdm, dmd2)]
    assert report['hidden']['captions'] == ['dmd2 – iteration 4, its last']
    assert [path.count('L') for path in report['curves']] == [
        len(dmd2['scalars'][name]['steps']) - 1 for name in ('digits/accuracy', 'loss_student')]
    assert report['keys'] == [row['key'] for row in data['config']]
    assert Body.images == [dmd2['grids']['samples_2_steps']['4']]  # and none of the hostile text
    assert repr(HOSTILE).replace('<', '&lt;').replace('>', '&gt;') in text
