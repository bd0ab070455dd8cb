"""Krea 2: one stream of text and image tokens, text from twelve layers of Qwen3-VL, Qwen-Image's autoencoder."""
import functools
import math
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.backbones.base import Backbone, pack, unpack
from cdm_plugin.backbones.published import DYNAMIC_SHIFT
from cdm_plugin.condition import MASK, Condition
from cdm_plugin.conditioners import Encoder, LimitedPipelineConditioner, TokenCount


@functools.lru_cache(maxsize=64)
def position_ids(text_tokens: int, height: int, width: int, device: torch.device) -> Tensor:
    """Positions (L + height width, 3), of text zero, of image tokens (0, row, column); made once a size."""
    with torch.device(device):
        image = torch.cartesian_prod(*(torch.arange(n).float() for n in (1, height, width)))
        return torch.cat([torch.zeros(text_tokens, 3), image])


@MODELS.register_module()
class Krea2Backbone(Backbone):
    """Krea 2: diffusers' Krea2Transformer2DModel. Its timestep is sigma itself.

    Arguments as in `Backbone`. With a Krea 2 pipeline as `pretrained`, its text encoder and VAE are the default
    conditioner and codec. The `guidance_scale` of sampling is the usual one, of which 1 is off: one more than the
    pipeline's.
    """
    network_class = Krea2Transformer2DModel
    pipeline_name = 'Krea2Pipeline'
    conditioner_type = 'Krea2TextConditioner'
    codec_type = 'QwenImageCodec'
    time_embedder = 'time_embed'
    lora_targets = ('to_q', 'to_k', 'to_v', 'to_gate', 'to_out.0')
    patch = 2
    takes_mask = True
    published_scheduler = {**DYNAMIC_SHIFT, 'max_image_seq_len': 6400}
    published_vae = {}  # the defaults of its class

    def _load_scheduler(self, scheduler: dict[str, Any] | None) -> FlowMatchEulerDiscreteScheduler:
        """As in `Backbone`; the pipeline of the distilled form has one shift for all sizes."""
        made = super()._load_scheduler(scheduler)
        if scheduler is None and self.pretrained is not None and self.pipeline_class().load_config(
                self.pretrained, **self._hub_kwargs).get('is_distilled'):
            return FlowMatchEulerDiscreteScheduler(shift=math.exp(1.15))
        return made

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        return dict(guidance_scale=scale - 1)

    def pipeline_defaults(self) -> dict[str, Any]:
        defaults = super().pipeline_defaults()
        return {**defaults, 'guidance_scale': 1 + defaults['guidance_scale']}

    @property
    def latent_channels(self) -> int:
        return self.config['in_channels'] // 4

    def default_latent_size(self) -> tuple[int, int]:
        return 128, 128

    def feature_map(self, output: Any, latent_size: tuple[int, int]) -> Tensor:
        """As in `Backbone`; in one stream the text comes first."""
        tokens = output[-1] if isinstance(output, tuple) else output
        return super().feature_map(tokens[:, -self.tokens(latent_size):], latent_size)

    def condition_widths(self) -> dict[str, int]:
        return dict(encoder_hidden_states=self.config['text_hidden_dim'])

    def empty_condition(self, tokens: int) -> Condition:
        shape = (1, tokens, self.config['num_text_layers'], self.config['text_hidden_dim'])
        return Condition(dict(encoder_hidden_states=torch.empty(shape, device='meta')))

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        text, (height, width) = fields['encoder_hidden_states'], x.shape[2:]
        if text.ndim == 3:  # of a conditioner with one state a token, for all layers
            text = text[:, :, None].expand(-1, -1, self.config['num_text_layers'], -1)
        tokens = network(hidden_states=pack(x), encoder_hidden_states=text, timestep=sigma,
                         position_ids=position_ids(text.shape[1], height // 2, width // 2, x.device),
                         encoder_attention_mask=fields.get('encoder_hidden_states' + MASK), return_dict=False)[0]
        return unpack(tokens, height, width)


@MODELS.register_module()
class Krea2TextConditioner(LimitedPipelineConditioner):
    """Krea 2's own text encoder, through `Krea2Pipeline.encode_prompt`, without the padding that the pipeline puts
    between a text and its template's end: (tokens, layers, width).

    Args:
        pretrained (str): Hub id or folder of a Krea 2 pipeline.
        max_sequence_length (int): Tokens at most, the template's end among them. Default 512, as in the pipeline.
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'Krea2Pipeline'
    published_encoders = (Encoder('text_encoder', 'Qwen3-VL-4B', 4_437_815_808),)

    def encode_texts(self, prompts: list[str]) -> dict[str, list[Tensor]]:
        states, mask = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, max_sequence_length=self.max_sequence_length)
        return dict(encoder_hidden_states=[row[own] for row, own in zip(states, mask)])

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        start, end = (self.pipeline.prompt_template_encode_start_idx,
                      self.pipeline.prompt_template_encode_num_suffix_tokens)
        texts = [self.pipeline.prompt_template_encode_prefix + prompt for prompt in prompts]
        lengths = [len(ids) - start + end for ids in self.pipeline.tokenizer(texts, verbose=False).input_ids]
        return [TokenCount('Qwen3-VL', self.max_sequence_length, lengths)]
