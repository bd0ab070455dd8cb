"""Qwen-Image: tokens of 2x2 latents, texts of any length from Qwen2.5-VL, guidance that keeps the length of a token."""
import inspect
from typing import Annotated, Any

import torch
from annotated_types import Le
from diffusers import AutoencoderKLQwenImage, ModelMixin, QwenImageTransformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.arguments import Count
from cdm_plugin.backbones.base import Backbone, pack, unpack
from cdm_plugin.backbones.published import DYNAMIC_SHIFT
from cdm_plugin.codecs import VAECodec
from cdm_plugin.condition import MASK
from cdm_plugin.conditioners import Encoder, LimitedPipelineConditioner, TokenCount


@MODELS.register_module()
class QwenImageBackbone(Backbone):
    """Qwen-Image: diffusers' QwenImageTransformer2DModel. Its timestep is sigma itself.

    Arguments as in `Backbone`. With a Qwen-Image pipeline as `pretrained`, its text encoder and VAE are the default
    conditioner and codec. `guidance_scale` in sampling is the pipeline's `true_cfg_scale`.
    """
    network_class = QwenImageTransformer2DModel
    pipeline_name = 'QwenImagePipeline'
    conditioner_type = 'QwenImageTextConditioner'
    codec_type = 'QwenImageCodec'
    time_embedder = 'time_text_embed'
    time_scale = 1
    patch = 2
    takes_mask = True
    whole_in_comfyui = True
    has_idle_weights = True  # the last block's text goes nowhere
    published_scheduler = {**DYNAMIC_SHIFT, 'max_shift': 0.9, 'max_image_seq_len': 8192, 'shift_terminal': 0.02}
    published_vae = {}  # the defaults of its class

    def empty_network(self, dtype: torch.dtype | None = None) -> ModelMixin:
        network = super().empty_network(dtype)
        rope = network.pos_embed  # its tables are no buffers: nobody would fill them
        network.pos_embed = type(rope)(rope.theta, rope.axes_dim, rope.scale_rope)
        return network

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        if scale == 1:
            return dict(true_cfg_scale=scale)
        return dict(true_cfg_scale=scale, negative_prompt=getattr(self.conditioner, 'negative_prompt', ''))

    def pipeline_defaults(self) -> dict[str, Any]:
        """As in `Backbone`; the pipeline's own `guidance_scale` is none of its network."""
        parameters = inspect.signature(self.pipeline_class().__call__).parameters
        return {**super().pipeline_defaults(), 'guidance_scale': parameters['true_cfg_scale'].default}

    @property
    def latent_channels(self) -> int:
        return self.config['in_channels'] // 4

    def output_channels(self) -> int:
        return self.config['patch_size']**2 * (self.config['out_channels'] or self.config['in_channels'])

    def default_latent_size(self) -> tuple[int, int]:
        return 128, 128

    def condition_widths(self) -> dict[str, int]:
        return dict(encoder_hidden_states=self.config['joint_attention_dim'])

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        height, width = x.shape[2:]
        tokens = network(
            hidden_states=pack(x), timestep=sigma, encoder_hidden_states=fields['encoder_hidden_states'],
            encoder_hidden_states_mask=fields.get('encoder_hidden_states' + MASK),
            img_shapes=[[(1, height // 2, width // 2)]] * len(x), return_dict=False)[0]
        return unpack(tokens, height, width)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance; every token's velocity gets as long as the conditional one."""
        tokens = pack(super().guide(conditional, unconditional, scale))
        lengths = [t.norm(dim=-1, keepdim=True) for t in (pack(conditional), tokens)]
        return unpack(tokens * (lengths[0] / lengths[1]), *conditional.shape[2:])


@MODELS.register_module()
class QwenImageTextConditioner(LimitedPipelineConditioner):
    """Qwen-Image's own text encoder, through `QwenImagePipeline.encode_prompt`: as many tokens as a text has, and 5.

    Args:
        pretrained (str): Hub id or folder of a Qwen-Image pipeline.
        max_sequence_length (int): Tokens at most, up to 1024. Default 512, as in the pipeline.
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'QwenImagePipeline'
    published_encoders = (Encoder('text_encoder', 'Qwen2.5-VL-7B', 8_292_166_656),)

    def __init__(self, pretrained: str, max_sequence_length: Annotated[Count, Le(1024)] = 512, **kwargs: Any) -> None:
        super().__init__(pretrained, max_sequence_length, **kwargs)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, mask = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length)
        return dict(encoder_hidden_states=states) | ({} if mask is None else {'encoder_hidden_states' + MASK: mask})

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        texts = [self.pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        lengths = [len(ids) - self.pipeline.prompt_template_encode_start_idx
                   for ids in self.pipeline.tokenizer(texts, verbose=False).input_ids]
        return [TokenCount('Qwen2.5-VL', self.max_sequence_length, lengths)]


@MODELS.register_module()
class QwenImageCodec(VAECodec):
    """Diffusers' AutoencoderKLQwenImage, whose images are videos of one frame; arguments as in `VAECodec`."""
    vae_class = AutoencoderKLQwenImage

    def scale_of(self, config: Any) -> int:
        return 2**len(config.temperal_downsample)

    def read_config(self, config: Any) -> None:
        self.scale = self.scale_of(config)
        self.register_buffer('shift', torch.tensor(config.latents_mean)[:, None, None], persistent=False)
        self.register_buffer('factor', 1 / torch.tensor(config.latents_std)[:, None, None], persistent=False)

    def run_encoder(self, images: Tensor) -> Tensor:
        return super().run_encoder(images[:, :, None])[:, :, 0]

    def run_decoder(self, latents: Tensor) -> Tensor:
        return super().run_decoder(latents[:, :, None])[:, :, 0]
