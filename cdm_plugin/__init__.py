"""Continuous-time distribution matching (CDM, arXiv 2605.06376) as an MMEngine plug-in.

Importing this package registers its methods, losses, hooks, ... in MMEngine's root registries and loads the plug-ins
of other distributions; `custom_imports = dict(imports=['cdm_plugin'])` in a config is all a run needs.
"""
from cdm_plugin import mmengine_compat, plugins
from cdm_plugin.version import __version__

mmengine_compat.apply()
plugins.load()

__all__ = ['__version__']
