import os
import sys

import mmengine.utils
import pytest


def test_packages_are_found_without_pkg_resources(tmp_path, monkeypatch):
    (tmp_path / 'compat_loose').mkdir()
    (tmp_path / 'compat_loose' / '__init__.py').touch()
    (tmp_path / 'compat_space').mkdir()
    # A distribution whose builder wrote no top_level.txt.
    metadata = tmp_path / 'compat_named_apart-1.0.dist-info'
    metadata.mkdir()
    (metadata / 'METADATA').write_text('Metadata-Version: 2.1\nName: compat-named-apart\nVersion: 1.0\n')
    (metadata / 'RECORD').write_text('compat_loose/__init__.py,,\ncompat_named_apart-1.0.dist-info/METADATA,,\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    utils = mmengine.utils
    assert utils.is_installed('mmengine') and utils.is_installed('compat_loose')
    assert not utils.is_installed('compat_space') and not utils.is_installed('compat_no_such_package')
    assert utils.get_installed_path('mmengine') == os.path.dirname(mmengine.__file__)
    assert utils.get_installed_path('compat_loose') == str(tmp_path / 'compat_loose')
    assert utils.is_installed('compat-named-apart')
    assert utils.get_installed_path('compat-named-apart') == str(tmp_path / 'compat_loose')
    assert utils.get_installed_path('opencv-python').endswith('cv2')
    with pytest.raises(RuntimeError, match='namespace package'):
        utils.get_installed_path('compat_space')
    with pytest.raises(ModuleNotFoundError, match='compat_no_such_package'):
        utils.get_installed_path('compat_no_such_package')
