"""The method of a config with networks that lie on the meta device: shapes without memory."""
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from mmengine.registry import MODELS
from torch import nn

from cdm_plugin.assets import resolve
from cdm_plugin.backbones import Backbone
from cdm_plugin.codecs import Codec, VAECodec
from cdm_plugin.commands.doctor.report import Part, Report, _billions, _problems, _size
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import Conditioner, TextConditioner
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.pretrained import check_dtype, check_folder
from cdm_plugin.registry import class_of, is_type
from cdm_plugin.roles import attention


def build_on_meta(model: dict[str, Any], report: Report) -> DiffusionModel:
    """The method of a config with networks that have shapes and no memory.

    Args:
        model (dict): `cfg.model`, changed.
        report (Report): Receives warnings about what is not on this machine.

    Raises:
        ValueError: For any mistake that building the method itself would find.
    """
    cls, backbone = class_of(model, MODELS), dict(model.get('backbone') or {})
    if not is_type(cls, DiffusionModel):
        raise ValueError(f'model.type={model.get("type")!r} is no method of cdm_plugin: take CDM, DecoupledDMD, DMD2, '
                         'TDM or FlowMatching')
    base, given = class_of(backbone, MODELS), backbone.pop('type', None)
    if not is_type(base, Backbone):
        raise ValueError(f'model.backbone.type={given!r} is no backbone')
    # Attention is judged apart: on the meta device every kernel but torch's own refuses.
    requested = attention.check_name(backbone.get('attention', 'auto'))
    backbone.update(attention='auto', compile=False)
    keys = {k: backbone[k] for k in ('revision', 'cache_dir') if k in backbone}
    for owner in (backbone, model.get('teacher') or {}):
        if owner.get('pretrained'):
            owner['pretrained'] = str(_folder(owner['pretrained'], report, keys) or owner['pretrained'])
    for settings, key in (('lora', 'student'), ('lora', 'fake'), ('teacher', 'lora')):  # LoRA files
        path = (model.get(settings) or {}).get(key)
        if path is not None:
            model[settings] = {**model[settings], key: None}
            if not Path(path).exists():
                report.problems.append(f'model.{settings}.{key}={path!r} does not exist')
    made = type(base.__name__, (_OnMeta, base), dict(report=report))(**backbone)
    made.attention = requested
    arguments = {**model, 'backbone': made}
    arguments.pop('type')
    method = type(cls.__name__, (_AdaptersOnMeta, cls), {})(**arguments).train()
    for pretrained, subfolder in {(each.pretrained, each.subfolder) for each in (made, *method.own_backbones.values())}:
        if pretrained is not None and Path(pretrained).is_dir():
            _check_weights(Path(pretrained, subfolder), report)
    return method


class _AdaptersOnMeta(DiffusionModel):
    """Mixin of a method: PEFT would put the adapters of a network on the meta device into the CPU's memory."""

    def build_trained(self, role: str) -> nn.Module:
        with torch.device('meta'):
            return super().build_trained(role)


class _OnMeta(Backbone):
    """Mixin of a backbone that loads nothing but small config files."""
    report: Report

    def build_network(self, dtype: torch.dtype | None = None) -> nn.Module:
        return self.empty_network(dtype)

    @property
    def on_disk(self) -> bool:
        """Whether the pretrained folder is on this machine."""
        return Path(self.pretrained).is_dir()

    def _load_config(self, config: Any) -> dict[str, Any]:
        if self.pretrained is None or self.on_disk:
            return super()._load_config(config)
        if not config:
            raise ValueError(f'{self.pretrained!r} is not on this machine, and there is no model.backbone.config: '
                             'nothing can be counted; add the dimensions of its config.json')
        hub_id, self.pretrained = self.pretrained, None
        try:
            return super()._load_config(config)
        finally:
            self.pretrained = hub_id

    def _load_scheduler(self, scheduler: dict[str, Any] | None) -> Any:
        if scheduler is None and self.pretrained is not None and not self.on_disk:
            scheduler = self.published_scheduler
        return super()._load_scheduler(scheduler)

    def _build_part(self, name: str, cfg: dict[str, Any] | None) -> nn.Module:
        if not isinstance(cfg, dict) or 'type' not in cfg:
            cfg = {**(self.default_parts().get(name) or {}), **(cfg or {})}
        cls, arguments = class_of(cfg, MODELS), {k: v for k, v in cfg.items() if k != 'type'}
        if name == 'codec':
            return self._build_codec(cls, arguments, cfg)
        if not cfg:
            return super()._build_part(name, None)
        with _problems(self.report):  # embeddings that are not there yet are no reason to say nothing else
            if cls is None or getattr(cls, 'light', False):
                return super()._build_part(name, cfg)
            if is_type(cls, TextConditioner):
                return _unread(cls, self, **arguments)
            _not_counted(self.report, name, cls)
        return _Unbuilt(self)

    def _build_codec(self, cls: type | None, arguments: dict[str, Any], cfg: dict[str, Any]) -> Codec:
        if cls is None or getattr(cls, 'light', False):
            return super()._build_part('codec', cfg or None)
        if is_type(cls, VAECodec):
            facts = dict(report=self.report, published=self.published_vae)
            return type(cls.__name__, (_VAEOnMeta, cls), facts)(**arguments).to('meta')  # its own buffers too
        _not_counted(self.report, 'codec', cls)
        codec = Codec()
        codec.scale = getattr(cls, 'scale', 1)
        return codec


