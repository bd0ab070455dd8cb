"""Continuous-time distribution matching (CDM, arXiv 2605.06376) as an MMEngine plug-in.

Importing this package registers its methods, losses, hooks, ... in MMEngine's root registries and loads the plug-ins
of other distributions; `custom_imports = dict(imports=['cdm_plugin'])` in a config is all a run needs.
"""
import logging

from cdm_plugin import compat, plugins, secrets
from cdm_plugin.version import __version__

# Diffusers imports xformers wherever it is installed, and that says in five lines, in every process, if it was built
# for another torch. `roles.attention.xformers_state` says it in one, in the log.
logging.getLogger('xformers').addFilter(lambda record: "can't load C++/CUDA extensions" not in record.getMessage())
compat.apply()
secrets.hide_secrets()
plugins.load()

__all__ = ['__version__']
