from typing import Any, Dict, List, Mapping, Optional, Union

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from PIL import Image
from torch import Tensor

from cdm_plugin.data.images import to_image_tensor
from cdm_plugin.data.sample import Sample


@TRANSFORMS.register_module()
class PackInputs:
    """Turns a raw sample of any dataset into a training sample: `prompt`, `image`, `condition`, and nothing else.

    It is the one transform that a dataset of one's own needs, as the last of its pipeline. Under the default scope
    of a library with a `PackInputs` of its own (mmpretrain, mmagic), write `type='mmengine.PackInputs'`.

    Args:
        prompt (str): Field that holds the prompt, a text or a class label. May be absent from a sample that has a
            `condition`, unless it is named here. Default 'prompt'.
        image (str, optional): Field that holds the image: uint8 pixels, (H, W) or (H, W, C) in RGB order, a PIL image
            (gray stays one channel, all else becomes RGB), the path of an image file, or a finished float tensor
            (C, H, W) in [-1, 1]. Default None: the field `image`, if there is one and it holds any of these but a path.
    """

    def __init__(self, prompt: str = 'prompt', image: Optional[str] = None) -> None:
        self.prompt, self.image = prompt, image

    def __call__(self, sample: Dict[str, Any]) -> Dict[str, Any]:
        """Packs one sample.

        Args:
            sample (dict): Raw sample.

        Returns:
            dict: `prompt` (str or int), `image` (Tensor, (C, H, W), float, in [-1, 1]) and `condition` (dict of
            tensors), as far as the sample has them.

        Raises:
            ValueError: If a named field is absent, or does not hold a prompt or an image.
        """
        packed = Sample()
        # Cached embeddings stand in for a prompt, but a field that was asked for by name must be there.
        has_condition = isinstance(sample.get('condition'), Mapping)
        if self.prompt in sample or not has_condition or self.prompt != 'prompt':
            packed['prompt'] = self._prompt(self._field(sample, 'prompt', self.prompt))
        if self.image is not None or isinstance(sample.get('image'), (Tensor, np.ndarray, Image.Image)):
            packed['image'] = self._image(self._field(sample, 'image', self.image or 'image'))
        if has_condition:
            packed['condition'] = Sample(sample['condition'])
        return packed

    @staticmethod
    def _field(sample: Dict[str, Any], key: str, name: str) -> Any:
        if name not in sample:
            raise ValueError(f'a sample has no field {name!r}, only {_names(sample)}: name the field that holds the '
                             f"{key} in the dataset's pipeline, dict(type='PackInputs', {key}=...)")
        return sample[name]

    def _prompt(self, value: Any) -> Union[str, int]:
        if isinstance(value, str):
            return value
        if isinstance(value, (int, np.integer)) or _is_integer_scalar(value):
            return int(value)
        raise ValueError(f'the field {self.prompt!r} of a sample is a {type(value).__name__}, but a prompt is a text '
                         "or a class label (int): name another field, dict(type='PackInputs', prompt=...)")

    def _image(self, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3:
            return value
        if isinstance(value, str):
            value = self._open(value)
        if isinstance(value, Image.Image):
            value = np.array(value.convert('L' if value.mode in ('1', 'L', 'LA') else 'RGB'))
        if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim in (2, 3):
            return to_image_tensor(value)
        raise ValueError(f'the field {self.image or "image"!r} of a sample is {_describe(value)}, but an image is a '
                         'uint8 array (H, W) or (H, W, C), a PIL image, a path, or a float tensor (C, H, W) in '
                         '[-1, 1]: convert it before PackInputs, or name another field, '
                         "dict(type='PackInputs', image=...)")

    def _open(self, path: str) -> Image.Image:
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except OSError as error:  # UnidentifiedImageError and a cut file are among them
            raise ValueError(f'the field {self.image!r} of a sample names {path!r}, which is no readable image '
                             f'({error}): check data_root and data_prefix of the dataset, and the file') from error

    def __repr__(self) -> str:
        return f'{type(self).__name__}(prompt={self.prompt!r}, image={self.image!r})'


def _is_integer_scalar(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, np.ndarray) and value.ndim == 0 and np.issubdtype(value.dtype, np.integer)


def _names(sample: Dict[str, Any]) -> List[str]:
    return sorted(str(name) for name in sample)


def _describe(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f'a {type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}'
    return f'a {type(value).__name__}'
