"""`cdm cache --latents`, and training on what it writes."""
import json
import shutil
import zlib

import numpy as np
import pytest
import safetensors.torch
import torch
from acme_plugin import config
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from PIL import Image
from tests_support import recording_optimizers, same_bits, tiny_backbone, tiny_method

from cdm_plugin.cli import main
from cdm_plugin.codecs import VAECodec
from cdm_plugin.config import load_config
from cdm_plugin.data import LatentDataset, WeightedMixDataset, cache_latents, check_latents, write_embeddings
from cdm_plugin.data.latents import cache
from cdm_plugin.data.latents.files import read_rows
from cdm_plugin.draws import drawn_by

SIZES = [(16, 16), (24, 16)]
PROMPTS = ['a fox', 'a cat', 'a fox', 'ships', 'x', 'a red fox', 'dogs']


@DATASETS.register_module()
class LatentTestCaptions(BaseDataset):
    """Pictures with several captions each."""

    def __init__(self, captions, **kwargs):
        self.captions = captions
        super().__init__(**kwargs)

    def load_data_list(self):
        return [dict(prompt=captions, image=torch.full((1, 8, 8), i / 10)) for i, captions in enumerate(self.captions)]


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """Captioned pictures of several sizes."""
    folder = tmp_path_factory.mktemp('pictures')
    for i in range(len(PROMPTS)):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 40, 3) if i % 3 else (50, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f'{i}.png')
    (folder / 'rows.csv').write_text('prompt,image\n' + ''.join(f'{p},{i}.png\n' for i, p in enumerate(PROMPTS)))
    return folder


def picture_dataset(rows, crop='center', flip=0.0, sizes=SIZES, prompt='prompt'):
    return dict(type='PromptDataset', ann_file='rows.csv', data_root=str(rows), data_prefix=dict(image=''), pipeline=[
        dict(type='PackInputs', image='image'), dict(type='ResizeCrop', sizes=sizes, crop=crop, flip=flip)])


def make_config(model, rows, **dataset):
    return Config(dict(
        model=dict(type='FlowMatching', image_size=SIZES,
                   backbone=dict(type='SD3Backbone', pretrained=model, conditioner=dict(max_sequence_length=8))),
        train_dataloader=dict(dataset=picture_dataset(rows, **dataset))))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob('*.safetensors')}


def test_latents_are_the_codecs_of_the_pictures(model, rows, tmp_path):
    report = cache_latents(make_config(model, rows), str(tmp_path), batch_size=3, shard_size=2, device='cpu')
    assert report.sizes == {(16, 16): 4, (24, 16): 3} and report.rows == 7 and report.reused_shards == 0
    assert report.prompts == ['a fox', 'a cat', 'ships', 'x', 'a red fox', 'dogs']
    names = ['16x16-00000', '16x16-00001', '24x16-00000', '24x16-00001']
    assert sorted(path.stem for path in (tmp_path / 'latents').glob('*.safetensors')) == names
    assert report.shards == 4 and report.bytes == sum(map(len, contents(tmp_path / 'latents').values()))
    dataset, pictures = LatentDataset(data_root=str(tmp_path)), DATASETS.build(picture_dataset(rows))
    codec = VAECodec(model)
    assert len(dataset) == len(pictures) == 7
    for i in range(7):
        picture = pictures[i]['image']
        assert dataset[i]['prompt'] == PROMPTS[i] and set(dataset[i]) == {'prompt', 'latents'}
        assert torch.equal(dataset[i]['latents'], codec.encode(picture[None])[0])
        info = dataset.get_data_info(i)
        assert (info['height'], info['width']) == tuple(picture.shape[1:]) and 'latents' not in info
    index = json.loads((tmp_path / 'latents' / 'index.json').read_text())
    assert index['codec'] == codec.to_config() and set(index['source']['files']) == {
        'vae/config.json', 'vae/diffusion_pytorch_model.safetensors'}
    assert (index['samples'], index['views'], index['dtype'], index['scale'], index['labels']) == (
        7, 1, 'float32', 2, False)
    for number, view, checksum in read_rows(tmp_path / 'latents' / '16x16-00000.safetensors'):
        assert view == 0 and checksum == zlib.crc32(pictures[number]['image'].numpy().tobytes())
    assert len({entry['pixels'] for entry in index['shards']}) == 4


