"""Datasets, conditioners and configs whose embeddings the tests cache."""
import json
from collections import Counter

import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, MODELS
from tests_support import tiny_backbone

from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import Conditioner

LENGTH = 8
PROMPTS = ['a cat', 'dogs and birds', '一只猫 🐈 坐在窗台上', 'naïve café', ' '.join(['word'] * 2000), 'a fox',
           'x', 'a lighthouse', 'a red fox', 'ships']


@DATASETS.register_module()
class CacheTestCaptions(BaseDataset):
    """A dataset of one's own, whose captions have another name."""

    def __init__(self, captions, field='caption', **kwargs):
        self.captions, self.field = captions, field
        super().__init__(**kwargs)

    def load_data_list(self):
        return [{self.field: caption} for caption in self.captions]


@MODELS.register_module()
class CacheTestConditioner(Conditioner):
    """Encodes a text by its length; `poison` is encoded as `value`, `cut` as too long."""

    def __init__(self, value=float('nan'), width=4, wide=(), scale=1.0):
        super().__init__()
        self.value, self.width, self.wide, self.scale = value, width, wide, scale
        self.truncated = Counter()
        self.register_buffer('weight', torch.ones(1), persistent=False)

    def encode(self, prompts):
        self.truncated.update({'clip': prompts.count('cut')} if 'cut' in prompts else {})
        length = 3 if set(self.wide) & set(prompts) else 2
        rows = [torch.full((length, self.width), self.value if p == 'poison' else len(p) * self.scale) for p in prompts]
        mask = torch.ones(len(prompts), length, dtype=torch.bool)
        return Condition(dict(encoder_hidden_states=torch.stack(rows) * self.weight, mask=mask))

    def null(self):
        return self.encode([''])


def toy_cfg(prompts=('a', 'bb', 'ccc', 'dddd'), dataset=None, **conditioner):
    """A config whose conditioner costs nothing."""
    return Config(dict(
        model=dict(backbone=dict(tiny_backbone(), conditioner=dict(type='CacheTestConditioner', **conditioner))),
        train_dataloader=dict(dataset=dataset or dict(
            type='CacheTestCaptions', captions=list(prompts), field='prompt', pipeline=[dict(type='PackInputs')]))))


def read_index(folder):
    return json.loads((folder / 'index.json').read_text(encoding='utf-8'))
