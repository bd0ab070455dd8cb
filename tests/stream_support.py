"""A stream of counted records, and what its readers give."""
from collections import Counter
from itertools import islice

from mmengine.dataset import default_collate, pseudo_collate
from mmengine.registry import DATASETS
from torch.utils.data import DataLoader

from cdm_plugin.data import PackInputs, Stream

COLLATE = dict(pseudo_collate=pseudo_collate, default_collate=default_collate)


@DATASETS.register_module()
class CountedStream(Stream):
    """Shards of `lengths` records, each with its shard and number as prompt."""

    def __init__(self, lengths, bad=(), pipeline=(PackInputs(),), **kwargs):
        super().__init__(pipeline, **kwargs)
        self.lengths, self.bad = lengths, bad

    @property
    def num_shards(self):
        return len(self.lengths)

    @property
    def fingerprint(self):
        return ', '.join(map(str, self.lengths))

    def read(self, shard):
        for row in range(self.lengths[shard]):
            name = f'{shard}/{row}'
            yield f'{name} of a test', dict(text='x') if name in self.bad else dict(prompt=name)


def shards(lengths):
    """The prompts in the order of the files."""
    return [f'{shard}/{row}' for shard, length in enumerate(lengths) for row in range(length)]


def given(stream, number):
    return [sample['prompt'] for sample in islice(iter(stream), number)]


def readers(number, lengths, **kwargs):
    """The first samples of each of several readers; an endless shard of none is left out."""
    found = []
    for reader in range(number):
        stream = CountedStream(lengths, **kwargs)
        stream.rank, stream.world_size = reader, number
        try:
            found.append(given(stream, 6))
        except ValueError:
            found.append([])
    return found


def counts(ranks, workers, lengths, turns, **kwargs):
    """How often each sample comes in each pass, over all readers of some passes."""
    found = Counter()
    for reader in range(ranks * workers):
        stream = CountedStream(lengths, **kwargs)
        for visit, (where, record), position in stream._records(reader, ranks * workers, _start()):
            if position.turn >= turns:
                break
            found[position.turn, record['prompt']] += 1
    return found


def _start():
    from cdm_plugin.data.stream import Position
    return Position()


def loader(rank, ranks, lengths, collate='pseudo_collate', workers=2, batch_size=3, **kwargs):
    """Torch's loader with workers, of one of several ranks."""
    stream = CountedStream(lengths, **kwargs)
    stream.rank, stream.world_size = rank, ranks
    return DataLoader(stream, batch_size=batch_size, num_workers=workers, collate_fn=COLLATE[collate])
