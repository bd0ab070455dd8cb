"""Files of cached latents, in the folder `latents` beside the text embeddings of the same cache.

A shard is a file like those of text embeddings and has latents of one size: `latents` (N, C, h, w), of each the prompts
that may be drawn for it (a JSON list of texts, or of one class label), and `row_ids`, int64, (N, 3): the number of the
sample in its dataset, which of its views it is, and the CRC-32 of the pixels that were encoded. `index.json` says what
encoded them, of what, and what each shard holds.
"""
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cdm_plugin.arguments import check_value
from cdm_plugin.data.embeddings.files import OF_SHARD, check_shards, describe_shard
from cdm_plugin.files import whole_file

FOLDER, INDEX, VERSION = 'latents', 'index.json', 1
ROWS = 'row_ids'
KEYS = dict(samples=int, views=int, seed=int, dtype=str, shard_size=int, scale=int, labels=bool, rows=str, codec=dict,
            source=dict, shards=list)


def read_index(folder: str | Path) -> dict[str, Any] | None:
    """What the index of a folder of latents says; None without one.

    Raises:
        ValueError: If it is damaged, of another version, or names a shard outside of the folder.
    """
    path = Path(folder, INDEX)
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except ValueError:
        index = {}
    if not isinstance(index, dict) or 'version' not in index:
        raise ValueError(f'{path} is damaged: delete the folder and run `cdm cache --latents` again')
    if index['version'] != VERSION:
        raise ValueError(f'{path} has version {index["version"]!r}, but this cdm_plugin reads version {VERSION}: '
                         'update cdm_plugin, or make the folder again')
    for key, kind in KEYS.items():
        check_value(index.get(key), kind, f'{path}: {key}')
    for i, shard in enumerate(index['shards']):
        check_value(shard, dict, f'{path}: shards[{i}]')
        for key, kind in dict(OF_SHARD, size=list[int]).items():
            check_value(shard.get(key), kind, f'{path}: shards[{i}].{key}')
        if len(shard['size']) != 2 or min(shard['size']) < 1:
            raise ValueError(f'{path}: shards[{i}].size must be height and width, but is {shard["size"]}')
    check_shards(path, index['shards'])
    return index


def write_index(folder: str | Path, index: Mapping[str, Any]) -> None:
    """Writes it whole or not at all."""
    with whole_file(Path(folder, INDEX)) as part:
        part.write_text(json.dumps(index, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def describe(path: Path, prompts: Sequence[str], size: Sequence[int]) -> dict[str, Any]:
    """What the index says of a finished shard: as of one of embeddings, its `size` (height and width of the latents),
    and `pixels`, a SHA-256 of its pixels' checksums."""
    pixels = [checksum for _, _, checksum in read_rows(path)]
    return dict(describe_shard(path, prompts), size=list(size),
                pixels=hashlib.sha256(json.dumps(pixels).encode()).hexdigest())


def parse_prompts(text: str, path: str | Path) -> list[Any]:
    """The prompts of a row, from the metadata of a shard.

    Raises:
        ValueError: If they are none.
    """
    try:
        prompts = json.loads(text)
    except ValueError:
        prompts = None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, (str, int)) for prompt in prompts):
        raise ValueError(f'shard {path}: the prompts of a row are no JSON list of texts or labels: write it again')
    return prompts


def read_rows(path: str | Path) -> list[list[int]]:
    """Of each row of a shard: number of the sample, of the view, checksum of the pixels.

    Raises:
        ValueError: If the shard does not say it.
    """
    try:
        with safe_open(path, 'pt') as shard:
            rows = shard.get_tensor(ROWS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f'shard {path} has no {ROWS} ({error}): write it again') from error
    if rows.ndim != 2 or rows.shape[1] != 3 or rows.is_floating_point():
        raise ValueError(f'shard {path}: {ROWS} must be whole numbers, (N, 3), but are {rows.dtype}, '
                         f'{tuple(rows.shape)}: write it again')
    return rows.tolist()