def test_views_are_what_the_pipeline_draws(model, rows, tmp_path):
    cfg = make_config(model, rows, crop='random', flip=0.5)
    cache_latents(cfg, str(tmp_path / 'a'), views=3, seed=4, device='cpu', workers=2)
    dataset, pictures = LatentDataset(data_root=str(tmp_path / 'a')), DATASETS.build(cfg.train_dataloader.dataset)
    codec, distinct = VAECodec(model), set()
    state = torch.get_rng_state()
    for i in range(7):
        drawn = []
        for view in range(3):
            with drawn_by(4, i, view):
                drawn.append(pictures[i]['image'])
            assert torch.equal(dataset[3 * i + view]['latents'], codec.encode(drawn[-1][None])[0])
        distinct.add(len({view.numpy().tobytes() for view in drawn}))
    assert {2, 3} & distinct
    assert torch.equal(torch.get_rng_state(), state)
    cache_latents(cfg, str(tmp_path / 'b'), views=3, seed=5, device='cpu')
    other = LatentDataset(data_root=str(tmp_path / 'b'))
    assert sum(torch.equal(other[i]['latents'], dataset[i]['latents']) for i in range(21)) < 21
    with pytest.raises(ValueError, match='the 2 views of a sample of train_dataloader.dataset are all the same'):
        cache_latents(make_config(model, rows), str(tmp_path / 'c'), views=2)


def test_captions_are_still_drawn_from_latents(tmp_path):
    captions = [['a fox', 'ein Fuchs'], ['a cat']]
    cfg = Config(dict(model=dict(backbone=tiny_backbone()), train_dataloader=dict(dataset=dict(
        type='LatentTestCaptions', captions=captions, pipeline=[dict(
            type='PackInputs', template=['{}', 'a photo of {}'], dropout=0.2)]))))
    report = cache_latents(cfg, str(tmp_path), device='cpu')
    assert report.prompts == ['a fox', 'a photo of a fox', 'ein Fuchs', 'a photo of ein Fuchs', '', 'a cat',
                              'a photo of a cat']
    dataset = LatentDataset(data_root=str(tmp_path))
    drawn = [{dataset[i]['prompt'] for _ in range(100)} for i in range(2)]
    assert drawn == [set(report.prompts[:4]), set(report.prompts[5:])]
    dropped = LatentDataset(data_root=str(tmp_path), pipeline=[dict(type='PackInputs', dropout=0.5)])
    assert {dropped[1]['prompt'] for _ in range(100)} == {'', *drawn[1]}


def test_an_interrupted_run_goes_on(model, rows, tmp_path, monkeypatch):
    cfg, out = make_config(model, rows), tmp_path / 'out'
    encoded, describe = [], cache.describe
    encode = VAECodec.encode
    monkeypatch.setattr(VAECodec, 'encode', lambda self, x: encoded.append(len(x)) or encode(self, x))
    with monkeypatch.context() as patch:
        def fail(path, *args):
            if path.stem == '24x16-00000':
                raise KeyboardInterrupt
            return describe(path, *args)
        patch.setattr(cache, 'describe', fail)
        with pytest.raises(KeyboardInterrupt):
            cache_latents(cfg, str(out), shard_size=2, device='cpu')
    with pytest.raises(ValueError, match=r'is unfinished: 5 of 7 latents are missing; run `cdm cache --latents`'):
        LatentDataset(data_root=str(out))
    before, _ = contents(out / 'latents'), encoded.clear()
    report = cache_latents(cfg, str(out), shard_size=2, device='cpu')
    assert report.reused_shards == 1 and sum(encoded) == 5
    cache_latents(cfg, str(tmp_path / 'whole'), shard_size=2, device='cpu')
    assert contents(out / 'latents') == contents(tmp_path / 'whole' / 'latents')
    assert before['16x16-00000.safetensors'] == contents(out / 'latents')['16x16-00000.safetensors']
    shard = out / 'latents' / '24x16-00000.safetensors'
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r'24x16-00000\.safetensors has \d+ bytes instead of'):
        LatentDataset(data_root=str(out))
    assert cache_latents(cfg, str(out), shard_size=2, device='cpu').reused_shards == 3
    assert contents(out / 'latents') == contents(tmp_path / 'whole' / 'latents')


