from cdm_plugin.backbones.base import Backbone
from cdm_plugin.backbones.sd3 import SD3Backbone

__all__ = ['Backbone', 'SD3Backbone']
