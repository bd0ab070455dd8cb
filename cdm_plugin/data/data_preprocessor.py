from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.condition import Condition, check_embeddings, is_mask

Prompts = list[str] | Tensor
MAPS = ('image', 'latents', 'pair_noise', 'pair_latents')
KEYS = ('prompt', 'condition', *MAPS, 'source', 'meta')


@MODELS.register_module()
class DistillationDataPreprocessor(BaseDataPreprocessor):
    """Makes one batch on the model's device of what either of MMEngine's collate functions gives.

    Args:
        non_blocking (bool): Whether copies to the device may overlap with computation, as they do from pinned memory
            (`pin_memory=True` of the data loader). Default True.
    """

    def __init__(self, non_blocking: bool = True) -> None:
        super().__init__(non_blocking)

    def forward(self, data: Mapping[str, Any] | Sequence[Mapping[str, Any]],
                training: bool = False) -> dict[str, Any]:
        """Batches samples.

        Args:
            data (dict or list[dict]): Lists by field (`pseudo_collate`), batched tensors by field (`default_collate`),
                or a list of samples. Other fields than those below are left out.
            training (bool): Not used.

        Returns:
            dict: `prompt` (list[str], or LongTensor (B,) of class labels), `condition` (dict of tensors, each
            (B, ...); texts of different lengths are padded to the longest, with masks, see `Condition`), `image`
            (Tensor, (B, C, H, W), float32), `latents`, `pair_noise`, `pair_latents` (likewise), `source` (list[str])
            and `meta` (dict of lists or batched tensors), as far as the samples have them.

        Raises:
            ValueError: If samples differ in their fields or shapes, mix texts and labels, have neither a prompt nor
                a condition, or have embeddings that are not floating or not finite. The message names the field.
        """
        if not isinstance(data, Mapping):
            data = _transpose(data, 'sample', KEYS)
        batch: dict[str, Any] = {}
        if 'prompt' in data:
            batch['prompt'] = _batch_prompts(data['prompt'])
        if 'condition' in data:
            batch['condition'] = _batch_condition(data['condition'])
        for name in MAPS:
            if name in data:
                batch[name] = _batch_images(name, data[name])
        if 'source' in data:
            batch['source'] = list(data['source'])
        if 'meta' in data:
            meta = data['meta']
            batch['meta'] = dict(meta) if isinstance(meta, Mapping) else _transpose(meta, 'meta')
        _check_batch(batch, data)
        return self.cast_data(batch)


def _transpose(samples: Sequence[Any], what: str, keys: tuple[str, ...] | None = None) -> dict[str, list[Any]]:
    for sample in samples:
        if not isinstance(sample, Mapping):
            raise ValueError(f'a {what} must be a dict of fields, but one of the batch is {_describe(sample)}')
    names = dict.fromkeys(name for sample in samples for name in sample if keys is None or name in keys)
    for name in names:
        shown = next(sample[name] for sample in samples if name in sample)
        without = next((sample for sample in samples if name not in sample), None)
        if without is not None:
            raise ValueError(f'one {what} of the batch has {name!r} ({_describe(shown)}), another has only '
                             f'{_describe(without)}: mix datasets of one kind only in train_dataloader.dataset')
    return {name: [sample[name] for sample in samples] for name in names}


def _batch_prompts(prompts: Tensor | Sequence[Any]) -> Prompts:
    if not isinstance(prompts, Tensor):
        are_texts = {isinstance(prompt, str) for prompt in prompts}
        if are_texts == {True}:
            return list(prompts)
        if True in are_texts:
            raise ValueError('a batch mixes text prompts and class labels '
                             f'({list(prompts)[:4]}): mix datasets of one kind only in train_dataloader.dataset')
    try:
        labels = prompts if isinstance(prompts, Tensor) else torch.stack([torch.as_tensor(p) for p in prompts])
    except (TypeError, ValueError, RuntimeError):
        labels = None
    if labels is None or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f'the prompts of a batch must be texts or class labels (int), but are {_describe(prompts)}: '
                         "name their field in the dataset's pipeline, dict(type='PackInputs', prompt=...)")
    return labels.long()