def other_vae(model, folder):
    """The same pipeline with another autoencoder."""
    shutil.copytree(model, folder)
    file = folder / 'vae' / 'diffusion_pytorch_model.safetensors'
    weights = {name: 1.01 * value for name, value in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file(weights, file, metadata=dict(format='pt'))
    return str(folder)


@pytest.mark.slow
def test_a_folder_of_other_latents_is_refused(model, rows, tmp_path):
    own = tmp_path / 'rows'
    shutil.copytree(rows, own)
    cfg, out = make_config(model, own), str(tmp_path / 'out')
    cache_latents(cfg, out, device='cpu')
    moved = make_config(other_vae(model, tmp_path / 'other'), own)
    for changed, kwargs, message in (
            (cfg, dict(seed=1), 'seed: 0 in the cache, 1 here'),
            (cfg, dict(dtype='bfloat16'), "dtype: 'float32' in the cache, 'bfloat16' here"),
            (make_config(model, own, flip=0.5), {}, 'dataset: '),
            (moved, {}, 'pretrained: ')):
        with pytest.raises(ValueError, match=f'holds latents that something else made .*{message}') as info:
            cache_latents(changed, out, device='cpu', **kwargs)
        assert '\n' not in str(info.value)
    shutil.copytree(model, tmp_path / 'copied')  # the same files elsewhere are the same codec
    assert cache_latents(make_config(str(tmp_path / 'copied'), own), out, device='cpu').reused_shards == 2
    table = own / 'rows.csv'
    table.write_text(table.read_text().replace('ships', 'boats'))
    with pytest.raises(ValueError, match="something else made .rows: '.*' in the cache"):
        cache_latents(cfg, out, device='cpu')
    table.write_text(table.read_text().replace('boats', 'ships'))
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(own / '1.png')
    with pytest.raises(ValueError, match='latents of other pictures: sample 1 of train_dataloader.dataset has changed'):
        cache_latents(cfg, out, device='cpu')


def test_a_model_refuses_the_latents_of_another(model, rows, tmp_path):
    cache_latents(make_config(model, rows), str(tmp_path / 'out'), device='cpu')
    dataset = LatentDataset(data_root=str(tmp_path / 'out'))

    def backbone(pretrained, **codec):
        return MODELS.build(dict(type='SD3Backbone', pretrained=pretrained, conditioner=MODELS.build(dict(
            type='ClassConditioner', num_classes=3)), codec=dict(lazy=True, **codec)))

    latent_sizes = [(8, 8), (12, 8)]
    check_latents(dataset, backbone(model), latent_sizes)
    check_latents(dataset, backbone(model, dtype='bfloat16'), latent_sizes)
    with pytest.raises(ValueError, match=r'another codec than model\.backbone\.codec made .*pretrained: '):
        check_latents(dataset, backbone(other_vae(model, tmp_path / 'other')), latent_sizes)
    pixels = MODELS.build(tiny_backbone())
    with pytest.raises(ValueError, match="type: 'VAECodec' in the cache, 'PixelCodec' here"):
        check_latents(WeightedMixDataset(dict(a=dict(dataset=dataset))), pixels, latent_sizes)
    with pytest.raises(ValueError, match=r'of pictures of 24x16 pixels, which model\.image_size has not'):
        check_latents(dataset, backbone(model), latent_sizes[:1])
    with pytest.raises(FileNotFoundError, match='has no latents/index.json: make latents there with `cdm cache'):
        LatentDataset(data_root=str(tmp_path))


@pytest.mark.parametrize('change, message', [
    (lambda cfg: cfg.train_dataloader.dataset.pipeline.pop(), r'has 50x30 pixels, which model.image_size \(16x16, 24'),
    (lambda cfg: cfg.train_dataloader.dataset.update(pipeline=[dict(type='PackInputs')]), 'samples without pictures'),
    (lambda cfg: setattr(cfg, 'train_dataloader', dict(dataset=dict(
        type='WeightedMixDataset', sources=dict(web=dict(dataset=cfg.train_dataloader.dataset))))),
     r'is a mix.*--dataset train_dataloader\.dataset\.sources\.web\.dataset'),
    (lambda cfg: setattr(cfg, 'train_dataloader', dict(dataset=dict(type='AcmePictures', length=0))),
     'train_dataloader.dataset must have a length of 1 or more'),
    (lambda cfg: cfg.pop('model'), "the config has no 'model.backbone'")])
def test_what_cannot_be_encoded_is_named(change, message, model, rows, tmp_path):
    cfg = make_config(model, rows)
    change(cfg)
    with pytest.raises(ValueError, match=message):
        cache_latents(cfg, str(tmp_path / 'out'))
    assert not list(tmp_path.glob('out/*/*'))


@pytest.mark.parametrize('change, message', [
    (lambda index: index.pop('scale'), r'index\.json is damaged .it has no scale'),
    (lambda index: index.update(version=2), 'has version 2, but this cdm_plugin reads version 1'),
    (lambda index: index['shards'][0].update(size=[8]), r'shards\[0\]\.size must be height and width'),
    (lambda index: index['shards'][0].update(size=['8', 8]), r'shards\[0\]\.size'),
    (lambda index: index['shards'][0].update(name='../x.safetensors'), 'may only name what lies in its folder'),
    (lambda index: index['shards'][0].update(rows=1), 'rows instead of 1'),
    (lambda index: index.clear(), 'is damaged')])
def test_a_damaged_index_is_named(change, message, tmp_path):
    cfg = Config(dict(model=dict(backbone=tiny_backbone()), train_dataloader=dict(dataset=dict(
        type='AcmePictures', length=2))))
    cache_latents(cfg, str(tmp_path), device='cpu')
    file = tmp_path / 'latents' / 'index.json'
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message) as info:
        LatentDataset(data_root=str(tmp_path))
    assert '\n' not in str(info.value)


