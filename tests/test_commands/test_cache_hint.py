"""What `cdm cache` prints is a config that trains on the cache."""
import pytest

from cdm_plugin.commands.cache import _over
from cdm_plugin.config import load_config


@pytest.mark.parametrize('recipe', [
    'sd3/cdm_lora_sd3-medium_1xb4_4step_4k.py',  # says something of the conditioner
    'digits/cdm_sd3-digits_1xb32_4step_800.py', 'flux/cdm_lora_flux-dev_1xb1_4step_4k.py'])
@pytest.mark.parametrize('kind', ['Embedding', 'Latent'])
def test_what_is_printed_works_over_a_shipped_recipe(recipe, kind, tmp_path):
    base, own = load_config(recipe), tmp_path / 'own.py'
    own.write_text(_over(base, recipe, kind, 'cache', encodes=True))
    cfg = load_config(str(own))
    assert cfg.model.backbone.conditioner == dict(type='EmbeddingConditioner', folder='cache')
    assert cfg.train_dataloader.dataset == dict(type=f'{kind}Dataset', data_root='cache')
    assert cfg.train_dataloader.batch_size == base.train_dataloader.batch_size


def test_a_base_without_a_conditioner_needs_no_delete(tmp_path):
    base, own = tmp_path / 'base.py', tmp_path / 'own.py'
    base.write_text("model = dict(type='CDM', backbone=dict(type='SD3Backbone', pretrained='tiny'))\n")
    own.write_text(_over(load_config(str(base), keys=()), str(base), 'Embedding', 'cache', encodes=True))
    cfg = load_config(str(own), keys=())
    assert cfg.model.backbone.conditioner == dict(type='EmbeddingConditioner', folder='cache')
    assert cfg.train_dataloader.dataset == dict(type='EmbeddingDataset', data_root='cache')
