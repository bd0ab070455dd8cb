"""What Hugging Face `datasets` opens: a repository of the hub, a folder, or files by the name of a builder."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cdm_plugin.assets import resolve
from cdm_plugin.data.images import open_image
from cdm_plugin.data.optional import needed
from cdm_plugin.errors import describe
from cdm_plugin.secrets import without_secrets


def open_source(kind: str, path: str, split: str, streaming: bool, options: Mapping[str, Any]) -> Any:
    """Opens a split.

    Args:
        kind (str): The class that asks, for messages.
        path (str): A folder of `save_to_disk`, or what `datasets.load_dataset` takes.
        split (str): Name of the split.
        streaming (bool): Whether to read while training instead of before.
        options (Mapping): Other arguments of `datasets.load_dataset`.

    Returns:
        datasets.Dataset or datasets.IterableDataset: Its pictures are not decoded yet.

    Raises:
        ImportError: If the package `datasets` is missing.
        ValueError: If it cannot be opened; one line with the reason.
    """
    library = needed('datasets', kind)
    folder = Path(resolve(path))
    try:
        if any((folder / name).is_file() for name in ('state.json', 'dataset_dict.json')):  # of save_to_disk
            found = library.load_from_disk(str(folder))
            if isinstance(found, library.DatasetDict):
                if split not in found:
                    raise ValueError(f'there is no split {split!r}, only {", ".join(found)}')
                found = found[split]
            elif split != 'train':
                raise ValueError('it was saved without splits: leave `split` out')
            found = found.to_iterable_dataset(num_shards=max(1, len(found.cache_files))) if streaming else found
        else:
            found = library.load_dataset(str(folder) if folder.exists() else path, split=split, streaming=streaming,
                                         **options)
    except Exception as error:  # the library's builders raise of many kinds
        raise ValueError(f'{kind} cannot open path={path!r}, split={split!r}'
                         f'{named(options)} ({describe(error)})') from error
    if not isinstance(found, (library.Dataset, library.IterableDataset)):
        raise ValueError(f'`split` of {kind} must name one split, but {split!r} gives a {type(found).__name__}')
    for name, feature in (found.features or {}).items():
        if isinstance(feature, library.Image):
            found = found.cast_column(name, library.Image(decode=False))
    return found


def named(options: Mapping[str, Any]) -> str:
    """Options as they go on in a message."""
    return ''.join(f', {key}={value!r}' for key, value in without_secrets(dict(options)).items())


def raw_sample(row: Mapping[str, Any], features: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """A row with its pictures opened, and for each class label `<column>_name`, its name.

    Args:
        row (Mapping): The row.
        features (Mapping, optional): The library's features by column.
        where (str): Where the row stands, for messages.
    """
    sample = dict(row)
    for name, feature in (features or {}).items():
        value, kind = sample.get(name), type(feature).__name__
        # A file written without the library's features has its pictures in the same form, as a plain struct.
        if isinstance(value, Mapping) and (kind == 'Image' or set(value) == {'bytes', 'path'}):
            path, content = value.get('path'), value.get('bytes')
            sample[name] = open_image(path if content is None else content, path or f'{where}, {name}')
        elif kind == 'ClassLabel' and isinstance(value, int) and value >= 0:
            sample.setdefault(f'{name}_name', feature.int2str(value))
    return sample
