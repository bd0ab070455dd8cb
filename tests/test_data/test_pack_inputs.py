import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, ConcatDataset, default_collate, pseudo_collate
from mmengine.registry import TRANSFORMS, DefaultScope, Registry
from PIL import Image

from cdm_plugin.data import DistillationDataPreprocessor, PackInputs, check_channel_order

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)


def as_pixels(image):
    return ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


def test_keeps_the_three_fields_only():
    condition = dict(encoder_hidden_states=torch.ones(2, 3))
    sample = dict(prompt='🐈', image=torch.zeros(3, 4, 5), condition=condition, sample_idx=3, url='x')
    packed = TRANSFORMS.build(dict(type='PackInputs'))(sample)
    assert set(packed) == {'prompt', 'image', 'condition'}
    assert packed['prompt'] == '🐈' and packed['image'] is sample['image'] and packed['condition'] == condition


@pytest.mark.parametrize('value, prompt', [('一只猫', '一只猫'), (3, 3), (np.int64(4), 4), (torch.tensor(5), 5),
                                           (np.array(6), 6)])
def test_prompt_by_another_name(value, prompt):
    packed = PackInputs(prompt='caption')(dict(caption=value, prompt='not this one'))
    assert packed == dict(prompt=prompt) and type(packed['prompt']) is type(prompt)


def test_embeddings_stand_in_for_a_prompt():
    sample = dict(condition=dict(a=torch.ones(2)))
    assert set(PackInputs()(sample)) == {'condition'}
    with pytest.raises(ValueError, match="no field 'captoin'"):
        PackInputs(prompt='captoin')(sample)


@pytest.mark.parametrize('value', [PIXELS, Image.fromarray(PIXELS), Image.fromarray(PIXELS).convert('RGBA')])
def test_colour_images(value):
    image = PackInputs(image='picture')(dict(prompt='x', picture=value))['image']
    assert image.shape == (3, 4, 5) and image.dtype == torch.float32 and image.is_contiguous()
    assert np.array_equal(as_pixels(image), PIXELS)


@pytest.mark.parametrize('value', [PIXELS[..., 0], PIXELS[..., :1], Image.fromarray(PIXELS[..., 0])])
def test_gray_images_have_as_many_channels_as_are_asked_for(value):
    image = PackInputs(channels=1)(dict(prompt='x', image=value))['image']
    assert image.shape == (1, 4, 5) and np.array_equal(as_pixels(image), PIXELS[..., :1])
    image = PackInputs()(dict(prompt='x', image=value))['image']
    assert image.shape == (3, 4, 5) and np.array_equal(as_pixels(image), PIXELS[..., :1].repeat(3, 2))


def test_gray_and_colour_go_into_one_batch():
    samples = [PackInputs()(dict(prompt='x', image=value)) for value in (PIXELS, PIXELS[..., 0])]
    for collate in (pseudo_collate, default_collate):
        assert DistillationDataPreprocessor()(collate(samples))['image'].shape == (2, 3, 4, 5)


@pytest.mark.parametrize('alpha', [False, True])
def test_arrays_in_the_order_of_opencv(alpha):
    """Red is the last of BGR; alpha stays where it is."""
    pixels = np.dstack([PIXELS[..., ::-1], np.full((4, 5, 1), 255, np.uint8)]) if alpha else PIXELS[..., ::-1]
    image = PackInputs(channel_order='bgr')(dict(prompt='x', image=pixels))['image']
    assert np.array_equal(as_pixels(image), PIXELS)
    # Pillow and files know their order.
    image = PackInputs(channel_order='bgr')(dict(prompt='x', image=Image.fromarray(PIXELS)))['image']
    assert np.array_equal(as_pixels(image), PIXELS)


def make_loader(**attributes):
    loader = type('LoadImageFromFile', (), dict(__module__='mmcv.transforms.loading', __call__=dict))()
    vars(loader).update(attributes)
    return loader


@pytest.mark.parametrize('loader, pack, warns', [
    (make_loader(), PackInputs(), True), (make_loader(), PackInputs(channel_order='bgr'), False),
    (make_loader(), PackInputs(channel_order='rgb'), False), (make_loader(channel_order='rgb'), PackInputs(), False),
    (make_loader(channel_order='bgr'), PackInputs(), True), (dict, PackInputs(), False)])
def test_a_loader_of_bgr_without_channel_order_is_named(loader, pack, warns, monkeypatch):
    said = []
    monkeypatch.setattr('cdm_plugin.data.pack_inputs.print_log', lambda text, *args, **kwargs: said.append(text))
    dataset = BaseDataset(pipeline=[loader, pack], lazy_init=True)
    check_channel_order(ConcatDataset([dataset, BaseDataset(pipeline=[pack], lazy_init=True)], lazy_init=True))
    assert len(said) == warns
    if warns:
        assert 'mmcv.transforms.loading.LoadImageFromFile' in said[0] and "channel_order='bgr'" in said[0]


