"""Finds, imports and lists plug-ins: the package's own parts first, then those of other distributions.

Every plug-in is an entry point of the group `cdm_plugin`. Importing its module registers its classes in MMEngine's
root registries, and the module itself is handed to pluggy for the hooks of `hookspecs.py`:

    from cdm_plugin.plugins import hookimpl

    @hookimpl
    def cdm_student_losses(method):
        return dict(sharpness=dict(type='SharpnessLoss', weight=0.1))
"""
from __future__ import annotations

import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

# MMEngine's own classes have to be registered before a plug-in's are told apart from them.
import mmengine.runner  # noqa: F401
import pluggy
from mmengine import registry as root

from cdm_plugin import hookspecs
from cdm_plugin.hookspecs import PROJECT, hookimpl

__all__ = ['PARTS', 'PluginInfo', 'format_table', 'hookimpl', 'load', 'loaded', 'manager']

GROUP = PROJECT
OWN = 'cdm-plugin'  # this distribution's name, normalised
DISABLE = 'CDM_DISABLE_PLUGINS'
INSTALL = '`pip install -e .` (or `pip install .`) in a checkout'

# The same list, in the same order, as in setup.py: setuptools sorts the entry points that it writes.
PARTS = ('time_grids', 'sigma_samplers', 'losses', 'conditioners', 'codecs', 'backbones', 'methods', 'data', 'engine',
         'evaluation', 'hooks')


@dataclass(frozen=True)
class PluginInfo:
    """What became of one plug-in.

    Attributes:
        name (str): '<distribution>:<entry point>', also its name in `manager`.
        distribution (str): Name of the distribution that declares it.
        version (str): Version of that distribution.
        entry_point (str): Name of the entry point.
        module (str): Module that the entry point names.
        location (str): File of the module; the folder of the distribution's metadata where it was not imported.
        status (str): 'loaded', 'failed' or 'disabled'.
        error (str): Why it failed, otherwise empty.
        registered (tuple[str, ...]): What it added to MMEngine's root registries, as 'MODELS.CDM'. A plug-in that
            failed half-way lists what it had added until then, and leaves it there.
    """

    name: str
    distribution: str
    version: str
    entry_point: str
    module: str
    location: str
    status: str
    error: str = ''
    registered: tuple[str, ...] = ()


class _Entry(NamedTuple):
    """An entry point and the distribution that it was found in."""

    point: metadata.EntryPoint
    distribution: str
    version: str
    folder: str

    @property
    def key(self) -> str:
        return f'{self.distribution}:{self.point.name}'

    @property
    def module(self) -> str:
        return self.point.value.partition(':')[0].strip()

    @property
    def is_own(self) -> bool:
        return _normalise(self.distribution) == OWN


class _Manager(pluggy.PluginManager):
    """pluggy's manager; before hooks are called, it takes in the plug-ins whose import was not finished at `load`."""

    @property
    def hook(self) -> pluggy.HookRelay:
        if _waiting:
            _load_waiting()
        return self._relay

    @hook.setter
    def hook(self, relay: pluggy.HookRelay) -> None:
        self._relay = relay


def _make_manager() -> pluggy.PluginManager:
    made = _Manager(GROUP)
    made.add_hookspecs(hookspecs)
    return made


_infos: dict[str, PluginInfo] = {}
# Plug-ins that somebody imported before cdm_plugin, and that import it themselves: their hooks do not exist yet.
_waiting: dict[str, _Entry] = {}
manager = _make_manager()


def load() -> None:
    """Load every plug-in that is not loaded yet; what has been loaded, or has failed, is left alone.

    The environment variable `CDM_DISABLE_PLUGINS=1` leaves the plug-ins of other distributions out. One of them that
    fails is warned about and stops nothing; `loaded` says why it failed.

    Raises:
        ImportError: One of the package's own parts cannot be imported, or the package is not installed.
    """
    entries = _find_entries()
    own = {entry.point.name: entry for entry in entries if entry.is_own}
    _check_parts_declared(own)
    for part in PARTS:
        _load_own(own[part])
    failures = [info for entry in entries if not entry.is_own if (info := _load_outside(entry)) is not None]
    for info in failures:  # last, so that turning warnings into errors leaves no plug-in unloaded
        _warn(info)


def loaded() -> list[PluginInfo]:
    """All plug-ins that were found, in the order in which they were loaded, with what became of each."""
    _load_waiting()
    return list(_infos.values())


def format_table(infos: Iterable[PluginInfo]) -> str:
    """Plug-ins as aligned text of 100 columns; names and paths are never broken, so a long path may stick out."""
    infos = list(infos)
    heads = [('plug-in', 'version', 'status')] + [(info.name, info.version, info.status) for info in infos]
    widths = [max(map(len, column)) for column in zip(*heads)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(head, widths)).rstrip() for head in heads]
    blocks = [lines[0]] + [line + _details(info) for line, info in zip(lines[1:], infos)]
    return '\n'.join(blocks)


def _details(info: PluginInfo) -> str:
    """The indented lines below a plug-in's name."""
    texts = dict(module=f'{info.module} in {info.location}', adds=', '.join(info.registered), error=info.error)
    return ''.join('\n' + _wrap(label, text) for label, text in texts.items() if text)


