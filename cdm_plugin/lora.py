"""LoRA: student and fake score as adapters of one frozen base, the teacher as that base with adapters off.

PEFT keeps the adapters; a role here is a view of the base that calls it with one adapter active. PEFT's own
`set_adapter` turns `requires_grad` off on the adapters that are not active, so switching roles between forward and
backward would silently lose gradients: roles switch what the layers compute with, and nothing else.
"""
import contextlib
import difflib
import json
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from diffusers import ModelMixin
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cdm_plugin.flow import full_precision

# Diffusers' prefix of a transformer's adapter in a LoRA file.
PREFIX = 'transformer'


class AdapterRole(nn.Module):
    """One role's view of the shared base: its parameters are its adapter's alone, its forward pass is the base's with
    that adapter.

    Args:
        base (ModelMixin): The frozen network that the roles share. It is not a submodule of a role.
        adapter (str, optional): Name of the role's adapter; None is the base itself.
    """

    def __init__(self, base: ModelMixin, adapter: Optional[str] = None) -> None:
        super().__init__()
        self._base = (base,)  # a tuple hides it from nn.Module
        self.adapter = adapter
        self._hooks: List[Tuple[str, Callable]] = []
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
            stack.enter_context(_Active(_tuner_layers(self.base), self.adapter))
            for submodule, hook in self._hooks:
                stack.callback(self.base.get_submodule(submodule).register_forward_hook(hook).remove)
            return self.base(*args, **kwargs)


def _tuner_layers(network: nn.Module) -> List[BaseTunerLayer]:
    return [layer for layer in network.modules() if isinstance(layer, BaseTunerLayer)]


class _Active:
    """Context in which layers compute with one adapter, or with none; `requires_grad` stays as it is.

    It may be entered again, as a second backward pass through the same checkpoint does.
    """

    def __init__(self, layers: List[BaseTunerLayer], adapter: Optional[str]) -> None:
        self.layers, self.adapter, self.before = layers, adapter, []

    def __enter__(self) -> None:
        self.before.append([(layer._active_adapter, layer._disable_adapters) for layer in self.layers])
        for layer in self.layers:
            layer._active_adapter, layer._disable_adapters = [self.adapter], self.adapter is None

    def __exit__(self, *error: Any) -> None:
        for layer, (active, disabled) in zip(self.layers, self.before.pop()):
            layer._active_adapter, layer._disable_adapters = active, disabled


def checkpoint_in_role(module: nn.Module, *args: Any) -> Any:
    """Activation checkpointing whose recomputation, in backward, runs in the role of the forward pass.

    Args:
        module (nn.Module): A block of the base, or a function over one.
        *args: Its arguments.
    """
    layers = _tuner_layers(module) if isinstance(module, nn.Module) else []
    adapter = None if not layers or layers[0]._disable_adapters else layers[0]._active_adapter[0]
    return checkpoint(module, *args, use_reentrant=False,
                      context_fn=lambda: (contextlib.nullcontext(), _Active(layers, adapter)))


