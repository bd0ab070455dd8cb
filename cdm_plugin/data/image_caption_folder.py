import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.assets import resolve
from cdm_plugin.data.bad_records import leave_out
from cdm_plugin.data.captions import check_caption, lookup
from cdm_plugin.data.images import SUFFIXES
from cdm_plugin.data.pack_inputs import PackInputs


@DATASETS.register_module()
class ImageCaptionFolder(BaseDataset):
    """Pictures in a folder and those below it, each with its caption in a file of the same name beside it.

    A raw sample holds `image` (str, the path) and `prompt` (str, or a list of them, of which `PackInputs` draws one
    each time); of a JSON object its other keys too.

    Args:
        data_root (str): The folder.
        caption_suffix (str): Of the captions' files: '.txt' (or any other: the whole text is the caption) or '.json' (a
            text, a list of texts, or an object with the key `column`). Default '.txt'.
        column (str): Where the caption, or the list of them, stands in a JSON object, also 'meta.caption'. Default
            'caption'.
        pipeline (Sequence): Transforms. Default `PackInputs` with the picture.
        **kwargs: Other arguments of MMEngine's `BaseDataset`, such as `indices`.

    Raises:
        FileNotFoundError: If there is no such folder, no picture in it, or a picture has no caption.
        ValueError: If a caption cannot be read or is empty, or `caption_suffix` is none. The message names the file.
    """

    def __init__(self, data_root: str, caption_suffix: str = '.txt', column: str = 'caption',
                 pipeline: Sequence[dict | Callable] = (PackInputs(image='image'),), **kwargs: Any) -> None:
        if not caption_suffix.startswith('.'):
            raise ValueError(f"`caption_suffix` begins with a dot, '.txt', but is {caption_suffix!r}")
        self.caption_suffix, self.column = caption_suffix, column
        super().__init__(data_root=resolve(data_root), pipeline=pipeline, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Lists the pictures in the order of their paths, and reads and checks their captions."""
        root = Path(self.data_root)
        if not root.is_dir():
            raise FileNotFoundError(f'`data_root` {root} is no folder: give one with pictures')
        samples = []
        for path in _pictures(root):
            try:
                samples.append(self._sample(path))
            except (ValueError, FileNotFoundError) as error:
                leave_out(error)
        if not samples:
            raise FileNotFoundError(f'`data_root` {root} has no pictures with captions ({", ".join(SUFFIXES)})')
        return samples

    def _sample(self, image: Path) -> dict[str, Any]:
        file = image.with_suffix(self.caption_suffix)
        try:
            text = file.read_text(encoding='utf-8-sig')
        except FileNotFoundError:
            raise FileNotFoundError(f'{image} has no caption beside it: write {file.name}, or set `caption_suffix`, '
                                    f'which is {self.caption_suffix!r}') from None
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f'{file} cannot be read ({error}); a caption is a text in UTF-8') from None
        row: dict[str, Any] = {}
        caption: Any = text.strip()
        if self.caption_suffix.endswith('.json'):
            caption = self._of_json(text, file)
            row = caption if isinstance(caption, dict) else {}
        if row:
            try:
                caption = lookup(row, self.column)
            except KeyError:
                raise ValueError(f'{file} has no {self.column!r}, only {list(row)}: set `column` to one of '
                                 'them') from None
        check_caption(caption, str(file), 'column', self.column)
        return {**row, 'prompt': caption, 'image': str(image)}

    @staticmethod
    def _of_json(text: str, file: Path) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{file} is not JSON ({error})') from None


def _pictures(root: Path) -> Iterator[Path]:
    seen: set[str] = set()  # a link may lead back
    for folder, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield from (Path(folder, name) for name in sorted(files)
                    if name.lower().endswith(SUFFIXES) and not name.startswith('.'))
