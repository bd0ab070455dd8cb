"""The method of a config with networks that lie on the meta device: shapes without memory."""
import json
import os
from pathlib import Path
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from mmengine.registry import MODELS
from torch import nn

from cdm_plugin import attention
from cdm_plugin.assets import resolve
from cdm_plugin.backbones import Backbone
from cdm_plugin.codecs import Codec, VAECodec
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import Conditioner, TextConditioner, TextEncoderConditioner, check_dtype
from cdm_plugin.doctor.report import Part, Report, _billions, _problems, _size
from cdm_plugin.methods import DiffusionModel

# What is published of the pipelines, for those that are not on this machine


class Encoder(NamedTuple):
    """A text encoder of a published pipeline.

    Attributes:
        part (str): Its folder in the pipeline.
        name (str): What people call it.
        parameters (int): Number of parameters.
    """
    part: str
    name: str
    parameters: int


T5 = 4_762_310_656
ENCODERS = dict(
    SD3TextConditioner=(Encoder('text_encoder', 'CLIP-L', 123_650_304), Encoder('text_encoder_2', 'OpenCLIP bigG',
                                                                              694_659_840),
                        Encoder('text_encoder_3', 'T5-XXL', T5)),
    LongCatImageTextConditioner=(Encoder('text_encoder', 'Qwen2.5-VL-7B', 8_292_166_656),),
    FluxTextConditioner=(Encoder('text_encoder', 'CLIP-L', 123_060_480), Encoder('text_encoder_2', 'T5-XXL', T5)))
# Text tokens of a condition: of the first encoders, and the argument that says how many the last one adds.
TOKENS = dict(SD3TextConditioner=(77, 'max_sequence_length', 256), LongCatImageTextConditioner=(512, None, 0),
              FluxTextConditioner=(0, 'max_sequence_length', 512), TextEncoderConditioner=(0, 'max_length', 32))
DYNAMIC_SHIFT = dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
                     max_image_seq_len=4096)
SCHEDULERS = dict(SD3Backbone=dict(shift=3.0), LongCatImageBackbone=DYNAMIC_SHIFT, FluxBackbone=DYNAMIC_SHIFT)
# The autoencoder of SD3, Flux and LongCat-Image.
VAE = dict(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, use_quant_conv=False,
    use_post_quant_conv=False, down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)


# The method


def build_on_meta(model: Dict[str, Any], report: Report) -> DiffusionModel:
    """The method of a config with networks that have shapes and no memory.

    Args:
        model (dict): `cfg.model`, changed.
        report (Report): Receives warnings about what is not on this machine.

    Raises:
        ValueError: For any mistake that building the method itself would find.
    """
    cls, backbone = MODELS.get(model.get('type', '')), dict(model.get('backbone') or {})
    if cls is None or not issubclass(cls, DiffusionModel):
        raise ValueError(f'model.type={model.get("type")!r} is no method of cdm_plugin: take CDM, DecoupledDMD, DMD2 '
                         'or FlowMatching')
    base = MODELS.get(backbone.pop('type', ''))
    if base is None or not issubclass(base, Backbone):
        raise ValueError(f'model.backbone.type={model.get("backbone", {}).get("type")!r} is no backbone')
    # Attention is judged apart: on the meta device every kernel but torch's own refuses.
    requested = attention.check_name(backbone.get('attention', 'auto'))
    backbone.update(attention='auto', compile=False)
    if backbone.get('pretrained'):
        keys = {k: backbone[k] for k in ('revision', 'cache_dir') if k in backbone}
        backbone['pretrained'] = str(_folder(backbone['pretrained'], report, keys) or backbone['pretrained'])
    for role in ('student', 'fake'):
        path = (model.get('lora') or {}).get(role)
        if path is not None:
            model['lora'] = {**model['lora'], role: None}
            if not Path(path).exists():
                report.problems.append(f'model.lora.{role}={path!r} does not exist')
    made = type(base.__name__, (_OnMeta, base), dict(report=report))(**backbone)
    made.attention = requested
    if made.pretrained is not None and made.on_disk:
        _check_weights(Path(made.pretrained, made.subfolder), report)
    arguments = {**model, 'backbone': made}
    arguments.pop('type')
    return type(cls.__name__, (_AdaptersOnMeta, cls), {})(**arguments).train()


class _AdaptersOnMeta:
    """Mixin of a method: PEFT would put the adapters of a network on the meta device into the CPU's memory."""

    def build_trained(self, role: str) -> nn.Module:
        with torch.device('meta'):
            return super().build_trained(role)


