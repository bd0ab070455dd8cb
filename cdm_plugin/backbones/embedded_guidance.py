"""Networks that are guidance-distilled: they are told a guidance scale, and one call has it in its velocity."""
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from cdm_plugin.backbones.base import Backbone


class EmbeddedGuidance(Backbone):
    """Base class, or mixin, of backbones whose network may have an embedding of guidance (`guidance_embeds`).

    Args:
        embedded_guidance (float, optional): Guidance that such a network is told, in every call. Default: what an
            exported folder says, else the pipeline's usual one.
        *args, **kwargs: As in `Backbone`. `guidance_scale` in sampling is classifier-free guidance on top of that.
    """
    published_guidance: float

    def __init__(self, *args: Any, embedded_guidance: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        saved = self._saved_parts().get('embedded_guidance', self.published_guidance)
        self.embedded_guidance = saved if embedded_guidance is None else embedded_guidance

    def save_pretrained(self, network: ModelMixin | None, folder: str | Path, **recipe: Any) -> None:
        super().save_pretrained(network, folder, embedded_guidance=self.embedded_guidance, **recipe)

    def pipeline_defaults(self) -> dict[str, Any]:
        """As in `Backbone`; the pipeline's own `guidance_scale` is the embedded one."""
        return {**super().pipeline_defaults(), 'guidance_scale': 1.0}

    def pipeline_guidance(self, scale: float) -> dict[str, Any]:
        return dict(guidance_scale=self.embedded_guidance)

    def guidance_told(self, sigma: Tensor) -> Tensor | None:
        """What the network is told beside the noise levels (B,)."""
        return torch.full_like(sigma, self.embedded_guidance) if self.config['guidance_embeds'] else None

    def embedded_values(self, sigma: Tensor) -> list[Tensor]:
        guidance = self.guidance_told(sigma)
        return super().embedded_values(sigma) + ([] if guidance is None else [guidance])
