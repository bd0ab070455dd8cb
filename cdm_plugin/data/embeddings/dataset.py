from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from torch import Tensor

from cdm_plugin.assets import resolve
from cdm_plugin.data.embeddings.files import (
    INDEX,
    NULL,
    EmbeddingReader,
    Field,
    ShardHeader,
    read_header,
    read_index,
    read_indexed_header,
)
from cdm_plugin.data.embeddings.provenance import check_encoder
from cdm_plugin.data.pack_inputs import PackInputs


@DATASETS.register_module()
class EmbeddingDataset(BaseDataset):
    """Cached text embeddings, read one sample at a time from safetensors files that `cdm cache` or `write_embeddings`
    wrote.

    A sample holds `condition` (dict of tensors, such as `encoder_hidden_states` (L, D) and `pooled_projections` (P,))
    and, if the files say it, `prompt` (str). Texts keep the lengths that they have in the files; the preprocessor pads
    those of a batch.

    Args:
        data_root (str): Folder of shards, taken in the order of their names, or one shard; `asset:NAME` for one that
            comes with the package. `null.safetensors` in the folder is no shard, but the null condition.
        pipeline (Sequence): Transforms. Default `PackInputs`.
        encoder (dict, optional): Config of the conditioner whose embeddings these must be, as it would stand in
            `model.backbone.conditioner`; see `check_encoder`. Default None: not checked.
        **kwargs: Other arguments of MMEngine's `BaseDataset`, such as `indices`.

    Raises:
        FileNotFoundError: If `data_root` does not exist, or holds no shard.
        ValueError: If a shard is damaged, or differs from the first one in its fields; in a folder that `cdm cache`
            made, also if the folder is unfinished, or a shard is not what its index says; if another encoder than
            `encoder` made the embeddings.
    """

    def __init__(self, data_root: str, pipeline: Sequence[dict | Callable] = (PackInputs(),),
                 encoder: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._reader = EmbeddingReader()
        self._encoder = encoder
        super().__init__(data_root=resolve(data_root), pipeline=pipeline, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads the headers of all shards and lists their rows."""
        self._shards: list[str] = []
        samples: list[dict[str, Any]] = []
        for index, (path, header) in enumerate(self._headers()):
            self._shards.append(path)
            if index == 0:
                self._first = header
            self._check_like_first(path, header)
            samples += [dict(shard=index, row=row) for row in range(header.rows)]
            for sample, prompt in zip(samples[len(samples) - header.rows:], header.prompts or []):
                sample['prompt'] = prompt
        if not samples:
            raise ValueError(f'`data_root` {self.data_root}: the shards hold no samples; write them again')
        return samples

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Raw sample, with its embeddings.

        Args:
            idx (int): Index of the sample.

        Returns:
            dict: `condition`, `prompt` if known, and `sample_idx`.
        """
        sample = super().get_data_info(idx)
        sample['condition'] = self._reader.read(self._shards[sample.pop('shard')], sample.pop('row'))
        return sample

    def null_condition(self) -> dict[str, Tensor]:
        """Embeddings of the null condition, from `null.safetensors` beside the shards.

        Returns:
            dict: Tensors by field, shaped as those of a sample.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, does not hold one sample, or its fields are not those of the shards.
        """
        self.full_init()
        path = Path(self._shards[0]).with_name(NULL)
        if not path.is_file():
            advice = f'write the embeddings of the empty prompt, one row, to {path}'
            if read_index(path.parent) is not None:
                advice = f'{path} is missing; run `cdm cache` again, it completes the folder'
            raise FileNotFoundError(f'`data_root` {self.data_root} has no null condition: {advice}')
        header = read_header(str(path))
        if header.rows != 1:
            raise ValueError(f'{path} must hold one sample, the null condition, but holds {header.rows}')
        self._check_like_first(str(path), header._replace(prompts=self._first.prompts))
        return self._reader.read(str(path), 0)

    def _headers(self) -> Iterator[tuple[str, ShardHeader]]:
        """Path and header of every shard."""
        root = Path(self.data_root)
        if not root.exists():
            raise FileNotFoundError(f'`data_root` {root} does not exist: give a folder of safetensors files, or one '
                                    'such file')
        if self._encoder is not None:
            check_encoder(str(root), self._encoder)
        index = read_index(root) if root.is_dir() else None
        if index is not None:
            yield from self._indexed_headers(root, index)
            return
        shards = [root] if root.is_file() else _shards_in(root)
        if not shards:
            raise FileNotFoundError(f'`data_root` {root} holds no embeddings: there is no shard *.safetensors in it')
        for path in shards:
            yield str(path), read_header(str(path))

    def _indexed_headers(self, root: Path, index: dict[str, Any]) -> Iterator[tuple[str, ShardHeader]]:
        missing = index['prompts']['count'] - sum(entry['rows'] for entry in index['shards'])
        if missing:
            raise ValueError(f'`data_root` {root} is unfinished: {missing} of {index["prompts"]["count"]} prompts are '
                             'missing; run `cdm cache` again, it completes the folder')
        strange = sorted({path.name for path in _shards_in(root)} - {entry['name'] for entry in index['shards']})
        if strange:
            raise ValueError(f'`data_root` {root}: its {INDEX} does not name the shard {strange[0]}; move it to '
                             'another folder')
        for entry in index['shards']:
            try:
                header = read_indexed_header(root, entry)
            except ValueError as error:
                raise ValueError(f'`data_root`: {error}; run `cdm cache` again, it completes the folder') from error
            yield str(root / entry['name']), header

    def _check_like_first(self, path: str, header: ShardHeader) -> None:
        for name in sorted({*header.fields, *self._first.fields}):
            here, first = (h.fields.get(name) for h in (header, self._first))
            if not _alike(here, first):
                raise ValueError(f'`data_root`: {name} is {_describe(here)} in {path}, but {_describe(first)} in '
                                 f'{self._shards[0]}; write all with one text encoder and one length, or keep them in '
                                 'separate folders')
        if (header.prompts is None) != (self._first.prompts is None):
            with_prompts, without = (path, self._shards[0]) if header.prompts is not None else (self._shards[0], path)
            raise ValueError(f'`data_root`: {with_prompts} holds prompts, but {without} does not; write all of them '
                             'with prompts, or none')


def _shards_in(root: Path) -> list[Path]:
    return sorted(path for path in root.glob('*.safetensors') if path.name != NULL)


def _alike(a: Field | None, b: Field | None) -> bool:
    if a is None or b is None or a[1] != b[1] or len(a[0]) != len(b[0]):
        return False
    # Only where rows have lengths of their own may these differ between shards.
    return a[0][1:] == b[0][1:] and (a[0][:1] == b[0][:1] or None in (*a[0][:1], *b[0][:1]))


def _describe(field: Field | None) -> str:
    return 'absent' if field is None else f'{field[1]} {field[0]}'
