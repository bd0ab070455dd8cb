from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.backbones.base import Backbone
from cdm_plugin.conditioners import Encoder, PipelineConditioner, TokenCount


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
    published_scheduler = dict(shift=3.0)
    whole_in_comfyui = True
    sd_scripts_layers = {
        'joint_blocks.{}.x_block.attn.qkv': [f'transformer_blocks.{{}}.attn.to_{part}' for part in 'qkv'],
        'joint_blocks.{}.x_block.attn.proj': ['transformer_blocks.{}.attn.to_out.0'],
        'joint_blocks.{}.x_block.attn2.qkv': [f'transformer_blocks.{{}}.attn2.to_{part}' for part in 'qkv'],
        'joint_blocks.{}.x_block.attn2.proj': ['transformer_blocks.{}.attn2.to_out.0'],
        'joint_blocks.{}.x_block.mlp.fc1': ['transformer_blocks.{}.ff.net.0.proj'],
        'joint_blocks.{}.x_block.mlp.fc2': ['transformer_blocks.{}.ff.net.2'],
        'joint_blocks.{}.context_block.attn.qkv': [f'transformer_blocks.{{}}.attn.add_{part}_proj' for part in 'qkv'],
        'joint_blocks.{}.context_block.attn.proj': ['transformer_blocks.{}.attn.to_add_out'],
        'joint_blocks.{}.context_block.mlp.fc1': ['transformer_blocks.{}.ff_context.net.0.proj'],
        'joint_blocks.{}.context_block.mlp.fc2': ['transformer_blocks.{}.ff_context.net.2']}

    @property
    def patch(self) -> int:  # type: ignore[override]
        """Latents a token covers, per side."""
        return self.config['patch_size']

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        return network(hidden_states=x, timestep=1000 * sigma, encoder_hidden_states=fields['encoder_hidden_states'],
                       pooled_projections=fields['pooled_projections'], return_dict=False)[0]

    def condition_widths(self) -> dict[str, int]:
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
    published_encoders = (Encoder('text_encoder', 'CLIP-L', 123_650_304),
                          Encoder('text_encoder_2', 'OpenCLIP bigG', 694_659_840),
                          Encoder('text_encoder_3', 'T5-XXL', 4_762_310_656))

    @classmethod
    def expected_encoders(cls, folder: Path | None, t5: bool = True, **arguments: Any) -> Sequence[Encoder]:
        found = super().expected_encoders(folder)
        others = [encoder for encoder in found if encoder.part != 'text_encoder_3']
        if t5 and len(others) == len(found):
            raise cls.without_t5(folder)
        return found if t5 else others

    @classmethod
    def expected_tokens(cls, max_sequence_length: int = 256, **arguments: Any) -> int:
        return 77 + max_sequence_length  # the first two encoders' and T5's

    @staticmethod
    def without_t5(pretrained: str | Path) -> ValueError:
        return ValueError(f"'{pretrained}' has no T5 (text_encoder_3): set model.backbone.conditioner.t5=False")

    def __init__(self, pretrained: str, t5: bool = True, max_sequence_length: int = 256, **kwargs: Any) -> None:
        self.t5, self.max_sequence_length = t5, max_sequence_length
        super().__init__(pretrained, **kwargs)
        self._config.update(t5=t5, max_sequence_length=max_sequence_length)

    def components(self, pretrained: str, **hub_kwargs: Any) -> dict[str, Any]:
        parts = self.pipeline_class().load_config(pretrained, **hub_kwargs)
        if self.t5 and (parts.get('text_encoder_3') or [None])[0] is None:
            raise self.without_t5(pretrained)
        with torch.device('meta'):  # encode_prompt asks the network for its width, and for nothing else
            network = SD3Transformer2DModel.from_config(
                SD3Transformer2DModel.load_config(pretrained, subfolder='transformer', **hub_kwargs))
        return dict(transformer=network, vae=None, **({} if self.t5 else dict(text_encoder_3=None, tokenizer_3=None)))

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length, device=self.device)
        return dict(encoder_hidden_states=tokens, pooled_projections=pooled)

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        limit = self.pipeline.tokenizer_max_length
        tokenizers = [('CLIP', self.pipeline.tokenizer, limit), ('T5', self.pipeline.tokenizer_3,
                                                                 self.max_sequence_length)]
        return [TokenCount(name, limit, [len(ids) for ids in tokenizer(prompts, verbose=False).input_ids])
                for name, tokenizer, limit in tokenizers if tokenizer is not None]
