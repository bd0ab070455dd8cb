import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from mmengine.logging import print_log
from mmengine.registry import TRANSFORMS
from PIL import Image, ImageColor
from torch import Tensor

from cdm_plugin.arguments import Share
from cdm_plugin.data.captions import Captions, lookup
from cdm_plugin.data.images import read_image
from cdm_plugin.data.sample import Sample, SampleError
from cdm_plugin.data.wrappers import leaves


@TRANSFORMS.register_module()
class PackInputs:
    """Turns a raw sample of any dataset into a training sample: `prompt`, `image`, `condition`, `latents`, `meta`, and
    nothing else.

    It is the one transform that a dataset of one's own needs, as the last of its pipeline. Under the default scope
    of a library with a `PackInputs` of its own (mmpretrain, mmagic), write `type='mmengine.PackInputs'`.

    Args:
        prompt (str): Field that holds the prompt: a text, a class label, or a list of texts, of which one is drawn each
            time that the sample is read. What lies deeper is named with dots, 'meta.caption'. May be absent from a
            sample that has a `condition`, unless it is named here. Default 'prompt'.
        image (str, optional): Field that holds the image: the path of an image file, a PIL image, uint8 or uint16
            pixels, (H, W) or (H, W, C) in RGB order, see `read_image`, or a finished float tensor (C, H, W) in [-1, 1].
            Default None: the field `image`, if there is one and it holds any of these but a path.
        channels (int): Channels of the images, 3, or 1 for a codec that takes gray ones. Finished tensors stay as they
            are. Default 3.
        background (str): Colour behind transparent pixels. Default 'white'.
        channel_order (str, optional): 'rgb' or 'bgr', the order in arrays; OpenCV and the loaders of mmcv give BGR.
            Default None: RGB, with a warning if such a loader stands in the pipeline.
        meta (Sequence[str]): Fields to hand on as they are, in `meta`. Default none.
        template (str or Sequence[str]): Texts into which the prompt is put in place of `{}`, one of them drawn each
            time. Default none.
        dropout (float): Probability with which the empty text replaces the prompt. Default 0.
    """

    def __init__(self, prompt: str = 'prompt', image: str | None = None, channels: Literal[1, 3] = 3,
                 background: str = 'white', channel_order: Literal['rgb', 'bgr'] | None = None,
                 meta: Sequence[str] = (), template: str | Sequence[str] = (), dropout: Share = 0.0) -> None:
        ImageColor.getrgb(background)  # says what is wrong with it
        self.prompt, self.image, self.meta = prompt, image, tuple(meta)
        self.channels, self.background, self.channel_order = channels, background, channel_order
        self._captions = Captions([template] if isinstance(template, str) else template, dropout)

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """Packs one sample.

        Args:
            sample (dict): Raw sample.

        Returns:
            dict: `prompt` (str or int), `image` (Tensor, (C, H, W), float, in [-1, 1]), `condition` (dict of tensors)
            and `latents` (of the sample's field of this name, (C, h, w)), as far as the sample has them; `meta` (dict)
            if it is asked for.

        Raises:
            SampleError: If a named field is absent, or does not hold a prompt or an image.
        """
        packed = Sample()
        # Cached embeddings stand in for a prompt, but a field that was asked for by name must be there.
        has_condition = isinstance(sample.get('condition'), Mapping)
        if self.prompt in sample or not has_condition or self.prompt != 'prompt':
            packed['prompt'] = self._prompt(self._field(sample, 'prompt', self.prompt))
        if has_condition and self._captions.changes:
            raise SampleError('template and dropout of PackInputs change the text of a prompt, but a sample has its '
                              'embeddings already (condition): use them where the texts are, `cdm cache` encodes every '
                              "variant, and train on the texts with conditioner=dict(type='EmbeddingConditioner')")
        if self.image is not None or isinstance(sample.get('image'), (Tensor, np.ndarray, Image.Image)):
            packed['image'] = self._image(self._field(sample, 'image', self.image or 'image'))
        if has_condition:
            packed['condition'] = Sample(sample['condition'])
        if isinstance(sample.get('latents'), (Tensor, np.ndarray)):
            packed['latents'] = torch.as_tensor(sample['latents'])
        if self.meta:
            packed['meta'] = Sample({name: self._field(sample, 'meta', name) for name in self.meta})
        return packed

    @staticmethod
    def _field(sample: dict[str, Any], key: str, name: str) -> Any:
        try:
            return lookup(sample, name)
        except KeyError:
            raise SampleError(f'a sample has no field {name!r}, only {_names(sample)}: name the field that holds the '
                              f"{key} in the dataset's pipeline, dict(type='PackInputs', {key}=...)") from None

    def _prompt(self, value: Any) -> str | int:
        texts = list(value) if isinstance(value, (list, tuple)) else [value]
        if texts and all(isinstance(text, str) for text in texts):
            return self._captions.choose(texts)
        if isinstance(value, (int, np.integer)) or _is_integer_scalar(value):
            if self._captions.changes:
                raise SampleError(f'the field {self.prompt!r} of a sample is a class label, but template and dropout '
                                  'of PackInputs are for texts: leave them out (FlowMatching has model.drop_rate)')
            return int(value)
        raise SampleError(f'the field {self.prompt!r} of a sample is {_describe(value)}, but a prompt is a text, a '
                          'list of texts or a class label (int): name another field, '
                          "dict(type='PackInputs', prompt=...)")

    def _image(self, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            return value
        if isinstance(value, np.ndarray) and value.ndim == 3 and self.channel_order == 'bgr':
            value = value[..., [2, 1, 0, *range(3, value.shape[2])]]
        if isinstance(value, (str, Image.Image)) or _is_pixels(value):
            try:
                return read_image(value, self.channels, self.background)
            except SampleError as error:
                raise SampleError(f'the field {self.image or "image"!r} of a sample names no picture: {error}: check '
                                  'data_root and data_prefix of the dataset, and the file') from error
        raise SampleError(f'the field {self.image or "image"!r} of a sample is {_describe(value)}, but an image is a '
                          'uint8 or uint16 array (H, W) or (H, W, C), a PIL image, a path, or a float tensor (C, H, W) '
                          'in [-1, 1]: convert it before PackInputs, or name another field, '
                          "dict(type='PackInputs', image=...)")

    def __repr__(self) -> str:
        return f'{type(self).__name__}(prompt={self.prompt!r}, image={self.image!r})'


def check_channel_order(dataset: Any) -> None:
    """Warns by name if a loader that gives BGR stands before a PackInputs that was told no `channel_order`."""
    for part in leaves(dataset):
        transforms = getattr(getattr(part, 'pipeline', None), 'transforms', ())
        blind = any(isinstance(t, PackInputs) and t.channel_order is None for t in transforms)
        for loader in transforms:
            if (blind and type(loader).__name__ == 'LoadImageFromFile'
                    and getattr(loader, 'channel_order', 'bgr') == 'bgr'):
                kind = f'{type(loader).__module__}.{type(loader).__name__}'
                print_log(f'{kind} in the pipeline of {type(part).__name__} gives BGR, and PackInputs takes it for '
                          "RGB, red for blue: set dict(type='PackInputs', channel_order='bgr'), or 'rgb' if another "
                          'transform has turned it', 'current', level=logging.WARNING)


def _is_pixels(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in (np.uint8, np.uint16) and (
        value.ndim == 2 or value.ndim == 3 and value.shape[2] <= 4)


def _is_integer_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, np.ndarray) and value.ndim == 0 and np.issubdtype(value.dtype, np.integer)


def _names(sample: dict[str, Any]) -> list[str]:
    return sorted(str(name) for name in sample)


def _describe(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f'a {type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}'
    return f'a {type(value).__name__}'
