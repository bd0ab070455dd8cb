"""Conditioners: from prompts (texts or class labels) to a `Condition`."""
import contextlib
import difflib
import inspect
import logging
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

import diffusers
import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.condition import Condition

Prompts = Union[List[str], Tensor]
# What `from_pretrained` may be told.
LOAD_KEYS = ('revision', 'variant', 'cache_dir', 'local_files_only', 'token', 'force_download', 'use_safetensors')
# What the loaders of config files take of that.
HUB_KEYS = ('revision', 'cache_dir', 'local_files_only', 'token', 'force_download')


def absolute_folder(pretrained: str) -> str:
    """A hub id as it is, a folder by its absolute path, so that a config is valid from anywhere on this machine."""
    return str(Path(pretrained).resolve()) if Path(pretrained).is_dir() else pretrained


def check_folder(path: str, given: str, key: str, what: str) -> str:
    """The path, if it is a folder or may be a hub id: a name, or an owner and a name.

    Raises:
        FileNotFoundError: If `given` looks like a path and is no folder; names the config's key and what belongs there.
    """
    looks_local = (given.startswith(('/', './', '../', '~', 'asset:')) or given.count('/') > 1
                   or Path(path).exists())
    if looks_local and not Path(path).is_dir():
        raise FileNotFoundError(f'{key}={given!r} is no folder: give {what}, or a hub id')
    return path


