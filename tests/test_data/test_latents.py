"""`cdm cache --latents`, and the dataset that reads them."""
import json
import random

import numpy as np
import pytest
import torch
from acme_plugin import config
from mmengine.registry import DATASETS, MODELS, TRANSFORMS
from mmengine.runner import Runner
from PIL import Image
from safetensors.torch import load_file
from tests_support import same_bits, tiny_backbone
from tiny_pipelines import save_tiny_sd3

from cdm_plugin.cli import main
from cdm_plugin.data import cache_latents, check_latents

SIZES = [8, (16, 8), (8, 16)]
# Height and width of the pictures: five, four and three of each size.
PICTURES = [(20, 20), (30, 14), (9, 20)] * 3 + [(20, 20), (20, 20), (30, 14)]


@TRANSFORMS.register_module()
class LabelOfRow:
    def __call__(self, sample):
        return dict(sample, prompt=int(sample['prompt']))


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """A file of labelled pictures."""
    folder = tmp_path_factory.mktemp('rows')
    lines, generator = ['prompt,image'], np.random.default_rng(0)
    for i, size in enumerate(PICTURES):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'{i}.png')
        lines.append(f'{i % 3},{i}.png')
    (folder / 'rows.csv').write_text('\n'.join(lines))
    return folder


def pictures(rows, *transforms, channels=1):
    return dict(type='PromptDataset', ann_file='rows.csv', data_root=str(rows), data_prefix=dict(image=''),
                pipeline=[dict(type='LabelOfRow'), dict(type='PackInputs', image='image', channels=channels),
                          *(transforms or [dict(type='ResizeCrop', sizes=SIZES)])])


def cached(rows, folder):
    return dict(type='LatentDataset', data_root=str(folder), dataset=dict(
        pictures(rows), pipeline=[dict(type='LabelOfRow'), dict(type='PackInputs')]))


def run_config(work_dir, dataset, iterations=4):
    cfg = config(work_dir, iterations, type='FlowMatching', image_size=SIZES)
    del cfg.model['student_every']
    cfg.train_dataloader = dict(batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', seed=1),
                                batch_sampler=dict(type='BucketBatchSampler', sizes=SIZES), dataset=dataset)
    cfg.optim_wrapper = dict(constructor=cfg.optim_wrapper.constructor, student=cfg.optim_wrapper.student)
    return cfg


def make(rows, tmp_path, *arguments, status=0, dataset=None):
    run_config(tmp_path / 'none', dataset or pictures(rows)).dump(tmp_path / 'config.py')
    assert main(['cache', str(tmp_path / 'config.py'), '--latents', '--out', str(tmp_path / 'latents'),
                 '--batch-size', '2', '--shard-size', '3', *arguments]) == status
    return tmp_path / 'latents'


def test_a_run_on_cached_latents_has_the_bits_of_one_on_the_pictures(rows, tmp_path, capsys):
    folder = make(rows, tmp_path)
    assert '12 pictures in ' in capsys.readouterr().out
    weights = []
    for name, dataset in (('pictures', pictures(rows)), ('latents', cached(rows, folder))):
        torch.manual_seed(0)
        runner = Runner.from_cfg(run_config(tmp_path / name, dataset))
        runner.train()
        assert ('image' in runner.train_dataloader.dataset[0]) == (name == 'pictures')
        weights.append(dict(runner.model.state_dict()))
    same_bits(*weights)


def test_latents_are_the_codec_s_by_size(rows, tmp_path):
    save_tiny_sd3(tmp_path / 'sd3', t5=False)
    codec = MODELS.build(dict(type='VAECodec', pretrained=str(tmp_path / 'sd3')))
    sizes = [16, (32, 16)]
    dataset = DATASETS.build(pictures(rows, dict(type='ResizeCrop', sizes=sizes), channels=3))
    assert cache_latents(codec, dataset, str(tmp_path / 'latents'), batch_size=2, shard_size=4) == 0
    shapes = [tuple(load_file(path)['latents'].shape) for path in sorted((tmp_path / 'latents').glob('*.safetensors'))]
    assert sorted(shapes) == [(4, 4, 8, 8), (4, 4, 8, 8), (4, 4, 16, 8)]  # three wide ones are cut to squares
    read = DATASETS.build(cached(rows, tmp_path / 'latents'))
    check_latents(read, codec)
    for i, sample in enumerate(dataset):
        expected = codec.encode(sample['image'][None])[0]
        assert torch.equal(read[i]['latents'], expected) and read[i]['prompt'] == i % 3 and len(read[i]) == 2
        assert tuple(read.get_data_info(i).values()) == tuple(sample['image'].shape[1:])
    # The same weights in bfloat16 are the same codec; others are not.
    twice = DATASETS.build(dict(type='RepeatDataset', dataset=cached(rows, tmp_path / 'latents'), times=2))
    check_latents(twice, codec.to(torch.bfloat16))
    save_tiny_sd3(tmp_path / 'other', t5=False, seed=1)
    other = MODELS.build(dict(type='VAECodec', pretrained=str(tmp_path / 'other')))
    with pytest.raises(ValueError, match='another codec than model.backbone.codec made the latents in .*latents'):
        check_latents(twice, other)
    with pytest.raises(ValueError, match='holds other latents .of another codec.'):
        cache_latents(other, dataset, str(tmp_path / 'latents'), shard_size=4)


