"""What every conditioner is: from prompts (texts or class labels) to a `Condition`."""
import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from cdm_plugin.condition import Condition

Prompts = list[str] | Tensor


class Conditioner(nn.Module):
    """Base class. A conditioner is frozen: it is never trained and never saved into checkpoints.

    Attributes:
        light (bool): Whether building it reads no weights; `cdm doctor` then builds it. Default False.
    """
    config_key = 'model.backbone.conditioner'
    light = False

    def encode(self, prompts: Prompts) -> Condition:
        """Encodes B prompts."""
        raise NotImplementedError

    def null(self) -> Condition:
        """The null condition, one row."""
        raise NotImplementedError

    def to_config(self) -> dict[str, Any] | None:
        """The config that rebuilds this conditioner, or None if that cannot be written down."""
        return None


class Encoder(NamedTuple):
    """A text encoder, as it is known before it is loaded.

    Attributes:
        part (str): Its folder in the pipeline.
        name (str): What people call it.
        parameters (int): Number of parameters.
    """
    part: str
    name: str
    parameters: int


class TokenCount(NamedTuple):
    """How long prompts are for one text encoder.

    Attributes:
        encoder (str): Its name.
        limit (int): Tokens that it takes.
        lengths (list[int]): Tokens of each prompt.
    """
    encoder: str
    limit: int
    lengths: list[int]


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


@contextlib.contextmanager
def visiting(modules: nn.Module, device: torch.device) -> Iterator[None]:
    """Frozen modules compute on a device inside. Their weights stay in the CPU's memory, where they are page-locked
    from the first visit to a GPU on (which makes the copies several times as fast); the device's are dropped after.
    """
    tensors = [*modules.parameters(), *modules.buffers()]
    for tensor in tensors:  # one after the other: both copies of all would not fit everywhere
        if device.type == 'cuda' and tensor.device.type == 'cpu' and not tensor.is_pinned():
            tensor.data = tensor.data.pin_memory()
    hosts = [tensor.data for tensor in tensors]
    try:
        for tensor, host in zip(tensors, hosts):
            tensor.data = host.to(device, non_blocking=True)
        yield
    finally:
        for tensor, host in zip(tensors, hosts):
            tensor.data = host


class TextConditioner(Conditioner):
    """Base class of those with text encoders: texts become what the encoders make of them.

    Prompts that are longer than an encoder takes lose their end, as in the pipelines; `truncated` counts them by
    encoder, and the first one of each is logged.

    Args:
        encoders (Sequence[nn.Module]): The text encoders; frozen here.
        negative_prompt (str): Text of the null condition. Default ''.
        offload (bool): Whether the encoders wait in the CPU's memory between two batches, and visit the device only
            to encode one. Default False.

    Attributes:
        published_encoders (Sequence[Encoder]): Of the published model. Default none: nothing is known of them.

    Raises:
        ValueError: If quantised encoders are to be offloaded.
    """
    published_encoders: Sequence[Encoder] = ()

    def __init__(self, encoders: Sequence[nn.Module], negative_prompt: str = '', offload: bool = False) -> None:
        super().__init__()
        modules = nn.ModuleList(encoders)
        modules.requires_grad_(False).eval()
        if offload and not all(p.is_floating_point() for p in modules.parameters()):
            # bitsandbytes keeps what a weight is scaled by beside the weight, on the device.
            raise ValueError('model.backbone.conditioner.offload=True does not go with quantised text encoders: leave '
                             'offload out, or take encoders that are not quantised')
        self.negative_prompt, self.offload = negative_prompt, offload
        # Offloaded encoders do not follow the model to its device: a tuple hides them from nn.Module.
        self._encoders: Any = (modules,) if offload else modules
        self.register_buffer('_here', torch.empty(0), persistent=False)
        self.truncated: Counter = Counter()
        self._config: dict[str, Any] = {}

    @classmethod
    def expected_encoders(cls, folder: Path | None, **arguments: Any) -> Sequence[Encoder]:
        """The text encoders that a conditioner of these arguments would load; `cdm doctor` asks.

        Args:
            folder (Path, optional): The pretrained folder, whose configs tell; None where it is not on this machine.
            **arguments: Those of the constructor.
        """
        return cls.published_encoders

    @classmethod
    def expected_tokens(cls, **arguments: Any) -> int:
        """Tokens of a text in its condition, for these arguments of the constructor; `cdm doctor` asks."""
        return 256

    def encode_texts(self, prompts: list[str]) -> Mapping[str, Tensor | list[Tensor]]:
        """The fields of the condition of B texts, as `Condition.of_rows` takes them: tensors (B, ...) or, of texts that
        keep their own lengths, lists of B tensors (L_i, ...)."""
        raise NotImplementedError

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
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

    def to_config(self) -> dict[str, Any]:
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
        with (visiting(self.encoders, self.device) if self.offload else contextlib.nullcontext(),
              _errors_only('diffusers', 'transformers')):
            return Condition.of_rows(self.encode_texts(prompts))

    def null(self) -> Condition:
        return self.encode([self.negative_prompt])

    def _count_truncated(self, prompts: list[str]) -> None:
        for encoder, limit, lengths in self.count_tokens(prompts):
            longer = [i for i, length in enumerate(lengths) if length > limit]
            first = not self.truncated[encoder]
            self.truncated.update({encoder: len(longer)} if longer else {})
            if longer and first:
                print_log(f'a prompt of {lengths[longer[0]]} tokens is longer than the {limit} that {encoder} takes, '
                          f'its end is left out: {prompts[longer[0]][:60]!r}... (logged once; '
                          'model.backbone.conditioner counts them in `truncated`)', 'current', level=logging.WARNING)
