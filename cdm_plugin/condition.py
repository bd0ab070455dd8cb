"""What a network is conditioned on: named tensors, one row a sample."""
from dataclasses import dataclass
from typing import Dict, List, Sequence, Union

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Encoded prompts of a batch.

    Attributes:
        fields (dict): Tensors by the backbone's names, each (B, ...), for example `encoder_hidden_states` (B, L, D)
            and `pooled_projections` (B, P) for SD3.
    """
    fields: Dict[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {name: len(t) for name, t in self.fields.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f'fields of a condition must have one row a sample, but have {lengths} rows')

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: Union[Tensor, slice, Sequence[int]]) -> 'Condition':
        """The rows that an index, a slice or a mask selects."""
        return Condition({name: t[index] for name, t in self.fields.items()})

    def to(self, device: torch.device) -> 'Condition':
        """A copy on a device."""
        return Condition({name: t.to(device, non_blocking=True) for name, t in self.fields.items()})

    def expand(self, rows: int) -> 'Condition':
        """One row, repeated."""
        return Condition({name: t.expand(rows, *t.shape[1:]) for name, t in self.fields.items()})

    def where(self, mask: Tensor, other: 'Condition') -> 'Condition':
        """Rows of `other` where mask (B,) is true, own rows elsewhere."""
        return Condition({name: torch.where(mask.reshape(-1, *[1] * (t.ndim - 1)), other.fields[name], t)
                          for name, t in self.fields.items()})

    @staticmethod
    def cat(conditions: List['Condition']) -> 'Condition':
        """Batches end to end."""
        return Condition({name: torch.cat([c.fields[name] for c in conditions]) for name in conditions[0].fields})
