from cdm_plugin.backbones.base import Backbone
from cdm_plugin.backbones.flux import FluxBackbone, FluxTextConditioner
from cdm_plugin.backbones.flux2 import Flux2Backbone, Flux2TextConditioner
from cdm_plugin.backbones.flux2_klein import Flux2Codec, Flux2KleinBackbone, Flux2KleinTextConditioner
from cdm_plugin.backbones.krea2 import Krea2Backbone, Krea2TextConditioner
from cdm_plugin.backbones.longcat_image import LongCatImageBackbone, LongCatImageTextConditioner
from cdm_plugin.backbones.qwen_image import QwenImageBackbone, QwenImageCodec, QwenImageTextConditioner
from cdm_plugin.backbones.sd3 import SD3Backbone, SD3TextConditioner
from cdm_plugin.backbones.z_image import ZImageBackbone, ZImageTextConditioner

__all__ = ['Backbone', 'Flux2Backbone', 'Flux2Codec', 'Flux2KleinBackbone', 'Flux2KleinTextConditioner',
           'Flux2TextConditioner', 'FluxBackbone', 'FluxTextConditioner', 'Krea2Backbone', 'Krea2TextConditioner',
           'LongCatImageBackbone', 'LongCatImageTextConditioner', 'QwenImageBackbone', 'QwenImageCodec',
           'QwenImageTextConditioner', 'SD3Backbone', 'SD3TextConditioner', 'ZImageBackbone', 'ZImageTextConditioner']
