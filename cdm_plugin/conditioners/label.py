from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin.arguments import Count
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners.base import Conditioner, Prompts


@MODELS.register_module()
class ClassConditioner(Conditioner):
    """Class labels as one-hot tokens, with one more class for the null condition.

    It has no weights: the network's own input projections embed the one-hot vectors. Token i of class k is the unit
    vector i (num_classes + 1) + k, so that tokens of one class differ.

    Args:
        num_classes (int): Number of classes.
        num_tokens (int): Tokens a label becomes. Default 2.
    """
    light = True

    def __init__(self, num_classes: Count, num_tokens: Count = 2) -> None:
        super().__init__()
        self.num_classes, self.num_tokens = num_classes, num_tokens
        classes = num_classes + 1
        eye = torch.eye(classes)
        tokens = torch.stack([torch.nn.functional.pad(eye, (i * classes, (num_tokens - 1 - i) * classes))
                              for i in range(num_tokens)], 1)
        self.register_buffer('tokens', tokens, persistent=False)
        self.register_buffer('pooled', eye, persistent=False)

    def _lookup(self, labels: Tensor) -> Condition:
        return Condition(dict(encoder_hidden_states=self.tokens[labels], pooled_projections=self.pooled[labels]))

    def encode(self, prompts: Prompts) -> Condition:
        """Encodes class labels: a LongTensor (B,), or texts of numbers.

        Raises:
            ValueError: If a label is no whole number in 0..num_classes-1.
        """
        given = prompts.tolist() if isinstance(prompts, Tensor) else list(prompts)
        try:
            if any(isinstance(p, float) for p in given):
                raise ValueError
            values = [int(p) for p in given]
        except (TypeError, ValueError):
            raise ValueError('ClassConditioner takes class labels such as 3 or "3" as prompts, '
                             f'but got {given[:3]}; check data.prompt or model.backbone.conditioner') from None
        wrong = [v for v in values if not 0 <= v < self.num_classes]
        if wrong:
            raise ValueError(f'class labels must lie in 0..{self.num_classes - 1} '
                             f'(model.backbone.conditioner.num_classes={self.num_classes}), but got {wrong[:3]}')
        return self._lookup(torch.tensor(values, device=self.tokens.device))

    def null(self) -> Condition:
        return self._lookup(torch.tensor([self.num_classes], device=self.tokens.device))

    def to_config(self) -> dict[str, Any]:
        return dict(type='ClassConditioner', num_classes=self.num_classes, num_tokens=self.num_tokens)
