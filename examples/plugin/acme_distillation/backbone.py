"""An architecture: its network class, how to call it, and what its condition is."""
from collections.abc import Mapping

from mmengine.registry import MODELS
from torch import Tensor, nn

from acme_distillation.network import AcmeTransformer2DModel
from cdm_plugin.backbones import Backbone


@MODELS.register_module()
class AcmeBackbone(Backbone):
    """Acme's architecture."""
    network_class = AcmeTransformer2DModel
    time_embedder = 'time_embed'  # the submodule that an anchor-aware fake score adds to
    lora_targets = ('to_q',)

    def call(self, network: nn.Module, x: Tensor, sigma: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Velocity, in the network's own timestep convention."""
        return network(x, timestep=1000 * sigma, encoder_hidden_states=fields['encoder_hidden_states']).sample

    def condition_widths(self) -> dict[str, int]:
        """Checked against the data before training."""
        return dict(encoder_hidden_states=self.config['cross_attention_dim'])
