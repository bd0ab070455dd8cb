"""Z-Image: one stream of image and text tokens, time that runs towards the image, texts of any length from Qwen3."""
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.arguments import NotNegative
from cdm_plugin.backbones.base import Backbone
from cdm_plugin.condition import MASK
from cdm_plugin.conditioners import Encoder, LimitedPipelineConditioner, TokenCount


@MODELS.register_module()
class ZImageBackbone(Backbone):
    """Z-Image: diffusers' ZImageTransformer2DModel. Its timestep is 1 - sigma, and its output is -v.

    Args:
        cfg_normalization (float): Guidance may not make a prediction longer than the conditional one times this, as in
            the pipeline. Default 0, which is off; True is 1.
        cfg_truncation (float): Below the noise level 1 - cfg_truncation there is no guidance, as in the pipeline.
            Default 1, which is off.
        *args, **kwargs: As in `Backbone`. The `guidance_scale` of sampling is the usual one, of which 1 is off: one
            more than the pipeline's.
    """
    network_class = ZImageTransformer2DModel
    pipeline_name = 'ZImagePipeline'
    conditioner_type = 'ZImageTextConditioner'
    time_embedder = 't_embedder'
    lora_targets = ('to_q', 'to_k', 'to_v', 'to_out.0')
    patch = 2
    takes_mask = True
    whole_in_comfyui = True
    published_scheduler = dict(shift=6.0)

    def __init__(self, *args: Any, cfg_normalization: bool | NotNegative = 0.0, cfg_truncation: float = 1.0,
                 **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cfg_normalization, self.cfg_truncation = float(cfg_normalization), cfg_truncation

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        return dict(guidance_scale=scale - 1)

    def pipeline_defaults(self) -> dict[str, Any]:
        defaults = super().pipeline_defaults()
        return {**defaults, 'guidance_scale': 1 + defaults['guidance_scale']}

    def default_latent_size(self) -> tuple[int, int]:
        return 128, 128

    def time_embedding_width(self) -> int:
        return min(self.config['dim'], 256)

    @property
    def width(self) -> int:
        return self.config['dim']

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return list(network.layers)  # its refiners see the image or the text alone

    def feature_map(self, output: Tensor, latent_size: tuple[int, int]) -> Tensor:
        return super().feature_map(output[:, :self.tokens(latent_size)], latent_size)  # the image comes first

    def condition_widths(self) -> dict[str, int]:
        return dict(encoder_hidden_states=self.config['cap_feat_dim'])

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        texts, mask = list(fields['encoder_hidden_states'].unbind()), fields.get('encoder_hidden_states' + MASK)
        if mask is not None:
            texts = [text[own] for text, own in zip(texts, mask)]
        time = (1000 - 1000 * sigma) / 1000  # 1 - sigma, rounded as in the pipeline
        images = network(list(x[:, :, None].unbind()), time, list(texts), return_dict=False)[0]
        return -torch.stack(images)[:, :, 0]

    def guidance_at(self, scale: float, sigma: Tensor) -> float | Tensor:
        """The scale, and 1 where `cfg_truncation` turns guidance off."""
        if self.cfg_truncation >= 1:
            return scale
        return torch.where(1 - sigma > self.cfg_truncation, 1.0, scale)[:, None, None, None]

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance; with `cfg_normalization`, no image's velocity gets longer than that allows."""
        guided = super().guide(conditional, unconditional, scale)
        if not self.cfg_normalization:
            return guided
        longest, length = (x.flatten(1).norm(dim=1) for x in (self.cfg_normalization * conditional, guided))
        factor = (longest / length).clamp(max=1)[:, None, None, None]
        return guided * torch.where(torch.as_tensor(scale, device=factor.device) == 1, 1.0, factor)


@MODELS.register_module()
class ZImageTextConditioner(LimitedPipelineConditioner):
    """Z-Image's own text encoder, through `ZImagePipeline.encode_prompt`: as many tokens as the text has in the
    tokenizer's chat template.

    Args:
        pretrained (str): Hub id or folder of a Z-Image pipeline.
        max_sequence_length (int): Tokens at most. Default 512, as in the pipeline.
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'ZImagePipeline'
    published_encoders = (Encoder('text_encoder', 'Qwen3-4B', 4_022_468_096),)

    def encode_texts(self, prompts: list[str]) -> dict[str, list[Tensor]]:
        states, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), device=self.device, do_classifier_free_guidance=False,  # it changes the list
            max_sequence_length=self.max_sequence_length)
        return dict(encoder_hidden_states=states)

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        texts = [self.pipeline.tokenizer.apply_chat_template(
            [dict(role='user', content=prompt)], tokenize=False, add_generation_prompt=True, enable_thinking=True)
            for prompt in prompts]
        lengths = [len(ids) for ids in self.pipeline.tokenizer(texts, verbose=False).input_ids]
        return [TokenCount('Qwen3', self.max_sequence_length, lengths)]
