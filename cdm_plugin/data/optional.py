"""Packages of which a training needs some only if its data do."""
import importlib
from typing import Any


def needed(package: str, kind: str) -> Any:
    """Imports a package.

    Args:
        package (str): Its name.
        kind (str): The dataset that needs it, for the message.

    Raises:
        ImportError: If it is missing; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{kind} needs the package {package} ({error}): pip install 'cdm_plugin[data]'") from error
