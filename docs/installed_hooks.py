"""Shows mkdocstrings the hooks where an installed package has them: `hooks/` is `cdm_plugin.hooks` (setup.py)."""
from typing import Any

import griffe


class InstalledHooks(griffe.Extension):
    """Puts the folder's modules into the package."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs: Any) -> None:
        if pkg.path == 'cdm_plugin':
            pkg.set_member('hooks', loader.load('hooks'))