def _batch_condition(condition: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    if not isinstance(condition, Mapping):
        condition = _transpose(condition, 'condition')
    rows = {name: _rows(f'condition.{name}', values, 1 if is_mask(name, condition) else 2)
            for name, values in condition.items()}
    fields = Condition.of_rows(rows).fields
    try:
        check_embeddings(fields, 'the condition of a batch')
    except ValueError:
        for row in range(min(map(len, rows.values()))):
            check_embeddings({name: values[row] for name, values in rows.items()}, f'sample {row} of a batch')
        raise
    return fields


def _batch_images(name: str, images: Tensor | Sequence[Any]) -> Tensor:
    rows = _rows(name, images)
    batch = rows if isinstance(rows, Tensor) else torch.stack(rows)
    if batch.ndim != 4 or not batch.is_floating_point():
        raise ValueError(f'{name} of a batch must be float tensors (C, H, W), pixels in [-1, 1], but stacked are '
                         f"{_describe(batch)}: convert them in the dataset's pipeline (dict(type='PackInputs', "
                         'image=...) does so for images)')
    return batch.float()


def _rows(name: str, values: Tensor | Sequence[Any], ragged: int = 99) -> Tensor | list[Tensor]:
    """The rows of a field, of one dtype and shape; the length of rows of `ragged` or more dimensions may differ."""
    if isinstance(values, Tensor):
        return values
    for value in values:
        if not isinstance(value, (Tensor, np.ndarray)):
            raise ValueError(f'{name} of a sample must be a tensor, but is {_describe(value)}: convert it in the '
                             "dataset's pipeline (PackInputs does so for images)")
    tensors = [torch.as_tensor(value) for value in values]
    first = tensors[0]
    start = int(first.ndim >= ragged)
    for other in tensors[1:]:
        if other.shape[start:] != first.shape[start:] or other.ndim != first.ndim or other.dtype != first.dtype:
            raise ValueError(f'{name} differs within a batch: {_describe(first)} and {_describe(other)}; '
                             f'{_ADVICE.get(name, _ENCODER_ADVICE)}')
    return tensors


_ADVICE = {
    'image': "bring all images to one size and number of channels in the dataset's pipeline, before PackInputs",
    'latents': 'bring all images to one size before they are encoded'}
_ENCODER_ADVICE = 'write all text embeddings with one text encoder and one dtype, or keep them in separate trainings'


def _check_batch(batch: dict[str, Any], data: Mapping[str, Any]) -> None:
    if 'prompt' not in batch and not batch.get('condition'):
        other = "; this has gone through another library's PackInputs" if 'data_samples' in data else ''
        raise ValueError(f"a batch needs 'prompt' or 'condition', but has {sorted(map(str, data))}: name the field of "
                         f"the prompts in the dataset's pipeline, dict(type='mmengine.PackInputs', prompt=...){other}")
    rows = {f'condition.{name}': len(values) for name, values in batch.get('condition', {}).items()}
    rows.update({name: len(batch[name]) for name in ('prompt', 'source', *MAPS) if name in batch})
    rows.update({f'meta.{name}': len(values) for name, values in batch.get('meta', {}).items()})
    if len(set(rows.values())) != 1:
        raise ValueError(f'the fields of a batch must have one row a sample, but have these numbers of rows: {rows}')


def _describe(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f'{str(value.dtype).replace("torch.", "")} {tuple(value.shape)}'
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{name}: {_describe(field)}' for name, field in value.items()) + '}'
    if isinstance(value, (list, tuple)) and value:
        return f'a list of {_describe(value[0])}'
    return f'a {type(value).__name__}'
