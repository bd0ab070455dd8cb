"""The whole path of the models that the package is for, on tiny pipelines of their classes: train, be stopped, resume,
sample, export, and open the export with diffusers alone."""
import functools

import diffusers
import numpy as np
import pytest
import torch
from mmengine.runner import Runner
from PIL import Image
from recipes import (
    FLUX2_LORA,
    FLUX_LORA,
    KLEIN_LORA,
    KREA2_LORA,
    LONGCAT,
    LONGCAT_LORA,
    QWEN_IMAGE_LORA,
    SD3,
    SD3_LORA,
    Z_IMAGE_LORA,
)
from test_training import same_bits
from tiny_pipelines import (
    save_tiny_flux,
    save_tiny_flux2,
    save_tiny_klein,
    save_tiny_krea2,
    save_tiny_longcat,
    save_tiny_qwen_image,
    save_tiny_sd3,
    save_tiny_z_image,
)

from cdm_plugin.cli import main
from cdm_plugin.config import load_config
from cdm_plugin.inference import load_method, sample_prompts, student_weights

PROMPTS = ['a red fox', 'dogs and birds']
# Writer, pixels of a side, pipeline, what loading it takes, and what every call of it takes.
MODELS = {
    'sd3': (save_tiny_sd3, 16, 'StableDiffusion3Pipeline', {}, dict(guidance_scale=1.0)),
    'longcat': (save_tiny_longcat, 64, 'LongCatImagePipeline', dict(text_processor=None),
                dict(guidance_scale=1.0, enable_prompt_rewrite=False)),
    'flux': (functools.partial(save_tiny_flux, guidance_embeds=True), 16, 'FluxPipeline', {}, dict(guidance_scale=3.5)),
    'klein': (save_tiny_klein, 32, 'Flux2KleinPipeline', {}, dict(guidance_scale=1.0)),
    'flux2': (save_tiny_flux2, 32, 'Flux2Pipeline', {}, dict(guidance_scale=4.0)),
    'krea2': (save_tiny_krea2, 16, 'Krea2Pipeline', {}, dict(guidance_scale=0.0)),
    'z_image': (save_tiny_z_image, 16, 'ZImagePipeline', {}, dict(guidance_scale=0.0)),
    'qwen_image': (save_tiny_qwen_image, 16, 'QwenImagePipeline', {}, dict(true_cfg_scale=1.0))}
LORA = dict(sd3=SD3_LORA, longcat=LONGCAT_LORA, flux=FLUX_LORA, klein=KLEIN_LORA, flux2=FLUX2_LORA, krea2=KREA2_LORA,
            z_image=Z_IMAGE_LORA, qwen_image=QWEN_IMAGE_LORA)
# Full recipes for one process; of the others the LoRA recipe, without its adapters.
FULL = dict(sd3=SD3, longcat=LONGCAT)
NEWER = ('flux', 'z_image', 'qwen_image', 'klein', 'flux2', 'krea2')


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """The tiny pipelines, which stand where a recipe names the real ones."""
    root = tmp_path_factory.mktemp('sources')
    for name, (save, *_) in MODELS.items():
        save(root / name)
    (root / 'prompts.txt').write_text('a red fox\na lighthouse\ndogs and birds\n')
    return root


# The other methods only ask fewer questions; tests/test_scale/test_partition.py has more of the combinations.
@pytest.mark.parametrize('name, method, weights', [
    ('sd3', 'CDM', 'lora'), *(pytest.param(*values, marks=pytest.mark.slow) for values in (
        ('longcat', 'CDM', 'full'), ('sd3', 'CDM', 'full'), ('sd3', 'DMD2', 'lora'), ('longcat', 'CDM', 'lora'),
        ('longcat', 'DecoupledDMD', 'full'), *((name, 'CDM', weights) for name in NEWER
                                               for weights in ('lora', 'full'))))])
def test_train_resume_sample_export(name, method, weights, sources, tmp_path):
    _, size, pipeline_name, loading, calling = MODELS[name]
    options = {
        'model.type': method, 'model.backbone.pretrained': str(sources / name), 'model.backbone.config': None,
        'model.backbone.dtype': 'float32', 'model.backbone.conditioner.dtype': 'float32',
        'model.image_size': size, 'model.time_grid.max_steps': 3,
        'model.student_every': 1, 'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False,
        'train_dataloader.dataset.ann_file': str(sources / 'prompts.txt'), 'log_level': 'ERROR',
        'custom_hooks': [dict(type='CDMHook')], 'default_hooks.checkpoint.interval': 2,
        'optim_wrapper.student.accumulative_counts': 1, 'optim_wrapper.fake.accumulative_counts': 1}
    if weights == 'full' and name not in FULL:
        options['model.lora'] = None
    recipe = LORA[name] if weights == 'lora' else FULL.get(name, LORA[name])
    config = tmp_path / 'config.py'

    def train(work_dir, iterations, resume=False):
        cfg = load_config(recipe, {
            **options, 'train_cfg.max_iters': iterations, 'work_dir': str(tmp_path / work_dir), 'resume': resume,
            'experiment_name': f'{tmp_path.name}-{work_dir}-{iterations}'})
        cfg.param_scheduler = {role: [dict(type='ConstantLR', factor=1.0, by_epoch=False, begin=0, end=9)]
                               for role in ('student', 'fake')}
        cfg.dump(config)
        Runner.from_cfg(cfg).train()

    train('whole', 4)
    train('stopped', 2)
    train('stopped', 4, resume=True)
    a, b = (torch.load(tmp_path / run / 'iter_4.pth', weights_only=True) for run in ('whole', 'stopped'))
    for part in ('state_dict', 'student_ema', 'optimizer'):
        same_bits(a[part], b[part], part)
    assert all('.adapters.' in key for key in a['state_dict']) == (weights == 'lora')

    trained = load_method(str(config), str(tmp_path / 'stopped'), device='cpu', roles=('student', 'teacher'))
    noise = torch.randn(trained.latent_shape(2), generator=torch.Generator().manual_seed(0))
    with student_weights(trained, ema=True):
        images = sample_prompts(trained, PROMPTS, noise)
    untrained = sample_prompts(trained, PROMPTS, noise, role='teacher')
    assert (images - untrained).abs().max() > 1e-5

    command = ['export', str(config), '--checkpoint', str(tmp_path / 'stopped'), '--out', str(tmp_path / 'student')]
    assert main([*command, *(['--fuse'] if weights == 'lora' else [])]) == 0
    pipeline = getattr(diffusers, pipeline_name).from_pretrained(tmp_path / 'student', **loading)
    pipeline.set_progress_bar_config(disable=True)
    # Some pipelines take packed latents; Z-Image's changes the list of prompts.
    packs = name in ('longcat', 'flux', 'qwen_image', 'krea2')
    latents = pipeline._pack_latents(noise, *noise.shape) if packs else noise
    exported = pipeline(prompt=list(PROMPTS), latents=latents, height=size, width=size, num_inference_steps=4,
                        sigmas=[1.0, 0.75, 0.5, 0.25], output_type='pt', **calling).images
    assert torch.allclose(2 * exported - 1, images, rtol=0, atol=1e-5)
    assert main(['sample', str(tmp_path / 'student'), '--prompts', *PROMPTS, '--num', '1', '--steps', '2',
                 '--out', str(tmp_path / 'images')]) == 0
    assert len(list((tmp_path / 'images').glob('*.png'))) == 3


