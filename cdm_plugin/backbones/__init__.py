from cdm_plugin.backbones.base import Backbone
from cdm_plugin.backbones.flux import FluxBackbone, FluxTextConditioner
from cdm_plugin.backbones.longcat_image import LongCatImageBackbone, LongCatImageTextConditioner
from cdm_plugin.backbones.sd3 import SD3Backbone, SD3TextConditioner

__all__ = ['Backbone', 'FluxBackbone', 'FluxTextConditioner', 'LongCatImageBackbone', 'LongCatImageTextConditioner',
           'SD3Backbone', 'SD3TextConditioner']
