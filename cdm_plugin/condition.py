"""What a network is conditioned on: named tensors, one row a sample."""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

MASK = '_mask'
# Fields of whole numbers: where tokens stand.
IDS = '_ids'


@dataclass(frozen=True)
class Condition:
    """Encoded prompts of a batch.

    Texts may have lengths of their own. Then a field is as long as its longest row, with zeros behind the others, and
    a second field, named as the first one with `_mask` behind, says which tokens are real. Without that all of them
    are. What stands under a mask must not change what a network gives.

    Attributes:
        fields (dict): Tensors by the backbone's names, each (B, ...), for example `encoder_hidden_states` (B, L, D)
            and `pooled_projections` (B, P) for SD3; `encoder_hidden_states_mask`, bool, (B, L), if rows are padded.
    """
    fields: dict[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {name: len(t) for name, t in self.fields.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f'fields of a condition must have one row a sample, but have {lengths} rows')

    @staticmethod
    def of_rows(fields: Mapping[str, Tensor | Sequence[Tensor]]) -> 'Condition':
        """Pads rows of different lengths to the longest; where none is shorter, there is no mask.

        Args:
            fields (dict): By the backbone's names, a tensor (B, ...) or a list of B rows. The rows of a list have one
                shape, or (L_i, ...), each with a length of its own. A mask that is given already may be of any dtype.
        """
        padded: dict[str, Tensor] = {}
        for name, rows in fields.items():
            if isinstance(rows, Tensor):
                padded[name] = rows
            elif len({row.shape for row in rows}) == 1:
                padded[name] = torch.stack(list(rows))
            else:
                padded[name] = pad_sequence(list(rows), batch_first=True)
                if not is_mask(name, fields):
                    own = [row.new_ones(len(row), dtype=torch.bool) for row in rows]
                    padded.setdefault(name + MASK, pad_sequence(own, batch_first=True))
        return Condition(padded)._trimmed()

    @property
    def masked(self) -> list[str]:
        """Names of the fields whose rows are padded."""
        return [name for name in self.fields if name + MASK in self.fields]

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> 'Condition':
        """The rows that an index, a slice or a mask selects."""
        return Condition({name: t[index] for name, t in self.fields.items()})

    def to(self, device: torch.device) -> 'Condition':
        """A copy on a device."""
        return Condition({name: t.to(device, non_blocking=True) for name, t in self.fields.items()})

    def expand(self, rows: int) -> 'Condition':
        """One row, repeated."""
        return Condition({name: t.expand(rows, *t.shape[1:]) for name, t in self.fields.items()})

    def where(self, mask: Tensor, other: 'Condition') -> 'Condition':
        """Rows of `other` where mask (B,) is true, own rows elsewhere; padded to the longer of both."""
        own, others = _aligned([self, other])
        return Condition({name: torch.where(mask.reshape(-1, *[1] * (t.ndim - 1)), others[name], t)
                          for name, t in own.items()})

    @staticmethod
    def cat(conditions: Sequence['Condition']) -> 'Condition':
        """Batches end to end, padded to the longest."""
        aligned = _aligned(conditions)
        return Condition({name: torch.cat([fields[name] for fields in aligned]) for name in aligned[0]})

    def _trimmed(self) -> 'Condition':
        """As long as its longest row, without masks that are true everywhere."""
        fields = dict(self.fields)
        for name in self.masked:
            mask = fields.pop(name + MASK).bool()
            used = mask.any(0).nonzero()
            length = int(used[-1]) + 1 if len(used) else 1  # a network takes no text of no tokens
            fields[name] = fields[name][:, :length]
            if not mask[:, :length].all():
                fields[name + MASK] = mask[:, :length]
        return Condition(fields)


def check_embeddings(fields: Mapping[str, Tensor], where: str) -> None:
    """Refuses embeddings that are not floating or not finite; masks and position ids (`..._ids`) may be whole numbers.

    Args:
        fields (dict): Tensors by name.
        where (str): What they are of, for the message.

    Raises:
        ValueError: With the field's name.
    """
    for name, field in fields.items():
        if field.dtype == torch.bool or is_mask(name, fields) or name.endswith(IDS):
            continue
        if not field.is_floating_point():
            raise ValueError(f'{name} of {where} is {str(field.dtype).removeprefix("torch.")}, but embeddings must be '
                             'floating: encode the texts, not their tokens')
        # A sum is the quickest way to see it; it can be infinite of finite numbers too.
        if not field.sum(dtype=torch.float32).isfinite() and not field.isfinite().all():
            raise ValueError(f'{name} of {where} has values that are not finite: encode it again, in float32 or '
                             'bfloat16 if the encoder ran in float16')


def is_mask(name: str, fields: Mapping[str, object]) -> bool:
    """Whether a field is the mask of another one."""
    return name.endswith(MASK) and name.removesuffix(MASK) in fields


def _aligned(conditions: Sequence[Condition]) -> list[dict[str, Tensor]]:
    """The fields of conditions, with one length for each and, where any has a mask or is shorter, a mask in all."""
    everyone = [dict(condition.fields) for condition in conditions]
    for name in list(everyone[0]):
        tensors = [fields[name] for fields in everyone]
        lengths = [t.shape[1] if t.ndim > 2 else 0 for t in tensors]  # of texts (B, L, ...)
        if len(set(lengths)) == 1 and not any(name + MASK in fields for fields in everyone):
            continue
        for fields, t, length in zip(everyone, tensors, lengths):
            mask = fields.get(name + MASK, t.new_ones(t.shape[:2], dtype=torch.bool))
            missing = max(lengths) - length
            fields[name] = pad(t, (*[0] * (2 * t.ndim - 3), missing))
            fields[name + MASK] = pad(mask, (0, missing))
    return everyone
