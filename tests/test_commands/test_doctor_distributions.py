"""Two distributions that give the import `mmengine`, as pip leaves them."""
import base64
import hashlib
import importlib.metadata

import mmengine
import pytest

from cdm_plugin.commands.doctor.distributions import problem, warning
from cdm_plugin.compat.packages import mmengine_distributions


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Writes a distribution's files and its record into one folder, and makes its `mmengine` the imported one."""
    def install(name, version, **files):
        rows = []
        for module, text in files.items():
            path = tmp_path / f'mmengine/{module}.py'
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()
            rows.append(f'mmengine/{module}.py,sha256={digest},{len(text)}')
        info = tmp_path / f'{name}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
        (info / 'RECORD').write_text('\n'.join([*rows, f'{info.name}/RECORD,,', '']))
        found.append(importlib.metadata.PathDistribution(info))
    found = []
    monkeypatch.setattr(importlib.metadata, 'distributions', lambda: list(found))
    monkeypatch.setattr(mmengine, '__file__', str(tmp_path / 'mmengine/__init__.py'))
    return install


def test_one_distribution_is_well(install, tmp_path):
    install('other', '1', readme='')
    install('mmengine', '0.10.7', __init__='', config='a')
    assert [d.metadata['Name'] for d in mmengine_distributions()] == ['mmengine']
    assert (problem(), warning()) == (None, None)


def test_files_that_are_not_as_installed_are_counted(install, tmp_path):
    install('mmengine', '0.10.7', __init__='', config='a', runner='b')
    (tmp_path / 'mmengine/config.py').write_text('patched')
    (tmp_path / 'mmengine/runner.py').unlink()
    assert problem() is None
    assert 'not as installed, 2 of mmengine 0.10.7:' in warning()
    assert '`pip install --force-reinstall --no-deps mmengine==0.10.7`' in warning()


def test_two_distributions_over_each_other_are_a_problem(install, tmp_path):
    install('mmengine', '0.10.7', __init__='', config='a', hub='same')
    install('onedl-mmengine', '0.10.12', __init__='', config='b', hub='same')
    assert warning() is None
    assert problem() == (
        'mmengine 0.10.7 and onedl-mmengine 0.10.12 have written the same files of the import mmengine over each other '
        '(1 of mmengine 0.10.7 are not as installed): `pip uninstall -y mmengine onedl-mmengine`, then install one of '
        'them, and this package with CDM_MMENGINE set to it')
