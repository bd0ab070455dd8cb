import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS, DefaultScope, Registry
from PIL import Image

from cdm_plugin.data import PackInputs

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
def test_gray_images_have_one_channel(value):
    image = PackInputs()(dict(prompt='x', image=value))['image']
    assert image.shape == (1, 4, 5) and np.array_equal(as_pixels(image), PIXELS[..., :1])


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
    (dict(), dict(prompt=['x', 'y']), ["'prompt' of a sample is a list", 'prompt=...']),
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
