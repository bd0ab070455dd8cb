"""Who encoded cached embeddings, and whether that is this encoder."""
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cache_support import LENGTH, PROMPTS, read_index, toy_cfg
from mmengine.registry import DATASETS, MODELS

from cdm_plugin.backbones import SD3TextConditioner
from cdm_plugin.data import EmbeddingDataset, cache_embeddings, check_encoder, write_embeddings


@pytest.fixture
def cached(make_cfg, tmp_path):
    """A cache without T5."""
    cache_embeddings(make_cfg(PROMPTS[:2], t5=False), str(tmp_path / 'out'), device='cpu')
    return str(tmp_path / 'out')


@pytest.mark.parametrize('more', [
    {}, dict(type='SD3TextConditioner'), dict(type='mmengine.SD3TextConditioner'), dict(type=SD3TextConditioner),
    dict(type='cdm_plugin.backbones.SD3TextConditioner'), dict(dtype='float32', negative_prompt=''),
    dict(local_files_only=True),
], ids=str)
def test_the_same_encoder_is_accepted(cached, model, more):
    encoder = dict(pretrained=model, t5=False, max_sequence_length=LENGTH, **more)
    check_encoder(cached, encoder)
    assert len(DATASETS.build(dict(type='EmbeddingDataset', data_root=cached, encoder=encoder))) == 2
    check_encoder(cached + '/00000.safetensors', {k: v for k, v in encoder.items() if k != 'pretrained'})
    check_encoder(cached, MODELS.build(dict(encoder, type='SD3TextConditioner')).to_config())


@pytest.mark.parametrize('change, message', [
    (dict(pretrained='acme/other'), "pretrained: '.*' in the cache, 'acme/other' here"),
    (dict(t5=True), 't5: False in the cache, True here'),
    (dict(max_sequence_length=77, dtype='bfloat16'),
     "dtype: 'float32' in the cache, 'bfloat16' here; max_sequence_length: 8 in the cache, 77 here"),
    (dict(variant='fp16'), "variant: None in the cache, 'fp16' here"),
    (dict(type='ClassConditioner'), "type: 'SD3TextConditioner' in the cache, 'ClassConditioner' here"),
    (dict(max_length=8), r'encoder\.max_length is unknown: SD3TextConditioner takes .*max_sequence_length'),
], ids=str)
def test_another_encoder_is_refused(cached, model, change, message):
    encoder = dict(dict(pretrained=model, t5=False, max_sequence_length=LENGTH), **change)
    if change.get('type'):
        encoder = change
    for check in (lambda: check_encoder(cached, encoder),
                  lambda: EmbeddingDataset(data_root=cached, encoder=encoder)):
        with pytest.raises(ValueError, match=message) as info:
            check()
        assert '\n' not in str(info.value)


def test_an_index_imports_nothing(cached, model, tmp_path, monkeypatch):
    (tmp_path / 'a_module_here.py').write_text('class Encoder: pass')
    monkeypatch.syspath_prepend(tmp_path)
    index = read_index(Path(cached))
    index['encoder']['type'] = 'a_module_here.Encoder'
    Path(cached, 'index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match="type: 'a_module_here.Encoder' in the cache, 'SD3TextConditioner' here"):
        check_encoder(cached, dict(type='SD3TextConditioner', pretrained=model, t5=False))
    check_encoder(cached, index['encoder'])
    assert 'a_module_here' not in sys.modules


def test_what_is_left_out_has_its_default(cached, model):
    with pytest.raises(ValueError, match='max_sequence_length: 8 in the cache, 256 here; t5: False in the cache, True'):
        check_encoder(cached, dict(pretrained=model))


def test_no_index_no_check(tmp_path):
    write_embeddings(tmp_path / 'a.safetensors', dict(x=torch.ones(2, 3)))
    assert len(EmbeddingDataset(data_root=str(tmp_path))) == 2
    with pytest.raises(ValueError, match='has no index.json, which says what encoder'):
        EmbeddingDataset(data_root=str(tmp_path), encoder=dict(t5=False))


def test_a_conditioner_that_writes_no_config_is_known_by_the_users(tmp_path):
    cache_embeddings(toy_cfg(scale=2.0), str(tmp_path), device='cpu')
    assert read_index(tmp_path)['encoder'] == dict(type='CacheTestConditioner', scale=2.0)
    check_encoder(str(tmp_path), dict(scale=2.0))
    for scale in (dict(scale=3.0), {}):
        with pytest.raises(ValueError, match='scale: 2.0 in the cache, [13].0 here'):
            cache_embeddings(toy_cfg(**scale), str(tmp_path), device='cpu')


def test_a_hub_models_commit_and_files(make_cfg, model, tmp_path, monkeypatch):
    """The hub's local copy, laid out as huggingface_hub does; nothing is downloaded."""
    repo = tmp_path / 'hub' / 'models--acme--tiny'
    snapshot = repo / 'snapshots' / ('ab' * 20)
    shutil.copytree(model, snapshot)
    (repo / 'refs').mkdir()
    (repo / 'refs' / 'main').write_text('ab' * 20)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    cfg, out = make_cfg(PROMPTS[:2]), tmp_path / 'out'
    cfg.model.backbone.update(pretrained='acme/tiny', cache_dir=str(tmp_path / 'hub'), local_files_only=True)
    cache_embeddings(cfg, str(out), device='cpu')
    index = read_index(out)
    assert index['encoder']['pretrained'] == 'acme/tiny' and index['source']['commit'] == 'ab' * 20
    assert 'text_encoder/model.safetensors' in index['source']['files']
    encoder = dict(pretrained='acme/tiny', max_sequence_length=LENGTH)
    check_encoder(str(out), encoder)
    check_encoder(str(out), dict(encoder, cache_dir=str(tmp_path / 'hub')))
    check_encoder(str(out), dict(encoder, pretrained=model))  # the same files from a folder
    (snapshot / 'text_encoder' / 'config.json').write_text('{}')
    with pytest.raises(ValueError, match='1 files of acme/tiny have changed, such as text_encoder/config.json'):
        check_encoder(str(out), dict(encoder, cache_dir=str(tmp_path / 'hub')))
