"""FLUX.2-klein: a token a latent of 16x16 pixels, positions of 4 columns, a shift by the number of steps too."""
import functools
import math
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cdm_plugin.backbones.base import Backbone
from cdm_plugin.codecs import VAECodec
from cdm_plugin.conditioners import Encoder, LimitedPipelineConditioner, TokenCount
from cdm_plugin.flow import shift_sigmas


@functools.lru_cache(maxsize=64)
def position_ids(text_tokens: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of text (L, 4), the last column counting, and of image tokens (height width, 4), (0, row, column, 0);
    made once a size."""
    with torch.device(device):
        text, image = (torch.cartesian_prod(*(torch.arange(n) for n in sizes))
                       for sizes in ((1, 1, 1, text_tokens), (1, height, width, 1)))
        return text, image


@MODELS.register_module()
class Flux2KleinBackbone(Backbone):
    """FLUX.2-klein: diffusers' Flux2Transformer2DModel. Its timestep is sigma itself.

    Arguments as in `Backbone`. With a Flux2Klein pipeline as `pretrained`, its text encoder and VAE are the default
    conditioner and codec. A latent is a token, of 16x16 pixels.
    """
    network_class = Flux2Transformer2DModel
    pipeline_name = 'Flux2KleinPipeline'
    conditioner_type = 'Flux2KleinTextConditioner'
    codec_type = 'Flux2Codec'
    time_embedder = 'time_guidance_embed'
    time_scale = 1000
    published_scheduler = dict(use_dynamic_shifting=True)
    published_vae = {}  # the defaults of its class
    # Whether the network is told a guidance.
    embeds_guidance = False

    def check_config(self) -> None:
        """As in `Backbone`; FLUX.2-klein and -dev have text encoders of one width, so that nothing else would tell."""
        super().check_config()
        if self.pretrained is not None and self.config['guidance_embeds'] != self.embeds_guidance:
            fitting = 'Flux2KleinBackbone' if self.embeds_guidance else 'Flux2Backbone'
            raise ValueError(f'the network of model.backbone.pretrained={self.pretrained!r} has guidance_embeds='
                             f"{self.config['guidance_embeds']}: set model.backbone.type={fitting!r}")

    def distilled_settings(self) -> dict[str, Any]:
        return {} if self.embeds_guidance else dict(is_distilled=True)

    @property
    def lora_targets(self) -> tuple[str, ...]:  # type: ignore[override]
        """All of the attention's; a block of the single stream has its own in one layer with the MLP's."""
        single = range(self.config['num_single_layers'])
        return (*Backbone.lora_targets, 'to_qkv_mlp_proj',
                *(f'single_transformer_blocks.{i}.attn.to_out' for i in single))

    def default_latent_size(self) -> tuple[int, int]:
        return 64, 64

    def feature_map(self, output: Any, latent_size: tuple[int, int]) -> Tensor:
        """As in `Backbone`; in one stream the text comes first."""
        tokens = output[-1] if isinstance(output, tuple) else output
        return super().feature_map(tokens[:, -self.tokens(latent_size):], latent_size)

    def condition_widths(self) -> dict[str, int]:
        return dict(encoder_hidden_states=self.config['joint_attention_dim'])

    def shift(self, latent_size: tuple[int, int], steps: int = 50) -> float:
        """As in `Backbone`, but the pipeline's own mu, which depends on the number of steps: of levels that are drawn
        one by one, its usual 50."""
        if not self.scheduler.config.use_dynamic_shifting:
            return super().shift(latent_size)
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu  # takes seconds
        return math.exp(compute_empirical_mu(self.tokens(latent_size), steps))

    def shift_grid(self, sigmas: Tensor, latent_size: tuple[int, int]) -> Tensor:
        return shift_sigmas(sigmas, self.shift(latent_size, len(sigmas)))

    def guidance_told(self, sigma: Tensor) -> Tensor | None:
        """What a guidance-distilled network is told beside the noise levels (B,); this one is none."""
        return None

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        text = fields['encoder_hidden_states']
        txt_ids, img_ids = position_ids(text.shape[1], *x.shape[2:], x.device)
        tokens = network(hidden_states=x.flatten(2).transpose(1, 2), timestep=sigma, encoder_hidden_states=text,
                         txt_ids=txt_ids, img_ids=img_ids, guidance=self.guidance_told(sigma), return_dict=False)[0]
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])


@MODELS.register_module()
class Flux2KleinTextConditioner(LimitedPipelineConditioner):
    """FLUX.2-klein's own text encoder, through `Flux2KleinPipeline.encode_prompt`: always as many tokens.

    Args:
        pretrained (str): Hub id or folder of a FLUX.2-klein pipeline.
        max_sequence_length (int): Tokens of every text. Default 512, as in the pipeline.
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'Flux2KleinPipeline'
    published_encoders = (Encoder('text_encoder', 'Qwen3-4B', 4_022_468_096),)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _ = self.pipeline.encode_prompt(prompt=prompts, device=self.device,
                                                max_sequence_length=self.max_sequence_length)
        return dict(encoder_hidden_states=states)

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        texts = [self.pipeline.tokenizer.apply_chat_template(
            [dict(role='user', content=prompt)], tokenize=False, add_generation_prompt=True, enable_thinking=False)
            for prompt in prompts]
        lengths = [len(ids) for ids in self.pipeline.tokenizer(texts, verbose=False).input_ids]
        return [TokenCount('Qwen3', self.max_sequence_length, lengths)]


@MODELS.register_module()
class Flux2Codec(VAECodec):
    """Diffusers' AutoencoderKLFlux2; 2x2 of its latents are one here, with the mean and deviation of its batch norm."""
    vae_class = AutoencoderKLFlux2

    def scale_of(self, config: Any) -> int:
        return 2**len(config.block_out_channels)  # one more than the autoencoder's own

    def read_config(self, config: Any) -> None:
        self.scale = self.scale_of(config)
        norm = self.vae.bn
        self.register_buffer('shift', norm.running_mean[:, None, None].float(), persistent=False)
        self.register_buffer('factor', (norm.running_var + config.batch_norm_eps).rsqrt()[:, None, None].float(),
                             persistent=False)

    def run_encoder(self, images: Tensor) -> Tensor:
        return pixel_unshuffle(super().run_encoder(images), 2)

    def run_decoder(self, latents: Tensor) -> Tensor:
        return super().run_decoder(pixel_shuffle(latents, 2))
