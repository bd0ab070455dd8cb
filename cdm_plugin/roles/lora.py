"""LoRA: student and fake score as adapters of one frozen base, the teacher as that base with adapters off.

PEFT keeps the adapters; a role here is a view of the base that calls it with one adapter active. PEFT's own
`set_adapter` turns `requires_grad` off on the adapters that are not active, so switching roles between forward and
backward would silently lose gradients: roles switch what the layers compute with, and nothing else.
"""
import contextlib
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import ModelMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from mmengine.logging import print_log
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME as PEFT_SETTINGS
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdm_plugin.arguments import Count, Positive, check_arguments, checked
from cdm_plugin.flow import full_precision

# Diffusers' prefix of a transformer's adapter in a LoRA file.
PREFIX = 'transformer'
# Settings of `model.lora` that say where an adapter starts.
STARTS = ('student', 'fake')


class AdapterRole(nn.Module):
    """One role's view of the shared base: its parameters are its adapter's alone, its forward pass is the base's with
    that adapter.

    Args:
        base (ModelMixin): The frozen network that the roles share. It is not a submodule of a role.
        adapter (str, optional): Name of the role's adapter; None is the base itself.
    """

    def __init__(self, base: ModelMixin, adapter: str | None = None) -> None:
        super().__init__()
        self._base = (base,)  # a tuple hides it from nn.Module
        self.adapter = adapter
        self._hooks: list[tuple[str, Callable]] = []
        # The same names in every role, so that fake merge and EMA pair them.
        self.adapters = nn.ModuleDict({
            name.replace('.', '-'): nn.ModuleDict(dict(lora_A=layer.lora_A[adapter], lora_B=layer.lora_B[adapter]))
            for name, layer in base.named_modules()
            if adapter is not None and isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A})

    @property
    def base(self) -> ModelMixin:
        """The network that the roles share."""
        return self._base[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the base's weights."""
        return self.base.dtype

    def add_hook(self, submodule: str, hook: Callable) -> None:
        """A forward hook on a submodule of the base, active in this role's calls only."""
        self._hooks.append((submodule, hook))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward pass in this role."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_Active(tuner_layers(self.base), self.adapter))
            for submodule, hook in self._hooks:
                stack.callback(self.base.get_submodule(submodule).register_forward_hook(hook).remove)
            return self.base(*args, **kwargs)


# Base -> the names of its adapters, and its layers that have any. A walk over the 3,311 modules of SD3-Medium takes
# longer than anything else that a call does here.
_known: WeakKeyDictionary[nn.Module, tuple[tuple[str, ...], list[BaseTunerLayer]]] = WeakKeyDictionary()


def tuner_layers(base: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a base that have adapters. They are searched for once, and again after a change of adapters."""
    adapters = tuple(getattr(base, 'peft_config', ()))
    if base not in _known or _known[base][0] != adapters:
        _known[base] = adapters, [layer for layer in base.modules() if isinstance(layer, BaseTunerLayer)]
    return _known[base][1]


class _Active:
    """Context in which layers compute with one adapter, or with none; `requires_grad` stays as it is.

    It may be entered again, as a second backward pass through the same checkpoint does.
    """
    # The innermost one that this thread is in.
    here: ContextVar['_Active | None'] = ContextVar('here', default=None)

    def __init__(self, layers: list[BaseTunerLayer], adapter: str | None) -> None:
        self.layers, self.adapter = layers, adapter
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before.append((self.here.get(), [(layer._active_adapter, layer._disable_adapters)
                                              for layer in self.layers]))
        self.here.set(self)
        for layer in self.layers:  # past nn.Module's setter, which would take most of the time
            vars(layer).update(_active_adapter=[self.adapter], _disable_adapters=self.adapter is None)

    def __exit__(self, *error: Any) -> None:
        outer, states = self.before.pop()
        self.here.set(outer)
        for layer, (active, disabled) in zip(self.layers, states):
            vars(layer).update(_active_adapter=active, _disable_adapters=disabled)


def checkpoint_in_role(block: Callable, *args: Any, **kwargs: Any) -> Any:
    """Activation checkpointing whose recomputation, in backward, runs in the role of the forward pass.

    The role is the one whose call this happens in, so it does not matter what is checkpointed: diffusers' networks
    hand over blocks, their bound methods or functions over them.

    Args:
        block (Callable): What to checkpoint.
        *args: Its arguments.
        **kwargs: Its arguments by name.

    Raises:
        RuntimeError: If no role is being called and the block may have adapters: nobody could tell with which of them
            to recompute it.
    """
    role = _Active.here.get()
    if role is None:
        if not isinstance(block, nn.Module) or any(isinstance(m, BaseTunerLayer) for m in block.modules()):
            raise RuntimeError('activation checkpointing of a network with LoRA adapters, but outside of a role: '
                               f'call the AdapterRole instead of its base (the block is {block!r:.80})')
        return checkpoint(block, *args, use_reentrant=False, **kwargs)
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), role), **kwargs)


class LoRA:
    """The adapters' settings, `model.lora`.

    Roles start from one A. A role without a file starts as the base (B = 0), for which any A will do, so it takes the
    A of a role with a file, or else the first role's. This is what makes the fake merge right, which mixes A and B
    apart: see `cdm_plugin.roles.weights.merge_weights`.

    Args:
        rank (int): Rank of every adapter. Default 64.
        alpha (float, optional): An adapter's output is scaled by alpha / rank. Default: the rank.
        target_modules (list[str], optional): Linear layers to adapt, by the end of their names. Default: the
            backbone's attention projections.
        student (str, optional): LoRA file, or folder of one, that the student starts from. Default: no change of
            the base.
        fake (str, optional): The same for the fake score. It does not follow from `student`.
    """
    config_key = 'model.lora'

    @checked
    def __init__(self, rank: Count = 64, alpha: Positive | None = None, target_modules: list[str] | None = None,
                 student: str | None = None, fake: str | None = None) -> None:
        self.rank, self.alpha, self.target_modules = rank, rank if alpha is None else alpha, target_modules
        self.start = dict(student=student, fake=fake)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> 'LoRA':
        """From the dict `model.lora`.

        Raises:
            ValueError: For an unknown key or a value that cannot be.
        """
        check_arguments(cls, config, 'model.lora')
        return cls(**config)

    def add(self, base: ModelMixin, role: str, targets: list[str]) -> AdapterRole:
        """Adds a role's adapter to the base; it starts as no change, or from its file. Roles without a file may get
        another A.

        Args:
            base (ModelMixin): The shared network.
            role (str): 'student' or 'fake', also the adapter's name.
            targets (list[str]): The backbone's default layers.

        Returns:
            AdapterRole: The role, with trainable adapter weights in float32 (float64 over a float64 base).
        """
        if not isinstance(base, PeftAdapterMixin):
            raise ValueError(f'model.lora needs a network that takes adapters: derive {type(base).__name__} from '
                             "diffusers' PeftAdapterMixin too (diffusers.loaders)")
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, init_lora_weights='gaussian',
                            target_modules=list(self.target_modules or targets))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', message='Already found a `peft_config`')  # two adapters are meant
                base.add_adapter(config, adapter_name=role)
        except ValueError as error:
            raise ValueError(f'model.lora.target_modules={config.target_modules} does not fit '
                             f'{type(base).__name__}: {error}') from error
        _known.pop(base, None)
        network = AdapterRole(base, role)
        for parameter in network.parameters():  # small updates are lost in bfloat16
            parameter.data = full_precision(parameter.data)
        if self.start[role] is not None:
            self._load(base, role, self.start[role])
        self._share_a(base)
        base.requires_grad_(False)
        for layer in tuner_layers(base):  # every adapter, for set_adapter has turned the others off
            for trained in self.start.keys() & layer.lora_A.keys():
                layer.lora_A[trained].requires_grad_(True)
                layer.lora_B[trained].requires_grad_(True)
        return network

    @torch.no_grad()
    def _share_a(self, base: ModelMixin) -> None:
        roles = [role for role in self.start if role in base.peft_config]
        from_file = [role for role in roles if self.start[role] is not None]
        first = (from_file or roles)[0]
        squares: Counter = Counter()
        for layer in tuner_layers(base):
            for role in roles:
                own, shared = layer.lora_A[role].weight, layer.lora_A[first].weight
                if own.is_meta or shared.is_meta:  # shapes without memory
                    continue
                if role not in from_file:
                    own.copy_(shared)
                elif role != first:
                    squares.update(between=(own - shared).square().sum().item(), first=shared.square().sum().item())
        if squares['between'] > squares['first']:
            files = ' and '.join(f'model.lora.{role}' for role in from_file)
            print_log(f'{files} start from unrelated A: model.fake_merge moves the fake score astray until they agree. '
                      'Take both files from one run, leave one out, or set model.fake_merge=0', 'current',
                      level=logging.WARNING)

    def _load(self, base: ModelMixin, role: str, path: str) -> None:
        weights = read_lora(path, f'model.lora.{role}')
        expected = get_peft_model_state_dict(base, adapter_name=role)
        given = f'model.lora.{role}={path!r}'
        if weights.keys() != expected.keys():
            differ = sorted(weights.keys() ^ expected.keys())[:3]
            raise ValueError(f'{given} adapts other layers than model.lora.target_modules, for example {differ}')
        for name, value in weights.items():
            if value.shape != expected[name].shape:
                raise ValueError(f'{given} has rank {min(value.shape)}, but model.lora.rank is {self.rank} '
                                 f'({name}: {tuple(value.shape)} instead of {tuple(expected[name].shape)})')
        for name in weights:
            if name.endswith('.lora_B.weight'):
                weights[name] = weights[name] * (self.rank / self.alpha)
        set_peft_model_state_dict(base, weights, adapter_name=role)


def read_lora(path: str, key: str) -> dict[str, Tensor]:
    """Reads a LoRA file of a transformer, with keys of diffusers or PEFT.

    Args:
        path (str): The file, or a folder with diffusers' `pytorch_lora_weights.safetensors` or PEFT's
            `adapter_model.safetensors`, beside which PEFT has its settings.
        key (str): Config key to name in errors.

    Returns:
        dict: `<layer>.lora_A.weight`, (rank, in), and `<layer>.lora_B.weight`, (out, rank), whose product is what the
        file adds to the layer: the scale that it gives (by `<layer>.alpha`, or in its metadata or PEFT's settings:
        alpha, patterns of ranks and alphas, rsLoRA) has gone into B.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read, has other keys, or is a DoRA.
    """
    names = (LORA_WEIGHT_NAME_SAFE, PEFT_FILE)
    files = [Path(path, name) for name in names] if Path(path).is_dir() else [Path(path)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f'{key}={path!r} is no LoRA file and no folder with {" or ".join(names)}')
    try:
        with safe_open(file, 'pt') as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}
            metadata = json.loads((content.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, '{}'))
        settings = file.with_name(PEFT_SETTINGS)
        if file.name == PEFT_FILE and settings.is_file():
            metadata = json.loads(settings.read_text(encoding='utf-8'))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f'{key}={path!r} is truncated or no safetensors file: {error}') from error
    # A pipeline writes these with the name of its part, a network of diffusers and PEFT without.
    metadata = {name.removeprefix(f'{PREFIX}.'): value for name, value in metadata.items()}
    if metadata.get('use_dora') or any('dora_scale' in k or 'magnitude_vector' in k for k in weights):
        raise ValueError(f'{key}={path!r} is a DoRA, whose magnitudes are not read: give a LoRA file')
    weights = {name.removeprefix(f'{PREFIX}.').removeprefix('base_model.model.'): w for name, w in weights.items()}
    alphas = {name.removesuffix('.alpha'): float(w) for name, w in weights.items() if name.endswith('.alpha')}
    weights = {name: w for name, w in weights.items() if not name.endswith('.alpha')}
    layers = [name.removesuffix('.lora_A.weight') for name in weights if name.endswith('.lora_A.weight')]
    if not layers:
        raise ValueError(f'{key}={path!r} has no keys of diffusers or PEFT (<layer>.lora_A.weight), but for example '
                         f'{sorted(weights)[:3]}')
    for layer in layers:
        rank, patterns = len(weights[f'{layer}.lora_A.weight']), metadata.get('alpha_pattern') or {}
        alpha = patterns.get(get_pattern_key(patterns, layer), metadata.get('lora_alpha', rank))
        scale = alphas.get(layer, alpha) / (rank ** 0.5 if metadata.get('use_rslora') else rank)
        if scale != 1:
            weights[f'{layer}.lora_B.weight'] = weights[f'{layer}.lora_B.weight'] * scale
    return weights


def save_lora(role: AdapterRole, folder: str) -> Path:
    """Writes a role's adapter as a diffusers LoRA file, `pytorch_lora_weights.safetensors`.

    Its scale alpha / rank goes into B, so that every reader adds what was trained, whether it looks at the metadata
    (diffusers, PEFT) or not (ComfyUI, which has no other place for it than `<layer>.alpha`, and takes none for alpha =
    rank). `StableDiffusion3Pipeline.load_lora_weights(folder)` takes it; a pipeline without that method takes it by
    `pipeline.transformer.load_lora_adapter(folder, prefix='transformer', use_safetensors=True)`.
    """
    from diffusers.loaders import SD3LoraLoaderMixin  # takes seconds
    config: dict[str, Any] = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in role.base.peft_config[role.adapter].to_dict().items()}
    scale, config['lora_alpha'] = config['lora_alpha'] / config['r'], config['r']
    weights = get_peft_model_state_dict(role.base, adapter_name=role.adapter)
    # The format is that of every transformer pipeline; LongCat's has no saving method of its own.
    SD3LoraLoaderMixin.save_lora_weights(
        folder, transformer_lora_layers={name: w * scale if name.endswith('.lora_B.weight') else w
                                         for name, w in weights.items()},
        transformer_lora_adapter_metadata=config)
    return Path(folder, LORA_WEIGHT_NAME_SAFE)
