"""What every architecture provides: networks, their conventions, and the way between prompts, latents and images."""
import inspect
import json
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from mmengine.registry import MODELS
from torch import Tensor, nn

from cdm_plugin.assets import resolve
from cdm_plugin.codecs import Codec
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import HUB_KEYS, Conditioner
from cdm_plugin.flow import full_precision, shift_sigmas

PARTS_FILE = 'cdm_parts.json'
# What `from_pretrained` may be told.
LOAD_KEYS = ('revision', 'variant', 'cache_dir', 'local_files_only', 'token', 'force_download', 'use_safetensors')


class Backbone(nn.Module):
    """Adapter over one diffusers architecture. Stateless about roles: it is handed the network to call.

    A subclass states its network class, its timestep convention and its condition's fields, in one file.

    Args:
        pretrained (str, optional): Hub id, folder (both in the layout of a diffusers pipeline) or `asset:` path.
        config (dict or str, optional): Dimensions of a new network with random weights, or the path of a diffusers
            config.json, instead of `pretrained`.
        conditioner (dict, optional): Config of the conditioner. Default: what `pretrained` brings; a dict without
            `type` changes single arguments of that, `dict(t5=False)`.
        codec (dict, optional): Config of the codec, likewise.
        scheduler (dict, optional): Arguments of FlowMatchEulerDiscreteScheduler. Default: what `pretrained` brings.
        subfolder (str): Where the network lies in `pretrained`. Default 'transformer'.
        dtype (str): Dtype of the network's weights. Default 'float32'.
        **load_kwargs: Passed to every `from_pretrained`: `revision`, `variant`, `cache_dir`, `local_files_only`,
            `token`, `force_download`, `use_safetensors`.
    """
    network_class: type
    # Name of the network's submodule whose output is the time embedding (an anchor-aware fake score adds to it).
    time_embedder: str

    def __init__(self, pretrained: Optional[str] = None, config: Union[None, str, Dict[str, Any]] = None,
                 conditioner: Optional[Dict] = None, codec: Optional[Dict] = None, scheduler: Optional[Dict] = None,
                 subfolder: str = 'transformer', dtype: str = 'float32', **load_kwargs: Any) -> None:
        super().__init__()
        if (pretrained is None) == (config is None):
            raise ValueError('model.backbone needs either pretrained (hub id or folder) or config (dimensions of a '
                             f'new network), but has pretrained={pretrained!r} and config={config!r}')
        unknown = sorted(set(load_kwargs) - set(LOAD_KEYS))
        if unknown:
            raise ValueError(f'model.backbone.{unknown[0]} is unknown: {type(self).__name__} takes pretrained, config, '
                             f'conditioner, codec, scheduler, subfolder, dtype, {", ".join(LOAD_KEYS)}')
        self.pretrained = None if pretrained is None else self._check_folder(resolve(pretrained), pretrained)
        self.subfolder, self.dtype, self.load_kwargs = subfolder, self._check_dtype(dtype), load_kwargs
        self.config = self._load_config(config)
        parts = self._saved_parts()
        self.scheduler = self._load_scheduler(scheduler)
        self.conditioner: Conditioner = self._build_part('conditioner', conditioner or parts.get('conditioner'))
        self.codec: Codec = self._build_part('codec', codec or parts.get('codec'))
        self.requires_grad_(False)

    # Loading and saving

    def build_network(self) -> ModelMixin:
        """A network of its own, with the pretrained weights or, from `config`, new ones."""
        if self.pretrained is None:
            network = self.network_class.from_config(self.config)
            return network if network.dtype == self.dtype else network.to(self.dtype)
        return self.network_class.from_pretrained(
            self.pretrained, subfolder=self.subfolder, torch_dtype=self.dtype, **self.load_kwargs)

    def save_pretrained(self, network: ModelMixin, folder: Union[str, Path], **recipe: Any) -> None:
        """Writes a folder that `pretrained` opens: the network and the scheduler in diffusers' layout (safetensors),
        and the configs of the conditioner and codec (text encoders and VAE stay where they came from).

        Args:
            network (ModelMixin): The network to save.
            folder (str): Where to; made if need be.
            **recipe: Plain data that says how to use the network, kept beside those configs.
        """
        folder = Path(folder)
        network.save_pretrained(folder / 'transformer', safe_serialization=True)
        self.scheduler.save_pretrained(folder / 'scheduler')
        parts = dict(backbone=type(self).__name__, conditioner=self.conditioner.to_config(),
                     codec=self.codec.to_config(), **recipe)
        (folder / PARTS_FILE).write_text(json.dumps(parts, indent=2) + '\n')

    @staticmethod
    def _check_folder(path: str, given: str) -> str:
        looks_local = given.startswith(('/', './', '../', '~', 'asset:')) or Path(path).exists()
        if looks_local and not Path(path).is_dir():
            raise FileNotFoundError(f'model.backbone.pretrained={given!r} is no folder: give a folder in the layout '
                                    'of a diffusers pipeline, or a hub id')
        return path

    @staticmethod
    def _check_dtype(dtype: str) -> torch.dtype:
        value = getattr(torch, str(dtype), None)
        if value not in (torch.float32, torch.float64, torch.bfloat16):
            raise ValueError(f'model.backbone.dtype must be float32, bfloat16 or float64, but is {dtype!r}')
        return value

    def _load_config(self, config: Union[None, str, Dict[str, Any]]) -> Dict[str, Any]:
        if isinstance(config, str):
            path = Path(resolve(config))
            if not path.is_file():
                raise FileNotFoundError(f'model.backbone.config={config!r} is no file: give the path of a diffusers '
                                        'config.json or the dimensions as a dict')
            config = json.loads(path.read_text())
        if config is not None:
            return self._with_defaults(dict(config))
        try:
            return dict(self.network_class.load_config(self.pretrained, subfolder=self.subfolder, **self._hub_kwargs))
        except OSError as error:
            cause = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f'model.backbone.pretrained={self.pretrained!r} has no {self.subfolder}/'
                                    f'config.json, or cannot be reached: {cause}') from error

    def _with_defaults(self, config: Dict[str, Any]) -> Dict[str, Any]:
        """The config completed by the network class's defaults."""
        parameters = inspect.signature(self.network_class.__init__).parameters
        known = {k: p.default for k, p in parameters.items() if k != 'self'}
        unknown = [k for k in config if k not in known and not k.startswith('_')]
        if unknown:
            raise ValueError(f'model.backbone.config has unknown keys {unknown}: {self.network_class.__name__} takes '
                             f'{sorted(known)}')
        return {**known, **config}

    @property
    def _hub_kwargs(self) -> Dict[str, Any]:
        """Those of load_kwargs that config files take too."""
        return {k: v for k, v in self.load_kwargs.items() if k in HUB_KEYS}

    def _load_scheduler(self, scheduler: Optional[Dict[str, Any]]) -> FlowMatchEulerDiscreteScheduler:
        if scheduler is not None or self.pretrained is None:
            return FlowMatchEulerDiscreteScheduler(**(scheduler or {}))
        return FlowMatchEulerDiscreteScheduler.from_pretrained(
            self.pretrained, subfolder='scheduler', **self._hub_kwargs)

    def _saved_parts(self) -> Dict[str, Any]:
        path = Path(self.pretrained or '', PARTS_FILE)
        if self.pretrained is None or not path.is_file():
            return {}
        return json.loads(path.read_text())

    def _build_part(self, name: str, cfg: Optional[Dict[str, Any]]) -> nn.Module:
        default = self.default_parts().get(name)
        if cfg is None:
            cfg = default
        elif isinstance(cfg, dict) and 'type' not in cfg:  # single arguments of the default part
            cfg = {**(default or {}), **cfg}
        if not cfg or (isinstance(cfg, dict) and 'type' not in cfg):
            raise ValueError(f'model.backbone.{name} is missing: pretrained={self.pretrained!r} brings none')
        return MODELS.build(dict(cfg)) if isinstance(cfg, dict) else cfg

    def default_parts(self) -> Dict[str, Dict[str, Any]]:
        """Configs of the conditioner and codec of the real models; empty for a network with new weights."""
        return {}

    # Conventions of the architecture

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The network's velocity at (x, sigma).

        Args:
            network (nn.Module): A network of this architecture, or a wrapper of one.
            x (Tensor): Noisy latents, (B, C, h, w).
            sigma (Tensor): Noise levels in [0, 1], (B,).
            condition (Condition): B rows.

        Returns:
            Tensor: (B, C, h, w), float32 (float64 from a float64 network).
        """
        dtype = next(network.parameters()).dtype
        fields = {name: t.to(dtype) for name, t in condition.fields.items()}
        return full_precision(self.call(network, x.to(dtype), sigma, fields))

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: Dict[str, Tensor]) -> Tensor:
        """Calls the network in its own convention; inputs have the network's dtype, sigma is float32 or wider."""
        raise NotImplementedError

    def condition_widths(self) -> Dict[str, int]:
        """Last dimension that the network expects of each field of a condition."""
        raise NotImplementedError

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config['in_channels']

    def default_latent_size(self) -> Tuple[int, int]:
        """Height and width of the latents that the network was made for."""
        return (self.config['sample_size'],) * 2

    def check_latent_size(self, latent_size: Tuple[int, int], image_size: Any) -> None:
        """Raises ValueError if the network cannot take latents of this size; `image_size` is named in the error."""
        patch = self.config.get('patch_size') or 1
        limit = patch * (self.config.get('pos_embed_max_size') or 10**9)
        if any(side % patch or side > limit for side in latent_size):
            raise ValueError(f'model.image_size={image_size!r} makes latents of {latent_size}, but the network takes '
                             f'multiples of {patch} up to {limit}: choose another image size')

    def time_embedding_width(self) -> int:
        """Width of the time embedding."""
        return self.config['num_attention_heads'] * self.config['attention_head_dim']

    def shift(self, latent_size: Tuple[int, int]) -> float:
        """The scheduler's shift for latents of this height and width."""
        return self.scheduler.config.shift

    def shift_sigmas(self, sigmas: Tensor, latent_size: Tuple[int, int]) -> Tensor:
        """The scheduler's own shift of noise levels, (N,) -> (N,)."""
        return shift_sigmas(sigmas, self.shift(latent_size))

    # Between the batch and the network

    def condition(self, data: Dict[str, Any]) -> Condition:
        """The condition of a batch: its precomputed embeddings, or its prompts encoded.

        Args:
            data (dict): A preprocessed batch with `condition` (dict of tensors) or `prompt` (texts or labels).
        """
        if data.get('condition') is not None:
            condition = Condition(dict(data['condition']))
        elif data.get('prompt') is not None:
            condition = self.conditioner.encode(data['prompt'])
        else:
            raise ValueError(f"a batch needs 'prompt' or 'condition', but has {sorted(data)}; name the field with "
                             "the transform dict(type='PackInputs', prompt=...) in the dataset's pipeline")
        self.check_condition(condition)
        return condition

    def check_condition(self, condition: Condition) -> None:
        """Raises ValueError if a field is absent or its width is not the network's."""
        for name, width in self.condition_widths().items():
            if name not in condition.fields:
                raise ValueError(f'{type(self).__name__} needs the field {name!r} in a condition, but there are '
                                 f'{sorted(condition.fields)}; make the embeddings with this model\'s text encoders')
            got = condition.fields[name].shape[-1]
            if got != width:
                raise ValueError(f'embeddings {name!r} have width {got}, but the network (model.backbone) expects '
                                 f'{width}: they come from other text encoders or another conditioner')
