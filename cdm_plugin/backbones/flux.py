"""Flux: tokens of 2x2 latents as in LongCat-Image, text from CLIP and T5, and guidance that may be embedded."""
import functools
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.backbones.base import pack, unpack
from cdm_plugin.backbones.embedded_guidance import EmbeddedGuidance
from cdm_plugin.backbones.published import DYNAMIC_SHIFT
from cdm_plugin.conditioners import Encoder, LimitedPipelineConditioner, TokenCount


@functools.lru_cache(maxsize=64)
def position_ids(text_tokens: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of text (L, 3), all zero, and of image tokens (height width, 3), (0, row, column); made once a size."""
    with torch.device(device):
        return torch.zeros(text_tokens, 3), torch.cartesian_prod(*(torch.arange(n).float() for n in (1, height, width)))


@MODELS.register_module()
class FluxBackbone(EmbeddedGuidance):
    """Flux.1: diffusers' FluxTransformer2DModel. Its timestep is sigma itself.

    Arguments as in `EmbeddedGuidance`, of which Flux.1-dev's usual one is 3.5; `guidance_scale` in sampling is the
    pipeline's `true_cfg_scale`.
    """
    network_class = FluxTransformer2DModel
    pipeline_name = 'FluxPipeline'
    conditioner_type = 'FluxTextConditioner'
    time_embedder = 'time_text_embed'
    time_scale = 1000
    patch = 2
    whole_in_comfyui = True
    sd_scripts_layers = {
        'double_blocks.{}.img_attn.qkv': [f'transformer_blocks.{{}}.attn.to_{part}' for part in 'qkv'],
        'double_blocks.{}.img_attn.proj': ['transformer_blocks.{}.attn.to_out.0'],
        'double_blocks.{}.img_mlp.0': ['transformer_blocks.{}.ff.net.0.proj'],
        'double_blocks.{}.img_mlp.2': ['transformer_blocks.{}.ff.net.2'],
        'double_blocks.{}.txt_attn.qkv': [f'transformer_blocks.{{}}.attn.add_{part}_proj' for part in 'qkv'],
        'double_blocks.{}.txt_attn.proj': ['transformer_blocks.{}.attn.to_add_out'],
        'double_blocks.{}.txt_mlp.0': ['transformer_blocks.{}.ff_context.net.0.proj'],
        'double_blocks.{}.txt_mlp.2': ['transformer_blocks.{}.ff_context.net.2'],
        'single_blocks.{}.linear1': [*(f'single_transformer_blocks.{{}}.attn.to_{part}' for part in 'qkv'),
                                     'single_transformer_blocks.{}.proj_mlp'],
        'single_blocks.{}.linear2': ['single_transformer_blocks.{}.proj_out']}
    published_scheduler = DYNAMIC_SHIFT
    published_guidance = 3.5

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        return dict(super().pipeline_guidance(scale), true_cfg_scale=scale)

    @property
    def latent_channels(self) -> int:
        return self.config['in_channels'] // 4

    def default_latent_size(self) -> tuple[int, int]:
        return 128, 128

    def condition_widths(self) -> dict[str, int]:
        return dict(encoder_hidden_states=self.config['joint_attention_dim'],
                    pooled_projections=self.config['pooled_projection_dim'])

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        text, (height, width) = fields['encoder_hidden_states'], x.shape[2:]
        txt_ids, img_ids = position_ids(text.shape[1], height // 2, width // 2, x.device)
        tokens = network(hidden_states=pack(x), timestep=sigma, encoder_hidden_states=text, txt_ids=txt_ids,
                         img_ids=img_ids, pooled_projections=fields['pooled_projections'],
                         guidance=self.guidance_told(sigma), return_dict=False)[0]
        return unpack(tokens, height, width)


@MODELS.register_module()
class FluxTextConditioner(LimitedPipelineConditioner):
    """Flux's own text encoders, through `FluxPipeline.encode_prompt`: CLIP's pooled vector and T5's tokens.

    Args:
        pretrained (str): Hub id or folder of a Flux pipeline.
        max_sequence_length (int): Tokens for T5, at most 512. Default 512, as in the pipeline (256 for FLUX.1-schnell).
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'FluxPipeline'
    published_encoders = (Encoder('text_encoder', 'CLIP-L', 123_060_480),
                          Encoder('text_encoder_2', 'T5-XXL', 4_762_310_656))

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        tokens, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length)
        return dict(encoder_hidden_states=tokens, pooled_projections=pooled)

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        return [TokenCount(name, limit, [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids])
                for name, tokenizer, limit in (
                    ('CLIP', self.pipeline.tokenizer, self.pipeline.tokenizer_max_length),
                    ('T5', self.pipeline.tokenizer_2, self.max_sequence_length))]
