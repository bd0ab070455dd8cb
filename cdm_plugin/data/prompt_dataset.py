from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.assets import resolve
from cdm_plugin.data.bad_records import leave_out
from cdm_plugin.data.captions import check_caption, lookup
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.data.prompt_files import read_rows


@DATASETS.register_module()
class PromptDataset(BaseDataset):
    """Text prompts from a file.

    A raw sample holds `prompt` (str, or a list of them), every other column of its row, for transforms to use, and
    `ann_line`, its line.

    Args:
        ann_file (str): A `.txt` file (one prompt a line), a `.jsonl` file (one object a line) or a `.csv` file (with a
            header), UTF-8, blank lines skipped; `asset:NAME` for one that comes with the package.
        column (str): Column of the prompts in a jsonl or csv file; in jsonl also what lies deeper, 'meta.caption', or
            one of a list, 'captions.0'. Of a list of texts `PackInputs` draws one each time. Default 'prompt'.
        category_column (str, optional): Column of a row's category, or list of categories, for MMEngine's
            `ClassBalancedDataset`. Default None.
        data_root (str): Folder that a relative `ann_file` or prefix starts from. Default ''.
        data_prefix (Mapping, optional): Folders by column, put before the paths in these columns. Default None.
        pipeline (Sequence): Transforms. Default `PackInputs`, which keeps nothing but the prompt.
        **kwargs: Other arguments of MMEngine's `BaseDataset`, such as `indices`.

    Attributes:
        categories (list[str]): All categories, sorted. `get_cat_ids` gives indices into it.

    Raises:
        FileNotFoundError: If `ann_file` does not exist.
        ValueError: If the file cannot be read, a row is malformed, lacks a column or has an empty prompt, or there is
            no prompt at all. The message names the line and what to change.
    """

    def __init__(self, ann_file: str, column: str = 'prompt', category_column: str | None = None,
                 data_root: str = '', data_prefix: Mapping[str, str] | None = None,
                 pipeline: Sequence[dict | Callable] = (PackInputs(),), **kwargs: Any) -> None:
        self.column, self.category_column = column, category_column
        self.categories: list[str] = []
        super().__init__(ann_file=resolve(ann_file), data_root=resolve(data_root), data_prefix=dict(data_prefix or {}),
                         pipeline=pipeline, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads and checks all rows."""
        samples = []
        for line, row in read_rows(self.ann_file, self.column):
            try:
                samples.append(self._sample(line, row))
            except ValueError as error:
                leave_out(error)
        if not samples:
            raise ValueError(f'`ann_file` {self.ann_file} holds no prompts')
        if self.category_column is not None:
            self.categories = sorted({name for sample in samples for name in self._names(sample)})
        return samples

    def get_cat_ids(self, idx: int) -> list[int]:
        """Categories of one sample, as `ClassBalancedDataset` asks for them.

        Args:
            idx (int): Index of the sample.

        Returns:
            list[int]: Indices into `categories`.

        Raises:
            ValueError: If `category_column` is not set.
        """
        if self.category_column is None:
            raise ValueError(f'`ann_file` {self.ann_file}: set `category_column` to balance categories')
        return [self.categories.index(name) for name in self._names(self.get_data_info(idx))]

    def _sample(self, line: int, row: dict[str, Any] | ValueError) -> dict[str, Any]:
        if isinstance(row, ValueError):
            raise row
        where = f'`ann_file` {self.ann_file}, line {line}'
        prompt = _cell(row, 'column', self.column, where)
        check_caption(prompt, where, 'column', self.column)
        self._check_category(row, where)
        return self.parse_data_info({'ann_line': line, **row, 'prompt': prompt})

    def _check_category(self, row: dict[str, Any], where: str) -> None:
        if self.category_column is None:
            return
        if _cell(row, 'category_column', self.category_column, where) in (None, ''):
            raise ValueError(f'{where}: no category in {self.category_column!r}; fill it in, or leave '
                             '`category_column` out')

    def _names(self, sample: dict[str, Any]) -> list[str]:
        value = _cell(sample, 'category_column', self.category_column, 'a sample')
        return [str(name) for name in (value if isinstance(value, list) else [value])]


def _cell(row: dict[str, Any], key: str, column: str, where: str) -> Any:
    try:
        return lookup(row, column)
    except KeyError:
        raise ValueError(f'{where}: no column {column!r}, there are {list(row)}; set `{key}` to one of them') from None
