"""ImageReward: a BLIP that rates an image for a prompt, trained on people's rankings."""
import re

import torch
from mmengine.registry import METRICS
from torch import Tensor, nn
from transformers import AutoTokenizer, BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from cdm_plugin.metrics.base import ScoreMetric
from cdm_plugin.metrics.clip_scores import pixel_values
from cdm_plugin.metrics.weights import download_command, image_processor, load_state

WEIGHTS = 'ImageReward.pt'
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw reward on the training set; what is printed is standardised by them."""
HEAD_SIZE = 64
"""Width of an attention head, of BLIP-large's image encoder and of its text encoder."""
# From the layout of BLIP's own repository to that of transformers.
VISION_NAMES = [
    (r'^cls_token$', 'embeddings.class_embedding'), (r'^pos_embed$', 'embeddings.position_embedding'),
    (r'^patch_embed\.proj\.', 'embeddings.patch_embedding.'), (r'^norm\.', 'post_layernorm.'),
    (r'^blocks\.', 'encoder.layers.'), (r'\.norm([12])\.', r'.layer_norm\1.'),
    (r'\.attn\.qkv\.', '.self_attn.qkv.'), (r'\.attn\.proj\.', '.self_attn.projection.')]


class ImageRewardJudge(nn.Module):
    """BLIP's image encoder, its text encoder that looks at the image, and five linear layers on the first token.

    Xu et al., "ImageReward", 2023, section 3. Sizes follow the published state dict.

    Args:
        state (dict[str, Tensor]): The published weights, in the layout of BLIP's repository.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        vision = {_renamed(name): value for name, value in _below('blip.visual_encoder.', state).items()}
        text = _below('blip.text_encoder.', state)
        text.pop('embeddings.position_ids', None)
        patches = vision['embeddings.patch_embedding.weight']
        width, patch = patches.shape[0], patches.shape[-1]
        side = round((vision['embeddings.position_embedding'].shape[1] - 1) ** 0.5)
        self.image_size = patch * side
        self.vision = BlipVisionModel(BlipVisionConfig(
            hidden_size=width, patch_size=patch, image_size=self.image_size, num_attention_heads=width // HEAD_SIZE,
            num_hidden_layers=_depth('encoder.layers.', vision), layer_norm_eps=1e-6,
            intermediate_size=len(vision['encoder.layers.0.mlp.fc1.bias'])))
        self.vision.load_state_dict(vision)
        words, positions = (text[f'embeddings.{name}_embeddings.weight'] for name in ('word', 'position'))
        self.text = BlipTextModel(BlipTextConfig(
            vocab_size=len(words), hidden_size=words.shape[1], max_position_embeddings=len(positions),
            num_attention_heads=words.shape[1] // HEAD_SIZE, num_hidden_layers=_depth('encoder.layer.', text),
            intermediate_size=len(text['encoder.layer.0.intermediate.dense.bias']), encoder_hidden_size=width,
            layer_norm_eps=1e-12, is_decoder=True), add_pooling_layer=False)
        self.text.load_state_dict(text)
        head = _below('mlp.layers.', state)
        linear = [nn.Linear(*head[f'{i}.weight'].shape[::-1]) for i in (0, 2, 4, 6, 7)]  # dropout between
        for layer, place in zip(linear, (0, 2, 4, 6, 7)):
            layer.load_state_dict({name: head[f'{place}.{name}'] for name in ('weight', 'bias')})
        self.head = nn.Sequential(*linear)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Standardised rewards (B,) of preprocessed images (B, 3, H, W) and tokens (B, L)."""
        image = self.vision(pixels).last_hidden_state
        seen = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        states = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=image,
                           encoder_attention_mask=seen).last_hidden_state
        return (self.head(states[:, 0]).squeeze(-1) - MEAN) / STD


@METRICS.register_module()
class ImageReward(ScoreMetric):
    """The standardised reward of ImageReward v1.0, around -2 to 2; higher is better.

    The package `image-reward` pins another transformers; its published weights (a pickled state dict of tensors, read
    with ``weights_only=True``) are put into BLIP of transformers here. Prompts are cut at 35 tokens, as published. The
    result is `image_reward`.

    Args:
        pretrained (str): Hub id, folder or file of ``ImageReward.pt``.
        tokenizer (str): Hub id or folder of BERT's tokenizer.
        **kwargs: Of `ImageMetric`.
    """

    key = 'image_reward'
    differentiable = True

    def __init__(self, pretrained: str = 'THUDM/ImageReward', tokenizer: str = 'google-bert/bert-base-uncased',
                 **kwargs) -> None:
        super().__init__(**kwargs)
        self.pretrained, self.tokenizer_path = pretrained, tokenizer
        self.model: ImageRewardJudge | None = None

    def load(self) -> None:
        with self.needs(self.tokenizer_path, 'tokenizer'):
            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_path, trust_remote_code=False)
        with self.needs(self.pretrained, get=download_command(self.pretrained, WEIGHTS)):
            state = load_state(self.pretrained, WEIGHTS)
        self.model = ImageRewardJudge(state).eval().requires_grad_(False).to(self.device)
        side = self.model.image_size
        self.preprocess = image_processor('CLIPImageProcessor')(
            size=dict(shortest_edge=side), crop_size=dict(height=side, width=side))

    def unload(self) -> None:
        self.model = None

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        pixels = pixel_values(images, self.preprocess)
        tokens = self.tokenizer(self.texts(prompts), padding='max_length', truncation=True, max_length=35,
                                return_tensors='pt').to(self.device)
        return self.model(pixels, tokens.input_ids, tokens.attention_mask)


def _below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _renamed(name: str) -> str:
    for pattern, replacement in VISION_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _depth(prefix: str, state: dict[str, Tensor]) -> int:
    return 1 + max(int(name.removeprefix(prefix).split('.')[0]) for name in state if name.startswith(prefix))
