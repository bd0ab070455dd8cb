"""LongCat-Image: tokens of 2x2 latents, text of a fixed length from Qwen2.5-VL, renormalised guidance."""
import functools
from typing import Any

import torch
from diffusers import LongCatImageTransformer2DModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.arguments import Share
from cdm_plugin.backbones.base import Backbone, pack, unpack
from cdm_plugin.backbones.published import DYNAMIC_SHIFT
from cdm_plugin.conditioners import Encoder, PipelineConditioner, TokenCount

# Where the image's positions start: the pipeline's `tokenizer_max_length`, whatever the length of the text.
IMAGE_START = 512


@functools.lru_cache(maxsize=64)
def position_ids(text_tokens: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of the tokens, made on the device once for every size.

    Args:
        text_tokens (int): Number of text tokens, L.
        height (int): Rows of image tokens.
        width (int): Columns of image tokens.
        device (torch.device): Where they are needed.

    Returns:
        tuple: Text (L, 3) as (0, i, i) and image (height width, 3) as (1, 512 + row, 512 + column), float32.
    """
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids  # takes seconds
    with torch.device(device):
        text = prepare_pos_ids(modality_id=0, type='text', start=(0, 0), num_token=text_tokens)
        image = prepare_pos_ids(modality_id=1, type='image', start=(IMAGE_START, IMAGE_START), height=height,
                                width=width)
    return text, image


@MODELS.register_module()
class LongCatImageBackbone(Backbone):
    """LongCat-Image: diffusers' LongCatImageTransformer2DModel. Its timestep is sigma itself.

    Args:
        cfg_renorm (bool): Whether guidance may not lengthen a token's velocity, as in the pipeline
            (`enable_cfg_renorm`). Default True.
        cfg_renorm_min (float): Least factor of that renormalisation, in [0, 1]; 1 is the same as none. Default 0.
        *args, **kwargs: As in `Backbone`. With a LongCat-Image pipeline as `pretrained`, its text encoder and VAE are
            the default conditioner and codec.
    """
    network_class = LongCatImageTransformer2DModel
    pipeline_name = 'LongCatImagePipeline'
    conditioner_type = 'LongCatImageTextConditioner'
    time_embedder = 'time_embed'
    time_scale = 1000
    patch = 2
    published_scheduler = DYNAMIC_SHIFT

    def __init__(self, *args: Any, cfg_renorm: bool = True, cfg_renorm_min: Share = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cfg_renorm, self.cfg_renorm_min = cfg_renorm, cfg_renorm_min

    @property
    def latent_channels(self) -> int:
        return self.config['in_channels'] // 4

    def default_latent_size(self) -> tuple[int, int]:
        return 128, 128

    def condition_widths(self) -> dict[str, int]:
        return dict(encoder_hidden_states=self.config['joint_attention_dim'])

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        text, (height, width) = fields['encoder_hidden_states'], x.shape[2:]
        txt_ids, img_ids = position_ids(text.shape[1], height // 2, width // 2, x.device)
        tokens = network(hidden_states=pack(x), timestep=sigma, encoder_hidden_states=text, txt_ids=txt_ids,
                         img_ids=img_ids, guidance=None, return_dict=False)[0]
        return unpack(tokens, height, width)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance; with `cfg_renorm`, no token's velocity gets longer than the conditional one."""
        guided = super().guide(conditional, unconditional, scale)
        if not self.cfg_renorm:
            return guided
        tokens = pack(guided)
        lengths = [t.norm(dim=-1, keepdim=True) for t in (pack(conditional), tokens)]
        factor = (lengths[0] / (lengths[1] + 1e-8)).clamp(min=self.cfg_renorm_min, max=1.0)
        return unpack(tokens * factor, *guided.shape[2:])


@MODELS.register_module()
class LongCatImageTextConditioner(PipelineConditioner):
    """LongCat-Image's own text encoder, through `LongCatImagePipeline.encode_prompt`: always 512 tokens.

    The pipeline rewrites prompts with the same language model by default; prompts are taken as they are here, so
    rewrite them before training if the model shall see such prompts.

    Args:
        pretrained (str): Hub id or folder of a LongCat-Image pipeline.
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """
    pipeline_name = 'LongCatImagePipeline'
    published_encoders = (Encoder('text_encoder', 'Qwen2.5-VL-7B', 8_292_166_656),)

    @classmethod
    def expected_tokens(cls, **arguments: Any) -> int:
        return 512

    def components(self, pretrained: str, **hub_kwargs: Any) -> dict[str, Any]:
        # The text processor serves the rewriting of prompts alone, and needs torchvision.
        return dict(transformer=None, vae=None, text_processor=None)

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        return dict(encoder_hidden_states=self.pipeline.encode_prompt(prompt=prompts)[0])

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        from diffusers.pipelines.longcat_image.pipeline_longcat_image import split_quotation
        # A quotation is tokenised character by character: it is to be written into the image.
        pieces = [[piece for part, quoted in split_quotation(p) for piece in (part if quoted else [part])]
                  for p in prompts]
        lengths = [sum(len(self.pipeline.tokenizer(piece, add_special_tokens=False, verbose=False).input_ids)
                       for piece in each) for each in pieces]
        return [TokenCount('Qwen2.5-VL', self.pipeline.tokenizer_max_length, lengths)]
