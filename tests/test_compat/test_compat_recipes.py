import os
import sys
from pathlib import Path

import mmengine.hub
import pytest
from mmengine.config import Config

from cdm_plugin.compat.recipes import MIM

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_pkg_resources(monkeypatch):
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)


def test_recipes_are_linked_into_the_package():
    assert os.path.samefile(MIM / 'configs', ROOT / 'configs')


def test_recipe_as_base_and_from_the_hub(no_pkg_resources, tmp_path):
    (tmp_path / 'mine.py').write_text("_base_ = 'cdm_plugin::_base_/default_runtime.py'\nlog_level = 'DEBUG'\n")
    cfg = Config.fromfile(tmp_path / 'mine.py', import_custom_modules=False)
    assert cfg.log_level == 'DEBUG'
    assert cfg.default_hooks.checkpoint.interval == 500
    # With a scope MMEngine looks for child registries of cdm_plugin, and warns at every part that it builds.
    assert '_scope_' not in cfg.pretty_text
    from_hub = mmengine.hub.get_config('cdm_plugin::_base_/default_runtime.py')
    assert from_hub.log_processor == cfg.log_processor
    (tmp_path / 'bad.py').write_text("_base_ = 'cdm_plugin::_base_/nothing.py'\n")
    with pytest.raises(FileNotFoundError, match='nothing.py'):
        Config.fromfile(tmp_path / 'bad.py')


def test_recipe_as_lazy_base(no_pkg_resources, tmp_path):
    (tmp_path / 'lazy.py').write_text(
        'from mmengine.config import read_base\n\n'
        'with read_base():\n    from cdm_plugin.configs._base_.default_runtime import *\n\n'
        "log_level = 'DEBUG'\n")
    cfg = Config.fromfile(tmp_path / 'lazy.py')
    assert (cfg.log_level, cfg.default_hooks.checkpoint.interval) == ('DEBUG', 500)


def test_recipes_of_other_packages_keep_their_scope(tmp_path, monkeypatch):
    configs = tmp_path / 'mmcls/.mim/configs/a'
    configs.mkdir(parents=True)
    (tmp_path / 'mmcls/__init__.py').touch()
    (tmp_path / 'mmcls/.mim/model-index.yml').write_text('Import: []\n')
    (configs / 'b.py').write_text("model = dict(type='X')\n")
    (tmp_path / 'mine.py').write_text("_base_ = 'mmcls::a/b.py'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    assert Config.fromfile(tmp_path / 'mine.py').model == dict(type='X', _scope_='mmcls')
