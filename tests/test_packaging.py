"""Builds the package as its users get it, a wheel and an editable checkout, and tries it from somewhere else.

Everything is installed offline into fresh environments that see this interpreter's libraries, but not its cdm_plugin.
"""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from environment_support import Environment, clean_copy, in_parallel, pip

pytestmark = pytest.mark.slow  # tests/test_plugins.py has the same of distributions that are only written down

SHAPES = '''
import torch
from mmengine.registry import MODELS, TASK_UTILS

from cdm_plugin.losses import ScoreLoss
from cdm_plugin.plugins import hookimpl


@MODELS.register_module()
class ShapeLoss(ScoreLoss):

    def __init__(self, level: float, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.level = level

    def forward(self, inputs):
        return 0 * inputs.prediction.x0.flatten(1).mean(1) + self.level, {}


@TASK_UTILS.register_module()
class ShapeTimeGrid:

    def __init__(self, levels: int) -> None:
        self.levels = levels

    def sample(self, generator=None):
        return torch.linspace(1, 0, self.levels + 1, dtype=torch.float64)[:-1]


@hookimpl
def cdm_student_losses(method):
    return dict(from_hook=dict(type='ShapeLoss', level=1.0))


@hookimpl
def cdm_after_iteration(iteration, logs):
    return dict(double=2 * logs['loss_shape'])
'''

# No import line for the plug-ins, of which two take part: the package finds them.
CONFIG = '''
custom_imports = dict(imports=['cdm_plugin'], allow_failed_imports=False)
model = dict(
    type='DMD2',
    backbone=dict(
        type='AcmeBackbone', config=dict(cross_attention_dim=8),
        conditioner=dict(type='ClassConditioner', num_classes=3), codec=dict(type='PixelCodec', scale=2)),
    losses=dict(dm=None, shape=dict(type='ShapeLoss', level=2.5, weight=2.0)),
    time_grid=dict(type='ShapeTimeGrid', levels=3),
    student_every=1)
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=False),
    dataset=dict(type='AcmePictures'))
optim_wrapper = dict(
    constructor='DistillationOptimWrapperConstructor',
    student=dict(optimizer=dict(type='SGD', lr=0.1)), fake=dict(optimizer=dict(type='SGD', lr=0.1)))
train_cfg = dict(by_epoch=False, max_iters=2)
custom_hooks = [dict(type='CDMHook')]
default_hooks = dict(checkpoint=None)
work_dir = 'work_dir'
'''

TRAIN = '''
import sys
from mmengine.config import Config
from mmengine.runner import Runner
runner = Runner.from_cfg(Config.fromfile(sys.argv[1]))
runner.train()
names = ('loss_shape', 'loss_from_hook', 'loss_student', 'grid_steps', 'double', 'acme_gap', 'loss_fake')
logs = {name: float(runner.message_hub.get_scalar('train/' + name).current()) for name in names}
'''

# `cdm demo`, a brief form.
DEMO = '''
import json
from cdm_plugin.commands.demo import distil
distil.distil_and_judge('work_dirs/demo', {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 4}, num_samples=20)
print(json.dumps(distil.__file__))
'''


def write_distribution(folder: Path, name: str, version: str, entry: str, module: str, source: str) -> Path:
    folder.mkdir()
    (folder / f'{module}.py').write_text(source)
    (folder / 'pyproject.toml').write_text(f"""
[build-system]
requires = ['setuptools']
build-backend = 'setuptools.build_meta'

[project]
name = '{name}'
version = '{version}'

[project.entry-points.cdm_plugin]
{entry} = '{module}'

[tool.setuptools]
py-modules = ['{module}']
""")
    return folder


def by_name(plugins: list) -> dict:
    assert len({info['name'] for info in plugins}) == len(plugins)
    return {info['name']: info for info in plugins}


@pytest.fixture(scope='session')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', folder, clean_copy(folder / 'copy'))
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='session')
def installed(wheel, tmp_path_factory):
    """An environment with the wheel and three plug-ins: the template of examples/plugin, one that gives a loss, a time
    grid and hooks, and a broken one."""
    folder = tmp_path_factory.mktemp('installed')
    template = shutil.copytree(wheel.with_name('copy') / 'examples/plugin', folder / 'template')
    shapes = write_distribution(folder / 'shapes', 'acme-shapes', '2.5', 'shapes', 'acme_shapes', SHAPES)
    broken = write_distribution(folder / 'broken', 'a-broken-one', '0.3', 'part', 'a_broken_one',
                                'import no_such_module')
    environment = Environment(folder / 'environment')
    environment.pip_install(wheel, template, shapes, broken)
    return environment


