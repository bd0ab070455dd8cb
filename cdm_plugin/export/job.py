"""What is exported, and how."""
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

import torch
from mmengine.config import Config

from cdm_plugin.backbones import Backbone
from cdm_plugin.codecs import VAECodec
from cdm_plugin.conditioners import EmbeddingConditioner, PipelineConditioner, check_dtype
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.networks import dtype_of

INDEX_FILE, CARD_FILE = 'model_index.json', 'README.md'


@dataclass(frozen=True)
class ExportJob:
    """What is exported, and how."""
    method: DiffusionModel
    ema: bool
    dtype: Optional[torch.dtype]
    fuse: bool
    config: Optional[Config]
    iterations: Optional[int]

    @property
    def backbone(self) -> Backbone:
        return self.method.backbone

    @property
    def as_lora(self) -> bool:
        """Whether a LoRA file is written rather than whole weights."""
        return self.method.lora is not None and not self.fuse

    @property
    def image_size(self) -> List[int]:
        """Height and width in pixels."""
        return [side * self.backbone.codec.scale for side in self.method.latent_size]

    @property
    def target_dtype(self) -> torch.dtype:
        """Dtype of the pipeline that is written or, for a LoRA file, that it is used with."""
        own = self.backbone.dtype if self.method.lora is not None else dtype_of(self.method.student)
        if self.as_lora or self.dtype is None:
            # Rounded to a bfloat16 base's dtype, the sum of base and adapter would lose much of a small adapter.
            return torch.float32 if self.fuse and own == torch.bfloat16 else own
        return self.dtype

    def weights(self) -> contextlib.AbstractContextManager:
        """Context in which the student carries the weights that are exported."""
        return self.method.student_ema.applied() if self.ema else contextlib.nullcontext()


def is_whole_pipeline(backbone: Backbone) -> bool:
    """Whether a backbone is that of a pipeline with text encoders and VAE, which diffusers can run by itself."""
    if backbone.pretrained is None or not isinstance(backbone.codec, VAECodec):
        return False
    if Path(backbone.pretrained).is_dir() and not Path(backbone.pretrained, INDEX_FILE).is_file():
        return False
    return isinstance(backbone.conditioner, (PipelineConditioner, EmbeddingConditioner))


def missing_t5(index: Mapping[str, Any]) -> Dict[str, Any]:
    """The conditioner's arguments for a pipeline without its optional T5, by its model_index.json."""
    return dict(t5=False) if (index.get('text_encoder_3') or [''])[0] is None else {}


def checked_dtype(name: Optional[str]) -> Optional[torch.dtype]:
    return None if name is None else check_dtype(name, 'the export\'s dtype')


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
