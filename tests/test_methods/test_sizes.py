"""Images of several sizes in one run: the batch carries its size, and nothing on the method changes."""
import copy

import pytest
import torch
from acme_plugin import config, picture
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from mmengine.runner import Runner
from tests_support import recording_optimizers, same_bits, tiny_method
from tiny_pipelines import save_tiny_flux

from cdm_plugin.methods import FlowMatching

SIZES = [8, (16, 8), 16]
LATENTS = ((4, 4), (8, 4), (8, 8))


@pytest.mark.parametrize('type', ['CDM', 'DMD2'])
def test_a_run_over_three_sizes_is_as_many_iterations_of_one_size(type):
    method = tiny_method(type=type, student_every=2, image_size=SIZES, anchor_aware_fake=True)
    assert method.latent_sizes == LATENTS
    labels, seen = dict(prompt=torch.tensor([0, 1, 2])), []
    for iteration in range(8):
        method.iteration = iteration
        size = method.draw_latent_size()
        seen.append(size)
        single = copy.deepcopy(method)
        single.latent_sizes = (size,)
        logs, expected = (m.train_step(labels, recording_optimizers(m)) for m in (method, single))
        same_bits(logs, expected)
        same_bits(dict(method.state_dict()), dict(single.state_dict()))
        assert method.latent_sizes == LATENTS
    assert set(seen) == set(LATENTS)


def test_the_size_of_an_iteration_is_the_same_on_every_rank(monkeypatch):
    method = tiny_method(image_size=SIZES)
    sizes = []
    for rank in range(2):
        monkeypatch.setattr('cdm_plugin.methods.base.get_rank', lambda: rank)
        sizes.append([])
        for method.iteration in range(20):
            sizes[-1].append(tuple(method.sample_draws(2).noise.shape[2:]))
    assert sizes[0] == sizes[1] and set(sizes[0]) == set(LATENTS)


def test_a_run_of_several_sizes_resumes_to_the_bit(tmp_path):
    def run(name, iterations, resume=False):
        torch.manual_seed(0)
        cfg = config(tmp_path / name, iterations, resume, type='CDM', image_size=SIZES)
        cfg.train_dataloader.dataset = dict(type='LabelDataset', num_classes=3, length=24)
        del cfg.optim_wrapper['discriminator']
        Runner.from_cfg(cfg).train()
        return torch.load(tmp_path / name / f'iter_{iterations}.pth', weights_only=True)

    whole = run('whole', 8)
    run('parts', 4)
    parts = run('parts', 8, resume=True)
    for part in ('state_dict', 'optimizer', 'student_ema'):
        same_bits(whole[part], parts[part], part)


def test_a_batch_of_pictures_keeps_its_own_size():
    """Whatever model.image_size says: shift, noise and anchors follow the pictures."""
    method = tiny_method(type='CDM', student_every=1, image_size=8)
    pictures = torch.stack([picture(i, 16, 8) for i in range(3)])
    iteration = method.start(method.data_preprocessor(dict(prompt=torch.tensor([0, 1, 2]), image=pictures), True))
    assert iteration.draws.noise.shape == iteration.anchor.x0.shape == (3, 4, 8, 4)


@pytest.mark.parametrize('height, width', [(16, 16), (32, 16), (8, 16)])
def test_flow_matching_shifts_by_the_size_of_the_pictures(height, width, tmp_path):
    """Diffusers' own shift for that number of tokens, whatever model.image_size is."""
    save_tiny_flux(tmp_path / 'flux')
    method = FlowMatching(dict(type='FluxBackbone', pretrained=str(tmp_path / 'flux')), image_size=16,
                          sigma=dict(type='UniformSigma'))
    method.seed, method.iteration = 0, 0
    data = dict(prompt=['a fox', 'birds'], image=torch.zeros(2, 3, height, width))
    sigma = method.start(method.data_preprocessor(data, True)).draws.sigma
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / 'flux', subfolder='scheduler')
    tokens = (height // 4) * (width // 4)
    mu = calculate_shift(tokens, scheduler.config.base_image_seq_len, scheduler.config.max_image_seq_len,
                         scheduler.config.base_shift, scheduler.config.max_shift)
    method.backbone.scheduler.register_to_config(use_dynamic_shifting=False, shift=1.0)
    unshifted = method.start(method.data_preprocessor(data, True)).draws.sigma
    expected = scheduler.time_shift(mu, 1.0, unshifted.double())
    assert torch.allclose(sigma.double(), expected, atol=1e-6) and not torch.allclose(sigma, unshifted, atol=1e-3)


def test_sizes_are_checked():
    for size, message in ((8.5, 'image_size must be a whole'), ([], r'but is \[\]'),
                          ([8, (8, 8, 8)], r'but is .*\(8, 8, 8\)'),
                          ([16, (9, 9)], 'divisible'), ([8, 64], 'multiples of'),
                          ([(8, 8), 'big'], "image_size must be a whole number or .*'big'")):
        with pytest.raises(ValueError, match=message):
            tiny_method(image_size=size)
    assert tiny_method(image_size=[8, 16]).latent_sizes == ((4, 8),)  # two numbers are height and width
