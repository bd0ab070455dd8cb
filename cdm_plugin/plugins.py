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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

# MMEngine's own classes have to be registered before a plug-in's are told apart from them.
import mmengine.runner  # noqa: F401
import pluggy
from mmengine import registry as root

from cdm_plugin import hookspecs
from cdm_plugin.arguments import guard
from cdm_plugin.hookspecs import PROJECT, hookimpl

__all__ = ['PARTS', 'PluginInfo', 'absent', 'format_table', 'hookimpl', 'hooks_of', 'load', 'loaded', 'manager']

OWN = 'cdm-plugin'  # this distribution's name, normalised
DISABLE = 'CDM_DISABLE_PLUGINS'
INSTALL = '`pip install -e .` (or `pip install .`) in a checkout'

# The same list, in the same order, as in setup.py: setuptools sorts the entry points that it writes.
PARTS = ('time_grids', 'sigma_samplers', 'losses', 'conditioners', 'codecs', 'backbones', 'methods', 'data', 'engine',
         'metrics', 'hooks')


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
        status (str): 'loaded', 'failed', 'disabled', or 'waiting' while the import of its module is not finished.
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
    status: str = 'waiting'
    error: str = ''
    registered: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f'the plug-in {self.entry_point!r} ({self.module}) of the distribution {self.distribution!r}'

    @property
    def remedy(self) -> str:
        """What to do when it fails."""
        return f'Update or uninstall {self.distribution}, or leave all plug-ins out with {DISABLE}=1'


class _Manager(pluggy.PluginManager):
    """pluggy's manager. A plug-in that somebody imported first, and that imports cdm_plugin, has no hooks yet when
    `load` meets it: such ones are taken in before hooks are called."""

    @property  # type: ignore[misc]
    def hook(self) -> pluggy.HookRelay:
        if _infos:
            _load_waiting()
        return self._relay

    @hook.setter
    def hook(self, relay: pluggy.HookRelay) -> None:
        self._relay = relay


def _make_manager() -> pluggy.PluginManager:
    made = _Manager(PROJECT)
    made.add_hookspecs(hookspecs)
    return made


_infos: dict[str, PluginInfo] = {}
_points: dict[str, metadata.EntryPoint] = {}
manager = _make_manager()


def load() -> None:
    """Load every plug-in that is not loaded yet; what has been loaded, or has failed, is left alone.

    The environment variable `CDM_DISABLE_PLUGINS=1` leaves the plug-ins of other distributions out. One of them that
    fails is warned about and stops nothing; `loaded` says why it failed.

    Raises:
        ImportError: One of the package's own parts cannot be imported, or the package is not installed.
    """
    found = _find()
    own = [info for info in found if _is_own(info)]
    _check_parts({info.entry_point for info in own})
    off = os.environ.get(DISABLE, '') not in ('', '0')
    for info in [*sorted(own, key=lambda info: PARTS.index(info.entry_point)),
                 *(info for info in found if not _is_own(info))]:
        known = _infos.setdefault(info.name, info)
        if not _is_own(info) and known.status in ('waiting', 'disabled'):
            _infos[info.name] = replace(known, status='disabled' if off else 'waiting')
    _load_waiting()


def loaded() -> list[PluginInfo]:
    """All plug-ins that were found, in the order in which they were loaded, with what became of each."""
    _load_waiting()
    return list(_infos.values())


def absent() -> str:
    """The end of a message about something that is not there: the plug-ins that are left out, which may have it."""
    out = [f'{info}, {info.error or DISABLE}' for info in loaded() if info.status in ('failed', 'disabled')]
    return f' (left out: {"; ".join(out)})' if out else ''


def hooks_of(name: str) -> Iterator[tuple[PluginInfo, Callable[..., Any]]]:
    """The plug-ins that have a hook, in pluggy's order, and what to call, with keyword arguments."""
    for impl in reversed(getattr(manager.hook, name).get_hookimpls()):
        name = impl.plugin_name
        by_hand = PluginInfo(name, 'registered by hand', '', name, getattr(impl.function, '__module__', name), '')
        yield _infos.get(name, by_hand), partial(_call, impl)


def _call(impl: pluggy.HookImpl, **arguments: Any) -> Any:
    return impl.function(*(arguments[name] for name in impl.argnames))


def format_table(infos: Iterable[PluginInfo]) -> str:
    """Plug-ins as aligned text of 100 columns; names and paths are never broken, so a long path may stick out."""
    infos = list(infos)
    heads = [('plug-in', 'version', 'status')] + [(info.name, info.version, info.status) for info in infos]
    widths = [max(map(len, column)) for column in zip(*heads)]
    lines = ['  '.join(cell.ljust(width) for cell, width in zip(head, widths)).rstrip() for head in heads]
    details = ['', *map(_details, infos)]
    return '\n'.join(line + detail for line, detail in zip(lines, details))