class _OnMeta:
    """Mixin of a backbone that loads nothing but small config files."""
    report: Report

    def build_network(self, dtype: Optional[torch.dtype] = None) -> nn.Module:
        return self.empty_network(dtype)

    @property
    def on_disk(self) -> bool:
        """Whether the pretrained folder is on this machine."""
        return Path(self.pretrained).is_dir()

    def _load_config(self, config: Any) -> Dict[str, Any]:
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

    def _load_scheduler(self, scheduler: Optional[Dict[str, Any]]) -> Any:
        if scheduler is None and self.pretrained is not None and not self.on_disk:
            scheduler = SCHEDULERS.get(type(self).__name__, {})
        return super()._load_scheduler(scheduler)

    def _build_part(self, name: str, cfg: Optional[Dict[str, Any]]) -> nn.Module:
        if not isinstance(cfg, dict) or 'type' not in cfg:
            cfg = {**(self.default_parts().get(name) or {}), **(cfg or {})}
        cls, arguments = MODELS.get(cfg.get('type', '')), {k: v for k, v in cfg.items() if k != 'type'}
        if cls is not None and issubclass(cls, VAECodec):
            return _VAE(self.report, **arguments)
        if cls is not None and not cls.__module__.startswith('cdm_plugin'):
            self.report.warnings.append(f'model.backbone.{name}.type={cfg["type"]} is not counted: it may load '
                                        'anything when it is built')
            return _Unknown(self) if name == 'conditioner' else Codec()
        if name == 'codec' or not cfg:
            return super()._build_part(name, cfg or None)
        with _problems(self.report):  # embeddings that are not there yet are no reason to say nothing else
            if cls is not None and issubclass(cls, TextConditioner):
                return _Encoders(cls.__name__, self, **arguments)
            return super()._build_part(name, cfg)
        return _Unknown(self)


class _Unknown(Conditioner):
    """A conditioner that is not built: its null condition has as many tokens as most text encoders give."""
    parts: Sequence[Part] = ()
    tokens = 256

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._backbone = (backbone,)

    def null(self) -> Condition:
        fields = {}
        for name, width in self._backbone[0].condition_widths().items():
            shape = (1, width) if 'pooled' in name else (1, self.tokens, width)
            fields[name] = torch.empty(shape, device='meta')
        return Condition(fields)


class _Encoders(_Unknown):
    """Text encoders, counted from their configs or the table."""

    def __init__(self, name: str, backbone: Backbone, pretrained: Optional[str] = None, dtype: str = 'float32',
                 offload: bool = False, t5: bool = True, **kwargs: Any) -> None:
        super().__init__(backbone)
        weights_dtype = check_dtype(dtype, 'model.backbone.conditioner.dtype')
        if name == 'TextEncoderConditioner':
            TextEncoderConditioner.check_pretrained(pretrained)
        folder = _folder(pretrained, backbone.report, kwargs)
        if folder is None:
            counts = {e.part: (e.name, e.parameters) for e in ENCODERS.get(name, ())}
        elif name == 'TextEncoderConditioner':
            counts = dict(text_encoder=_count_text_encoder(folder))
            _check_weights(folder, backbone.report)
        else:
            index = json.loads((folder / 'model_index.json').read_text())
            counts = {part: (entry[1], _count_transformer(entry[1], folder / part)) for part, entry in index.items()
                      if part.startswith('text_encoder') and entry[0] is not None}
            for part in counts:
                _check_weights(folder / part, backbone.report)
            if t5 and name == 'SD3TextConditioner' and 'text_encoder_3' not in counts:
                raise ValueError(f'{pretrained!r} has no T5 (text_encoder_3): set model.backbone.conditioner.t5=False')
        if not t5:
            counts.pop('text_encoder_3', None)
        parameters = sum(count for _, count in counts.values())
        self.offload, self.largest = offload, parameters * weights_dtype.itemsize
        note = ', '.join(f'{label} {_billions(count)}' for label, count in counts.values())
        if offload:
            note += f'; {_size(self.largest)} in the CPU\'s memory, on the GPU while they encode'
        self.parts = [Part('text encoders', parameters, dtype, 0 if offload else self.largest, note=note)]
        first, key, more = TOKENS.get(name, (self.tokens, None, 0))
        self.tokens = first + (kwargs.get(key, more) if key else 0)


class _VAE(VAECodec):
    """The autoencoder with shapes and no memory."""

    def __init__(self, report: Report, pretrained: str, subfolder: str = 'vae', dtype: str = 'float32',
                 **kwargs: Any) -> None:
        Codec.__init__(self)
        folder = _folder(pretrained, report, kwargs)
        config = VAE if folder is None else AutoencoderKL.load_config(folder, subfolder=subfolder)
        if folder is not None:
            _check_weights(folder / subfolder, report)
        with torch.device('meta'):
            vae = AutoencoderKL.from_config(config)
        self.vae = nn.Module.to(vae, check_dtype(dtype, 'model.backbone.codec.dtype')).requires_grad_(False).eval()
        self.vae.enable_slicing()
        self.scale = 2**(len(self.vae.config.block_out_channels) - 1)
        self.shift, self.factor = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor


def _count_transformer(cls: str, folder: Path) -> int:
    import transformers
    config = transformers.AutoConfig.from_pretrained(folder)
    if cls.startswith('CLIPText') and hasattr(config, 'text_config'):
        config = config.text_config
    with torch.device('meta'):
        return sum(p.numel() for p in getattr(transformers, cls)(config).parameters())


def _count_text_encoder(folder: Path) -> Tuple[str, int]:
    """Class and parameters of what `TextEncoderConditioner` loads from a folder."""
    import transformers
    with torch.device('meta'):
        encoder = transformers.AutoModelForTextEncoding.from_config(transformers.AutoConfig.from_pretrained(folder))
    return type(encoder).__name__, sum(p.numel() for p in encoder.parameters())


def _folder(pretrained: Optional[str], report: Report, kwargs: Dict[str, Any]) -> Optional[Path]:
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
