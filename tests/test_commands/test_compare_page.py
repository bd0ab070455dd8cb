"""The page of `cdm compare` in a real Chromium, with the keys and clicks of a reader; runs are made up."""
import io
import json
import math
import re
import shutil
from urllib.parse import unquote

import pytest
from browser import Browser
from PIL import Image

from cdm_plugin.cli import main
from cdm_plugin.commands.compare import page
from cdm_plugin.commands.compare.runs import Histogram, Run

# Two iterations make a student step.
STEPS = range(1, 9)
LOSSES = [[4.0, 2.0, 1.0, 0.5, 0.25, 0.5, 0.25, 0.125], [8.0, 4.0, 4.0, 2.0, 2.0, 1.0, 1.0, 0.5]]
TIMES = [0, 2, 4, 8]  # iterations with grids


def picture(*color, width=40):
    buffer = io.BytesIO()
    Image.new('RGB', (width, 30), color).save(buffer, 'png')
    return buffer.getvalue()


def made_up(i):
    run = Run(name=f'run{i}', config={'model.type': "'CDM'", 'model.student_every': '2', 'seed': str(i)},
              metrics={'digits/fd'})
    run.scalars['loss_student'] = dict(zip(STEPS, LOSSES[i]))
    run.scalars['digits/fd'] = {4: 30.0 - i, 8: 20.0 - i}
    for name in ('samples', 'samples_2_steps'):
        run.grids[name] = {step: picture(step * 9, 200 * i, len(name)) for step in TIMES}
    run.histograms = {step: Histogram([0.0, 0.5, 1.0], [1.0, 3.0]) for step in (4, 8)}
    return run


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    if shutil.which('chromium') is None:
        pytest.skip('no chromium on PATH')
    browser = Browser(tmp_path_factory.mktemp('chromium'))
    yield browser
    browser.close()


@pytest.fixture
def driven(chromium, tmp_path):
    """The browser with the page of two runs in a wide, light window; nothing on it may fail."""
    chromium.complaints.clear()
    chromium.window(1400, 900)
    chromium.open(page.write_page([made_up(0), made_up(1)], tmp_path / 'compare.html'))
    yield chromium
    assert chromium.complaints == []


def focus(browser, wanted, most=40):
    """Presses Tab until an element has the focus."""
    for _ in range(most):
        if browser.value(f'document.activeElement === {wanted}'):
            return
        browser.press('Tab')
    raise AssertionError(f'{most} tabs do not reach {wanted}')


def time_of(browser):
    return browser.value('$("time-text").textContent')


def images(browser):
    """What the pictures on the page are of: [name of the grid, iteration] for each."""
    return browser.value('[...document.images].map(image => { for (const run of runs) for (const [name, grid] of '
                         'Object.entries(run.grids)) for (const [step, url] of Object.entries(grid)) '
                         'if (url === image.getAttribute("src")) return [run.name, name, Number(step)]; })')


def rows(browser, panel):
    return browser.value(f'[...panels[{panel}].table.tBodies[0].rows].map('
                         'row => [...row.cells].map(cell => cell.textContent))')


def test_the_slider_by_keys(driven):
    assert time_of(driven) == 'student step 4'
    assert images(driven) == [['run0', 'samples', 8], ['run1', 'samples', 8]]
    focus(driven, '$("time")')
    driven.press('Home')
    assert time_of(driven) == 'student step 0'
    assert images(driven) == [['run0', 'samples', 0], ['run1', 'samples', 0]]
    assert [row[1] for row in rows(driven, 1)] == ['–', '–']  # nothing is logged at step 0
    driven.press('ArrowRight', 'ArrowRight')
    assert time_of(driven) == 'student step 2' and images(driven)[0] == ['run0', 'samples', 4]
    assert [row[1:] for row in rows(driven, 1)] == [['0.5', '0.125', '0.125', '4'], ['2', '0.5', '0.5', '8']]
    assert driven.value('$("time").getAttribute("aria-valuetext")') == 'student step 2'
    driven.press('ArrowLeft')
    assert time_of(driven) == 'student step 1'
    driven.press('End')
    assert time_of(driven) == 'student step 4'


def test_the_slider_by_a_click(driven):
    driven.click('$("time")', 0.02)
    assert time_of(driven) == 'student step 0'
    driven.click('$("time")', 0.65)
    assert time_of(driven) == 'student step 2'