def test_a_shard_without_its_rows_is_named(tmp_path):
    write_embeddings(tmp_path / 'x.safetensors', dict(latents=torch.zeros(2, 4, 4, 4)), ['a', 'b'])
    with pytest.raises(ValueError, match=r'x\.safetensors has no row_ids'):
        read_rows(tmp_path / 'x.safetensors')
    write_embeddings(tmp_path / 'x.safetensors', dict(row_ids=torch.zeros(2, 4)), ['a', 'b'])
    with pytest.raises(ValueError, match='must be whole numbers'):
        read_rows(tmp_path / 'x.safetensors')


def test_bad_arguments_are_named(model, rows, tmp_path):
    for kwargs, message in ((dict(views=0), 'views must be a whole number of 1 or more'),
                            (dict(workers=-1), 'workers must be'), (dict(dtype='int8'), 'dtype must be one of')):
        with pytest.raises(ValueError, match=message):
            cache_latents(make_config(model, rows), str(tmp_path), **kwargs)


def test_labelled_pictures_have_no_texts(tmp_path):
    cfg = Config(dict(model=dict(backbone=tiny_backbone()), train_dataloader=dict(dataset=dict(
        type='AcmePictures', length=5))))
    report = cache_latents(cfg, str(tmp_path), device='cpu')
    assert report.prompts is None and report.sizes == {(8, 8): 5}
    dataset, pictures = LatentDataset(data_root=str(tmp_path)), DATASETS.build(cfg.train_dataloader.dataset)
    for i in range(5):
        assert dataset[i]['prompt'] == pictures[i]['prompt']
        assert torch.equal(dataset[i]['latents'], torch.pixel_unshuffle(pictures[i]['image'], 2))