class _Unbuilt(Conditioner):
    """In the place of a conditioner whose weights are not read: the shapes of its null condition, and its size.

    Args:
        backbone (Backbone): That it is for.
        tokens (int): Of its null condition. Default 256, as most text encoders give.
        parts (Sequence[Part]): What it occupies on the GPU. Default nothing.
        offload (bool): Whether its encoders wait in the CPU's memory. Default False.
        largest (int): Bytes of all encoders together. Default 0.
    """

    def __init__(self, backbone: Backbone, tokens: int = 256, parts: Sequence[Part] = (), offload: bool = False,
                 largest: int = 0) -> None:
        super().__init__()
        self._backbone = (backbone,)  # a tuple hides it from nn.Module
        self.tokens, self.parts, self.offload, self.largest = tokens, parts, offload, largest

    def null(self) -> Condition:
        return self._backbone[0].empty_condition(self.tokens)


def _unread(cls: type[TextConditioner], backbone: Backbone, pretrained: str | None = None, dtype: str = 'float32',
            offload: bool = False, **arguments: Any) -> _Unbuilt:
    """Text encoders as their class expects them."""
    weights_dtype = check_dtype(dtype, 'model.backbone.conditioner.dtype')
    if pretrained is not None:
        check_folder(pretrained, pretrained, 'model.backbone.conditioner.pretrained', 'a folder with text encoders')
    folder = _folder(pretrained, backbone.report, arguments)
    encoders = cls.expected_encoders(folder, **arguments)
    if not encoders:
        _not_counted(backbone.report, 'conditioner', cls)
    for encoder in encoders if folder is not None else ():
        _check_weights(folder / encoder.part, backbone.report)
    parameters = sum(encoder.parameters for encoder in encoders)
    largest = parameters * weights_dtype.itemsize
    note = ', '.join(f'{encoder.name} {_billions(encoder.parameters)}' for encoder in encoders)
    if offload:
        note += f'; {_size(largest)} in the CPU\'s memory, on the GPU while they encode'
    part = Part('text encoders', parameters, dtype, 0 if offload else largest, note=note)
    return _Unbuilt(backbone, cls.expected_tokens(**arguments), [part], offload, largest)


class _VAEOnMeta(VAECodec):
    """Mixin of a codec: its autoencoder has shapes and no memory."""
    report: Report
    published: dict[str, Any]

    def vae_config(self, pretrained: str, subfolder: str, **load_kwargs: Any) -> dict[str, Any]:
        folder = _folder(pretrained, self.report, load_kwargs)
        if folder is None:
            return self.published
        _check_weights(folder / subfolder, self.report)
        return self.vae_class.load_config(folder, subfolder=subfolder)

    def load_vae(self, pretrained: str, subfolder: str, dtype: torch.dtype, **load_kwargs: Any) -> nn.Module:
        with torch.device('meta'):
            vae = self.vae_class.from_config(self.vae_config(pretrained, subfolder, **load_kwargs))
        return nn.Module.to(vae, dtype)


def _not_counted(report: Report, name: str, cls: type) -> None:
    report.warnings.append(f'model.backbone.{name}.type={cls.__name__} is not counted: it may load anything when it '
                           'is built')


def _folder(pretrained: str | None, report: Report, kwargs: dict[str, Any]) -> Path | None:
    """The folder of a pretrained pipeline, if it is on this machine; says so in the report if it is not whole."""
    if pretrained is None:
        return None
    path = Path(resolve(pretrained))
    if not path.is_dir():
        try:
            path = Path(snapshot_download(str(path), local_files_only=True, revision=kwargs.get('revision'),
                                          cache_dir=kwargs.get('cache_dir')))
        except HFValidationError:  # no id of the hub, but a folder that is not there: Backbone says so
            return None
        except OSError:
            absent = f'{pretrained!r} is not in the cache of this machine'
            if os.environ.get('HF_HUB_OFFLINE', '0') not in ('0', ''):
                lines, text = report.problems, f'{absent}, and HF_HUB_OFFLINE is set'
            else:
                lines, text = report.warnings, (f'{absent}: training will download it; counted by the recipe and '
                                                'by what is published')
            if text not in lines:
                lines.append(text)
            return None
    return path


def _check_weights(folder: Path, report: Report) -> None:
    """Says in the report if a part's folder has no weights, or not all of their files."""
    indices = [json.loads(index.read_text())['weight_map'].values() for index in folder.glob('*.index.json')]
    missing = [sorted({name for name in index if not (folder / name).exists()}) for index in indices]
    if indices and all(missing):
        report.problems.append(f'{folder} lacks {len(missing[0])} files of weights, for example {missing[0][0]}')
    elif not indices and not any(file.suffix in ('.safetensors', '.bin') for file in folder.glob('*')):
        report.problems.append(f'{folder} has no weights')