def _wrap(label: str, text: str) -> str:
    return textwrap.fill(text, width=100, initial_indent=f'    {label:<7}', subsequent_indent=' ' * 11,
                         break_long_words=False, break_on_hyphens=False)


def _find_entries() -> list[_Entry]:
    """The group's entry points, each distribution once.

    An editable checkout has two copies of its metadata, installed and egg-info. As for modules, the first on
    `sys.path` counts.
    """
    seen, entries = set(), []
    for found in metadata.distributions():
        if f'[{GROUP}]' not in (found.read_text('entry_points.txt') or ''):
            continue
        name, version = found.metadata['Name'] or 'unknown', found.metadata['Version'] or ''
        if _normalise(name) in seen:
            continue
        seen.add(_normalise(name))
        folder = str(Path(found.locate_file('')).resolve())
        entries += [_Entry(point, name, version, folder) for point in found.entry_points if point.group == GROUP]
    return entries


def _check_parts_declared(own: dict[str, _Entry]) -> None:
    stale = [part for part in (*PARTS, *own) if part not in own or part not in PARTS]
    if not own:
        raise ImportError(f'cdm_plugin is imported from {Path(__file__).parent} but is not installed: no distribution '
                          f'declares its parts. Install it with {INSTALL}.')
    if stale:
        raise ImportError(f'the code in {Path(__file__).parent} and the installed metadata of cdm_plugin differ in '
                          f'version, to judge by its parts ({", ".join(stale)}). Install it again with {INSTALL}.')


def _load_own(entry: _Entry) -> None:
    if entry.key in _infos or _is_being_imported(entry.module):
        return
    info, error = _load_entry(entry)
    if error is not None:
        raise ImportError(f'cdm_plugin cannot load its own part {entry.point.name!r} ({entry.module}): {info.error}. '
                          f'If something is missing, install it again with {INSTALL}.') from error
    _infos[entry.key] = info


def _load_outside(entry: _Entry) -> PluginInfo | None:
    """Load the plug-in of another distribution if it is due; what failed is returned."""
    known = _infos.get(entry.key)
    if known is not None and known.status != 'disabled':
        return None
    if os.environ.get(DISABLE, '') not in ('', '0'):
        _infos[entry.key] = _info(entry, 'disabled')
        return None
    if _is_being_imported(entry.module):
        _waiting[entry.key] = entry
        return None
    _infos[entry.key], error = _load_entry(entry)
    return None if error is None else _infos[entry.key]


def _load_waiting() -> None:
    for key, entry in list(_waiting.items()):
        if not _is_being_imported(entry.module) and _waiting.pop(key, None) and (failed := _load_outside(entry)):
            _warn(failed)


def _warn(info: PluginInfo) -> None:
    warnings.warn(f'the plug-in {info.entry_point!r} ({info.module}) of the distribution {info.distribution!r} '
                  f'failed and is left out: {info.error}', RuntimeWarning, stacklevel=3)


def _load_entry(entry: _Entry) -> tuple[PluginInfo, BaseException | None]:
    """Import an entry point and register it with pluggy."""
    before = _registered()
    error = None
    try:
        _register(entry.key, entry.point.load())
    except (Exception, SystemExit) as caught:  # a module that exits must not end the training that did not ask for it
        error = caught
    # What the module itself defines is counted even if somebody had imported the module before.
    added = tuple(sorted(name for name, module in _registered().items()
                         if name not in before or f'{module}.'.startswith(f'{entry.module}.')))
    status, text = ('loaded', '') if error is None else ('failed', f'{type(error).__name__}: {error}')
    return _info(entry, status, text, added), error


def _register(key: str, plugin: object) -> None:
    """Hand a plug-in to pluggy, which checks names and arguments of its hooks."""
    try:
        manager.register(plugin, name=key)
        manager.check_pending()
    except pluggy.PluginValidationError:
        if manager.has_plugin(key):  # depends on pluggy's version
            manager.unregister(name=key)
        raise


def _info(entry: _Entry, status: str, error: str = '', registered: tuple[str, ...] = ()) -> PluginInfo:
    location = getattr(sys.modules.get(entry.module), '__file__', None) or entry.folder
    return PluginInfo(entry.key, entry.distribution, entry.version, entry.point.name, entry.module, location, status,
                      ' '.join(error.split()), registered)


def _is_being_imported(module: str) -> bool:
    """Whether the import of a module has begun and not ended."""
    spec = getattr(sys.modules.get(module), '__spec__', None)
    return getattr(spec, '_initializing', False)


def _registered() -> dict[str, str]:
    """All names in MMEngine's root registries, as 'MODELS.CDM', and the module that each object comes from."""
    registries = {name: value for name, value in vars(root).items() if isinstance(value, root.Registry)}
    return {f'{name}.{key}': getattr(value, '__module__', '')
            for name, registry in registries.items() for key, value in registry.module_dict.items()}


def _normalise(distribution: str) -> str:
    return re.sub(r'[-_.]+', '-', distribution).lower()
