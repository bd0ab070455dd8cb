"""Finds packages without `pkg_resources`, which setuptools 82 removed, and those that give the import `mmengine`."""
import importlib.metadata
import importlib.util
import os
from pathlib import Path

import mmengine


def is_installed(package: str) -> bool:
    """Tells whether a distribution or an importable module (not a namespace package) has this name.

    Args:
        package (str): Name of the distribution or module.
    """
    try:
        importlib.metadata.distribution(package)
        return True
    except importlib.metadata.PackageNotFoundError:
        spec = importlib.util.find_spec(package)
        return spec is not None and spec.origin is not None


def get_installed_path(package: str) -> str:
    """Finds the directory of a package, editable installs and PYTHONPATH included.

    Args:
        package (str): Name of the distribution (mmcv-full) or of the module (mmcv).

    Returns:
        str: The directory.

    Raises:
        PackageNotFoundError: If nothing of this name is installed or importable.
        RuntimeError: If it is a namespace package, which has no directory of its own.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        spec = importlib.util.find_spec(package2module(package))
    if spec is None or spec.origin is None:
        raise RuntimeError(f'{package} is a namespace package, which is invalid for `get_installed_path`')
    return os.path.dirname(spec.origin)


def package2module(package: str) -> str:
    """Infers the name of the module that a distribution installs.

    Args:
        package (str): Name of the distribution.

    Raises:
        PackageNotFoundError: If it is not installed.
        ValueError: If it does not say which module it installs.
    """
    distribution = importlib.metadata.distribution(package)
    names = (distribution.read_text('top_level.txt') or '').split()
    # Only setuptools writes top_level.txt; other builders leave the list of files.
    names = names or [file.parts[0] for file in distribution.files or [] if file.name == '__init__.py']
    if not names:
        raise ValueError(f'can not infer the module name of {package}')
    return names[0]


def mmengine_distributions() -> list[importlib.metadata.Distribution]:
    """The installed distributions that say to have written the `mmengine` that is imported: one, stock MMEngine or a
    fork of it, if all is well."""
    imported = Path(mmengine.__file__).resolve()
    return [distribution for distribution in importlib.metadata.distributions()
            if '\nmmengine/__init__.py,' in '\n' + (distribution.read_text('RECORD') or '')
            and Path(str(distribution.locate_file('mmengine/__init__.py'))).resolve() == imported]
