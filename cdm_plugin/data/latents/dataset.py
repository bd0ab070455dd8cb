from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.assets import resolve
from cdm_plugin.data.embeddings.files import EmbeddingReader, read_indexed_header
from cdm_plugin.data.embeddings.provenance import codec_differences, describe_codec
from cdm_plugin.data.latents.files import FOLDER, INDEX, parse_prompts, read_index, read_rows
from cdm_plugin.data.pack_inputs import PackInputs
from cdm_plugin.data.wrappers import leaves


@DATASETS.register_module()
class LatentDataset(BaseDataset):
    """Latents of pictures that `cdm cache --latents` encoded, read one at a time.

    A sample holds `latents` (C, h, w) and `prompt`, a text or a class label; of several captions `PackInputs` draws one
    each time. Its embeddings come from the conditioner, which may be an `EmbeddingConditioner` of the same folder. With
    several views each is a sample of its own. They come in the order of the dataset that they were made of. Raw samples
    say the picture's `height` and `width` in pixels.

    Args:
        data_root (str): The folder that `cdm cache --latents` wrote.
        pipeline (Sequence): Transforms. Default `PackInputs`.
        **kwargs: Other arguments of MMEngine's `BaseDataset`, such as `indices`.

    Raises:
        FileNotFoundError: If there are no latents.
        ValueError: If they are unfinished, or a shard is damaged or not what the index says.
    """

    def __init__(self, data_root: str, pipeline: Sequence[dict | Callable] = (PackInputs(),), **kwargs: Any) -> None:
        self._reader = EmbeddingReader()
        super().__init__(data_root=resolve(data_root), pipeline=pipeline, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads the headers of all shards and lists their rows."""
        folder = Path(self.data_root, FOLDER)
        index = read_index(folder)
        if index is None:
            raise FileNotFoundError(f'`data_root` {self.data_root} has no {FOLDER}/{INDEX}: make latents there with '
                                    '`cdm cache --latents`')
        self.index, rows = index, {}
        self._shards = [str(folder / entry['name']) for entry in index['shards']]
        for shard, entry in enumerate(index['shards']):
            try:
                header, places = read_indexed_header(folder, entry), read_rows(self._shards[shard])
                prompts = [self._prompt(parse_prompts(text, self._shards[shard])) for text in header.prompts or ()]
            except ValueError as error:
                raise ValueError(f'`data_root`: {error}; run `cdm cache --latents` again, it completes the '
                                 'folder') from error
            height, width = (side * index['scale'] for side in entry['size'])
            for row, (number, view, _) in enumerate(places):
                rows[number, view] = dict(shard=shard, row=row, prompt=prompts[row], height=height, width=width)
        missing = index['samples'] * index['views'] - len(rows)
        if missing:
            raise ValueError(f'`data_root` {self.data_root} is unfinished: {missing} of {missing + len(rows)} latents '
                             'are missing; run `cdm cache --latents` again, it completes the folder')
        return [rows[place] for place in sorted(rows)]

    @staticmethod
    def _prompt(drawn: list[Any]) -> Any:
        """The one of several, or the list of which `PackInputs` draws; the empty one is its `dropout`'s business."""
        kept = [prompt for prompt in drawn if prompt != ''] or drawn
        return kept[0] if len(kept) == 1 else kept

    def prepare_data(self, idx: int) -> Any:
        """A sample with its latents, through the pipeline."""
        sample = self.get_data_info(idx)
        sample['latents'] = self._reader.read(self._shards[sample.pop('shard')], sample.pop('row'))['latents']
        return self.pipeline(sample)


def check_latents(dataset: Any, backbone: Any, latent_sizes: Sequence[tuple[int, int]]) -> None:
    """Checks that cached latents belong to a model: that its codec made them, and that it has their sizes.

    Args:
        dataset (Dataset): The training dataset, of any kind.
        backbone (Backbone): The model's.
        latent_sizes (Sequence): Height and width of the latents of `model.image_size`.

    Raises:
        ValueError: If they do not; names the key and what differs.
    """
    for part in leaves(dataset):
        if not isinstance(part, LatentDataset):
            continue
        part.full_init()
        own = describe_codec(backbone.codec, backbone.load_kwargs)
        differences = codec_differences(part.index, own, but=('dtype',))
        if differences:
            raise ValueError(f'another codec than model.backbone.codec made the latents in {part.data_root} '
                             f'({"; ".join(differences)}): take the folder of this codec, or make one with `cdm cache '
                             '--latents`')
        sizes = sorted({tuple(entry['size']) for entry in part.index['shards']} - set(latent_sizes))
        if sizes:
            height, width = (side * part.index['scale'] for side in sizes[0])
            raise ValueError(f'the latents in {part.data_root} are of pictures of {height}x{width} pixels, which '
                             'model.image_size has not: add that size to it, or cache pictures of its sizes')
