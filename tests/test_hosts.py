"""Beside other people's MMEngine: a project of a foreign `default_scope` in environments of their own, from PyPI."""
import csv
import json
import os

import pytest
from environment_support import Environment, clean_copy, pip
from host_project import METHODS, PROGRAM, write_project

pytestmark = pytest.mark.slow

DOCTOR = ['doctor', 'project.py']
WRONG = ['train', 'project.py', '--cfg-options', 'model.alpa=1']
EXPORT = ['export', 'project.py', '--checkpoint', 'runs/CDM', '--out', 'student']
CLASH = 'train_dataloader.dataset.pipeline.{}.type=PackInputs'
TORCHVISION = 'torchvision==0.28.0'
MMPRETRAIN = ('mmpretrain==1.2.0', 'mmcv-lite==2.1.0', 'mat4py==0.6.0', 'model-index==0.1.11', 'ordered-set==4.1.0',
              TORCHVISION)
MMAGIC = ('mmagic==1.2.0', 'mmcv-lite==2.1.0', 'albumentations==1.4.24', 'albucore==0.0.23', 'stringzilla==5.3.2',
          'simsimd==6.5.16', 'imageio==2.38.1', 'lpips==0.1.4', 'lmdb==3.0.0', TORCHVISION)
# A wheel of torchvision from PyPI is built for CUDA: its operators do not load beside a CPU build of torch. Every
# library that imports torchvision needs these two declared.
OPERATORS = '''
import torch
_declared = torch.library.Library('torchvision', 'FRAGMENT')
for _name in ('nms', 'qnms'):
    _declared.define(_name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
'''
# numpy 2 has no such name.
NUMPY_NAMES = 'import numpy\nnumpy.bool8 = numpy.bool_\n'


@pytest.fixture(scope='module')
def wheels(tmp_path_factory):
    """The package as it is installed beside stock MMEngine, and beside the fork."""
    folder = tmp_path_factory.mktemp('wheels')
    copy = clean_copy(folder / 'copy')
    for name in ('mmengine', 'onedl-mmengine'):
        os.environ['CDM_MMENGINE'] = name
        try:
            pip('wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', folder / name, copy)
        finally:
            del os.environ['CDM_MMENGINE']
    return {path.parent.name: path for path in folder.glob('*/*.whl')}


@pytest.fixture(scope='module')
def make(wheels, tmp_path_factory):
    """Makes an environment with the package and what is given, from the index."""
    def make(*requirements, own='mmengine', without=()):
        environment = Environment(tmp_path_factory.mktemp('host') / 'environment', without)
        if requirements:
            environment.install_from_index(*requirements)
        environment.pip_install(wheels[own])
        return environment
    return make


@pytest.fixture(scope='module')
def stock(make):
    """The losses of the project with stock MMEngine."""
    return report_of(make())['losses']


def report_of(environment, methods=METHODS, commands=(DOCTOR, WRONG, EXPORT), **project):
    write_project(environment.elsewhere, **project)
    done = environment.run('python', '-c', PROGRAM, json.dumps(methods), json.dumps(commands), OMP_NUM_THREADS='1',
                           NO_ALBUMENTATIONS_UPDATE='1')
    return dict(json.loads(done.stdout.splitlines()[-1]), stderr=done.stderr)


def prepend(environment, package, text):
    """Puts a shim into the environment's copy of a package."""
    file = environment.site / package / '__init__.py'
    file.write_text(text + file.read_text())


def check_project(report, stock):
    """Every method trains as with stock MMEngine, resumes to the bit, and the commands know the project."""
    assert report['losses'] == {method: stock[method] for method in report['losses']}
    assert report['resumed'] == {key: report['losses']['CDM'][key] for key in '34'}
    doctor, wrong, export = report['said']
    assert doctor[0] == 0 and doctor[1].endswith('no problem found\n'), doctor[1]
    assert wrong[0] == 2 and 'model.alpa is unknown' in wrong[1] and "did you mean 'alpha'?" in wrong[1]
    assert export[0] == 0, export[1]
    return doctor[1]


def test_project_trains_every_method_with_stock_mmengine(stock):
    assert list(stock) == list(METHODS)
    steps = {method: [key for key, losses in stock[method].items() if 'loss_student' in losses] for method in METHODS}
    assert steps == dict(dict.fromkeys(METHODS, ['2', '4']), FlowMatching=['1', '2', '3', '4'])
    assert len({losses['2']['loss_student'] for losses in stock.values()}) == len(METHODS)