@pytest.fixture(scope='session')
def reports(installed):
    """What programs print there, by name; started together, as each takes seconds to import torch."""
    config = installed.elsewhere / 'acme.py'
    config.write_text(CONFIG)
    template = installed.folder.parent / 'template'
    names = ('training', 'disabled', 'table', 'template', 'command')
    return dict(zip(names, in_parallel(
        lambda: installed.look(config, before=TRAIN),
        lambda: installed.look(CDM_DISABLE_PLUGINS='1'),
        lambda: installed.run('cdm', 'plugins').stdout,
        lambda: installed.run('python', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', cwd=template).stdout,
        lambda: installed.run('cdm', 'acme', 'acme_config.py', cwd=template).stdout)))


@pytest.fixture(scope='session')
def editable(tmp_path_factory):
    """The environment of an editable checkout, and the checkout."""
    folder = tmp_path_factory.mktemp('editable')
    copy = clean_copy(folder / 'copy')
    environment = Environment(folder / 'environment')
    environment.pip_install('-e', copy)
    return environment, copy


def test_wheel_holds_all_files_of_the_checkout(wheel, installed):
    copy = wheel.with_name('copy')
    sources = [path for path in (copy / 'cdm_plugin').rglob('*') if path.is_file() and not path.is_symlink()]
    expected = {path.relative_to(copy / 'cdm_plugin').as_posix() for path in sources}
    expected |= {f'hooks/{path.relative_to(copy / "hooks").as_posix()}' for path in (copy / 'hooks').rglob('*.py')}
    expected |= {f'.mim/configs/{path.relative_to(copy / "configs").as_posix()}'
                 for path in (copy / 'configs').rglob('*.py')}
    package = installed.site / 'cdm_plugin'
    found = {path.relative_to(package).as_posix() for path in package.rglob('*') if path.is_file()}
    assert expected - found == set()
    assert {name for name in found - expected if not name.endswith('.pyc')} == set()
    assert {'.mim/configs/_base_/default_runtime.py', '.mim/model-index.yml', 'assets/digits/digits_16.npz',
            'hooks/cdm_hook.py', 'commands/compare/page.html', 'py.typed'} <= found


def test_wheel_works_from_elsewhere(installed, reports):
    report, package = reports['training'], installed.site / 'cdm_plugin'
    assert Path(report['file']) == package / '__init__.py'
    assert Path(report['hooks']) == package / 'hooks/__init__.py'
    assert Path(report['digits']) == package / 'assets/digits'
    assert (installed.site / 'cdm_command/__init__.py').read_text() == (package / 'cli/__init__.py').read_text()
    own = [info for info in report['plugins'] if info['distribution'] == 'cdm_plugin']
    assert own[0]['entry_point'] == 'time_grids' and own[-1]['entry_point'] == 'hooks'
    assert {info['status'] for info in own} == {'loaded'}


def test_wheel_runs_the_demo_elsewhere_and_what_the_demo_says_to_do_next(installed):
    done = installed.run('python', '-c', DEMO, CDM_DISABLE_PLUGINS='1')
    *said, file = done.stdout.splitlines()
    assert Path(json.loads(file)).is_relative_to(installed.site)
    work_dir = installed.elsewhere / 'work_dirs/demo'
    rows = json.loads((work_dir / 'results.json').read_text())['rows']
    assert {(row['model'], row['steps']) for row in rows} >= {('teacher', 50), ('student', 4)}
    assert (work_dir / 'samples.png').is_file() and (work_dir / 'student/README.md').is_file()
    command, = [line.partition('cdm ')[2].split() for line in said if 'cdm sample' in line]
    installed.run('cdm', *command, CDM_DISABLE_PLUGINS='1')
    assert len(list((installed.elsewhere / 'images').glob('0*.png'))) == 4 * 4


def test_plugin_of_another_distribution_is_found(installed, reports):
    info = by_name(reports['training']['plugins'])['acme-shapes:shapes']
    assert (info['version'], info['status'], info['error']) == ('2.5', 'loaded', '')
    assert Path(info['location']) == installed.site / 'acme_shapes.py'
    assert info['registered'] == ['MODELS.ShapeLoss', 'TASK_UTILS.ShapeTimeGrid']


def test_the_template_passes_its_own_tests(reports):
    assert re.search(r'^4 passed', reports['template'], re.MULTILINE), reports['template']


def test_two_plugins_train_from_a_config_that_imports_neither(reports):
    """The student's loss is 2 x 2.5 from the config and 1 x 1 from a hook; backbone and dataset are the template's."""
    logs = reports['training']['logs']
    gap, fake = logs.pop('acme_gap'), logs.pop('loss_fake')
    assert logs == dict(loss_shape=2.5, loss_from_hook=1, loss_student=6, double=5, grid_steps=3)
    assert gap == pytest.approx(6 - fake, abs=1e-5)


def test_the_command_of_a_plugin_is_listed_and_runs(installed, reports):
    assert reports['command'].splitlines()[-3:] == ['0: 8', '1: 8', '2: 8']
    line = next(line for line in installed.run('cdm', '--help').stdout.splitlines() if line.split()[:1] == ['acme'])
    assert line.split(None, 1)[1] == "counts the samples of a config's dataset by prompt (acme-distillation)"
    assert 'acme  acme_distillation.command (acme-distillation 1.0)' in reports['table']


def test_broken_plugin_is_reported_by_name_and_stops_nothing(reports):
    info = by_name(reports['training']['plugins'])['a-broken-one:part']
    cause = "ModuleNotFoundError: No module named 'no_such_module'"
    assert (info['status'], info['error']) == ('failed', cause)
    warned = [line for line in reports['training']['stderr'].splitlines() if "'a-broken-one'" in line]
    assert len(warned) == 1 and "'part'" in warned[0] and cause in warned[0]


def test_plugins_of_other_distributions_can_be_disabled(reports):
    infos = reports['disabled']['plugins']
    outside = [info for info in infos if info['distribution'] != 'cdm_plugin']
    assert {(info['name'], info['status'], tuple(info['registered'])) for info in outside} == {
        (name, 'disabled', ()) for name in ('acme-distillation:acme', 'acme-shapes:shapes', 'a-broken-one:part')}
    assert {info['status'] for info in infos if info not in outside} == {'loaded'}
    assert 'a-broken-one' not in reports['disabled']['stderr']


def test_command_lists_what_is_loaded_from_where(installed, reports):
    table = reports['table']
    rows = {line.split()[0]: line.split()[1:3] for line in table.splitlines() if line and not line.startswith(' ')}
    assert rows['acme-shapes:shapes'] == ['2.5', 'loaded']
    assert rows['a-broken-one:part'] == ['0.3', 'failed']
    assert rows['cdm_plugin:losses'][1] == 'loaded'
    assert str(installed.site / 'acme_shapes.py') in table and 'TASK_UTILS.ShapeTimeGrid' in table
    assert 'no_such_module' in table


def test_editable_checkout_works_from_elsewhere_and_from_inside(editable):
    """Inside the checkout its egg-info is a second copy of the metadata: nothing may be registered twice."""
    environment, copy = editable
    # Older front ends leave it behind; today's do not.
    subprocess.run([sys.executable, 'setup.py', '-q', 'egg_info'], cwd=copy, check=True)
    assert list(copy.glob('*.egg-info')) and list(environment.site.glob('cdm_plugin-*.dist-info'))
    elsewhere, inside = in_parallel(environment.look, lambda: environment.look(cwd=copy))
    for report in (elsewhere, inside):
        assert Path(report['file']).samefile(copy / 'cdm_plugin/__init__.py')
        assert Path(report['hooks']).samefile(copy / 'hooks/__init__.py')
        assert Path(report['digits'], 'digits_16.npz').is_file()
        assert {info['status'] for info in by_name(report['plugins']).values()} == {'loaded'}
    assert Path(elsewhere['file']).with_name('.mim').joinpath('configs/_base_/default_runtime.py').is_file()
    assert [info['name'] for info in elsewhere['plugins']] == [info['name'] for info in inside['plugins']]
    assert environment.run('cdm', '--version').stdout == environment.run('cdm', '--version', cwd=copy).stdout != ''