def origin(load_kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Those of from_pretrained's arguments that say which weights are meant (and are no secret)."""
    return {k: v for k, v in load_kwargs.items() if k in ('revision', 'variant')}


def check_load_keys(load_kwargs: Dict[str, Any], key: str, cls: type) -> None:
    """Raises ValueError for arguments that `from_pretrained` does not have: misspelt ones of the class itself."""
    for name in load_kwargs:
        if name not in LOAD_KEYS:
            known = [n for base in cls.__mro__ if '__init__' in vars(base) and base.__module__.startswith('cdm_plugin')
                     for n, p in inspect.signature(base.__init__).parameters.items()
                     if n != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
            known = list(dict.fromkeys([*known, *LOAD_KEYS]))
            close = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f'{key}.{name} is unknown: {cls.__name__} takes {", ".join(known)}'
                             + (f'; did you mean {close[0]!r}?' if close else ''))


def check_dtype(dtype: str, key: str) -> torch.dtype:
    """A dtype by its name. float16 is refused: its range is too small for T5 and for large transformers.

    Raises:
        ValueError: If it is none of float32, bfloat16 and float64; names the config's key.
    """
    value = getattr(torch, str(dtype), None)
    if value not in (torch.float32, torch.float64, torch.bfloat16):
        why = ' (float16 overflows in these models: take bfloat16)' if value is torch.float16 else ''
        raise ValueError(f'{key} must be float32, bfloat16 or float64, but is {dtype!r}{why}')
    return value


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


class TokenCount(NamedTuple):
    """How long prompts are for one text encoder.

    Attributes:
        encoder (str): Its name.
        limit (int): Tokens that it takes.
        lengths (list[int]): Tokens of each prompt.
    """
    encoder: str
    limit: int
    lengths: List[int]


@contextlib.contextmanager
def _errors_only(*loggers: str) -> Iterator[None]:
    """Truncation is counted here; diffusers warns of it for every batch, and transformers of an indexing error that
    will not happen."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in loggers}
    try:
        for logger, level in levels.items():
            logger.setLevel(max(level, logging.ERROR))
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


class TextConditioner(Conditioner):
    """Base class of those with text encoders: texts become what the encoders make of them.

    Prompts that are longer than an encoder takes lose their end, as in the pipelines; `truncated` counts them by
    encoder, and the first one of each is logged.

    Args:
        encoders (Sequence[nn.Module]): The text encoders; frozen here.
        negative_prompt (str): Text of the null condition. Default ''.
        offload (bool): Whether the encoders wait in the CPU's memory between two batches, and visit the device only
            to encode one. Default False.
    """

    def __init__(self, encoders: Sequence[nn.Module], negative_prompt: str = '', offload: bool = False) -> None:
        super().__init__()
        modules = nn.ModuleList(encoders)
        modules.requires_grad_(False).eval()
        self.negative_prompt, self.offload = negative_prompt, offload
        # Offloaded encoders do not follow the model to its device: a tuple hides them from nn.Module.
        self._encoders = (modules,) if offload else modules
        self.register_buffer('_here', torch.empty(0), persistent=False)
        self.truncated: Counter = Counter()
        self._config: Dict[str, Any] = {}

    def encode_texts(self, prompts: List[str]) -> Dict[str, Tensor]:
        """The fields of the condition of B texts."""
        raise NotImplementedError

    def count_tokens(self, prompts: List[str]) -> List[TokenCount]:
        """Lengths of the prompts, for every encoder."""
        raise NotImplementedError

    @property
    def encoders(self) -> nn.ModuleList:
        """The text encoders."""
        return self._encoders[0] if self.offload else self._encoders

    @property
    def device(self) -> torch.device:
        """Where prompts are encoded."""
        return self._here.device

    def to_config(self) -> Dict[str, Any]:
        return self._config

    @torch.no_grad()
    def encode(self, prompts: Prompts) -> Condition:
        """Encodes B texts.

        Raises:
            ValueError: If they are no texts.
        """
        if not all(isinstance(p, str) for p in prompts):
            raise ValueError(f'{type(self).__name__} takes texts as prompts, but got {type(prompts).__name__}; '
                             'set model.backbone.conditioner for class labels')
        prompts = list(prompts)
        self._count_truncated(prompts)
        if self.offload:
            self.encoders.to(self.device)
        try:
            with _errors_only('diffusers', 'transformers'):
                return Condition(self.encode_texts(prompts))
        finally:
            if self.offload:
                self.encoders.to('cpu')

    def null(self) -> Condition:
        return self.encode([self.negative_prompt])

    def _count_truncated(self, prompts: List[str]) -> None:
        for encoder, limit, lengths in self.count_tokens(prompts):
            longer = [i for i, length in enumerate(lengths) if length > limit]
            first = not self.truncated[encoder]
            self.truncated.update({encoder: len(longer)} if longer else {})
            if longer and first:
                print_log(f'a prompt of {lengths[longer[0]]} tokens is longer than the {limit} that {encoder} takes, '
                          f'its end is left out: {prompts[longer[0]][:60]!r}... (logged once; '
                          'model.backbone.conditioner counts them in `truncated`)', 'current', level=logging.WARNING)


class PipelineConditioner(TextConditioner):
    """Base class of the text encoders of a diffusers pipeline, called through the pipeline's own `encode_prompt`.

    Args:
        pretrained (str): Hub id or folder of the pipeline.
        negative_prompt (str): Text of the null condition. Default ''.
        dtype (str): Weights' dtype, 'float32' or 'bfloat16'. Default 'float32'.
        offload (bool): See `TextConditioner`. Default False.
        **load_kwargs: Passed to `from_pretrained` (`revision`, `variant`, ...).
    """
    # By name: importing a pipeline takes seconds, and models without text encoders skip it.
    pipeline_name: str

    def __init__(self, pretrained: str, negative_prompt: str = '', dtype: str = 'float32', offload: bool = False,
                 **load_kwargs: Any) -> None:
        check_load_keys(load_kwargs, 'model.backbone.conditioner', type(self))
        weights_dtype = check_dtype(dtype, 'model.backbone.conditioner.dtype')
        hub_kwargs = {k: v for k, v in load_kwargs.items() if k in HUB_KEYS}
        components = self.components(pretrained, **hub_kwargs)
        pipeline = self.pipeline_class().from_pretrained(pretrained, dtype=weights_dtype, **components, **load_kwargs)
        super().__init__([part for name, part in pipeline.components.items()
                          if isinstance(part, nn.Module) and name not in components], negative_prompt, offload)
        self.pipeline = pipeline
        self._config = dict(type=type(self).__name__, pretrained=absolute_folder(pretrained), dtype=dtype,
                            negative_prompt=negative_prompt, **origin(load_kwargs))

    def pipeline_class(self) -> type:
        """The pipeline whose encoders these are."""
        return getattr(diffusers, self.pipeline_name)

    def components(self, pretrained: str, **hub_kwargs: Any) -> Dict[str, Any]:
        """Parts of the pipeline that are given instead of loaded, mostly None."""
        return dict(transformer=None, vae=None)


@MODELS.register_module()
class TextEncoderConditioner(TextConditioner):
    """One text encoder of transformers, for backbones that are trained here: its last hidden states are the tokens
    (zero behind a text's end), their mean over the text's own tokens the pooled vector.

    Args:
        pretrained (str): Hub id or folder of the encoder, with its tokenizer; any that `AutoModelForTextEncoding`
            opens (BERT, MiniLM, T5's encoder, ...).
        max_length (int): Tokens of a prompt, special ones included; shorter prompts are padded to it. Default 32.
        negative_prompt (str): Text of the null condition. Default ''.
        dtype (str): Weights' dtype, 'float32' or 'bfloat16'. Default 'float32'.
        offload (bool): See `TextConditioner`. Default False.
        **load_kwargs: Passed to `from_pretrained` (`revision`, ...).

    Raises:
        FileNotFoundError: If `pretrained` is neither a folder with an encoder nor a hub id that can be fetched.
        ValueError: If `max_length` is more than the encoder has positions.
    """

    def __init__(self, pretrained: str, max_length: int = 32, negative_prompt: str = '', dtype: str = 'float32',
                 offload: bool = False, **load_kwargs: Any) -> None:
        check_load_keys(load_kwargs, 'model.backbone.conditioner', type(self))
        weights_dtype = check_dtype(dtype, 'model.backbone.conditioner.dtype')
        self.check_pretrained(pretrained)
        hub_kwargs = {k: v for k, v in load_kwargs.items() if k in HUB_KEYS}
        from transformers import AutoModelForTextEncoding, AutoTokenizer
        try:
            tokenizer = AutoTokenizer.from_pretrained(pretrained, **hub_kwargs)
            encoder = AutoModelForTextEncoding.from_pretrained(pretrained, dtype=weights_dtype, **load_kwargs)
        except (OSError, ValueError) as error:  # ValueError: a folder without a tokenizer, or of another kind of model
            raise FileNotFoundError(f'model.backbone.conditioner.pretrained={pretrained!r} is no text encoder of '
                                    'transformers: neither a folder with its config.json, weights and tokenizer nor a '
                                    f'hub id that can be fetched ({str(error).strip().splitlines()[0]})') from error
        positions = getattr(encoder.config, 'max_position_embeddings', None) or max_length
        if not isinstance(max_length, int) or not 1 <= max_length <= positions:
            raise ValueError(f'model.backbone.conditioner.max_length must be a whole number in 1..{positions}, the '
                             f'positions of {pretrained!r}, but is {max_length!r}')
        super().__init__([encoder], negative_prompt, offload)
        self.tokenizer, self.max_length = tokenizer, max_length
        self._config = dict(type=type(self).__name__, pretrained=absolute_folder(pretrained), max_length=max_length,
                            negative_prompt=negative_prompt, dtype=dtype, **origin(load_kwargs))

    @staticmethod
    def check_pretrained(pretrained: str) -> None:
        """Raises FileNotFoundError if it looks like a path and is no folder."""
        check_folder(pretrained, pretrained, 'model.backbone.conditioner.pretrained',
                     "a folder with a text encoder's config.json, weights and tokenizer")

    def encode_texts(self, prompts: List[str]) -> Dict[str, Tensor]:
        inputs = self.tokenizer(prompts, padding='max_length', truncation=True, max_length=self.max_length,
                                return_tensors='pt').to(self.device)
        states = self.encoders[0](**inputs).last_hidden_state
        own = inputs['attention_mask'][..., None].to(states.dtype)
        states = states * own
        return dict(encoder_hidden_states=states, pooled_projections=states.sum(1) / own.sum(1))

    def count_tokens(self, prompts: List[str]) -> List[TokenCount]:
        lengths = [len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids]
        return [TokenCount(type(self.encoders[0]).__name__, self.max_length, lengths)]


@MODELS.register_module()
class EmbeddingConditioner(Conditioner):
    """Text embeddings computed before, by `cdm cache` or `write_embeddings`: looks prompts up and loads no encoder.

    Data that carry their embeddings (`EmbeddingDataset`) need only its null condition; others (images with captions,
    validation prompts) have their prompts looked up.

    Args:
        folder (str): Folder of the embeddings, with `null.safetensors` in it.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        from cdm_plugin.data import EmbeddingDataset
        self.folder = folder
        self._dataset = EmbeddingDataset(data_root=folder)
        for name, row in self._dataset.null_condition().items():
            self.register_buffer(name, row[None], persistent=False)
        self._rows: Optional[Dict[str, int]] = None  # of the prompts, made when the first one is asked for

    def encode(self, prompts: Prompts) -> Condition:
        """Looks B prompts up.

        Raises:
            ValueError: If the folder does not say what prompts it holds, or has no embedding of one of them.
        """
        if self._rows is None:
            infos = (BaseDataset.get_data_info(self._dataset, i) for i in range(len(self._dataset)))
            self._rows = {info['prompt']: i for i, info in enumerate(infos) if 'prompt' in info}
        given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
        missing = [prompt for prompt in given if prompt not in self._rows]
        if missing:
            what = (f'has no embedding of {len(missing)} of {len(given)} prompts, such as {str(missing[0])[:80]!r}'
                    if self._rows else 'does not say what prompts it holds')
            raise ValueError(f'model.backbone.conditioner.folder={self.folder!r} {what}: run `cdm cache` with these '
                             'prompts, or set model.backbone.conditioner to the text encoders that made the folder')
        rows = [self._dataset.get_data_info(self._rows[prompt])['condition'] for prompt in given]
        device = next(self.buffers()).device
        return Condition({name: torch.stack([row[name] for row in rows]) for name in rows[0]}).to(device)

    def null(self) -> Condition:
        return Condition(dict(self.named_buffers()))
