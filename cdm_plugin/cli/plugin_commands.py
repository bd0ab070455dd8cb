"""Commands that plug-ins add to `cdm`: entry points of the group `cdm_plugin.commands`, found without importing one.

The name of the entry point is the command's. What it names has `add_arguments` and `run`, as the modules of
`cdm_plugin.commands` have, and is imported when the command is called. Its line in `cdm --help` is the first of the
module's docstring, which is read from the file.
"""
import ast
import os
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

GROUP = 'cdm_plugin.commands'


@dataclass(frozen=True)
class PluginCommand:
    """A command of another distribution.

    Attributes:
        name (str): The command's.
        distribution (str): Name of the distribution that declares it, or of all that do.
        line (str): What it does.
        points (tuple[EntryPoint, ...]): What names it; more than one if distributions disagree.
        problem (str): Why it cannot be called, otherwise empty.
    """
    name: str
    distribution: str
    line: str
    points: tuple[metadata.EntryPoint, ...]
    problem: str = ''

    @property
    def help(self) -> str:
        """Its line in `cdm --help`."""
        return f'{self.problem or self.line} ({self.distribution})'


def find(own: set[str]) -> dict[str, PluginCommand]:
    """The commands of all installed distributions by name.

    Args:
        own (set[str]): Names that are taken: those of `cdm` itself, which stay its own.
    """
    named: dict[str, list[metadata.EntryPoint]] = {}
    for point in metadata.entry_points(group=GROUP):
        named.setdefault(point.name, []).append(point)
    return {name: _command(name, points, name in own) for name, points in sorted(named.items())}


def _command(name: str, points: list[metadata.EntryPoint], taken: bool) -> PluginCommand:
    distributions, problem = ' and '.join(sorted(point.dist.metadata['Name'] for point in points)), ''
    if os.environ.get('CDM_DISABLE_PLUGINS', '') not in ('', '0'):
        problem = 'left out by CDM_DISABLE_PLUGINS'
    elif taken:
        problem = f'cdm has a command {name!r} itself: another name is needed in the plug-in'
    elif len(points) > 1:
        problem = f'two plug-ins give a command {name!r}: uninstall one of them'
    line = _docstring(points[0].module).removeprefix(f'`cdm {name}`:').strip().removesuffix('.')
    return PluginCommand(name, distributions, line or points[0].dist.metadata['Summary'] or '', tuple(points), problem)


def _docstring(module: str) -> str:
    """The first line of a module's docstring; empty if its file is not found or cannot be read."""
    top, *rest = module.split('.')
    try:
        spec = find_spec(top)  # imports nothing, while a longer name imports the package
        places = [Path(spec.origin)] if not rest else [
            place for folder in spec.submodule_search_locations
            for place in (Path(folder, *rest).with_suffix('.py'), Path(folder, *rest, '__init__.py'))]
        source = next(place for place in places if place.is_file()).read_text(encoding='utf-8')
        return (ast.get_docstring(ast.parse(source)) or '').partition('\n')[0]
    except Exception:  # a stranger's package may be anything; whoever calls the command is told
        return ''
