from typing import Any, Dict, List

import torch
from diffusers import SD3Transformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.backbones.base import Backbone
from cdm_plugin.conditioners import PipelineConditioner, TokenCount


@MODELS.register_module()
class SD3Backbone(Backbone):
    """SD3 and SD3.5: diffusers' SD3Transformer2DModel (Esser et al. 2024). Its timestep is 1000 sigma.

    Arguments as in `Backbone`. With a StableDiffusion3 pipeline as `pretrained`, its text encoders and VAE are the
    default conditioner and codec; `conditioner` and `codec` replace them, for class-conditional or pixel-space models.
    """
    network_class = SD3Transformer2DModel
    pipeline_name = 'StableDiffusion3Pipeline'
    conditioner_type = 'SD3TextConditioner'
    time_embedder = 'time_text_embed'
    repeated_blocks = ('JointTransformerBlock',)

    @property
    def patch(self) -> int:
        """Latents a token covers, per side."""
        return self.config['patch_size']

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: Dict[str, Tensor]) -> Tensor:
        return network(hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=fields['encoder_hidden_states'],
                       pooled_projections=fields['pooled_projections'], return_dict=False)[0]

    def condition_widths(self) -> Dict[str, int]:
        return dict(encoder_hidden_states=self.config['joint_attention_dim'],
                    pooled_projections=self.config['pooled_projection_dim'])


@MODELS.register_module()
class SD3TextConditioner(PipelineConditioner):
    """SD3's own text encoders, through `StableDiffusion3Pipeline.encode_prompt`.

    Args:
        pretrained (str): Hub id or folder of a StableDiffusion3 pipeline.
        t5 (bool): Whether to load the third encoder, T5-XXL (4.7 B parameters). Without it, its tokens are zeros, as
            in the pipeline. Default True.
        max_sequence_length (int): Tokens for T5. Default 256, as in the pipeline.
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'StableDiffusion3Pipeline'

    def __init__(self, pretrained: str, t5: bool = True, max_sequence_length: int = 256, **kwargs: Any) -> None:
        self.t5, self.max_sequence_length = t5, max_sequence_length
        super().__init__(pretrained, **kwargs)
        self._config.update(t5=t5, max_sequence_length=max_sequence_length)

    def components(self, pretrained: str, **hub_kwargs: Any) -> Dict[str, Any]:
        parts = self.pipeline_class().load_config(pretrained, **hub_kwargs)
        if self.t5 and (parts.get('text_encoder_3') or [None])[0] is None:
            raise ValueError(f'{pretrained!r} has no T5 (text_encoder_3): set model.backbone.conditioner.t5=False')
        with torch.device('meta'):  # encode_prompt asks the network for its width, and for nothing else
            network = SD3Transformer2DModel.from_config(
                SD3Transformer2DModel.load_config(pretrained, subfolder='transformer', **hub_kwargs))
        return dict(transformer=network, vae=None, **({} if self.t5 else dict(text_encoder_3=None, tokenizer_3=None)))

    def encode_texts(self, prompts: List[str]) -> Dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length, device=self.device)
        return dict(encoder_hidden_states=tokens, pooled_projections=pooled)

    def count_tokens(self, prompts: List[str]) -> List[TokenCount]:
        limit = self.pipeline.tokenizer_max_length
        tokenizers = [('CLIP', self.pipeline.tokenizer, limit), ('T5', self.pipeline.tokenizer_3,
                                                                 self.max_sequence_length)]
        return [TokenCount(name, limit, [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids])
                for name, tokenizer, limit in tokenizers if tokenizer is not None]
