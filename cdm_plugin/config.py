"""Loads configs, and finds their mistakes before anything is built."""
import difflib
import inspect
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from mmengine import registry as root
from mmengine.config import Config
from mmengine.registry import Registry

RECIPES = Path(__file__).parent / '.mim' / 'configs'


def find_config(path: str) -> str:
    """A config's file: a path, or the name of a shipped recipe such as `digits/cdm_sd3-digits_1xb32_4step_800.py`.

    Raises:
        FileNotFoundError: If it is neither; the message lists the shipped recipes of that folder.
    """
    if Path(path).is_file():
        return path
    name = path.split('::')[-1]
    for candidate in (name, name + '.py', name.removeprefix('configs/')):
        if (RECIPES / candidate).is_file():
            return str(RECIPES / candidate)
    shipped = sorted(str(p.relative_to(RECIPES)) for p in RECIPES.glob('[!_]*/*.py'))
    raise FileNotFoundError(f'config {path!r} is no file and no shipped recipe; shipped are {", ".join(shipped)}')


def load_config(path: str, options: Optional[Dict[str, Any]] = None) -> Config:
    """Reads a config, applies options (dotted key -> value) and checks it.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If the config has a mistake that `check_config` finds.
    """
    cfg = read_config(path, options)
    check_config(cfg)
    return cfg


def read_config(path: str, options: Optional[Dict[str, Any]] = None) -> Config:
    """The same without the check."""
    cfg = Config.fromfile(find_config(path))
    cfg.merge_from_dict(options or {})
    return cfg


def check_config(cfg: Config) -> None:
    """Checks every dict with a `type`: the type is registered, and the classes of this package know its keys.

    Raises:
        ValueError: One line that names the key and what was probably meant.
    """
    for key in ('model', 'train_dataloader', 'optim_wrapper', 'train_cfg'):
        if key not in cfg:
            raise ValueError(f'the config has no {key!r}: a training config needs model, train_dataloader, '
                             'optim_wrapper and train_cfg')
    if cfg.get('default_scope', 'mmengine') not in (None, 'mmengine'):
        return  # another library's registries have to be imported first; its own errors speak
    for path, part in _typed_parts(cfg.to_dict(), ''):
        _check_part(path, part)


def _typed_parts(value: Any, path: str) -> Iterator[Tuple[str, Dict[str, Any]]]:
    if isinstance(value, dict):
        if isinstance(value.get('type'), str):
            yield path, value
        for key, child in value.items():
            if key in ('metainfo', 'meta'):
                continue  # the user's own data
            yield from _typed_parts(child, f'{path}.{key}' if path else str(key))
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            yield from _typed_parts(child, f'{path}[{i}]')


def _registries() -> List[Registry]:
    return [r for r in vars(root).values() if isinstance(r, Registry)]


def _check_part(path: str, part: Dict[str, Any]) -> None:
    name = part['type']
    if '.' in name:
        return  # a scope or an import path: MMEngine resolves it
    found = [r.module_dict[name] for r in _registries() if name in r.module_dict]
    if not found:
        known = sorted({n for r in _registries() for n in r.module_dict})
        raise ValueError(f'{path}.type={name!r} is not registered{_suggest(name, known)}')
    for cls in found:
        if inspect.isclass(cls) and cls.__module__.startswith('cdm_plugin'):
            _check_keys(path, part, cls)


def _check_keys(path: str, part: Dict[str, Any], cls: type) -> None:
    parameters = _parameters(cls)
    if parameters is None:
        return
    runner_keys = {'type', 'priority', 'data_preprocessor'}
    for key in part:
        if key not in parameters and key not in runner_keys:
            raise ValueError(f'{path}.{key} is unknown: {cls.__name__} takes {", ".join(sorted(parameters))}'
                             f'{_suggest(key, sorted(parameters))}')


def _parameters(cls: type) -> Optional[List[str]]:
    """Names of a class's arguments; None if a base class outside this package, or what it hands them to, takes any."""
    if getattr(cls, 'hands_on_keys', False):
        return None
    names: List[str] = []
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        names += [n for n, p in parameters.items() if n != 'self' and p.kind is not p.VAR_KEYWORD]
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            return names
        if not base.__module__.startswith('cdm_plugin'):
            return None
    return names


def _suggest(word: str, known: List[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f'; did you mean {close[0]!r}?' if close else ''
