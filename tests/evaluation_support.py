"""Metrics that the tests of evaluation share."""
import os

from mmengine.registry import METRICS

from cdm_plugin.metrics import MissingMetric, ScoreMetric, SetMetric


@METRICS.register_module()
class InkMetric(ScoreMetric):
    """How bright an image is."""
    key = 'ink'

    def scores(self, images, prompts):
        return images.flatten(1).mean(1)


@METRICS.register_module()
class RecordingMetric(SetMetric):
    """Keeps the images: `judged.rows` are their pixels."""
    key = 'mean'

    def features(self, images):
        return images.flatten(1)

    def value(self, rows, prompts, index):
        return dict(mean=float(rows.mean()), count=float(len(rows)))


@METRICS.register_module()
class AbsentMetric(ScoreMetric):
    """Lacks its weights, on one rank or on all of them."""
    key = 'absent'

    def __init__(self, rank=None, **kwargs):
        super().__init__(**kwargs)
        self.rank = rank

    def load(self):
        if self.rank is None or int(os.environ.get('RANK', 0)) == self.rank:
            raise MissingMetric('AbsentMetric has no weights: run `hf download absent/weights`')

    def scores(self, images, prompts):
        return images.flatten(1).mean(1)


@METRICS.register_module()
class PairsMetric(SetMetric):
    """Number of prompts; has no value of single images."""
    key = 'pairs'

    def features(self, images):
        return images.flatten(1)

    def value(self, rows, prompts, index):
        if len(index.unique()) == len(index):
            raise ValueError('PairsMetric needs two images a prompt')
        return dict(pairs=float(len(index.unique())))
