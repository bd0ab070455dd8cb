"""What every architecture provides: networks, their conventions, and the way between prompts, latents and images."""
import contextlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from cdm_plugin.assets import resolve
from cdm_plugin.backbones.parts import PARTS_FILE, read_parts
from cdm_plugin.backbones.precision import keep_norms_exact, unrounded
from cdm_plugin.backbones.published import VAE_16
from cdm_plugin.backbones.scheduled_levels import ScheduledLevels
from cdm_plugin.codecs import Codec
from cdm_plugin.condition import MASK, Condition
from cdm_plugin.conditioners import Conditioner
from cdm_plugin.flow import full_precision
from cdm_plugin.pretrained import HUB_KEYS, check_dtype, check_folder, check_load_keys, naming_absent
from cdm_plugin.roles import attention as kernels
from cdm_plugin.roles.weights import dtype_of, unwrap
from cdm_plugin.secrets import masked


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as a token for each 2x2 of them, (B, h w / 4, 4 C), in the order of Flux and its kin."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, h w / 4, 4 C) to latents (B, C, h, w)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def _with_more_variants(compiled: Callable) -> Callable:
    """The rollout's batch shrinks, and three roles call the blocks with and without gradient: with torch's limit of 8
    variants the rest would run uncompiled. The limit of everything else in the process stays as it is."""
    limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch._dynamo.config.patch(recompile_limit=limit)(compiled)


