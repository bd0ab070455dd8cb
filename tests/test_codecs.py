"""Codecs: pixel blocks by hand, and diffusers' autoencoder with its own arithmetic."""
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3_img2img import retrieve_latents
from mmengine.registry import MODELS
from tiny_pipelines import tiny_vae

from cdm_plugin.codecs import Codec, PixelCodec, VAECodec


def images_of(*shape, seed=0):
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


# Pixels


@pytest.mark.parametrize('scale', [1, 2, 4])
@pytest.mark.parametrize('channels', [1, 3])
def test_pixel_codec_round_trip_is_exact(scale, channels):
    codec, images = PixelCodec(scale), images_of(2, channels, 8, 12)
    latents = codec.encode(images)
    assert latents.shape == (2, channels * scale**2, 8 // scale, 12 // scale)
    assert latents.shape[2:] == codec.latent_size(8, 12)
    assert torch.equal(codec.decode(latents), images)


def test_a_blocks_pixels_become_channels():
    """Channel c scale^2 + i scale + j holds row i, column j of the blocks of image channel c."""
    images = images_of(1, 3, 4, 6)
    latents = PixelCodec(2).encode(images)
    for c in range(3):
        for i in range(2):
            for j in range(2):
                assert torch.equal(latents[:, 4 * c + 2 * i + j], images[:, c, i::2, j::2])


def test_pixel_codec_decodes_to_images_in_range():
    decoded = PixelCodec(1).decode(torch.tensor([[[[-3.0, -1.0, 0.5, 1.0, 7.0]]]]))
    assert decoded.flatten().tolist() == [-1.0, -1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize('size', [(9, 8), (8, 9)])
def test_sizes_that_do_not_divide_are_refused(size):
    for call in (lambda: PixelCodec(2).latent_size(*size), lambda: PixelCodec(2).encode(torch.zeros(1, 3, *size))):
        with pytest.raises(ValueError, match=f'image size {size[0]}x{size[1]} must be divisible by 2'):
            call()


def test_pixel_codec_has_no_state_and_is_rebuilt_from_its_config():
    codec = PixelCodec(4)
    assert codec.state_dict() == {} and MODELS.build(codec.to_config()).scale == 4


def test_base_class_states_what_is_missing():
    codec = Codec()
    assert codec.to_config() is None and codec.latent_size(5, 7) == (5, 7)
    for call in (codec.encode, codec.decode):
        with pytest.raises(NotImplementedError):
            call(torch.zeros(1, 3, 2, 2))


# Diffusers' autoencoder


@pytest.fixture(scope='module', params=[0.0609, None], ids=['shifted', 'no shift'])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp('vae')
    torch.manual_seed(0)
    vae = tiny_vae()
    vae.register_to_config(shift_factor=request.param)
    vae.save_pretrained(folder / 'vae')
    return folder


@pytest.fixture(scope='module')
def vae(folder):
    return AutoencoderKL.from_pretrained(folder, subfolder='vae')


def test_encode_is_diffusers_arithmetic(folder, vae):
    """As in diffusers' image-to-image pipeline of SD3, with the posterior's mode instead of a sample."""
    codec, images = VAECodec(str(folder)), images_of(2, 3, 16, 12)
    with torch.no_grad():
        raw = retrieve_latents(vae.encode(images), sample_mode='argmax')
    expected = (raw - (vae.config.shift_factor or 0)) * 1.5305
    latents = codec.encode(images)
    assert latents.shape == (2, 4, 8, 6) and latents.shape[2:] == codec.latent_size(16, 12)
    assert torch.allclose(latents, expected, rtol=0, atol=1e-6)
    assert torch.equal(latents, codec.encode(images)) and not latents.requires_grad


def test_decode_is_diffusers_arithmetic(folder, vae):
    codec = VAECodec(str(folder))
    latents = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents / 1.5305 + (vae.config.shift_factor or 0), return_dict=False)[0].clamp(-1, 1)
    images = codec.decode(latents)
    assert images.shape == (2, 3, 16, 12)
    assert torch.allclose(images, expected, rtol=0, atol=1e-5) and not images.requires_grad


def test_decoded_images_are_in_range(folder):
    images = VAECodec(str(folder)).decode(100 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert images.min() >= -1 and images.max() <= 1


def test_autoencoder_is_frozen_and_its_side_length_known(folder):
    codec = VAECodec(str(folder))
    assert codec.scale == 2 and codec.to_config()['type'] == 'VAECodec'
    assert not any(p.requires_grad for p in codec.parameters()) and not any(m.training for m in codec.modules()
                                                                            if m is not codec)
    with pytest.raises(ValueError, match='image size 15x16'):
        codec.encode(torch.zeros(1, 3, 15, 16))


def test_autoencoder_in_bfloat16_returns_float32(folder, vae):
    codec, images = VAECodec(str(folder), dtype='bfloat16'), images_of(1, 3, 8, 8)
    assert {p.dtype for p in codec.parameters()} == {torch.bfloat16}
    latents = codec.encode(images)
    assert latents.dtype == codec.decode(latents).dtype == torch.float32
    assert (latents - VAECodec(str(folder)).encode(images)).abs().max() < 0.1


def test_a_lazy_autoencoder_reads_its_weights_when_they_are_needed(folder):
    whole, images = VAECodec(str(folder)), images_of(2, 3, 16, 12)
    for call in (lambda codec: codec.encode(images), lambda codec: codec.decode(whole.encode(images)),
                 lambda codec: next(codec.vae.parameters())):
        codec = VAECodec(str(folder), lazy=True)
        assert not codec.loaded and not list(codec.parameters()) and not codec.state_dict()
        assert codec.scale == whole.scale == 2 and codec.latent_size(16, 12) == (8, 6)
        assert codec.to_config() == whole.to_config()
        assert torch.equal(call(codec), call(whole)) and codec.loaded
        assert not any(p.requires_grad for p in codec.parameters()) and not codec.vae.training
    with pytest.raises(AttributeError, match='nothing'):
        VAECodec(str(folder), lazy=True).nothing
