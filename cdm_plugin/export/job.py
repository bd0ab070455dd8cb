"""What is exported, and how."""
import contextlib
import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from cdm_plugin.backbones import Backbone
from cdm_plugin.codecs import VAECodec
from cdm_plugin.conditioners import EmbeddingConditioner, PipelineConditioner
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.pretrained import check_dtype
from cdm_plugin.roles.weights import dtype_of

INDEX_FILE, CARD_FILE = 'model_index.json', 'README.md'
# Of the linear layers, where it is asked for; what has no room in it is in the dtype that they are computed with.
FLOAT8, BESIDE_FLOAT8 = torch.float8_e4m3fn, torch.bfloat16


@dataclass(frozen=True)
class ExportJob:
    """What is exported, and how."""
    method: DiffusionModel
    ema: bool
    dtype: torch.dtype | None
    fuse: bool
    config: Config | None
    iterations: int | None
    sd_scripts: bool = False

    @property
    def backbone(self) -> Backbone:
        return self.method.backbone

    @property
    def as_lora(self) -> bool:
        """Whether a LoRA file is written rather than whole weights."""
        return self.method.lora is not None and not self.fuse

    @property
    def image_size(self) -> list[int]:
        """Height and width in pixels."""
        return [side * self.backbone.codec.scale for side in self.method.latent_sizes[0]]

    @property
    def target_dtype(self) -> torch.dtype:
        """Dtype of the pipeline that is written (of float8, what it computes with) or, for a LoRA file, that it is used
        with."""
        own = self.backbone.dtype if self.method.lora is not None else dtype_of(self.method.student)
        if self.as_lora or self.dtype is None:
            # Rounded to a bfloat16 base's dtype, the sum of base and adapter would lose much of a small adapter.
            return torch.float32 if self.fuse and own == torch.bfloat16 else own
        return BESIDE_FLOAT8 if self.dtype == FLOAT8 else self.dtype

    def file_dtype(self, own: torch.dtype) -> torch.dtype:
        """Dtype in the files of a weight that has this one in the network, and none of those in float8."""
        if not own.is_floating_point:
            return own
        return own if self.dtype is None and not self.fuse else self.target_dtype

    @functools.cached_property
    def trained_as(self) -> DiffusionModel:
        """The method that the student was trained by, for what it says of itself: where the student was loaded alone,
        one of the same config whose networks have no memory."""
        model = {} if self.method.config is None else dict(self.method.config.model)
        if type(self.method) is not DiffusionModel or not model:
            return self.method
        backbone = copy.copy(self.backbone)
        backbone.dtype, backbone.quantization = torch.float32, None
        backbone.build_network = backbone.empty_network
        return MODELS.build({**{key: value for key, value in model.items() if value is not None}, 'backbone': backbone})

    def weights(self) -> contextlib.AbstractContextManager:
        """Context in which the student carries the weights that are exported."""
        return self.method.student_ema.applied() if self.ema else contextlib.nullcontext()


def is_whole_pipeline(backbone: Backbone) -> bool:
    """Whether a backbone is that of a pipeline with text encoders and VAE, which diffusers can run by itself."""
    if None in (backbone.pretrained, backbone.pipeline_name) or not isinstance(backbone.codec, VAECodec):
        return False
    if Path(backbone.pretrained).is_dir() and not Path(backbone.pretrained, INDEX_FILE).is_file():
        return False
    return isinstance(backbone.conditioner, (PipelineConditioner, EmbeddingConditioner))


def missing_t5(index: Mapping[str, Any]) -> dict[str, Any]:
    """The conditioner's arguments for a pipeline without its optional T5, by its model_index.json."""
    return dict(t5=False) if (index.get('text_encoder_3') or [''])[0] is None else {}


def checked_dtype(name: str | None) -> torch.dtype | None:
    if name == 'float8':
        return FLOAT8
    return None if name is None else check_dtype(name, 'the export\'s dtype', 'float8')


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