def test_runs_are_left_out_and_come_back(driven):
    curves = 'document.querySelectorAll("#panels path.curve").length'
    assert driven.value(curves) == 4
    focus(driven, 'document.querySelectorAll("#runs input")[1]')
    driven.press('Space')
    assert driven.value(curves) == 2 and images(driven) == [['run0', 'samples', 8]]
    assert [row[0] for row in rows(driven, 0)] == ['run0']
    driven.press('Space')
    assert driven.value(curves) == 4
    driven.click('document.querySelectorAll("#runs label")[0]', 0.9)
    assert images(driven) == [['run1', 'samples', 8]]
    driven.click('document.querySelectorAll("#runs label")[1]', 0.9)  # none is left, and nothing fails
    assert driven.value(curves) == 0 and images(driven) == []


def heights(browser, panel):
    """The corners of the first curve: how high each lies, from the top."""
    path = browser.value(f'panels[{panel}].host.querySelector("path.curve:not(.raw)").getAttribute("d")')
    return [float(y) for y in re.findall(r'[ML][\d.]+ ([\d.]+)', path)]


def test_axis_scale_and_smoothing_by_keys(driven):
    focus(driven, '$("axis")')
    driven.press('ArrowDown')
    assert time_of(driven) == 'iteration 8' and driven.value('$("axis").value') == 'iteration'
    driven.press('ArrowUp')
    assert time_of(driven) == 'student step 4'
    fitted = heights(driven, 1)
    focus(driven, 'panels[1].scale')
    driven.press('ArrowDown', 'ArrowDown')
    assert driven.value('panels[1].scale.value') == 'logarithmic'
    logarithmic = heights(driven, 1)
    ratios = [(y - logarithmic[0]) / (logarithmic[2] - logarithmic[0]) for y in logarithmic]
    assert ratios == pytest.approx([math.log2(4 / loss) / 2 for loss in LOSSES[0]], abs=0.01)
    ratios = [(y - fitted[0]) / (fitted[2] - fitted[0]) for y in fitted]
    assert ratios == pytest.approx([(4 - loss) / 3 for loss in LOSSES[0]], abs=0.01)
    driven.press('ArrowUp', 'Tab')
    assert driven.value('document.activeElement === panels[1].smoothing')
    driven.press(*['ArrowRight'] * 10)
    assert driven.value('panels[1].weight.textContent') == '0.50'
    assert driven.value('document.querySelectorAll("#panels path.raw").length') == 2
    # Half of each value and half of what was before it, without the bias of the start (TensorBoard's).
    mean, mass, smooth = 0, 0, []
    for loss in LOSSES[0]:
        mean, mass = mean / 2 + loss / 2, mass / 2 + 1 / 2
        smooth.append(mean / mass)
    seen = heights(driven, 1)
    assert [(y - seen[0]) / (seen[-1] - seen[0]) for y in seen] == pytest.approx(
        [(4 - value) / (4 - smooth[-1]) for value in smooth], abs=0.01)


def test_the_pointer_reads_the_curves(driven):
    driven.move_to('panels[1].host.querySelector("svg")', 0.5)
    head = driven.value('panels[1].table.tHead.textContent')
    at = float(re.search(r'At student step ([\d.]+)', head)[1])
    assert 1.5 <= at <= 2.5 and rows(driven, 1)[0][1] == f'{LOSSES[0][int(2 * at) - 1]:g}'
    driven.move_to('$("title")', 0.5)
    assert 'At student step 4' in driven.value('panels[1].table.tHead.textContent')


def test_tab_reaches_every_control_in_the_order_of_the_page(driven):
    count, reached = driven.value('controls().length'), []
    for _ in range(3 * count):
        driven.press('Tab')
        reached.append(driven.value('controls().indexOf(document.activeElement)'))
        assert reached[-1] < 0 or driven.value('document.activeElement.matches(":focus-visible")')
        if count - 1 in reached:
            break
    assert [i for i in reached if i >= 0] == list(range(count))


def test_grids_and_keys_are_chosen_by_keys(driven):
    focus(driven, '$("grid")')
    driven.press('ArrowDown')
    assert images(driven) == [['run0', 'samples_2_steps', 8], ['run1', 'samples_2_steps', 8]]
    names = '[...document.querySelectorAll("#config-table tbody th")].map(cell => cell.textContent)'
    assert driven.value(names) == ['seed']
    focus(driven, '$("all-keys")')
    driven.press('Space')
    assert sorted(driven.value(names)) == ['model.student_every', 'model.type', 'seed']


