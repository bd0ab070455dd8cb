"""How well an image fits its prompt, by the angle between their CLIP embeddings: CLIPScore, PickScore, HPSv2."""
from typing import Any

import torch
from mmengine.registry import METRICS
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from transformers import AutoTokenizer, CLIPModel

from cdm_plugin.metrics.base import ScoreMetric
from cdm_plugin.metrics.weights import image_processor
from cdm_plugin.sheets import to_pixels

CLIP_H14 = 'laion/CLIP-ViT-H-14-laion2B-s32B-b79K'


class CLIPJudge:
    """A CLIP of transformers with its preprocessing, frozen, in float32.

    Args:
        pretrained (str): Hub id or folder of a `CLIPModel`.
        device (torch.device): Where it runs.
        processor (str, optional): Hub id or folder of the tokenizer and the image processor. Defaults to
            `pretrained`.

    Raises:
        OSError: There are no such weights.
    """

    def __init__(self, pretrained: str, device: torch.device, processor: str | None = None) -> None:
        processor = processor or pretrained
        self.preprocess = image_processor('CLIPImageProcessor').from_pretrained(processor)
        self.tokenizer = AutoTokenizer.from_pretrained(processor, trust_remote_code=False)
        self.model = CLIPModel.from_pretrained(pretrained, dtype=torch.float32).eval().requires_grad_(False).to(device)
        self.device = device

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors (B, D) of images (B, C, H, W) in [-1, 1]."""
        pixels = pixel_values(images, self.preprocess)
        return normalize(self.model.visual_projection(self.model.vision_model(pixels).pooler_output), dim=-1)

    def embed_texts(self, prompts: list[str]) -> Tensor:
        """Unit vectors (B, D) of texts, cut at 77 tokens."""
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors='pt')
        output = self.model.text_model(input_ids=tokens.input_ids.to(self.device),
                                       attention_mask=tokens.attention_mask.to(self.device))
        return normalize(self.model.text_projection(output.pooler_output), dim=-1)


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, C, H, W) in [-1, 1] as 8-bit pictures, what a judge would read from PNG files."""
    return [Image.fromarray(pixels) for pixels in to_pixels(images)]


def pixel_values(images: Tensor, preprocess: Any) -> Tensor:
    """What a judge of CLIP's preprocessing sees of images (B, C, H, W) in [-1, 1]: of 8-bit pictures or, where
    gradients pass, of the images themselves, which differs by rounding."""
    if not images.requires_grad:
        return preprocess(to_pictures(images), return_tensors='pt')['pixel_values'].to(images.device)
    side, crop = preprocess.size['shortest_edge'], preprocess.crop_size
    height, width = (int(side * length / min(images.shape[-2:])) for length in images.shape[-2:])
    # Pillow's kernel, as `antialias` says.
    pixels = interpolate((images.expand(-1, 3, -1, -1) + 1) / 2, (height, width), mode='bicubic', antialias=True)
    top, left = (height - crop['height']) // 2, (width - crop['width']) // 2
    pixels = pixels.clamp(0, 1)[..., top:top + crop['height'], left:left + crop['width']]
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (preprocess.image_mean, preprocess.image_std))
    return (pixels - mean) / std


class CLIPSimilarity(ScoreMetric):
    """A scale times the cosine between the embeddings of an image and its prompt (str).

    Args:
        pretrained (str): Hub id or folder of a `CLIPModel` of transformers. Default the published weights.
        processor (str, optional): Hub id or folder of its tokenizer and image processor. Default None: as
            published.
        **kwargs: Of `ImageMetric`.
    """

    differentiable = True
    PRETRAINED: str
    PROCESSOR: str | None = None

    def __init__(self, pretrained: str | None = None, processor: str | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.pretrained = pretrained or self.PRETRAINED
        # one's own weights come with their own processor, unless it is told
        self.processor = processor or (self.pretrained if pretrained else self.PROCESSOR or self.PRETRAINED)
        self.clip: CLIPJudge | None = None

    def load(self) -> None:
        with self.needs(self.processor, 'pretrained' if self.processor == self.pretrained else 'processor'):
            AutoTokenizer.from_pretrained(self.processor, trust_remote_code=False)
        with self.needs(self.pretrained):
            self.clip = CLIPJudge(self.pretrained, self.device, self.processor)

    def unload(self) -> None:
        self.clip = None

    def scores(self, images: Tensor, prompts: list[str]) -> Tensor:
        prompts = self.texts(prompts)
        cosines = (self.clip.embed_images(images) * self.clip.embed_texts(prompts)).sum(-1)
        return self.scaled(cosines)

    def scaled(self, cosines: Tensor) -> Tensor:
        """The published score from cosines (B,)."""
        raise NotImplementedError


@METRICS.register_module()
class CLIPScore(CLIPSimilarity):
    """``100 max(cos, 0)`` of CLIP ViT-H-14 trained on LAION-2B, around 30 for good images; higher is better.

    Hessel et al., "CLIPScore", 2021, eq. 1 (there with ViT-B/32 and the factor 2.5). The result is `clip_score`.
    """

    key = 'clip_score'
    PRETRAINED = CLIP_H14

    def scaled(self, cosines: Tensor) -> Tensor:
        return 100 * cosines.clamp(min=0)


@METRICS.register_module()
class PickScore(CLIPSimilarity):
    """``exp(logit_scale) cos`` of a CLIP-H fine-tuned on people's choices, around 20 to 23; higher is better.

    Kirstain et al., "Pick-a-Pic", 2023, section 4. The processor is that of CLIP ViT-H-14, as its page says. The
    result is `pick_score`.
    """

    key = 'pick_score'
    PRETRAINED = 'yuvalkirstain/PickScore_v1'
    PROCESSOR = CLIP_H14

    def scaled(self, cosines: Tensor) -> Tensor:
        return self.clip.model.logit_scale.exp() * cosines


@METRICS.register_module()
class HPSv2(CLIPSimilarity):
    """``100 cos`` of a CLIP-H fine-tuned on people's rankings, around 25 to 31; higher is better.

    Wu et al., "Human Preference Score v2", 2023; the package prints the mean cosine times 100. Its weights
    (xswu/HPSv2) are in open_clip's layout; the default is their conversion to transformers' `CLIPModel` by a third
    party, and any other conversion can be named. The result is `hpsv2`.
    """

    key = 'hpsv2'
    PRETRAINED = 'adams-story/HPSv2-hf'
    PROCESSOR = CLIP_H14

    def scaled(self, cosines: Tensor) -> Tensor:
        return 100 * cosines
