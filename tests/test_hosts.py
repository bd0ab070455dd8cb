"""Beside other people's MMEngine: a project of a foreign `default_scope` in environments of their own, from PyPI."""
import json

import pytest
from environment_support import Environment, clean_copy, pip
from host_project import METHODS, PROGRAM, write_project

pytestmark = pytest.mark.slow

DOCTOR = ['doctor', 'project.py']
WRONG = ['train', 'project.py', '--cfg-options', 'model.alpa=1']
CLASH = ['train', 'project.py', '--cfg-options', 'train_dataloader.dataset.pipeline.2.type=PackInputs']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    pip('wheel', '--no-deps', '--no-index', '--no-build-isolation', '-w', folder, clean_copy(folder / 'copy'))
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def stock(wheel, tmp_path_factory):
    """What the project reports with stock MMEngine."""
    environment = Environment(tmp_path_factory.mktemp('stock') / 'environment')
    environment.pip_install(wheel)
    return report_of(environment)


def report_of(environment, methods=METHODS, commands=(DOCTOR, WRONG), **project):
    write_project(environment.elsewhere, **project)
    done = environment.run('python', '-c', PROGRAM, json.dumps(methods), json.dumps(commands))
    return dict(json.loads(done.stdout.splitlines()[-1]), stderr=done.stderr)
