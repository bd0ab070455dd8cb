from pathlib import Path
from typing import Any, Dict

from diffusers import SD3Transformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.backbones.base import Backbone


@MODELS.register_module()
class SD3Backbone(Backbone):
    """SD3 and SD3.5: diffusers' SD3Transformer2DModel (Esser et al. 2024). Its timestep is 1000 sigma.

    Arguments as in `Backbone`. With a StableDiffusion3 pipeline as `pretrained`, its text encoders and VAE are the
    default conditioner and codec; `conditioner` and `codec` replace them, for class-conditional or pixel-space models.
    """
    network_class = SD3Transformer2DModel
    time_embedder = 'time_text_embed'

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: Dict[str, Tensor]) -> Tensor:
        return network(hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=fields['encoder_hidden_states'],
                       pooled_projections=fields['pooled_projections'], return_dict=False)[0]

    def condition_widths(self) -> Dict[str, int]:
        return dict(encoder_hidden_states=self.config['joint_attention_dim'],
                    pooled_projections=self.config['pooled_projection_dim'])

    def default_parts(self) -> Dict[str, Dict[str, Any]]:
        if self.pretrained is None:
            return {}
        # A local folder without text encoders or VAE (a class-conditional model) has no such default.
        local, parts = Path(self.pretrained).is_dir(), {}
        if not local or Path(self.pretrained, 'text_encoder').is_dir():
            parts['conditioner'] = dict(type='SD3TextConditioner', pretrained=self.pretrained, **self.load_kwargs)
        if not local or Path(self.pretrained, 'vae').is_dir():
            parts['codec'] = dict(type='VAECodec', pretrained=self.pretrained, **self.load_kwargs)
        return parts