class LoRA:
    """The adapters' settings, `model.lora`.

    Args:
        rank (int): Rank of every adapter. Default 64.
        alpha (float, optional): An adapter's output is scaled by alpha / rank. Default: the rank.
        target_modules (list[str], optional): Linear layers to adapt, by the end of their names. Default: the
            backbone's attention projections.
        student (str, optional): LoRA file, or folder of one, that the student starts from. Default: no change of
            the base.
        fake (str, optional): The same for the fake score.
    """

    def __init__(self, rank: int = 64, alpha: Optional[float] = None, target_modules: Optional[List[str]] = None,
                 student: Optional[str] = None, fake: Optional[str] = None) -> None:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f'model.lora.rank must be a whole number of 1 or more, but is {rank!r}')
        if alpha is not None and not (isinstance(alpha, (int, float)) and alpha > 0):
            raise ValueError(f'model.lora.alpha must be a number above 0, but is {alpha!r}')
        self.rank, self.alpha, self.target_modules = rank, rank if alpha is None else alpha, target_modules
        self.start = dict(student=student, fake=fake)

    @classmethod
    def from_config(cls, config: Dict[str, Any]) -> 'LoRA':
        """From the dict `model.lora`.

        Raises:
            ValueError: If a key is unknown.
        """
        known = ('rank', 'alpha', 'target_modules', 'student', 'fake')
        for key in config:
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f'model.lora.{key} is unknown: it takes {", ".join(known)}'
                                 + (f'; did you mean {close[0]!r}?' if close else ''))
        return cls(**config)

    def add(self, base: ModelMixin, role: str, targets: List[str]) -> AdapterRole:
        """Adds a role's adapter to the base; it starts as no change, or from its file.

        Args:
            base (ModelMixin): The shared network.
            role (str): 'student' or 'fake', also the adapter's name.
            targets (list[str]): The backbone's default layers.

        Returns:
            AdapterRole: The role, with trainable adapter weights in float32 (float64 over a float64 base).
        """
        config = LoraConfig(r=self.rank, lora_alpha=self.alpha, init_lora_weights='gaussian',
                            target_modules=list(self.target_modules or targets))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings('ignore', message='Already found a `peft_config`')  # two adapters are meant
                base.add_adapter(config, adapter_name=role)
        except ValueError as error:
            raise ValueError(f'model.lora.target_modules={config.target_modules} does not fit '
                             f'{type(base).__name__}: {error}') from error
        network = AdapterRole(base, role)
        for parameter in network.parameters():  # small updates are lost in bfloat16
            parameter.data = full_precision(parameter.data)
        if self.start[role] is not None:
            self._load(base, role, self.start[role])
        base.requires_grad_(False)
        for layer in _tuner_layers(base):  # every adapter, for set_adapter has turned the others off
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                part.requires_grad_(True)
        return network

    def _load(self, base: ModelMixin, role: str, path: str) -> None:
        weights, alpha = read_lora(path, f'model.lora.{role}')
        expected = get_peft_model_state_dict(base, adapter_name=role)
        given = f'model.lora.{role}={path!r}'
        if weights.keys() != expected.keys():
            differ = sorted(weights.keys() ^ expected.keys())[:3]
            raise ValueError(f'{given} adapts other layers than model.lora.target_modules, for example {differ}')
        for name, value in weights.items():
            if value.shape != expected[name].shape:
                raise ValueError(f'{given} has rank {min(value.shape)}, but model.lora.rank is {self.rank} '
                                 f'({name}: {tuple(value.shape)} instead of {tuple(expected[name].shape)})')
        alpha = self.rank if alpha is None else alpha  # what diffusers takes if the file does not say it
        if alpha != self.alpha:
            raise ValueError(f'{given} was trained with alpha {alpha}, but model.lora.alpha is {self.alpha}')
        set_peft_model_state_dict(base, weights, adapter_name=role)


def read_lora(path: str, key: str) -> Tuple[Dict[str, Tensor], Optional[float]]:
    """Reads a diffusers LoRA file of a transformer.

    Args:
        path (str): The file, or a folder with `pytorch_lora_weights.safetensors`.
        key (str): Config key to name in errors.

    Returns:
        tuple: Weights by PEFT's names, and alpha if the file says it.
    """
    file = Path(path, LORA_WEIGHT_NAME_SAFE) if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f'{key}={path!r} is no LoRA file and no folder with {LORA_WEIGHT_NAME_SAFE}')
    try:
        with safe_open(file, 'pt') as content:
            weights = {name: content.get_tensor(name) for name in content.keys()}
            metadata = json.loads((content.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, '{}'))
    except SafetensorError as error:
        raise ValueError(f'{key}={path!r} is truncated or no safetensors file: {error}') from error
    weights = {name.removeprefix(f'{PREFIX}.'): value for name, value in weights.items()}
    return weights, metadata.get(f'{PREFIX}.lora_alpha')


def save_lora(role: AdapterRole, folder: str) -> Path:
    """Writes a role's adapter as a diffusers LoRA file, `pytorch_lora_weights.safetensors`.

    `StableDiffusion3Pipeline.load_lora_weights(folder)` takes it; a pipeline without that method takes it by
    `pipeline.transformer.load_lora_adapter(folder, prefix='transformer', use_safetensors=True)`.
    """
    from diffusers.loaders import SD3LoraLoaderMixin  # takes seconds
    config = {key: sorted(value) if isinstance(value, set) else value
              for key, value in role.base.peft_config[role.adapter].to_dict().items()}
    # The format is that of every transformer pipeline; LongCat's has no saving method of its own.
    SD3LoraLoaderMixin.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(role.base, adapter_name=role.adapter),
        transformer_lora_adapter_metadata=config)
    return Path(folder, LORA_WEIGHT_NAME_SAFE)
