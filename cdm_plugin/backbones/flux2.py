"""FLUX.2-dev: FLUX.2-klein's network, told a guidance, with text from Mistral 3."""
from typing import Any

from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.backbones.embedded_guidance import EmbeddedGuidance
from cdm_plugin.backbones.flux2_klein import Flux2KleinBackbone
from cdm_plugin.conditioners import Encoder, LimitedPipelineConditioner, TokenCount


@MODELS.register_module()
class Flux2Backbone(EmbeddedGuidance, Flux2KleinBackbone):
    """FLUX.2-dev: diffusers' Flux2Transformer2DModel with an embedding of guidance. Its timestep is sigma itself.

    Arguments as in `EmbeddedGuidance`; its pipeline's usual guidance is 4. It has no other one: its pipeline has no
    negative prompt.
    """
    pipeline_name = 'Flux2Pipeline'
    conditioner_type = 'Flux2TextConditioner'
    published_guidance = 4.0
    embeds_guidance = True


@MODELS.register_module()
class Flux2TextConditioner(LimitedPipelineConditioner):
    """FLUX.2-dev's own text encoder, through `Flux2Pipeline.encode_prompt`: always as many tokens.

    Args:
        pretrained (str): Hub id or folder of a FLUX.2-dev pipeline.
        max_sequence_length (int): Tokens of every text, the pipeline's system message among them. Default 512, as in
            the pipeline.
        **kwargs: See `PipelineConditioner`: `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'Flux2Pipeline'
    published_encoders = (Encoder('text_encoder', 'Mistral-Small-3.2-24B', 24_011_361_280),)

    def __init__(self, pretrained: str, **kwargs: Any) -> None:
        super().__init__(pretrained, **kwargs)
        self.pipeline.tokenizer = self._tokenizer

    def components(self, pretrained: str, **hub_kwargs: Any) -> dict[str, Any]:
        # The pipeline's processor is for images too, and needs torchvision; texts go through its tokenizer alone.
        from transformers import AutoTokenizer
        self._tokenizer = AutoTokenizer.from_pretrained(pretrained, subfolder='tokenizer', trust_remote_code=False,
                                                        **hub_kwargs)
        return dict(transformer=None, vae=None, tokenizer=None)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        states, _ = self.pipeline.encode_prompt(prompt=prompts, device=self.device,
                                                max_sequence_length=self.max_sequence_length)
        return dict(encoder_hidden_states=states)

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input  # takes seconds
        ids = self.pipeline.tokenizer.apply_chat_template(
            format_input(prompts, self.pipeline.system_message), tokenize=True, return_dict=True)['input_ids']
        return [TokenCount('Mistral 3', self.max_sequence_length, [len(each) for each in ids])]
