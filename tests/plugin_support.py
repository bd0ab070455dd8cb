"""Plug-ins that are only written down: metadata and modules in a folder on `sys.path`."""
import importlib
import sys
from pathlib import Path

import pytest
from mmengine import registry as root

from cdm_plugin import plugins


class Site:
    """A folder on `sys.path` where a test installs distributions by writing their metadata and modules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, entries: dict, version='1.0', suffix='dist-info', commands: dict = {},
                **modules: str) -> None:
        info = self.folder / f'{name.replace("-", "_")}-{version}.{suffix}'
        info.mkdir()
        metadata = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: Parts of {name}\n'
        (info / ('METADATA' if suffix == 'dist-info' else 'PKG-INFO')).write_text(metadata)
        groups = {'cdm_plugin': entries, **({'cdm_plugin.commands': commands} if commands else {})}
        (info / 'entry_points.txt').write_text('\n'.join(
            f'[{group}]\n' + ''.join(f'{key} = {value}\n' for key, value in points.items())
            for group, points in groups.items()))
        for module, source in modules.items():
            (self.folder / f'{module}.py').write_text(source)
        importlib.invalidate_caches()


@pytest.fixture
def make_site(tmp_path, monkeypatch):
    """Makes sites; afterwards modules, registries, pluggy and the list of plug-ins are what they were before."""
    monkeypatch.setattr(plugins, 'manager', plugins._make_manager())
    for name in ('_infos', '_points'):
        monkeypatch.setattr(plugins, name, dict(getattr(plugins, name)))
    monkeypatch.delenv('CDM_DISABLE_PLUGINS', raising=False)
    for registry in [value for value in vars(root).values() if isinstance(value, root.Registry)]:
        monkeypatch.setattr(registry, '_module_dict', dict(registry._module_dict))

    def make(name: str = 'site') -> Site:
        (tmp_path / name).mkdir()
        monkeypatch.syspath_prepend(tmp_path / name)
        return Site(tmp_path / name)

    yield make
    for name, module in list(sys.modules.items()):
        if str(getattr(module, '__file__', None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def site(make_site):
    return make_site()
