"""Flux: tokens of 2x2 latents as in LongCat-Image, text from CLIP and T5, and guidance that may be embedded."""
import functools
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from diffusers import FluxTransformer2DModel, ModelMixin
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.backbones.base import Backbone, pack, unpack
from cdm_plugin.conditioners import PipelineConditioner, TokenCount


@functools.lru_cache(maxsize=64)
def position_ids(text_tokens: int, height: int, width: int, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Positions of text (L, 3), all zero, and of image tokens (height width, 3), (0, row, column); made once a size."""
    with torch.device(device):
        return torch.zeros(text_tokens, 3), torch.cartesian_prod(*(torch.arange(n).float() for n in (1, height, width)))


@MODELS.register_module()
class FluxBackbone(Backbone):
    """Flux.1: diffusers' FluxTransformer2DModel. Its timestep is sigma itself.

    Args:
        embedded_guidance (float, optional): Guidance that a guidance-distilled network (`guidance_embeds`) is told,
            in every call. Default: what an exported folder says, else 3.5.
        *args, **kwargs: As in `Backbone`. `guidance_scale` in sampling is classifier-free guidance, the pipeline's
            `true_cfg_scale`.
    """
    network_class = FluxTransformer2DModel
    pipeline_name = 'FluxPipeline'
    conditioner_type = 'FluxTextConditioner'
    time_embedder = 'time_text_embed'
    repeated_blocks = tuple(FluxTransformer2DModel._repeated_blocks)
    patch = 2

    def __init__(self, *args: Any, embedded_guidance: Optional[float] = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        saved = self._saved_parts().get('embedded_guidance', 3.5)
        self.embedded_guidance = saved if embedded_guidance is None else embedded_guidance

    def save_pretrained(self, network: ModelMixin, folder: Union[str, Path], **recipe: Any) -> None:
        super().save_pretrained(network, folder, embedded_guidance=self.embedded_guidance, **recipe)

    def pipeline_defaults(self) -> Dict[str, Any]:
        """As in `Backbone`; the pipeline's own `guidance_scale` is the embedded one."""
        return {**super().pipeline_defaults(), 'guidance_scale': 1.0}

    @property
    def latent_channels(self) -> int:
        return self.config['in_channels'] // 4

    def default_latent_size(self) -> Tuple[int, int]:
        return 128, 128

    def condition_widths(self) -> Dict[str, int]:
        return dict(encoder_hidden_states=self.config['joint_attention_dim'],
                    pooled_projections=self.config['pooled_projection_dim'])

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: Dict[str, Tensor]) -> Tensor:
        text, (height, width) = fields['encoder_hidden_states'], x.shape[2:]
        txt_ids, img_ids = position_ids(text.shape[1], height // 2, width // 2, x.device)
        guidance = torch.full_like(sigma, self.embedded_guidance) if self.config['guidance_embeds'] else None
        tokens = network(hidden_states=pack(x), timestep=sigma, encoder_hidden_states=text, txt_ids=txt_ids,
                         img_ids=img_ids, pooled_projections=fields['pooled_projections'], guidance=guidance,
                         return_dict=False)[0]
        return unpack(tokens, height, width)


@MODELS.register_module()
class FluxTextConditioner(PipelineConditioner):
    """Flux's own text encoders, through `FluxPipeline.encode_prompt`: CLIP's pooled vector and T5's tokens.

    Args:
        pretrained (str): Hub id or folder of a Flux pipeline.
        max_sequence_length (int): Tokens for T5, at most 512. Default 512, as in the pipeline (256 for FLUX.1-schnell).
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'FluxPipeline'

    def __init__(self, pretrained: str, max_sequence_length: int = 512, **kwargs: Any) -> None:
        self.max_sequence_length = max_sequence_length
        super().__init__(pretrained, **kwargs)
        self._config.update(max_sequence_length=max_sequence_length)

    def encode_texts(self, prompts: List[str]) -> Dict[str, Tensor]:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length)
        return dict(encoder_hidden_states=tokens, pooled_projections=pooled)

    def count_tokens(self, prompts: List[str]) -> List[TokenCount]:
        return [TokenCount(name, limit, [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids])
                for name, tokenizer, limit in (
                    ('CLIP', self.pipeline.tokenizer, self.pipeline.tokenizer_max_length),
                    ('T5', self.pipeline.tokenizer_2, self.max_sequence_length))]