def write_config(folder, source, **changes):
    """A LoRA config of one's own on a tiny SD3."""
    cfg = load_config(SD3_LORA, {
        'model.backbone.pretrained': str(source), 'model.backbone.config': None, 'model.backbone.dtype': 'float32',
        'model.image_size': 16, 'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False, 'log_level': 'ERROR', 'train_cfg.max_iters': 2,
        'custom_hooks': [dict(type='CDMHook')], **changes})
    cfg.param_scheduler = None
    cfg.dump(folder / 'config.py')
    return str(folder / 'config.py')


def test_a_checkpoint_knows_how_it_was_trained(sources, tmp_path, capsys):
    """model.type and model.lora as on the command line of the training, whatever the config says at export."""
    config = write_config(tmp_path, sources / 'sd3', **{
        'train_dataloader.dataset.ann_file': str(sources / 'prompts.txt')})
    run, out = str(tmp_path / 'run'), tmp_path / 'out'
    swapped = ['--cfg-options', 'model.type=DMD2', 'model.student_every=1', 'model.lora.rank=2', 'model.lora.alpha=8']
    assert main(['train', config, '--work-dir', run, *swapped]) == 0
    assert main(['export', config, '--checkpoint', run, '--sd-scripts', '--out', str(out)]) == 0
    assert (out / 'sd_scripts_lora.safetensors').is_file()
    card = (out / 'README.md').read_text()
    assert '| method | DMD2 |' in card and "type='DMD2'" in card and 'rank 2, alpha 8' in card
    capsys.readouterr()
    assert main(['train', config, '--work-dir', run, '--resume', *swapped[:-1], 'model.lora.alpha=64',
                 'train_cfg.max_iters=4']) == 2
    assert "model.lora.alpha=64, but the run that is resumed was trained with 8" in capsys.readouterr().err


def test_cached_embeddings_of_another_model_are_refused(sources, tmp_path, capsys):
    save_tiny_sd3(tmp_path / 'other', seed=1)
    data = {'train_dataloader.dataset.ann_file': str(sources / 'prompts.txt')}
    config = write_config(tmp_path, sources / 'sd3', **data)
    cached = str(tmp_path / 'cache')
    assert main(['cache', config, '--out', cached]) == 0
    (tmp_path / 'embedded.py').write_text(capsys.readouterr().out.split('in a config over this one:\n')[1])
    embedded = str(tmp_path / 'embedded.py')
    assert main(['train', embedded, '--work-dir', str(tmp_path / 'run')]) == 0
    # Sampling from texts takes the encoders that made the cache.
    assert main(['sample', embedded, '--checkpoint', str(tmp_path / 'run'), '--prompts', 'a cat', '--num', '1',
                 '--out', str(tmp_path / 'images')]) == 0
    capsys.readouterr()
    assert main(['train', embedded, '--work-dir', str(tmp_path / 'run2'), '--cfg-options',
                 f'model.backbone.pretrained={tmp_path / "other"}']) == 2
    assert 'another encoder made the embeddings' in capsys.readouterr().err


def test_doctor_fails_where_training_would(sources, tmp_path, capsys):
    data = {'train_dataloader.dataset.ann_file': str(sources / 'prompts.txt')}
    config = write_config(tmp_path, sources / 'sd3', **data)
    assert main(['doctor', config]) == 0
    assert main(['doctor', config, '--cfg-options', 'train_dataloader.dataset.ann_file=absent.txt']) == 1
    assert 'absent.txt' in capsys.readouterr().out


def test_images_do_not_depend_on_the_batch(sources, tmp_path):
    for size in ('1', '3'):
        assert main(['sample', str(sources / 'sd3'), '--prompts', 'a cat', '--num', '3', '--steps', '2', '--batch-size',
                     size, '--out', str(tmp_path / size)]) == 0
    for name in ('0000.png', '0001.png', '0002.png'):
        one, three = (np.asarray(Image.open(tmp_path / size / name)).astype(int) for size in '13')
        assert abs(one - three).max() <= 1  # of 255; a batch's matrix products round differently
