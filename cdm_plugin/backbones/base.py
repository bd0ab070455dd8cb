"""What every architecture provides: networks, their conventions, and the way between prompts, latents and images."""
import inspect
import json
import math
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Tuple, Union

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ModelMixin
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cdm_plugin import attention as kernels
from cdm_plugin.assets import resolve
from cdm_plugin.codecs import Codec
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import HUB_KEYS, Conditioner, check_dtype, check_folder, check_load_keys
from cdm_plugin.flow import full_precision, shift_sigmas
from cdm_plugin.networks import dtype_of

PARTS_FILE = 'cdm_parts.json'


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as a token for each 2x2 of them, (B, h w / 4, 4 C), in the order of Flux and its kin."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, h w / 4, 4 C) to latents (B, C, h, w)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


class Backbone(nn.Module):
    """Adapter over one diffusers architecture. Stateless about roles: it is handed the network to call.

    A subclass states its network class, its timestep convention and its condition's fields, in one file.

    Args:
        pretrained (str, optional): Hub id, folder (both in the layout of a diffusers pipeline) or `asset:` path.
        config (dict or str, optional): Dimensions of the network, or the path of a diffusers config.json. Without
            `pretrained`, a new network with random weights has them; with it, they are what the pretrained network
            must have (`cdm doctor` counts by them before anything is downloaded).
        conditioner (dict, optional): Config of the conditioner. Default: what `pretrained` brings; a dict without
            `type` changes single arguments of that, `dict(t5=False)`.
        codec (dict, optional): Config of the codec, likewise.
        scheduler (dict, optional): Arguments of FlowMatchEulerDiscreteScheduler. Default: what `pretrained` brings.
        subfolder (str): Where the network lies in `pretrained`. Default 'transformer'.
        dtype (str): Dtype of the network's weights: 'float32', 'bfloat16' (a frozen base of LoRA adapters, or
            sampling) or 'float64'. Default 'float32'.
        attention (str): Attention kernel, see `cdm_plugin.attention`. Default 'auto'.
        compile (bool): Whether the repeated blocks run through torch.compile. Default False.
        quantization (dict, optional): Arguments of diffusers' BitsAndBytesConfig, for a frozen base of LoRA adapters
            on a GPU: `dict(load_in_4bit=True)`. Default None.
        **load_kwargs: Passed to every `from_pretrained`: `revision`, `variant`, `cache_dir`, `local_files_only`,
            `token`, `force_download`, `use_safetensors`.
    """
    network_class: type
    # Diffusers' pipeline of this architecture, by name: importing one takes seconds.
    pipeline_name: str
    # Conditioner of a pretrained pipeline.
    conditioner_type: str
    # Name of the network's submodule whose output is the time embedding (an anchor-aware fake score adds to it).
    time_embedder: str
    # Linear layers that LoRA adapts by default, by the end of their names: all of the attention's, image and text.
    lora_targets: Sequence[str] = ('to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj', 'add_k_proj', 'add_v_proj',
                                   'to_add_out')
    # Class names of the blocks that repeat: the units of compilation and of sharding.
    repeated_blocks: Sequence[str] = ()
    # Latents a token covers, per side.
    patch: int = 1

    def __init__(self, pretrained: Optional[str] = None, config: Union[None, str, Dict[str, Any]] = None,
                 conditioner: Optional[Dict] = None, codec: Optional[Dict] = None, scheduler: Optional[Dict] = None,
                 subfolder: str = 'transformer', dtype: str = 'float32', attention: str = 'auto',
                 compile: bool = False, quantization: Optional[Dict[str, Any]] = None, **load_kwargs: Any) -> None:
        super().__init__()
        if pretrained is None and config is None:
            raise ValueError('model.backbone needs pretrained (hub id or folder) or config (dimensions of a new '
                             'network), but has neither')
        check_load_keys(load_kwargs, 'model.backbone', type(self))
        self.pretrained = None if pretrained is None else check_folder(
            resolve(pretrained), pretrained, 'model.backbone.pretrained',
            'a folder in the layout of a diffusers pipeline')
        self.subfolder, self.load_kwargs = subfolder, load_kwargs
        self.dtype = check_dtype(dtype, 'model.backbone.dtype')
        self.attention, self.compile, self.quantization = kernels.check_name(attention), compile, quantization
        self.config = self._load_config(config)
        parts = self._saved_parts()
        self.scheduler = self._load_scheduler(scheduler)
        self.conditioner: Conditioner = self._build_part('conditioner', conditioner or parts.get('conditioner'))
        self.codec: Codec = self._build_part('codec', codec or parts.get('codec'))
        self.requires_grad_(False)

    # Loading and saving

    def build_network(self, dtype: Optional[torch.dtype] = None) -> ModelMixin:
        """A network of its own, with the pretrained weights or, from `config`, new ones.

        Args:
            dtype (torch.dtype, optional): Of the weights. Default: the backbone's.

        Raises:
            ValueError: If weights are missing, left over or of another shape.
        """
        return self.compile_blocks(self.load_network(dtype))

    def load_network(self, dtype: Optional[torch.dtype] = None) -> ModelMixin:
        """The network as `build_network` has it, before its blocks are compiled."""
        dtype = dtype or self.dtype
        if self.pretrained is not None:
            return self._load_pretrained(dtype)
        network = self.network_class.from_config(self.config)
        return network if network.dtype == dtype else network.to(dtype)

    def empty_network(self, dtype: Optional[torch.dtype] = None) -> ModelMixin:
        """A network of shapes without memory, on the meta device."""
        with torch.device('meta'):
            network = self.network_class.from_config(self.config)
        return nn.Module.to(network, dtype or self.dtype)  # diffusers' own `to` warns of what does not matter here

    def compile_blocks(self, network: ModelMixin) -> ModelMixin:
        """The network, its repeated blocks compiled if `compile` asks for it."""
        if self.compile:
            network._repeated_blocks = list(self.repeated_blocks)
            # The rollout's batch shrinks, and three roles call the blocks with and without gradient: with torch's
            # limit of 8 variants the rest would run uncompiled.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            network.compile_repeated_blocks(dynamic=True)
        return network

    def _load_pretrained(self, dtype: torch.dtype) -> ModelMixin:
        kwargs = dict(self.load_kwargs)
        if self.quantization is not None:
            kwargs['quantization_config'] = diffusers.BitsAndBytesConfig(
                **{'bnb_4bit_compute_dtype': torch.bfloat16, **self.quantization})
        where = f'the network in {self.pretrained!r} (model.backbone.pretrained)'
        try:
            network, info = self.network_class.from_pretrained(
                self.pretrained, subfolder=self.subfolder, dtype=dtype, output_loading_info=True, **kwargs)
        except (RuntimeError, ValueError, OSError) as error:  # among others, that a shape differs or a file is cut
            raise ValueError(f'{where} cannot be loaded: {error}') from error
        for key, what in (('missing_keys', 'lacks weights'), ('unexpected_keys', 'has weights that nothing takes'),
                          ('mismatched_keys', 'has weights of other shapes'), ('error_msgs', 'cannot be loaded')):
            if info.get(key):
                shown = ', '.join(str(k) for k in list(info[key])[:3])
                raise ValueError(f'{where} {what}, {len(info[key])} of them: {shown}; the file is incomplete, or it '
                                 f'belongs to another architecture than {type(self).__name__} or to another config')
        return network

    def pipeline_class(self) -> type:
        """Diffusers' pipeline of this architecture."""
        return getattr(diffusers, self.pipeline_name)

    def pipeline_defaults(self) -> Dict[str, Any]:
        """The usual settings of the undistilled model, the defaults of its pipeline: `guidance_scale`,
        `num_inference_steps`."""
        parameters = inspect.signature(self.pipeline_class().__call__).parameters
        return {name: parameters[name].default for name in ('guidance_scale', 'num_inference_steps')}

    def save_pretrained(self, network: Optional[ModelMixin], folder: Union[str, Path], **recipe: Any) -> None:
        """Writes a folder that `pretrained` opens: the network and the scheduler in diffusers' layout (safetensors),
        and the configs of the conditioner and codec (text encoders and VAE stay where they came from).

        Args:
            network (ModelMixin, optional): The network to save; None if the folder has its weights already.
            folder (str): Where to; made if need be.
            **recipe: Plain data that says how to use the network, kept beside those configs; `conditioner` and
                `codec` replace them.
        """
        folder = Path(folder)
        if network is not None:
            network.save_pretrained(folder / 'transformer', safe_serialization=True)
        self.scheduler.save_pretrained(folder / 'scheduler')
        parts = {'backbone': type(self).__name__, 'conditioner': self.conditioner.to_config(),
                 'codec': self.codec.to_config(), **recipe}
        (folder / PARTS_FILE).write_text(json.dumps(parts, indent=2) + '\n')

    def _load_config(self, config: Union[None, str, Dict[str, Any]]) -> Dict[str, Any]:
        if isinstance(config, str):
            path = Path(resolve(config))
            if not path.is_file():
                raise FileNotFoundError(f'model.backbone.config={config!r} is no file: give the path of a diffusers '
                                        'config.json or the dimensions as a dict')
            config = json.loads(path.read_text())
        if self.pretrained is None:
            return self._with_defaults(dict(config))
        loaded = self._pretrained_config()
        for key, value in (config or {}).items():
            found = loaded.get(key)
            if not key.startswith('_') and (list(found) if isinstance(found, (list, tuple)) else found) != (
                    list(value) if isinstance(value, (list, tuple)) else value):
                raise ValueError(f'model.backbone.config.{key}={value!r}, but the network in {self.pretrained!r} has '
                                 f'{found!r}: with pretrained, config only states what is expected; leave it out or '
                                 'correct it')
        return loaded

    def _pretrained_config(self) -> Dict[str, Any]:
        try:
            loaded = dict(self.network_class.load_config(
                self.pretrained, subfolder=self.subfolder, **self._hub_kwargs))
        except OSError as error:
            cause = str(error).strip().splitlines()[0]
            if Path(self.pretrained).is_dir():
                raise FileNotFoundError(f'model.backbone.pretrained={self.pretrained!r} is no diffusers pipeline: it '
                                        f'has no {self.subfolder}/config.json') from error
            raise FileNotFoundError(
                f'model.backbone.pretrained={self.pretrained!r} is no folder here, and as a hub id it is not in the '
                f'local cache and cannot be fetched (no connection, no access, or no such repository): {cause}'
                ) from error
        found = loaded.get('_class_name', self.network_class.__name__)
        if found != self.network_class.__name__:
            fitting = [name for name, cls in MODELS.module_dict.items()
                       if inspect.isclass(cls) and issubclass(cls, Backbone) and cls is not Backbone
                       and cls.network_class.__name__ == found]
            advice = f"set model.backbone.type='{fitting[0]}'" if fitting else 'no registered backbone takes that'
            raise ValueError(f'model.backbone.type={type(self).__name__} takes a {self.network_class.__name__}, but '
                             f'{self.pretrained!r} has a {found}: {advice}')
        return self._with_defaults(loaded, check=False)

    def _with_defaults(self, config: Dict[str, Any], check: bool = True) -> Dict[str, Any]:
        """The config completed by the network class's defaults."""
        parameters = inspect.signature(self.network_class.__init__).parameters
        known = {k: p.default for k, p in parameters.items() if k != 'self'}
        unknown = [k for k in config if k not in known and not k.startswith('_')]
        if unknown and check:
            raise ValueError(f'model.backbone.config has unknown keys {unknown}: {self.network_class.__name__} takes '
                             f'{sorted(known)}')
        return {**known, **config}

    @property
    def _hub_kwargs(self) -> Dict[str, Any]:
        """Those of load_kwargs that config files take too."""
        return {k: v for k, v in self.load_kwargs.items() if k in HUB_KEYS}

    def _load_scheduler(self, scheduler: Optional[Dict[str, Any]]) -> FlowMatchEulerDiscreteScheduler:
        if scheduler is not None or self.pretrained is None:
            made = FlowMatchEulerDiscreteScheduler(**(scheduler or {}))
        else:
            made = FlowMatchEulerDiscreteScheduler.from_pretrained(
                self.pretrained, subfolder='scheduler', **self._hub_kwargs)
        for key in ('shift_terminal', 'invert_sigmas', 'use_karras_sigmas', 'use_exponential_sigmas', 'use_beta_sigmas',
                    'stochastic_sampling'):
            if made.config.get(key):
                raise ValueError(f'model.backbone.scheduler: {key}={made.config[key]!r} is not supported, its levels '
                                 'depend on the whole grid; set model.backbone.scheduler=dict(shift=...) instead')
        return made

    def _saved_parts(self) -> Dict[str, Any]:
        path = Path(self.pretrained or '', PARTS_FILE)
        if self.pretrained is None or not path.is_file():
            return {}
        parts = json.loads(path.read_text())
        for part in (parts.get('conditioner'), parts.get('codec')):
            if part and part.get('pretrained') == '.':  # it lies in the folder itself, wherever that is now
                part['pretrained'] = self.pretrained
        return parts

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
        """Configs of the conditioner and codec of the pretrained pipeline; empty for a network with new weights."""
        if self.pretrained is None:
            return {}
        # A local folder without text encoders or VAE (a class-conditional model) has no such default.
        local, parts = Path(self.pretrained).is_dir(), {}
        if not local or Path(self.pretrained, 'text_encoder').is_dir():
            parts['conditioner'] = dict(type=self.conditioner_type, pretrained=self.pretrained, **self.load_kwargs)
        if not local or Path(self.pretrained, 'vae').is_dir():
            parts['codec'] = dict(type='VAECodec', pretrained=self.pretrained, **self.load_kwargs)
        saved = self._saved_parts()
        for name in ('conditioner', 'codec'):
            if saved.get(name):  # without `type`: single arguments of what lies in the folder
                parts[name] = saved[name] if 'type' in saved[name] else {**parts.get(name, {}), **saved[name]}
        return parts

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
        dtype = dtype_of(network)
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

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of two velocities, (B, C, h, w), as the architecture's pipeline does it."""
        return unconditional + scale * (conditional - unconditional)

    def default_latent_size(self) -> Tuple[int, int]:
        """Height and width of the latents that the network was made for."""
        return (self.config['sample_size'],) * 2

    def check_latent_size(self, latent_size: Tuple[int, int], image_size: Any) -> None:
        """Raises ValueError if the network cannot take latents of this size; `image_size` is named in the error."""
        limit = self.patch * (self.config.get('pos_embed_max_size') or 10**9)
        if any(side % self.patch or side > limit for side in latent_size):
            unit = self.patch * self.codec.scale
            most = '' if limit > 10**8 else f' up to {limit * self.codec.scale}'
            raise ValueError(f'image size {image_size!r} (model.image_size, --height, --width) does not fit: height '
                             f'and width must be multiples of {unit} pixels{most}')

    def tokens(self, latent_size: Tuple[int, int]) -> int:
        """Number of image tokens for latents of this height and width."""
        return (latent_size[0] // self.patch) * (latent_size[1] // self.patch)

    def time_embedding_width(self) -> int:
        """Width of the time embedding."""
        return self.config['num_attention_heads'] * self.config['attention_head_dim']

    def shift(self, latent_size: Tuple[int, int]) -> float:
        """The scheduler's shift for latents of this height and width: its constant, or exp(mu) with mu linear in the
        number of image tokens (dynamic shifting)."""
        config = self.scheduler.config
        if not config.use_dynamic_shifting:
            return config.shift
        span = config.max_image_seq_len - config.base_image_seq_len
        mu = config.base_shift + (config.max_shift - config.base_shift) * (
            self.tokens(latent_size) - config.base_image_seq_len) / span
        return math.exp(mu) if config.time_shift_type == 'exponential' else mu

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