def test_a_narrow_window_and_dark_mode(driven):
    look = ('({width: innerWidth, content: document.documentElement.scrollWidth, page: getComputedStyle(document.body)'
            '.backgroundColor, ink: getComputedStyle(document.body).color, right: Math.max(...controls().map('
            'node => node.closest(".scroll") ? 1 : node.getBoundingClientRect().right))})')
    wide = driven.value(look)
    assert (wide['page'], wide['ink']) == ('rgb(245, 246, 248)', 'rgb(27, 31, 36)')
    for width in (1400, 500, 320):
        driven.window(width, 800, dark=True)
        driven.wait_for(f'innerWidth === {width}')
        shown = driven.value(look)
        assert shown['content'] <= width and 0 < shown['right'] <= width
        assert (shown['page'], shown['ink']) == ('rgb(16, 20, 24)', 'rgb(232, 236, 240)')
    seen = Image.open(io.BytesIO(driven.picture())).convert('RGB')
    assert seen.size == (320, 800) and seen.getpixel((2, 790)) == (16, 20, 24)
    driven.wait_for('panels[0].host.querySelector("svg").getBoundingClientRect().right <= 320')
    focus(driven, '$("time")')  # and it works as in a wide one
    driven.press('Home')
    assert time_of(driven) == 'student step 0'


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """A page of two runs with 1,000 grids each, all of another colour."""
    folder, made = tmp_path_factory.mktemp('many'), []
    for i in range(2):
        run = Run(name=f'run{i}', config={'model.type': "'CDM'", 'model.student_every': '1'})
        run.grids['samples'] = {step: picture(step % 256, step // 256, 9, width=40 + i) for step in range(1000)}
        made.append(run)
    return made, page.write_page(made, folder / 'two runs.html')


def test_two_thousand_grids_are_read_when_they_are_shown(many, chromium):
    made, html = many
    chromium.complaints.clear()
    chromium.open(html)

    def loaded():
        files = [unquote(url.rpartition('/')[2]) for url in chromium.requests if url.endswith('.png')]
        return [tuple(map(int, re.match(r'(\d)_samples_(\d+)_', file).groups())) for file in files]

    both = 'document.images.length === 2 && [...document.images].every(node => node.naturalWidth > 0)'
    chromium.wait_for(both)
    assert loaded() == [(0, 999), (1, 999)]
    focus(chromium, '$("time")')
    chromium.press('Home')
    chromium.wait_for(both)
    assert loaded()[2:] == [(0, 0), (1, 0)]
    chromium.press(*['ArrowRight'] * 3)
    chromium.wait_for(both)
    assert set(loaded()[4:]) <= {(i, step) for i in (0, 1) for step in (1, 2, 3)} and loaded()[-2:] == [(0, 3), (1, 3)]
    assert chromium.value('[...document.images].map(image => image.naturalWidth)') == [40, 41]
    assert chromium.complaints == []


def test_two_thousand_grids_lie_beside_the_page(many):
    made, html = many
    shown = json.loads(re.search(r'id="data">(.*?)</script>', html.read_text(), re.S)[1])
    assert html.stat().st_size < 300_000 and len(shown['times']) == 1000
    for run, own in zip(made, shown['runs']):
        for step, url in list(own['grids']['samples'].items())[::99]:
            assert (html.parent / unquote(url)).read_bytes() == run.grids['samples'][int(step)]
    assert shown['notes'] == ['The sample grids lie in the folder two runs_grids beside this page: keep them together.']
    before = {path.name: path.stat().st_mtime_ns for path in html.parent.glob('two runs_grids/*')}
    page.write_page([Run(name='one', grids=dict(samples={s: made[0].grids['samples'][s] for s in range(200)}))], html)
    after = {path.name: path.stat().st_mtime_ns for path in html.parent.glob('two runs_grids/*')}
    assert len(before) == 2000 and len(after) == 200 and after.items() <= before.items()
    page.write_page(made, html)


def test_watch_redraws_while_a_run_trains_and_keeps_what_is_chosen(chromium, tmp_path, monkeypatch):
    """The command writes the page every second, and between two of them a run goes on and a reader looks."""
    (tmp_path / 'run/vis_data').mkdir(parents=True)
    out, log, seen = tmp_path / 'compare.html', tmp_path / 'run/vis_data/scalars.json', []
    chromium.complaints.clear()

    def train(iterations):
        log.write_text(''.join(f'{{"loss": {i}, "iter": {i}, "step": {i}}}\n' for i in range(1, iterations + 1)))

    def wait(seconds):
        if not seen:
            chromium.open(out)
            focus(chromium, 'panels[0].smoothing')
            chromium.press('ArrowRight')
        chromium.wait_for(f'runs[0].iterations === {4 + len(seen)} && panels.length === 1')
        seen.append([chromium.value('panels[0].weight.textContent'), rows(chromium, 0)[0][2]])
        train(4 + len(seen))
        if len(seen) == 3:
            raise KeyboardInterrupt

    train(4)
    monkeypatch.setattr('time.sleep', wait)
    assert main(['compare', str(tmp_path / 'run'), '--out', str(out), '--watch', '1']) == 0
    assert seen == [['0.05', '4'], ['0.05', '5'], ['0.05', '6']] and chromium.complaints == []