def test_a_run_goes_on_where_it_stopped(rows, tmp_path, capsys):
    folder = make(rows, tmp_path)
    whole = DATASETS.build(cached(rows, folder))
    expected = [whole[i]['latents'] for i in range(12)]
    index = json.loads((folder / 'latents.json').read_text())
    assert [len(entry['samples']) for entry in index['shards']] == [3, 3, 3, 2, 1]
    (folder / '00001.safetensors').unlink()
    (folder / '00003.safetensors').write_bytes(b'cut')
    with pytest.raises(ValueError, match='00001.safetensors is missing'):
        DATASETS.build(cached(rows, folder))
    capsys.readouterr()
    make(rows, tmp_path)
    assert 'shards of an earlier run: 3' in capsys.readouterr().out
    again = DATASETS.build(cached(rows, folder))
    assert all(torch.equal(again[i]['latents'], expected[i]) for i in range(12))
    make(rows, tmp_path, '--dtype', 'bfloat16', status=2)
    assert "holds other latents (dtype: 'float32' there, 'bfloat16' here)" in capsys.readouterr().err


def test_what_does_not_fit_is_refused(rows, tmp_path, capsys):
    random.seed(0)
    for transform in (dict(type='ResizeCrop', sizes=8, crop='random'), dict(type='ResizeCrop', sizes=8, flip=0.5)):
        make(rows, tmp_path, status=2, dataset=pictures(rows, transform))
        assert 'the dataset draws its pictures: sample' in capsys.readouterr().err
    make(rows, tmp_path, status=2, dataset=dict(pictures(rows), pipeline=[dict(type='PackInputs')]))
    assert "sample 0 of the dataset has no picture: name its field with the transform dict(type='PackInputs', " in (
        capsys.readouterr().err)
    folder = make(rows, tmp_path)
    with pytest.raises(FileNotFoundError, match='has no latents.json: make latents there'):
        DATASETS.build(cached(rows, tmp_path))
    shorter = cached(rows, folder)
    shorter['dataset']['indices'] = 5
    with pytest.raises(ValueError, match='has latents of 12 pictures, but the dataset has 5 samples'):
        DATASETS.build(shorter)
    shifted = cached(rows, folder)
    shifted['dataset']['indices'] = [*range(1, 12), 0]
    with pytest.raises(ValueError, match="latents 0 of .* were made for '0', but the dataset has '1' there"):
        DATASETS.build(shifted)[0]
    index = json.loads((folder / 'latents.json').read_text())
    for change, message in ((dict(count=13), 'unfinished: it has 12 of 13'), (dict(version=2), 'has version 2'),
                            (dict(shards=None), 'is damaged'),
                            (dict(shards=[dict(index['shards'][0], name='../x')]), r'\.\./x')):
        (folder / 'latents.json').write_text(json.dumps({**index, **change}))
        with pytest.raises(ValueError, match=message):
            DATASETS.build(cached(rows, folder))


def test_a_training_refuses_the_latents_of_another_codec(rows, tmp_path):
    folder = make(rows, tmp_path)
    cfg = run_config(tmp_path / 'run', cached(rows, folder))
    cfg.model.update(backbone=dict(tiny_backbone(), codec=dict(type='PixelCodec', scale=1)), image_size=[4, (8, 4)])
    with pytest.raises(ValueError, match='another codec than model.backbone.codec made the latents'):
        Runner.from_cfg(cfg).train()
