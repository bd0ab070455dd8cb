"""A network, backbone and conditioner for texts of different lengths, as a package of one's own registers them."""
import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from mmengine.registry import MODELS
from torch import nn

from cdm_plugin.backbones import Backbone
from cdm_plugin.conditioners import TextConditioner, TokenCount

WIDTH = 6


class RaggedNetwork(ModelMixin, ConfigMixin):
    """Every latent attends to the text and to itself; honours the mask. Every kind of field is used."""

    @register_to_config
    def __init__(self, in_channels=2, sample_size=2, width=8, text_width=WIDTH):
        super().__init__()
        self.enter, self.text = nn.Linear(in_channels, width), nn.Linear(text_width, width)
        self.position, self.time = nn.Embedding(32, width), nn.Linear(1, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.leave = nn.Linear(width, in_channels)

    def forward(self, x, sigma, states, ids, mask=None):
        tokens = self.enter(x.flatten(2).transpose(1, 2)) + self.time(sigma[:, None].to(x.dtype))[:, None]
        text = self.text(states) + self.position(ids[..., 0])
        both = torch.cat([text, tokens], 1)
        if mask is not None:
            mask = ~torch.cat([mask, mask.new_ones(tokens.shape[:2])], 1)
        out = self.attention(both, both, both, key_padding_mask=mask, need_weights=False)[0][:, text.shape[1]:]
        return self.leave(torch.tanh(out)).transpose(1, 2).unflatten(2, x.shape[2:])


@MODELS.register_module()
class RaggedBackbone(Backbone):
    """All of it is in one class: nothing of ragged texts is the method's business."""
    network_class = RaggedNetwork
    takes_mask = True

    def call(self, network, x, sigma, fields):
        mask = fields.get('encoder_hidden_states_mask')
        assert mask is None or mask.dtype == torch.bool
        assert fields['text_ids'].dtype == torch.long and fields['encoder_hidden_states'].dtype == x.dtype
        return network(x, sigma, fields['encoder_hidden_states'], fields['text_ids'], mask)

    def condition_widths(self):
        return dict(encoder_hidden_states=WIDTH, text_ids=1)


@MODELS.register_module()
class RaggedConditioner(TextConditioner):
    """A token a letter, as an encoder that returns lists."""

    def __init__(self, negative_prompt='-', padded=None):
        super().__init__([], negative_prompt)
        self.padded = padded
        self.register_buffer('letters', torch.randn(256, WIDTH, generator=torch.Generator().manual_seed(3)),
                             persistent=False)

    def encode_texts(self, prompts):
        rows = [self.letters[list(p.encode())] for p in prompts]
        ids = [torch.arange(len(row))[:, None] for row in rows]
        if self.padded is None:
            return dict(encoder_hidden_states=rows, text_ids=ids)
        # As encoders of transformers do it: one length, and a mask of integers.
        masks = [(torch.arange(self.padded) < len(row)).long() for row in rows]
        rows, ids = ([nn.functional.pad(t, (0, 0, 0, self.padded - len(t)), value=7) for t in ts] for ts in (rows, ids))
        return dict(encoder_hidden_states=torch.stack(rows), text_ids=torch.stack(ids),
                    encoder_hidden_states_mask=torch.stack(masks), text_ids_mask=torch.stack(masks))

    def count_tokens(self, prompts):
        return [TokenCount('letters', 99, [len(p) for p in prompts])]