def test_latents_and_other_fields_pass():
    latents = np.ones((4, 2, 2), np.float16)
    pack = PackInputs(meta=['score', 'source'])
    samples = [pack(dict(prompt='x', latents=latents, score=0.5, source=source, other=1)) for source in 'ab']
    assert set(samples[0]) == {'prompt', 'latents', 'meta'}
    for collate, scores in ((pseudo_collate, [0.5, 0.5]), (default_collate, torch.tensor([0.5, 0.5]).double()),
                            (list, [0.5, 0.5])):
        batch = DistillationDataPreprocessor()(collate(samples))
        assert batch['latents'].shape == (2, 4, 2, 2) and batch['latents'].dtype == torch.float32
        assert list(batch['meta']) == ['score', 'source'] and list(batch['meta']['source']) == ['a', 'b']
        assert list(batch['meta']['score']) == list(scores)
    with pytest.raises(ValueError, match=r"no field 'scores', only .*type='PackInputs', meta=\.\.\."):
        PackInputs(meta=['scores'])(dict(prompt='x', score=1))


@pytest.mark.parametrize('kwargs, message', [
    (dict(channels=4), 'PackInputs.channels must be 1 or 3, but is 4'),
    (dict(channel_order='gbr'), "PackInputs.channel_order must be 'rgb' or 'bgr' or None, but is 'gbr'"),
    (dict(background='whit'), "'whit'"),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PackInputs(**kwargs)


def test_a_path_is_opened_where_it_is_asked_for(tmp_path):
    """A prompt file may have a column `image` that nobody needs."""
    Image.fromarray(PIXELS).save(tmp_path / '1.png')
    sample = dict(prompt='x', image=str(tmp_path / '1.png'))
    assert PackInputs()(sample) == dict(prompt='x')
    image = PackInputs(image='image')(sample)['image']
    assert np.array_equal(as_pixels(image), PIXELS) and image.dtype == torch.float32


@pytest.mark.parametrize('content', [None, b'', b'no image', 'half a file'], ids=str)
def test_a_path_that_is_no_image_is_named(content, tmp_path):
    file = tmp_path / '1.png'
    if content == 'half a file':
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file)
        content = file.read_bytes()[:2000]
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="'picture' of a sample names .*1.png.*no readable image.*data_root"):
        PackInputs(image='picture')(dict(prompt='x', picture=str(file)))


@pytest.mark.parametrize('kwargs, sample, words', [
    (dict(), dict(caption='x', url='y'), ["no field 'prompt'", "['caption', 'url']", "type='PackInputs', prompt=..."]),
    (dict(prompt='text'), dict(caption='x'), ["no field 'text'", "['caption']", 'prompt=...']),
    (dict(image='img'), dict(prompt='x', jpg=1), ["no field 'img'", "['jpg', 'prompt']", 'image=...']),
    (dict(), dict(prompt=['x', 1]), ["'prompt' of a sample is a list", 'prompt=...']),
    (dict(), dict(prompt=[]), ["'prompt' of a sample is a list"]),
    (dict(prompt='meta.text'), dict(meta=dict(caption='x')), ["no field 'meta.text'", "['meta']"]),
    (dict(dropout=0.1), dict(prompt=3), ['is a class label', 'template and dropout', 'model.drop_rate']),
    (dict(template='a {}'), dict(prompt='x', condition=dict(pooled_projections=torch.ones(2))),
     ['has its embeddings already', 'EmbeddingConditioner']),
    (dict(), dict(prompt=0.5), ['is a float']),
    (dict(image='img'), dict(prompt='x', img=PIXELS / 255), ["'img'", 'float64', '(4, 5, 3)', 'image=...']),
    (dict(image='img'), dict(prompt='x', img=torch.from_numpy(PIXELS)), ['a Tensor of torch.uint8']),
    (dict(image='img'), dict(prompt='x', img=torch.ones(4, 5)), ['(4, 5)']),
])
def test_errors_name_the_field_and_the_key(kwargs, sample, words):
    with pytest.raises(ValueError) as info:
        PackInputs(**kwargs)(sample)
    assert '\n' not in str(info.value)
    assert [word for word in words if word not in str(info.value)] == []


def test_full_name_reaches_past_a_library_with_a_transform_of_the_same_name():
    library = Registry('transform', parent=TRANSFORMS, scope='packing_library')
    try:
        library.register_module(name='PackInputs', module=dict)
        with DefaultScope.overwrite_default_scope('packing_library'):
            assert isinstance(TRANSFORMS.build(dict(type='mmengine.PackInputs')), PackInputs)
            assert not isinstance(TRANSFORMS.build(dict(type='PackInputs')), PackInputs)
    finally:
        TRANSFORMS.children.pop('packing_library')


def test_repr_says_the_fields():
    assert repr(PackInputs('caption', image='img')) == "PackInputs(prompt='caption', image='img')"
