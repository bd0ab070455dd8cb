"""Conditioners: from prompts (texts or class labels) to a `Condition`."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.condition import Condition

Prompts = Union[List[str], Tensor]
# What the loaders of config files take of from_pretrained's arguments.
HUB_KEYS = ('revision', 'cache_dir', 'local_files_only', 'token', 'force_download')


def absolute_folder(pretrained: str) -> str:
    """A hub id as it is, a folder by its absolute path, so that a config is valid from anywhere on this machine."""
    return str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained


def origin(load_kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Those of from_pretrained's arguments that say which weights are meant (and are no secret)."""
    return {k: v for k, v in load_kwargs.items() if k in ('revision', 'variant')}


class Conditioner(nn.Module):
    """Base class. A conditioner is frozen: it is never trained and never saved into checkpoints."""

    def encode(self, prompts: Prompts) -> Condition:
        """Encodes B prompts."""
        raise NotImplementedError

    def null(self) -> Condition:
        """The null condition, one row."""
        raise NotImplementedError

    def to_config(self) -> Optional[Dict[str, Any]]:
        """The config that rebuilds this conditioner, or None if that cannot be written down."""
        return None


@MODELS.register_module()
class ClassConditioner(Conditioner):
    """Class labels as one-hot tokens, with one more class for the null condition.

    It has no weights: the network's own input projections embed the one-hot vectors. Token i of class k is the unit
    vector i (num_classes + 1) + k, so that tokens of one class differ.

    Args:
        num_classes (int): Number of classes.
        num_tokens (int): Tokens a label becomes. Default 2.
    """

    def __init__(self, num_classes: int, num_tokens: int = 2) -> None:
        super().__init__()
        if num_classes < 1 or num_tokens < 1:
            raise ValueError('model.backbone.conditioner needs num_classes >= 1 and num_tokens >= 1, '
                             f'but has {num_classes} and {num_tokens}')
        self.num_classes, self.num_tokens = num_classes, num_tokens
        classes = num_classes + 1
        eye = torch.eye(classes)
        tokens = torch.stack([torch.nn.functional.pad(eye, (i * classes, (num_tokens - 1 - i) * classes))
                              for i in range(num_tokens)], 1)
        self.register_buffer('tokens', tokens, persistent=False)
        self.register_buffer('pooled', eye, persistent=False)

    def _lookup(self, labels: Tensor) -> Condition:
        return Condition(dict(encoder_hidden_states=self.tokens[labels], pooled_projections=self.pooled[labels]))

    def encode(self, prompts: Prompts) -> Condition:
        """Encodes class labels: a LongTensor (B,), or texts of numbers.

        Raises:
            ValueError: If a label is no whole number in 0..num_classes-1.
        """
        given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
        try:
            if any(isinstance(p, float) for p in given):
                raise ValueError
            values = [int(p) for p in given]
        except (TypeError, ValueError):
            raise ValueError('ClassConditioner takes class labels such as 3 or "3" as prompts, '
                             f'but got {given[:3]}; check data.prompt or model.backbone.conditioner') from None
        wrong = [v for v in values if not 0 <= v < self.num_classes]
        if wrong:
            raise ValueError(f'class labels must lie in 0..{self.num_classes - 1} '
                             f'(model.backbone.conditioner.num_classes={self.num_classes}), but got {wrong[:3]}')
        return self._lookup(torch.tensor(values, device=self.tokens.device))

    def null(self) -> Condition:
        return self._lookup(torch.tensor([self.num_classes], device=self.tokens.device))

    def to_config(self) -> Dict[str, Any]:
        return dict(type='ClassConditioner', num_classes=self.num_classes, num_tokens=self.num_tokens)


@MODELS.register_module()
class SD3TextConditioner(Conditioner):
    """SD3's own text encoders, through `StableDiffusion3Pipeline.encode_prompt`.

    Args:
        pretrained (str): Hub id or folder of a StableDiffusion3 pipeline.
        t5 (bool): Whether to load the third encoder, T5-XXL (4.7 B parameters). Without it, its tokens are zeros, as
            in the pipeline. Default True.
        max_sequence_length (int): Tokens for T5. Default 256, as in the pipeline.
        negative_prompt (str): Text of the null condition. Default ''.
        dtype (str): Weights' dtype. Default 'float32'.
        **load_kwargs: Passed to `from_pretrained` (`revision`, `variant`, ...).
    """

    def __init__(self, pretrained: str, t5: bool = True, max_sequence_length: int = 256, negative_prompt: str = '',
                 dtype: str = 'float32', **load_kwargs: Any) -> None:
        super().__init__()
        # Takes seconds; models without text encoders skip it.
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
        hub_kwargs = {k: v for k, v in load_kwargs.items() if k in HUB_KEYS}
        parts = StableDiffusion3Pipeline.load_config(pretrained, **hub_kwargs)
        if t5 and (parts.get('text_encoder_3') or [None])[0] is None:
            raise ValueError(f'{pretrained!r} has no T5 (text_encoder_3): set model.backbone.conditioner.t5=False')
        without_t5 = {} if t5 else dict(text_encoder_3=None, tokenizer_3=None)
        with torch.device('meta'):  # encode_prompt asks the network for its width, and for nothing else
            network = SD3Transformer2DModel.from_config(
                SD3Transformer2DModel.load_config(pretrained, subfolder='transformer', **hub_kwargs))
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(
            pretrained, transformer=network, vae=None, torch_dtype=getattr(torch, dtype), **without_t5, **load_kwargs)
        encoders = [self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.text_encoder_3]
        self.encoders = nn.ModuleList([e for e in encoders if e is not None])
        self.encoders.requires_grad_(False).eval()
        self.max_sequence_length, self.negative_prompt = max_sequence_length, negative_prompt
        self._config = dict(
            type='SD3TextConditioner', pretrained=absolute_folder(pretrained), t5=t5, dtype=dtype,
            max_sequence_length=max_sequence_length, negative_prompt=negative_prompt, **origin(load_kwargs))

    def to_config(self) -> Dict[str, Any]:
        return self._config

    @torch.no_grad()
    def encode(self, prompts: Prompts) -> Condition:
        if not all(isinstance(p, str) for p in prompts):
            raise ValueError(f'SD3TextConditioner takes texts as prompts, but got {type(prompts).__name__}; '
                             'set model.backbone.conditioner for class labels')
        tokens, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=list(prompts), prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length, device=next(self.encoders.parameters()).device)
        return Condition(dict(encoder_hidden_states=tokens, pooled_projections=pooled))

    def null(self) -> Condition:
        return self.encode([self.negative_prompt])


@MODELS.register_module()
class EmbeddingConditioner(Conditioner):
    """For data that carry their text embeddings (`EmbeddingDataset`): holds the null condition, encodes nothing.

    Args:
        folder (str): Folder of the embeddings, with `null.safetensors` in it.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        from cdm_plugin.data import EmbeddingDataset
        for name, row in EmbeddingDataset(data_root=folder).null_condition().items():
            self.register_buffer(name, row[None], persistent=False)

    def encode(self, prompts: Prompts) -> Condition:
        raise ValueError('EmbeddingConditioner cannot encode prompts: use an EmbeddingDataset for training and a '
                         'conditioner with text encoders for sampling (model.backbone.conditioner)')

    def null(self) -> Condition:
        return Condition(dict(self.named_buffers()))
