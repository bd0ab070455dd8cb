import gc

import pytest
from cache_support import LENGTH, PROMPTS
from mmengine.config import Config
from tiny_pipelines import save_tiny_sd3


@pytest.fixture(scope='session', autouse=True)
def _imports_out_of_the_garbage_collector():
    """MMEngine collects garbage for every dataset that it builds: a fifth of a second among the imported libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """Folder of a tiny SD3 with its text encoders."""
    folder = tmp_path_factory.mktemp('sd3')
    save_tiny_sd3(folder)
    return str(folder)


@pytest.fixture
def make_cfg(model, tmp_path):
    """A config with the tiny SD3 and a txt file of prompts."""
    def make(prompts=PROMPTS, **conditioner):
        path = tmp_path / 'prompts.txt'
        path.write_text('\n'.join(prompts), encoding='utf-8')
        return Config(dict(
            model=dict(backbone=dict(type='SD3Backbone', pretrained=model,
                                     conditioner=dict(dict(max_sequence_length=LENGTH), **conditioner))),
            train_dataloader=dict(dataset=dict(type='PromptDataset', ann_file=str(path)))))
    return make