def _details(info: PluginInfo) -> str:
    """The indented lines below a plug-in's name."""
    texts = dict(module=f'{info.module} in {info.location}', adds=', '.join(info.registered), error=info.error)
    return ''.join('\n' + textwrap.fill(text, width=100, initial_indent=f'    {label:<7}', subsequent_indent=' ' * 11,
                                        break_long_words=False, break_on_hyphens=False)
                   for label, text in texts.items() if text)


def _find() -> list[PluginInfo]:
    """The group's entry points, each distribution once: an editable checkout has two copies of its metadata, installed
    and egg-info. As for modules, the first on `sys.path` counts."""
    seen, found = set(), []
    for place in metadata.distributions():
        if f'[{PROJECT}]' not in (place.read_text('entry_points.txt') or ''):
            continue
        name, version = place.metadata['Name'] or 'unknown', place.metadata['Version'] or ''
        if _normalise(name) in seen:
            continue
        seen.add(_normalise(name))
        for point in place.entry_points.select(group=PROJECT):
            key, module = f'{name}:{point.name}', point.value.partition(':')[0].strip()
            _points[key] = point
            folder = Path(str(place.locate_file(''))).resolve()
            found.append(PluginInfo(key, name, version, point.name, module, str(folder)))
    return found


def _check_parts(own: set[str]) -> None:
    if not own:
        raise ImportError(f'cdm_plugin is imported from {Path(__file__).parent} but is not installed: no distribution '
                          f'declares its parts. Install it with {INSTALL}.')
    if own != set(PARTS):
        raise ImportError(f'the code in {Path(__file__).parent} and the installed metadata of cdm_plugin differ in '
                          f'version, to judge by its parts ({", ".join(sorted(own ^ set(PARTS)))}). Install it again '
                          f'with {INSTALL}.')


def _load_waiting() -> None:
    """Load what waits, but for modules whose import has begun elsewhere and not ended."""
    if any(info.status == 'loading' for info in _infos.values()):  # pluggy, or a plug-in while it is imported, asks
        return
    failed = []
    for name in list(_infos):
        info = _infos[name]
        importing = getattr(getattr(sys.modules.get(info.module), '__spec__', None), '_initializing', False)
        if info.status == 'waiting' and not importing:
            _infos[name] = replace(info, status='loading')
            try:
                _infos[name] = _load(info)
            except BaseException:
                _infos[name] = info
                raise
            failed += [_infos[name]] if _infos[name].error else []
    for info in failed:  # last, so that turning warnings into errors leaves no plug-in unloaded
        warnings.warn(f'{info} failed and is left out: {info.error}. {info.remedy}', RuntimeWarning, stacklevel=3)


def _load(info: PluginInfo) -> PluginInfo:
    """Import an entry point and register it with pluggy."""
    before, status, error = _registered(), 'loaded', ''
    try:
        _register(info.name, _points[info.name].load())
    except (Exception, SystemExit) as caught:  # a module that exits must not end the training that did not ask for it
        status, error = 'failed', ' '.join(f'{type(caught).__name__}: {caught}'.split())
        if _is_own(info):
            raise ImportError(f'cdm_plugin cannot load its own part {info.entry_point!r} ({info.module}): {error}. If '
                              f'something is missing, install it again with {INSTALL}.') from caught
    # What the module itself defines is counted even if somebody had imported the module before.
    added = tuple(sorted(name for name, module in _registered().items()
                         if name not in before or f'{module}.'.startswith(f'{info.module}.')))
    for name in added:
        registry, _, key = name.partition('.')
        guard(getattr(root, registry).module_dict[key], info.module.split('.')[0])
    location = getattr(sys.modules.get(info.module), '__file__', None) or info.location
    return replace(info, location=location, status=status, error=error, registered=added)


def _register(name: str, plugin: object) -> None:
    """Hand a plug-in to pluggy, which checks names and arguments of its hooks."""
    try:
        manager.register(plugin, name=name)
        manager.check_pending()
        for caller in manager.get_hookcallers(plugin) or ():
            if any(impl.plugin is plugin and (impl.wrapper or impl.hookwrapper) for impl in caller.get_hookimpls()):
                raise pluggy.PluginValidationError(plugin, f'{caller.name} may not be a wrapper of other plug-ins')
    except pluggy.PluginValidationError:
        if manager.has_plugin(name):  # depends on pluggy's version
            manager.unregister(name=name)
        raise


def _registered() -> dict[str, str]:
    """All names in MMEngine's root registries, as 'MODELS.CDM', and the module that each object comes from."""
    registries = {name: value for name, value in vars(root).items() if isinstance(value, root.Registry)}
    return {f'{name}.{key}': getattr(value, '__module__', '')
            for name, registry in registries.items() for key, value in registry.module_dict.items()}


def _is_own(info: PluginInfo) -> bool:
    return _normalise(info.distribution) == OWN


def _normalise(distribution: str) -> str:
    return re.sub(r'[-_.]+', '-', distribution).lower()
