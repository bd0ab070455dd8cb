"""A teacher that is not the model's own pretrained network: fine-tuned weights, a LoRA file, or another size."""
import copy
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from mmengine.logging import print_log
from torch import nn

from cdm_plugin.arguments import check_arguments
from cdm_plugin.assets import resolve
from cdm_plugin.backbones import Backbone
from cdm_plugin.pretrained import check_folder
from cdm_plugin.roles.lora import AdapterRole, read_lora


@dataclass(frozen=True)
class Teacher:
    """`model.teacher`: where the teacher's weights come from. It shares the latents and the condition of the student.

    Attributes:
        pretrained (str, optional): Hub id or folder of a pipeline of the same architecture, in any size. Default: the
            backbone's.
        subfolder (str): Where its network lies in `pretrained`. Default 'transformer'.
        config (dict, optional): What its dimensions must be; without `pretrained`, of a new network.
        lora (str, optional): LoRA file, or folder of one, that is added to its weights (keys of diffusers or PEFT).
        lora_scale (float): Factor of what the file adds. Default 1.
        init (str): Where student and fake score start: 'teacher', from the teacher if its weights have the same names
            and shapes, or 'base', from the backbone's. Default 'teacher'.
    """
    pretrained: str | None = None
    subfolder: str = 'transformer'
    config: dict[str, Any] | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    init: Literal['teacher', 'base'] = 'teacher'

    @classmethod
    def from_config(cls, config: dict[str, Any] | None) -> 'Teacher':
        """From the dict `model.teacher`.

        Raises:
            ValueError: For an unknown key or a value that cannot be.
        """
        check_arguments(cls, config or {}, 'model.teacher')
        return cls(**(config or {}))

    def backbone(self, model: Backbone, shares_base: bool) -> Backbone:
        """The teacher's backbone: the model's, or one of the same conventions, text encoders and codec that loads other
        weights.

        Args:
            model (Backbone): The model's.
            shares_base (bool): Whether a teacher without network of its own is an adapter of the roles' base.

        Raises:
            ValueError: If its latents or its condition are not the student's.
        """
        own_network = self.pretrained is not None or self.config is not None
        fuses = self.lora is not None and (own_network or not shares_base)
        if not own_network and not fuses:
            return model
        own = copy.copy(model)
        own._modules = dict(model._modules)  # the same conditioner and codec
        if own_network:
            own.pretrained = None if self.pretrained is None else check_folder(
                resolve(self.pretrained), self.pretrained, 'model.teacher.pretrained',
                'a folder in the layout of a diffusers pipeline')
            own.subfolder = self.subfolder
            own.config = own._load_config(self.config)
            self._check_fits(own, model)
        if fuses:
            own.adapt = self._fuse
        return own

    @staticmethod
    def _check_fits(own: Backbone, model: Backbone) -> None:
        for what, theirs, ours in (('latents', own.latent_channels, model.latent_channels),
                                   ('a condition', own.condition_widths(), model.condition_widths())):
            if theirs != ours:
                raise ValueError(f'model.teacher has {what} of width {theirs}, but the student (model.backbone) '
                                 f'{ours}: they must share latents and text encoders')

    def _fuse(self, network: ModelMixin) -> None:
        """Adds the LoRA file to the weights."""
        add_adapter(network, self.lora, 'teacher', self.lora_scale)
        network.fuse_lora(adapter_names=['teacher'])
        network.unload_lora()

    def adapter(self, base: ModelMixin) -> AdapterRole:
        """The teacher as a frozen adapter of the base that the other roles share."""
        add_adapter(base, self.lora, 'teacher', self.lora_scale)
        return AdapterRole(base, 'teacher').requires_grad_(False).eval()


def same_shapes(a: Backbone, b: Backbone) -> bool:
    """Whether two backbones' networks have weights of the same names and shapes."""
    if a.config == b.config:
        return True
    first, second = ({name: tuple(w.shape) for name, w in each.empty_network().state_dict().items()} for each in (a, b))
    return first == second


def add_adapter(network: ModelMixin, path: str, name: str, scale: float = 1.0) -> None:
    """Loads a LoRA file as an adapter of a network. Its scale alpha / rank goes into its weights.

    Args:
        network (ModelMixin): The network.
        path (str): The file, or a folder of one; keys of diffusers or PEFT, `<layer>.alpha` among them or not.
        name (str): Of the adapter.
        scale (float): Factor of what it adds. Default 1.

    Raises:
        ValueError: If it does not fit.
    """
    weights = read_lora(path, 'model.teacher.lora')
    layers = {name.removesuffix('.lora_A.weight') for name in weights if name.endswith('.lora_A.weight')}
    missing = sorted(layers - {layer for layer, _ in network.named_modules()})[:3]
    if missing:
        raise ValueError(f'model.teacher.lora={path!r} adapts layers that {type(network).__name__} lacks, for example '
                         f'{missing}: it belongs to another architecture')
    for layer in layers:
        weights[f'{layer}.lora_B.weight'] = weights[f'{layer}.lora_B.weight'] * scale
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Already found a `peft_config`')  # several adapters are meant
        network.load_lora_adapter(weights, prefix=None, adapter_name=name)


@torch.no_grad()
def start_from_adapter(role: nn.Module, teacher: AdapterRole) -> bool:
    """Gives a trained adapter the product B A of the teacher's: its first rows and columns are the teacher's, scaled,
    the others add nothing.

    Returns:
        bool: Whether it could: every layer of the teacher's is adapted, with as high a rank.
    """
    base = role.base
    layers = {name: layer for name, layer in base.named_modules() if teacher.adapter in getattr(layer, 'lora_A', {})}
    if any(role.adapter not in layer.lora_A or len(layer.lora_A[role.adapter].weight) < len(
            layer.lora_A[teacher.adapter].weight) for layer in layers.values()):
        print_log(f'{role.adapter} starts from the base: its adapters (model.lora.rank, target_modules) cannot hold '
                  'those of model.teacher.lora', 'current')
        return False
    for layer in layers.values():
        (a, b), (own_a, own_b) = ((layer.lora_A[n].weight, layer.lora_B[n].weight)
                                  for n in (teacher.adapter, role.adapter))
        rank = len(a)
        own_a[:rank], own_b[:, :rank] = a, b * (layer.scaling[teacher.adapter] / layer.scaling[role.adapter])
    return True