def test_fork(make, stock, wheels):
    """onedl-mmengine, required in the place of stock MMEngine."""
    environment = make('onedl-mmengine==0.10.12', own='onedl-mmengine', without=['mmengine'])
    report = report_of(environment)
    assert report['mmengine'] == ['0.10.12', str(environment.site / 'mmengine/__init__.py')]
    assert 'onedl-mmengine 0.10.12,' in check_project(report, stock)
    assert 'onedl-mmengine' in (environment.elsewhere / 'student/README.md').read_text()
    needs = environment.run('python', '-c', 'from importlib.metadata import requires; print(requires("cdm_plugin"))')
    assert "'onedl-mmengine'" in needs.stdout and "'mmengine" not in needs.stdout


def test_pre_release(make, stock):
    report = report_of(make('mmengine==0.11.0rc3', without=['mmengine']))
    assert report['mmengine'][0] == '0.11.0rc3'
    assert 'mmengine 0.11.0rc3,' in check_project(report, stock)


def test_two_distributions_of_mmengine_are_seen(make):
    """What pip leaves after stock MMEngine is installed over the fork: each has files that the other wrote."""
    environment = make('onedl-mmengine==0.10.12', without=['mmengine'])
    environment.install_from_index('mmengine==0.10.7')
    ((status, text),) = report_of(environment, methods=[], commands=[DOCTOR])['said']
    (line,) = [line for line in text.splitlines() if line.startswith('problem: ')]
    hashes = []
    for folder in environment.site.glob('*mmengine-*.dist-info'):
        rows = csv.reader((folder / 'RECORD').read_text().splitlines())
        hashes.append({name: digest for name, digest, _ in rows if name.startswith('mmengine/') and digest})
    differ = sum(hashes[0].get(name, digest) != digest for name, digest in hashes[1].items())
    assert status == 1 and f'({differ} of onedl-mmengine 0.10.12 are not as installed)' in line and differ > 20
    assert '`pip uninstall -y ' in line and 'CDM_MMENGINE' in line


def test_mmpretrain(make, stock):
    """Its default scope, its dataset and transforms, and its PackInputs, which is another one."""
    environment = make(*MMPRETRAIN)
    prepend(environment, 'torchvision', OPERATORS)
    clash = ['train', 'project.py', '--work-dir', 'clash', '--cfg-options', CLASH.format(3)]
    bare = [*DOCTOR, '--cfg-options', CLASH.format(2)]
    report = report_of(
        environment, commands=[DOCTOR, WRONG, EXPORT, clash, bare], scope='mmpretrain', registry='mmpretrain.registry',
        dataset="type='CustomDataset', data_root='pictures'",
        load=[dict(type='LoadImageFromFile'), dict(type='ResizeEdge', scale=8)])
    *said, clash, bare = report['said']
    check_project(dict(report, said=said), stock)
    line = ("type='PackInputs' is mmpretrain.datasets.transforms.formatting.PackInputs under "
            "default_scope='mmpretrain'; cdm_plugin's is type='mmengine.PackInputs'")
    assert clash[0] == 2 and f'train_dataloader.dataset.pipeline[3].prompt is unknown: {line}' in clash[1]
    assert f'note: train_dataloader.dataset.pipeline[2]: {line}' in bare[1]


def test_mmagic(make, stock):
    """Its transforms, by their scope; as the default scope it is refused, because its models do not import."""
    environment = make(*MMAGIC)
    prepend(environment, 'torchvision', OPERATORS)
    prepend(environment, 'mmagic', NUMPY_NAMES)
    scope = ['--cfg-options', 'default_scope=mmagic']
    report = report_of(
        environment, commands=[DOCTOR, WRONG, EXPORT, [*DOCTOR, *scope], ['train', 'project.py', *scope]], scope=None,
        registry='mmengine.registry', imports=['mmagic.datasets.transforms'],
        load=[dict(type='mmagic.LoadImageFromFile', key='img'),
              dict(type='mmagic.Resize', keys=['img'], scale=(8, 8))])
    *said, doctor, train = report['said']
    check_project(dict(report, said=said), stock)
    assert doctor[0] == 1 and train[0] == 2
    for text in (doctor[1], train[1]):
        assert "default_scope='mmagic' cannot be used here: to find 'CDM', MMEngine imports mmagic.models" in text
        assert "No module named 'diffusers.pipelines.paint_by_example'" in text and "type='mmagic.X'" in text
