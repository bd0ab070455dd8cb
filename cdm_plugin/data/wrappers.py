"""What stands inside MMEngine's dataset wrappers (ConcatDataset, RepeatDataset, ...)."""
from collections.abc import Iterator
from typing import Any


def leaves(dataset: Any) -> Iterator[Any]:
    """The datasets that are no wrappers, in their order."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
        return
    for part in inner:
        yield from leaves(part)
