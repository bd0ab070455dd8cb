import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS

from cdm_plugin.assets import resolve
from cdm_plugin.data.images import SUFFIXES, open_image
from cdm_plugin.data.optional import needed
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.data.sample import SampleError
from cdm_plugin.data.stream import Stream
from cdm_plugin.secrets import mask_text

TEXTS = ('prompt', 'txt', 'text', 'caption')


@DATASETS.register_module()
class WebDataset(Stream):
    """Samples from tar files in which files of one name but for the extension are one sample, without end. Needs
    `pip install 'cdm_plugin[data]'`.

    A raw sample holds a field for each extension: texts (`txt`, `text`, `caption`, `prompt`), what JSON holds (`json`),
    the number in `cls`, pictures as PIL images (`jpg`, `png`, ...), other files as bytes; `__key__` and `__url__`; also
    `image`, its first picture, and `prompt`, its text, so that `PackInputs` needs no argument for these.

    Args:
        urls (str or Sequence[str]): Tar files: paths, also with `*`, or URLs that the package `webdataset` opens
            (http(s), s3 and gs by `pipe:`, hf), with braces, 'https://host/train-{0000..0127}.tar'.
        data_root (str): Folder that relative paths start from. Default ''.
        pipeline (Sequence): Transforms. Default `PackInputs`.
        **kwargs: `shuffle`, `share`, `seed` and `max_bad` of `Stream`.

    Raises:
        ImportError: If the package `webdataset` is missing.
        FileNotFoundError: If a path does not exist, or there is none.
    """

    def __init__(self, urls: str | Sequence[str], data_root: str = '',
                 pipeline: Sequence[dict | Callable] = (PackInputs(),), **kwargs: Any) -> None:
        super().__init__(pipeline, **kwargs)
        expand = needed('webdataset', type(self).__name__).shardlists.expand_urls
        given = [urls] if isinstance(urls, str) else urls
        self.urls = [file for url in given for name in expand(url) for file in self._files(name, data_root)]
        if not self.urls:
            raise FileNotFoundError(f'`urls` of {type(self).__name__} names no tar file: {urls!r}')

    def _files(self, name: str, data_root: str) -> list[str]:
        if ':' in name.partition('/')[0]:  # a URL
            return [name]
        path = Path(resolve(data_root), resolve(name))
        files = sorted(path.parent.glob(path.name)) if '*' in path.name else [path]
        missing = [path] if not files else [file for file in files if not file.is_file()]
        if missing:
            raise FileNotFoundError(f'`urls` of {type(self).__name__}: {missing[0]} does not exist: check it, and '
                                    '`data_root`')
        return list(map(str, files))

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    @property
    def fingerprint(self) -> str:
        urls = list(map(mask_text, self.urls))  # another token reads the same files
        digest = hashlib.sha256('\n'.join(urls).encode()).hexdigest()[:12]
        return f'{urls[0]} and {len(urls) - 1} more tar files ({digest})'

    def read(self, shard: int) -> Iterator[tuple[str, Any]]:
        library, url = needed('webdataset', type(self).__name__), mask_text(self.urls[shard])
        records, key = library.tariterators.tarfile_samples([dict(url=self.urls[shard])]), None
        while True:
            try:
                record = next(records, None)
            except Exception as error:
                where = f'{url}, behind {key}' if key else url
                reason = mask_text(' '.join(str(error.args[0] if error.args else '').split()))
                raise SampleError(f'{where}: cannot be read further ({type(error).__name__}: {reason})') from error
            if record is None:
                return
            key = record['__key__']
            yield f'{url}, {key}', {**record, '__url__': url}

    def decode(self, record: dict[str, Any]) -> dict[str, Any]:
        sample = dict(record)
        for name, content in record.items():
            kind = name.rpartition('.')[2]
            file = f'{record["__url__"]}, {record["__key__"]}.{name}'
            if not isinstance(content, bytes):
                continue
            if f'.{kind}' in SUFFIXES:
                sample[name] = open_image(content, file)
                sample.setdefault('image', sample[name])
            elif kind in (*TEXTS, 'json', 'cls'):
                sample[name] = _parsed(content, kind, file)
        text = next((sample[name] for name in TEXTS if name in sample), None)
        return sample if text is None else {'prompt': text, **sample}


def _parsed(content: bytes, kind: str, file: str) -> Any:
    try:
        text = content.decode('utf-8-sig')
        return json.loads(text) if kind == 'json' else int(text) if kind == 'cls' else text.strip()
    except (ValueError, RecursionError) as error:
        raise SampleError(f'{file} is no {"UTF-8" if kind in TEXTS else kind} ({error})') from None
