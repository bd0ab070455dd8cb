import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.arguments import Count
from cdm_plugin.conditioners.base import Encoder, TextConditioner, TokenCount
from cdm_plugin.pretrained import (
    HUB_KEYS,
    absolute_folder,
    check_dtype,
    check_folder,
    check_load_keys,
    naming_absent,
    origin,
)


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

    @classmethod
    def expected_encoders(cls, folder: Path | None, **arguments: Any) -> Sequence[Encoder]:
        if folder is None:
            return cls.published_encoders
        index = json.loads((folder / 'model_index.json').read_text())
        return [_count(part, entry[1], folder / part) for part, entry in index.items()
                if part.startswith('text_encoder') and entry[0] is not None]

    def __init__(self, pretrained: str, negative_prompt: str = '', dtype: str = 'float32', offload: bool = False,
                 **load_kwargs: Any) -> None:
        check_load_keys(load_kwargs, 'model.backbone.conditioner', type(self))
        weights_dtype = check_dtype(dtype, 'model.backbone.conditioner.dtype')
        key = 'model.backbone.conditioner.pretrained'
        check_folder(pretrained, pretrained, key, 'the folder of a pipeline, with its text encoders')
        hub_kwargs = {k: v for k, v in load_kwargs.items() if k in HUB_KEYS}
        with naming_absent(pretrained, key):
            components = self.components(pretrained, **hub_kwargs)
            pipeline = self.pipeline_class().from_pretrained(pretrained, dtype=weights_dtype, **components,
                                                             **load_kwargs)
        super().__init__([part for name, part in pipeline.components.items()
                          if isinstance(part, nn.Module) and name not in components], negative_prompt, offload)
        self.pipeline = pipeline
        self._config = dict(type=type(self).__name__, pretrained=absolute_folder(pretrained), dtype=dtype,
                            negative_prompt=negative_prompt, **origin(load_kwargs))

    def pipeline_class(self) -> type[Any]:
        """The pipeline whose encoders these are."""
        return getattr(diffusers, self.pipeline_name)

    def components(self, pretrained: str, **hub_kwargs: Any) -> dict[str, Any]:
        """Parts of the pipeline that are given instead of loaded, mostly None."""
        return dict(transformer=None, vae=None)


class LimitedPipelineConditioner(PipelineConditioner):
    """A pipeline conditioner whose texts have so many tokens at most.

    Args:
        pretrained (str): Hub id or folder of a pipeline of this architecture.
        max_sequence_length (int): Tokens of a text. Default 512, as in these pipelines.
        **kwargs: See `PipelineConditioner`: `negative_prompt`, `dtype`, `offload`, `revision`, ...
    """

    @classmethod
    def expected_tokens(cls, max_sequence_length: int = 512, **arguments: Any) -> int:
        return max_sequence_length

    def __init__(self, pretrained: str, max_sequence_length: Count = 512, **kwargs: Any) -> None:
        self.max_sequence_length = max_sequence_length
        super().__init__(pretrained, **kwargs)
        self._config.update(max_sequence_length=max_sequence_length)


def _count(part: str, name: str, folder: Path) -> Encoder:
    """A class of transformers and its parameters for the config in a folder, counted without memory."""
    import transformers
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    cls: Any = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(f'{folder.parent / "model_index.json"}: {part} must be a model of transformers, but is '
                         f'{name!r}')
    if name.startswith('CLIPText') and hasattr(config, 'text_config'):
        config = config.text_config
    with torch.device('meta'):
        return Encoder(part, name, sum(p.numel() for p in cls(config).parameters()))


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

    def __init__(self, pretrained: str, max_length: Count = 32, negative_prompt: str = '', dtype: str = 'float32',
                 offload: bool = False, **load_kwargs: Any) -> None:
        check_load_keys(load_kwargs, 'model.backbone.conditioner', type(self))
        weights_dtype = check_dtype(dtype, 'model.backbone.conditioner.dtype')
        self.check_pretrained(pretrained)
        hub_kwargs = {k: v for k, v in load_kwargs.items() if k in HUB_KEYS}
        from transformers import AutoModelForTextEncoding, AutoTokenizer
        try:
            # Unasked, transformers asks on the terminal whether to run code that the folder brings.
            tokenizer = AutoTokenizer.from_pretrained(pretrained, trust_remote_code=False, **hub_kwargs)
            encoder = AutoModelForTextEncoding.from_pretrained(pretrained, dtype=weights_dtype,
                                                               trust_remote_code=False, **load_kwargs)
        except (OSError, ValueError) as error:  # ValueError: a folder without a tokenizer, or of another kind of model
            raise FileNotFoundError(f'model.backbone.conditioner.pretrained={pretrained!r} is no text encoder of '
                                    'transformers: neither a folder with its config.json, weights and tokenizer nor a '
                                    f'hub id that can be fetched ({str(error).strip().splitlines()[0]})') from error
        positions = getattr(encoder.config, 'max_position_embeddings', None) or max_length
        if max_length > positions:
            raise ValueError(f'model.backbone.conditioner.max_length must be a whole number in 1..{positions}, the '
                             f'positions of {pretrained!r}, but is {max_length!r}')
        super().__init__([encoder], negative_prompt, offload)
        self.tokenizer, self.max_length = tokenizer, max_length
        self._config = dict(type=type(self).__name__, pretrained=absolute_folder(pretrained), max_length=max_length,
                            negative_prompt=negative_prompt, dtype=dtype, **origin(load_kwargs))

    @classmethod
    def expected_encoders(cls, folder: Path | None, **arguments: Any) -> Sequence[Encoder]:
        if folder is None:
            return ()
        from transformers import AutoConfig, AutoModelForTextEncoding
        with torch.device('meta'):
            encoder = AutoModelForTextEncoding.from_config(
                AutoConfig.from_pretrained(folder, trust_remote_code=False), trust_remote_code=False)
        return [Encoder('', type(encoder).__name__, sum(p.numel() for p in encoder.parameters()))]

    @classmethod
    def expected_tokens(cls, max_length: int = 32, **arguments: Any) -> int:
        return max_length

    @staticmethod
    def check_pretrained(pretrained: str) -> None:
        """Raises FileNotFoundError if it looks like a path and is no folder."""
        check_folder(pretrained, pretrained, 'model.backbone.conditioner.pretrained',
                     "a folder with a text encoder's config.json, weights and tokenizer")

    def encode_texts(self, prompts: list[str]) -> dict[str, Tensor]:
        inputs = self.tokenizer(prompts, padding='max_length', truncation=True, max_length=self.max_length,
                                return_tensors='pt').to(self.device)
        states = self.encoders[0](**inputs).last_hidden_state
        own = inputs['attention_mask'][..., None].to(states.dtype)
        states = states * own
        return dict(encoder_hidden_states=states, pooled_projections=states.sum(1) / own.sum(1))

    def count_tokens(self, prompts: list[str]) -> list[TokenCount]:
        lengths = [len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids]
        return [TokenCount(type(self.encoders[0]).__name__, self.max_length, lengths)]
