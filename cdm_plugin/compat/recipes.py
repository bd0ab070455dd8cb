"""Recipes of this package as `_base_`: `cdm_plugin::sd3/x.py`, and `cdm_plugin.configs.sd3.x` in `read_base`."""
from pathlib import Path

import mmengine.config.config as config_module
import mmengine.config.utils as config_utils
from mmengine.config import Config

from cdm_plugin.compat.packages import get_installed_path

PACKAGE = 'cdm_plugin'
MIM = Path(__file__).parents[1] / '.mim'

_stock_cfg_path = Config._get_cfg_path


def add_recipes() -> None:
    """Makes MMEngine's configs find them."""
    config_utils.MODULE2PACKAGE.setdefault(PACKAGE, PACKAGE)
    config_module.get_installed_path = _lazy_base_path
    Config._get_cfg_path = staticmethod(_get_cfg_path)


def _lazy_base_path(package: str) -> str:
    """Where `read_base` looks: cdm_plugin.configs is no module, its recipes are installed below .mim."""
    return str(MIM) if package == PACKAGE else get_installed_path(package)


def _get_cfg_path(cfg_path: str, filename: str) -> tuple:
    """Resolves one `_base_`. Ours has no scope: its parts are in the root registries, so `_scope_` would only warn."""
    if not cfg_path.startswith(f'{PACKAGE}::'):
        return _stock_cfg_path(cfg_path, filename)
    return config_utils._get_external_cfg_base_path(str(MIM.parent), cfg_path.partition('::')[2]), None