class Backbone(ScheduledLevels, nn.Module):
    """Adapter over one diffusers architecture. Stateless about roles: it is handed the network to call.

    A subclass states its network class, its timestep convention (`call`) and its condition's fields
    (`condition_widths`), in one file; `check_stated` says what else some uses need.

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
        attention (str): Attention kernel, see `cdm_plugin.roles.attention`. Default 'auto'.
        compile (bool): Whether the repeated blocks run through torch.compile. Default False.
        quantization (dict, optional): Arguments of diffusers' BitsAndBytesConfig, for a frozen base of LoRA adapters
            on a GPU: `dict(load_in_4bit=True)`. Default None.
        **load_kwargs: Passed to every `from_pretrained`: `revision`, `variant`, `cache_dir`, `local_files_only`,
            `token`, `force_download`, `use_safetensors`.
    """
    config_key = 'model.backbone'
    network_class: type[Any]
    # Diffusers' pipeline of this architecture, by name: importing one takes seconds. None: there is none, and what is
    # exported is the network.
    pipeline_name: str | None = None
    # Conditioner and codec of a pretrained pipeline.
    conditioner_type: str | None = None
    codec_type: str = 'VAECodec'
    # Name of the network's submodule whose output is the time embedding (an anchor-aware fake score adds to it).
    time_embedder: str | None = None
    # The time embedder's `time_proj` takes sinusoids of this times sigma, where the network rounds that to the dtype of
    # its tokens first; None where it does not.
    time_scale: float | None = None
    # Linear layers that LoRA adapts by default, by the end of their names: all of the attention's, image and text.
    lora_targets: Sequence[str] = ('to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj', 'add_k_proj', 'add_v_proj',
                                   'to_add_out')
    # Latents a token covers, per side.
    patch: int = 1
    # What is done to the weights of a network when they are loaded; for a teacher with a LoRA file.
    adapt: Callable[[ModelMixin], None] | None = None
    # Whether `call` leaves out the padding of texts of different lengths: it gets `NAME_mask`, bool, (B, L), beside
    # every field NAME that is padded, and none where all rows are as long.
    takes_mask: bool = False
    # Whether some of the network's weights have no influence on what it gives, and so get no gradient: DDP has to look
    # for them.
    has_idle_weights: bool = False
    # Whether ComfyUI reads the network's whole weights by diffusers' names; it reads LoRA files of all.
    whole_in_comfyui: bool = False
    # For LoRA files of sd-scripts: each of its layers, and those of diffusers that are one there, in the order of their
    # rows; '{}' is the number of the block. Empty: it does not know the architecture.
    sd_scripts_layers: Mapping[str, Sequence[str]] = {}
    # Of the published model, for `cdm doctor` where that is not on this machine: arguments of its scheduler and its
    # autoencoder. Its text encoders are the conditioner's to say.
    published_scheduler: dict[str, Any] = {}
    published_vae: dict[str, Any] = VAE_16

    def __init__(self, pretrained: str | None = None, config: None | str | dict[str, Any] = None,
                 conditioner: dict | nn.Module | None = None, codec: dict | nn.Module | None = None,
                 scheduler: dict | None = None, subfolder: str = 'transformer', dtype: str = 'float32',
                 attention: str = 'auto', compile: bool = False,
                 quantization: dict[str, Any] | None = None, **load_kwargs: Any) -> None:
        super().__init__()
        self.check_stated()
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
        for key, stated in dict(in_channels='latent_channels', sample_size='default_latent_size').items():
            if key not in self.config and getattr(type(self), stated) is getattr(Backbone, stated):
                raise ValueError(f'{type(self).__name__} lacks {stated}: the config of a {self.network_class.__name__} '
                                 f'has no {key!r} to take it from')
        self.check_config()
        parts = self._saved_parts()
        self.scheduler = self._load_scheduler(scheduler)
        self.conditioner: Conditioner = self._build_part('conditioner', conditioner or parts.get('conditioner'))
        self.codec: Codec = self._build_part('codec', codec or parts.get('codec'))
        self.requires_grad_(False)

    def check_stated(self) -> None:
        """Raises ValueError if the class lacks what every backbone has to state, and names all of it."""
        lacks = [name for name in ('call', 'condition_widths')
                 if getattr(type(self), name) is getattr(Backbone, name)]
        network_class = getattr(self, 'network_class', None)
        builds = any('build_network' in vars(base) for base in type(self).__mro__
                     if base is not Backbone and issubclass(base, Backbone))
        kinds = (nn.Module,) if builds else (ModelMixin, ConfigMixin)
        if not (inspect.isclass(network_class) and all(issubclass(network_class, kind) for kind in kinds)):
            lacks.insert(0, f'network_class (a {" and ".join(kind.__name__ for kind in kinds)})')
        if lacks:
            raise ValueError(f'the backbone {type(self).__name__} lacks {", ".join(lacks)}: see '
                             'cdm_plugin/backbones/base.py')

    # Loading and saving

    def build_network(self, dtype: torch.dtype | None = None) -> ModelMixin:
        """A network of its own, with the pretrained weights or, from `config`, new ones.

        Args:
            dtype (torch.dtype, optional): Of the weights. Default: the backbone's.

        Raises:
            ValueError: If weights are missing, left over or of another shape.
        """
        return self.compile_blocks(self.load_network(dtype))

    def load_network(self, dtype: torch.dtype | None = None) -> ModelMixin:
        """The network as `build_network` has it, before its blocks are compiled."""
        dtype = dtype or self.dtype
        if self.pretrained is not None:
            network = self._load_pretrained(dtype)
        else:
            network = self.network_class.from_config(self.config)
            network = network if network.dtype == dtype else network.to(dtype)
        if self.adapt is not None:
            self.adapt(network)
        return keep_norms_exact(network)

    def empty_network(self, dtype: torch.dtype | None = None) -> ModelMixin:
        """A network of shapes without memory, on the meta device."""
        with torch.device('meta'):
            network = self.network_class.from_config(self.config)
        # Diffusers' own `to` warns of what does not matter here.
        return keep_norms_exact(nn.Module.to(network, dtype or self.dtype))

    def compile_blocks(self, network: ModelMixin) -> ModelMixin:
        """The network, its repeated blocks compiled if `compile` asks for it."""
        if self.compile:
            network._repeated_blocks = list(self.repeated_blocks)
            network.compile_repeated_blocks(dynamic=True)
            for block in network.modules():
                if block._compiled_call_impl is not None:
                    block._compiled_call_impl = _with_more_variants(block._compiled_call_impl)
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

    def pipeline_class(self) -> type[Any]:
        """Diffusers' pipeline of this architecture."""
        return getattr(diffusers, self.pipeline_name)

    def pipeline_defaults(self) -> dict[str, Any]:
        """The usual settings of the undistilled model, the defaults of its pipeline: `guidance_scale`,
        `num_inference_steps`."""
        parameters = inspect.signature(self.pipeline_class().__call__).parameters
        return {name: parameters[name].default for name in ('guidance_scale', 'num_inference_steps')}

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        """Arguments of the pipeline's call that ask for classifier-free guidance of this scale; 1 is off."""
        return dict(guidance_scale=scale)

    def distilled_settings(self) -> dict[str, Any]:
        """Arguments of the pipeline itself that turn guidance off in its default call; most have none."""
        return {}

    def save_pretrained(self, network: ModelMixin | None, folder: str | Path, **recipe: Any) -> None:
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
        self.scheduler_for(recipe.get('rollout', 'ode')).save_pretrained(folder / 'scheduler')
        parts = masked({'backbone': type(self).__name__, 'conditioner': self.conditioner.to_config(),
                        'codec': self.codec.to_config(), **recipe})
        (folder / PARTS_FILE).write_text(json.dumps(parts, indent=2) + '\n')

    def _load_config(self, config: None | str | dict[str, Any]) -> dict[str, Any]:
        if isinstance(config, str):
            path = Path(resolve(config))
            if not path.is_file():
                raise FileNotFoundError(f'model.backbone.config={config!r} is no file: give the path of a diffusers '
                                        'config.json or the dimensions as a dict')
            given = json.loads(path.read_text())
        else:
            given = dict(config or {})
        if self.pretrained is None:
            return self._with_defaults(given)
        loaded = self._pretrained_config()
        for key, value in given.items():
            found = loaded.get(key)
            if not key.startswith('_') and (list(found) if isinstance(found, (list, tuple)) else found) != (
                    list(value) if isinstance(value, (list, tuple)) else value):
                raise ValueError(f'model.backbone.config.{key}={value!r}, but the network in {self.pretrained!r} has '
                                 f'{found!r}: with pretrained, config only states what is expected; correct it, or '
                                 'leave it out (over a recipe: config=None)')
        return loaded

    def _pretrained_config(self) -> dict[str, Any]:
        try:
            with naming_absent(self.pretrained, 'model.backbone.pretrained'):
                loaded = dict(self.network_class.load_config(
                    self.pretrained, subfolder=self.subfolder, **self._hub_kwargs))
        except OSError as error:
            if not Path(self.pretrained).is_dir():
                raise
            raise FileNotFoundError(f'model.backbone.pretrained={self.pretrained!r} is no diffusers pipeline: it has '
                                    f'no {self.subfolder}/config.json') from error
        found = loaded.get('_class_name', self.network_class.__name__)
        if found != self.network_class.__name__:
            fitting = [name for name, cls in MODELS.module_dict.items()
                       if inspect.isclass(cls) and issubclass(cls, Backbone) and cls is not Backbone
                       and getattr(getattr(cls, 'network_class', None), '__name__', None) == found]
            advice = f"set model.backbone.type='{fitting[0]}'" if fitting else 'no registered backbone takes that'
            raise ValueError(f'model.backbone.type={type(self).__name__} takes a {self.network_class.__name__}, but '
                             f'{self.pretrained!r} has a {found}: {advice}')
        return self._with_defaults(loaded, check=False)

    def _with_defaults(self, config: dict[str, Any], check: bool = True) -> dict[str, Any]:
        """The config completed by the network class's defaults."""
        parameters = inspect.signature(self.network_class.__init__).parameters
        known = {k: p.default for k, p in parameters.items() if k != 'self'}
        unknown = [k for k in config if k not in known and not k.startswith('_')]
        if unknown and check:
            raise ValueError(f'model.backbone.config has unknown keys {unknown}: {self.network_class.__name__} takes '
                             f'{sorted(known)}')
        return {**known, **config}

    @property
    def _hub_kwargs(self) -> dict[str, Any]:
        """Those of load_kwargs that config files take too."""
        return {k: v for k, v in self.load_kwargs.items() if k in HUB_KEYS}

    def _saved_parts(self) -> dict[str, Any]:
        parts = {} if self.pretrained is None else read_parts(self.pretrained)
        for part in (parts.get('conditioner'), parts.get('codec')):
            if part and part.get('pretrained') == '.':  # it lies in the folder itself, wherever that is now
                part['pretrained'] = self.pretrained
        return parts

    def _build_part(self, name: str, cfg: dict[str, Any] | None) -> nn.Module:
        default = self.default_parts().get(name)
        if cfg is None:
            cfg = default
        elif isinstance(cfg, dict) and 'type' not in cfg:  # single arguments of the default part
            cfg = {**(default or {}), **cfg}
        if not cfg or (isinstance(cfg, dict) and 'type' not in cfg):
            stated = '' if name == 'codec' or self.conditioner_type else (
                f', and {type(self).__name__} states no conditioner_type')
            raise ValueError(f'model.backbone.{name} is missing: pretrained={self.pretrained!r} brings none{stated}')
        return MODELS.build(dict(cfg)) if isinstance(cfg, dict) else cfg

    def default_parts(self) -> dict[str, dict[str, Any]]:
        """Configs of the conditioner and codec of the pretrained pipeline; empty for a network with new weights."""
        if self.pretrained is None:
            return {}
        # A local folder without text encoders or VAE (a class-conditional model) has no such default.
        local, parts = Path(self.pretrained).is_dir(), {}
        if self.conditioner_type and (not local or Path(self.pretrained, 'text_encoder').is_dir()):
            parts['conditioner'] = dict(type=self.conditioner_type, pretrained=self.pretrained, **self.load_kwargs)
        if not local or Path(self.pretrained, 'vae').is_dir():
            parts['codec'] = dict(type=self.codec_type, pretrained=self.pretrained, **self.load_kwargs)
        saved = self._saved_parts()
        for name in ('conditioner', 'codec'):
            if saved.get(name):  # without `type`: single arguments of what lies in the folder
                parts[name] = saved[name] if 'type' in saved[name] else {**parts.get(name, {}), **saved[name]}
        return parts

    # Conventions of the architecture

    @property
    def repeated_blocks(self) -> Sequence[str]:
        """Class names of the blocks that repeat, the units of compilation, measuring and sharding: diffusers' list."""
        return tuple(self.network_class._repeated_blocks or self.network_class._no_split_modules or ())

    def check_config(self) -> None:
        """Raises ValueError if the network is none that `call` can call. Any that takes more channels than it gives
        back is such: it needs masked or control images, which nothing here hands over."""
        taken, given = self.config.get('in_channels'), self.output_channels()
        if given is not None and taken != given:
            where = 'model.backbone.config' if self.pretrained is None else (
                f'model.backbone.pretrained={self.pretrained!r}')
            raise ValueError(f'the network of {where} takes {taken} channels and gives {given}: it needs an image '
                             'beside the noisy latents (to fill or to follow); take the text-to-image model')

    def output_channels(self) -> int | None:
        """Channels that the network gives back, counted as `in_channels`; None if its config does not say."""
        return self.config.get('out_channels')

    def velocity(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """The network's velocity at (x, sigma).

        Args:
            network (nn.Module): A network of this architecture, or a wrapper of one.
            x (Tensor): Noisy latents, (B, C, h, w).
            sigma (Tensor): Noise levels in [0, 1], (B,).
            condition (Condition): B rows.

        Returns:
            Tensor: (B, C, h, w), float32 (float64 from a float64 network).

        Raises:
            ValueError: If the condition is padded, and the network takes no mask.
        """
        self._check_masks(condition)
        dtype = dtype_of(network)
        fields = {name: t.to(dtype) if t.is_floating_point() else t for name, t in condition.fields.items()}
        with self._unrounded(network, sigma):
            velocity = self.call(network, x.to(dtype), sigma, fields)
        if getattr(velocity, 'shape', None) != x.shape:
            raise ValueError(f'{type(self).__name__}.call must return the velocity, a tensor {tuple(x.shape)}, but '
                             f'returned a {type(velocity).__name__} {tuple(getattr(velocity, "shape", ()))}')
        return full_precision(velocity)

    def _unrounded(self, network: nn.Module, sigma: Tensor) -> contextlib.AbstractContextManager:
        if self.time_scale is None:
            return contextlib.nullcontext()
        network = unwrap(network)
        network = getattr(network, 'base', network)  # of an adapter
        return unrounded(network.get_submodule(f'{self.time_embedder}.time_proj'),
                         [self.time_scale * value for value in self.embedded_values(sigma)])

    def embedded_values(self, sigma: Tensor) -> list[Tensor]:
        """What the network embeds by sinusoids, in that order, each (B,): here the noise levels alone."""
        return [sigma]

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: dict[str, Tensor]) -> Tensor:
        """Calls the network in its own convention; x and the fields that are no masks or ids have the network's dtype,
        sigma is float32 or wider."""
        raise NotImplementedError

    def condition_widths(self) -> dict[str, int]:
        """Last dimension that the network expects of each field of a condition."""
        raise NotImplementedError

    def empty_condition(self, tokens: int) -> Condition:
        """A condition of one row and so many tokens, on the meta device: shapes without memory."""
        return Condition({name: torch.empty((1, width) if 'pooled' in name else (1, tokens, width), device='meta')
                          for name, width in self.condition_widths().items()})

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.config['in_channels']

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float | Tensor) -> Tensor:
        """Classifier-free guidance of two velocities, (B, C, h, w), as the architecture's pipeline does it.

        Args:
            conditional (Tensor): The velocity with the prompt.
            unconditional (Tensor): The one with the null condition.
            scale (float or Tensor): What `guidance_at` says; 1 is off.
        """
        return unconditional + scale * (conditional - unconditional)

    def guidance_at(self, scale: float, sigma: Tensor) -> float | Tensor:
        """The guidance scale at noise levels (B,), a number or (B, 1, 1, 1): here the same at all of them."""
        return scale

    def default_latent_size(self) -> tuple[int, int]:
        """Height and width of the latents that the network was made for."""
        return (self.config['sample_size'],) * 2

    def check_latent_size(self, latent_size: tuple[int, int], image_size: Any) -> None:
        """Raises ValueError if the network cannot take latents of this size; `image_size` is named in the error."""
        limit = self.patch * (self.config.get('pos_embed_max_size') or 10**9)
        if any(side % self.patch or side > limit for side in latent_size):
            unit = self.patch * self.codec.scale
            most = '' if limit > 10**8 else f' up to {limit * self.codec.scale}'
            raise ValueError(f'image size {image_size!r} (model.image_size, --height, --width) does not fit: height '
                             f'and width must be multiples of {unit} pixels{most}')

    def tokens(self, latent_size: tuple[int, int]) -> int:
        """Number of image tokens for latents of this height and width."""
        return (latent_size[0] // self.patch) * (latent_size[1] // self.patch)

    def time_embedding_width(self) -> int:
        """Width of the time embedding."""
        try:
            return self.width
        except KeyError as error:
            raise ValueError(f'{type(self).__name__} lacks time_embedding_width, which model.anchor_aware_fake needs: '
                             f'the config of a {self.network_class.__name__} has no {error}') from None

    @property
    def width(self) -> int:
        """Width of the image tokens."""
        return self.config['num_attention_heads'] * self.config['attention_head_dim']

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The blocks of a network that image tokens go through, in their order."""
        return [module for module in network.modules() if type(module).__name__ in self.repeated_blocks]

    def feature_map(self, output: Any, latent_size: tuple[int, int]) -> Tensor:
        """The image tokens that a block gives, beside those of the text or behind them, as a map (B, D, h, w)."""
        tokens = output[-1] if isinstance(output, tuple) else output
        rows, columns = (side // self.patch for side in latent_size)
        return tokens[:, -rows * columns:].transpose(1, 2).unflatten(2, (rows, columns))

    # Between the batch and the network

    def condition(self, data: dict[str, Any]) -> Condition:
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

    def latent_size_of(self, batch: Mapping[str, Any]) -> tuple[int, int] | None:
        """Height and width of the latents of a batch's pictures or pairs; None if it has none.

        Raises:
            ValueError: If it has both, of two sizes.
        """
        sizes = {tuple(batch[name].shape[-2:]) for name in ('latents', 'pair_latents') if batch.get(name) is not None}
        if batch.get('latents') is None and batch.get('image') is not None:
            sizes.add(self.codec.latent_size(*batch['image'].shape[-2:]))
        if len(sizes) > 1:
            raise ValueError(f'the pictures and the pairs of a batch have latents of {sorted(sizes)}: bring the '
                             'pictures to the size of the pairs, or make these with --height and --width')
        return next(iter(sizes), None)

    def real_latents(self, batch: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Tensor:
        """The latents of a batch's own pictures, (B, C, h, w); `dtype` is that of the arithmetic.

        Raises:
            ValueError: If the batch has no pictures, or the network cannot take their size.
        """
        latents = batch.get('latents')
        if latents is None:
            if batch.get('image') is None:
                raise ValueError(f"real pictures are needed, but the batch has only {sorted(batch)}; name the field "
                                 "with the transform dict(type='PackInputs', image=...)")
            latents = self.codec.encode(batch['image'].to(dtype))
        self.check_latent_size(tuple(latents.shape[-2:]), tuple(s * self.codec.scale for s in latents.shape[-2:]))
        return latents.to(dtype)

    def check_condition(self, condition: Condition) -> None:
        """Raises ValueError if a field is absent, its width is not the network's, or it is padded and its mask is no
        mask or the network takes none."""
        self._check_masks(condition)
        for name, width in self.condition_widths().items():
            if name not in condition.fields:
                raise ValueError(f'{type(self).__name__} needs the field {name!r} in a condition, but there are '
                                 f'{sorted(condition.fields)}; make the embeddings with this model\'s text encoders')
            got = condition.fields[name].shape[-1]
            if got != width:
                raise ValueError(f'embeddings {name!r} have width {got}, but the network (model.backbone) expects '
                                 f'{width}: they come from other text encoders or another conditioner')

    def _check_masks(self, condition: Condition) -> None:
        for name in condition.masked:
            field, mask = condition.fields[name], condition.fields[name + MASK]
            if not self.takes_mask:
                raise ValueError(
                    f'{type(self).__name__} (model.backbone) attends to all tokens, so every text needs as many, but '
                    f'rows of {name!r} have {sorted(set(mask.sum(1).tolist()))}: pad prompts and null condition to one '
                    'length in the text encoder (model.backbone.conditioner) and encode them again')
            if mask.dtype != torch.bool or mask.shape != field.shape[:2]:
                raise ValueError(f'{name + MASK!r} must be bool, {tuple(field.shape[:2])}, but is {mask.dtype}, '
                                 f'{tuple(mask.shape)}: make conditions with Condition.of_rows')