# The command, and training


@pytest.mark.parametrize('type, kwargs', [
    ('DMD2', dict(student_every=1, losses=dict(gan=dict(type='GANLoss', r1=1.0)))), ('FlowMatching', {})])
def test_losses_on_latents_are_those_on_pictures(type, kwargs):
    image = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logs = {}
    for name, rows in dict(image=image, latents=torch.pixel_unshuffle(image, 2)).items():
        method = tiny_method(type, **kwargs)
        logs[name] = method.train_step(dict(prompt=torch.tensor([0, 1, 2, 0]), **{name: rows}),
                                       recording_optimizers(method))
    same_bits(logs['image'], logs['latents'])
    assert len(logs['image']) >= 2


def test_one_call_caches_prompts_and_pictures_and_training_reads_no_autoencoder(model, rows, tmp_path, capsys):
    cfg, out = make_config(model, rows), str(tmp_path / 'cache')
    whole = config(tmp_path / 'run', 4)
    whole.model, whole.train_dataloader.dataset = cfg.model, cfg.train_dataloader.dataset
    whole.optim_wrapper.pop('discriminator'), whole.optim_wrapper.pop('fake')
    whole.dump(str(tmp_path / 'own.py'))
    assert main(['cache', str(tmp_path / 'own.py'), '--out', out, '--latents', '--dtype', 'float32']) == 0
    printed = capsys.readouterr().out
    assert '7 latents (4 of 16x16, 3 of 24x16)' in printed and '6 prompts' in printed
    (tmp_path / 'over.py').write_text(printed.split('in a config over this one:\n')[1])
    over = load_config(str(tmp_path / 'over.py'))
    assert over.model.backbone.conditioner == dict(type='EmbeddingConditioner', folder=out)
    assert over.model.backbone.codec == dict(lazy=True) and over.model.backbone.pretrained == model
    assert over.train_dataloader.dataset == dict(type='LatentDataset', data_root=out)
    assert main(['cache', str(tmp_path / 'own.py'), '--out', out, '--views', '2']) == 2

    def train(name, dataset, codec, iterations=4, resume=False):
        torch.manual_seed(0)
        own = config(tmp_path / name, iterations, resume)
        own.model = dict(type='FlowMatching', image_size=SIZES, backbone=dict(
            type='SD3Backbone', pretrained=model, codec=codec,
            conditioner=dict(type='EmbeddingConditioner', folder=out)))
        own.train_dataloader = dict(
            batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', seed=1), dataset=dataset,
            batch_sampler=dict(type='BucketBatchSampler', sizes=SIZES))
        own.optim_wrapper = dict(constructor=own.optim_wrapper.constructor, student=own.optim_wrapper.student)
        own.default_hooks.checkpoint.interval = 2
        runner = Runner.from_cfg(own)
        runner.train()
        return runner.model.backbone.codec, torch.load(tmp_path / name / 'iter_4.pth', weights_only=True)

    resized = dict(cfg.train_dataloader.dataset)
    whole_codec, on_pictures = train('pictures', resized, {})
    codec, on_latents = train('latents', dict(type='LatentDataset', data_root=out), dict(lazy=True))
    assert whole_codec.loaded and list(whole_codec.parameters())
    assert not codec.loaded and not list(codec.parameters())
    for part in ('state_dict', 'optimizer', 'student_ema'):
        same_bits(on_pictures[part], on_latents[part], part)
