"""What stands inside MMEngine's dataset wrappers (ConcatDataset, RepeatDataset, ...)."""
from collections.abc import Iterator
from typing import Any


def parts(dataset: Any) -> Iterator[Any]:
    """A dataset and all that stand inside, in their order."""
    yield dataset
    for part in _inner(dataset):
        yield from parts(part)


def leaves(dataset: Any) -> Iterator[Any]:
    """The datasets that are no wrappers, in their order."""
    return (part for part in parts(dataset) if not _inner(part))


def _inner(dataset: Any) -> list[Any]:
    found = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    return [part for part in found if part is not None]
