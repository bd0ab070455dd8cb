"""Exported folders, opened by diffusers alone and by this package, against the method that was exported."""
import importlib
import json
import os
import re
import shutil

import diffusers
import pytest
import tiny_pipelines
import torch
from huggingface_hub import ModelCard
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors import safe_open
from tests_support import perturb, tiny_method

from cdm_plugin.data import cache_embeddings
from cdm_plugin.engine import StudentEMA
from cdm_plugin.export import check_export, export
from cdm_plugin.export.staging import staged
from cdm_plugin.inference import load_method, sample_prompts

PROMPTS = ['a red fox', 'dogs and birds']
# name: writer, backbone, pixels of a side, arguments of from_pretrained and of every call
TINY = {
    'sd3': (tiny_pipelines.save_tiny_sd3, 'SD3Backbone', 16, {}, dict(guidance_scale=1.0)),
    'sd3_without_t5': (lambda folder: tiny_pipelines.save_tiny_sd3(folder, t5=False), 'SD3Backbone', 16,
                       dict(text_encoder_3=None, tokenizer_3=None), dict(guidance_scale=1.0)),
    'longcat': (tiny_pipelines.save_tiny_longcat, 'LongCatImageBackbone', 64, dict(text_processor=None),
                dict(guidance_scale=1.0, enable_prompt_rewrite=False)),
    'flux': (lambda folder: tiny_pipelines.save_tiny_flux(folder, guidance_embeds=True), 'FluxBackbone', 16, {},
             dict(guidance_scale=3.5)),
    'klein': (tiny_pipelines.save_tiny_klein, 'Flux2KleinBackbone', 32, {}, dict(guidance_scale=1.0)),
    'flux2': (tiny_pipelines.save_tiny_flux2, 'Flux2Backbone', 32, {}, dict(guidance_scale=4.0)),
    'krea2': (tiny_pipelines.save_tiny_krea2, 'Krea2Backbone', 16, {}, dict(guidance_scale=0.0)),
    'qwen_image': (tiny_pipelines.save_tiny_qwen_image, 'QwenImageBackbone', 16, {}, dict(true_cfg_scale=1.0)),
    'z_image': (tiny_pipelines.save_tiny_z_image, 'ZImageBackbone', 16, {}, dict(guidance_scale=0.0)),
}
# The others take the same way with text encoders that take longer.
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name in ('klein', 'flux2', 'krea2'))) for name in TINY]
LORA = dict(rank=3, alpha=6)


class Trained:
    """A method on a source folder of its own, whose student, moving average and teacher differ."""

    def __init__(self, name, folder, dtype=None, **kwargs):
        _, backbone, self.size, self.loading, self.calling = TINY[name]
        self.folder, options = folder, dict(conditioner=dict(t5=False)) if name == 'sd3_without_t5' else {}
        options.update(kwargs.pop('backbone', {}))
        self.config = Config(dict(model=dict(
            dict(type='CDM', sample_sigmas=[1.0, 0.8, 0.5, 0.3], image_size=self.size),
            backbone=dict(type=backbone, pretrained=str(folder), **options), **kwargs)))
        torch.manual_seed(7)
        self.method = MODELS.build(self.config.model).eval()
        perturb(self.method.student)
        self.method.student_ema = StudentEMA(self.method.student)
        for weight in self.method.student_ema.weights.values():
            weight.add_(0.05 * torch.randn_like(weight))
        self.method.iteration = 11
        self.noise = torch.randn(self.method.latent_shape(2), generator=torch.Generator().manual_seed(1))

    def images(self, ema=True, role='student'):
        """What the method itself makes."""
        if ema:
            with self.method.student_ema.applied():
                return self.images(ema=False, role=role)
        return sample_prompts(self.method, PROMPTS, self.noise, role=role)

    def open(self, folder, **kwargs):
        """The folder as diffusers opens it, without this package."""
        # Whose automatic class of text-to-image pipelines has all of them but LongCat-Image.
        kind = diffusers.DiffusionPipeline if 'text_processor' in self.loading else diffusers.AutoPipelineForText2Image
        pipeline = kind.from_pretrained(folder, **self.loading, **kwargs)
        assert type(pipeline).__name__ == self.method.backbone.pipeline_name
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(self, pipeline, **calling):
        """What a diffusers pipeline makes, in [-1, 1]."""
        noise, packs_itself = self.noise, type(pipeline).__name__.startswith('Flux2')
        if hasattr(pipeline, '_pack_latents') and not packs_itself:
            noise = pipeline._pack_latents(noise, *noise.shape)
        images = pipeline(prompt=list(PROMPTS), latents=noise.to(pipeline.dtype), height=self.size, width=self.size,
                          num_inference_steps=4, sigmas=self.method.sample_sigmas.tolist(), output_type='pt',
                          **{**self.calling, **calling}).images
        return 2 * images.float() - 1


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """Folder of a tiny pipeline by name, written once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / 'base'
            TINY[name][0](made[name])
        return made[name]

    return get


@pytest.fixture
def train(sources, tmp_path):
    """Trained(name, ...), on a copy of the pipeline that the test may delete."""

    def build(name, **kwargs):
        return Trained(name, shutil.copytree(sources(name), tmp_path / 'source'), **kwargs)

    return build


def files(folder, *suffixes):
    return sorted(p for p in folder.rglob('*') if p.suffix in suffixes)


def weights(folder):
    """Every tensor in the folder."""
    found = {}
    for file in files(folder, '.safetensors'):
        with safe_open(file, 'pt') as content:
            found.update({f'{file.relative_to(folder)}:{name}': content.get_tensor(name) for name in content.keys()})
    return found


def run_card(folder, monkeypatch, base=None):
    """Runs the first block of code in the model card, in the folder; a base that the reader has to put in is `base`."""
    code = re.search(r'```python\n(.*?)```', (folder / 'README.md').read_text(), re.DOTALL).group(1)
    if base is not None:
        assert f"'path/to/{base.name}'" in code
        code = code.replace(f'path/to/{base.name}', str(base))
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        scope = {}
        exec(code, scope)
    return code, scope


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


# Whole pipelines


@pytest.mark.parametrize('name', NAMES)
def test_the_exported_pipeline_makes_the_trained_images_without_source_and_package(name, train, tmp_path, monkeypatch):
    trained = train(name)
    expected, own, teacher = trained.images(), trained.images(ema=False), trained.images(False, 'teacher')
    assert min((expected - own).abs().max(), (expected - teacher).abs().max(), (own - teacher).abs().max()) > 1e-3
    state = {k: v.clone() for k, v in trained.method.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        export(trained.method, 'out', config=trained.config, prompts=PROMPTS)  # a relative path
    export(trained.method, tmp_path / 'own', ema=False)
    assert all(torch.equal(v, state[k]) for k, v in trained.method.state_dict().items())
    moved = shutil.move(tmp_path / 'out', tmp_path / 'elsewhere')
    shutil.rmtree(trained.folder)
    pipeline = trained.open(moved)
    # Z-Image's time is 1000 (1 - sigma) in float32: a rounding of sigma is a thousand times as large there.
    atol = 2e-5 if name == 'z_image' else 1e-5
    close(trained.draw(pipeline), expected, atol)
    close(trained.draw(trained.open(tmp_path / 'own')), own, atol)
    loaded = load_method(str(moved), device='cpu')
    assert torch.equal(sample_prompts(loaded, PROMPTS, trained.noise), expected)
    again = MODELS.build(dict(type='CDM', backbone=dict(trained.config.model.backbone, pretrained=str(moved)),
                              image_size=trained.size))
    assert torch.equal(sample_prompts(again.eval(), PROMPTS, trained.noise, role='teacher',
                                      sigmas=trained.method.sample_sigmas), expected)
    assert {p.suffix for p in moved.rglob('*') if p.is_file()} == {'.json', '.safetensors', '.md', '.png', '.jinja'} - (
        set() if name in ('longcat', 'klein', 'flux2', 'krea2', 'qwen_image', 'z_image') and files(
            moved, '.jinja') else {'.jinja'})
    assert not any(str(tmp_path) in file.read_text() for file in files(moved, '.json', '.md'))
    if name == 'sd3_without_t5':
        assert not (moved / 'text_encoder_3').exists() and pipeline.text_encoder_3 is None
    if name == 'klein':  # the guidance of its default call is ignored
        assert torch.equal(trained.draw(pipeline, guidance_scale=4.0), trained.draw(pipeline))
    code, scope = run_card(moved, monkeypatch)
    assert 'sigmas=[1.0, 0.8, 0.5, 0.3]' in code and scope['image'].size == (trained.size,) * 2
    assert (moved / 'image.png').is_file()


@pytest.mark.parametrize('lora', [None, LORA], ids=['full', 'lora'])
def test_a_student_that_noises_anew_is_sampled_so_by_diffusers_and_here(lora, train, tmp_path, monkeypatch):
    trained = train('sd3', rollout='renoise', lora=lora)
    expected, ode = trained.images(), trained.images(role='teacher')
    out = export(trained.method, tmp_path / 'out', config=trained.config, sd_scripts=lora is not None)
    assert json.loads((out / 'scheduler/scheduler_config.json').read_text())['stochastic_sampling'] is True
    card = (out / 'README.md').read_text()
    assert '4 steps of LCM' in card and 'Sampler `lcm`' in card and 'euler' not in card and 'of Euler' not in card
    assert '| from step to step | x0 noised anew |' in card and 'torch.manual_seed' in card
    loaded = load_method(str(out), device='cpu')
    assert loaded.rollout == 'renoise' and torch.equal(sample_prompts(loaded, PROMPTS, trained.noise), expected)
    euler = sample_prompts(loaded, PROMPTS, trained.noise, rollout='ode')
    assert (euler - expected).abs().max() > 1e-3 and torch.equal(ode, trained.images(role='teacher'))
    again = recipe(export(loaded, tmp_path / 'again'))
    assert again == recipe(out) and again['from step to step'] == 'x0 noised anew'
    if lora is None:  # the noise of each of diffusers' steps is ours; that of the last has the factor 0
        drawn, randn = [], torch.randn
        with monkeypatch.context() as patch:
            patch.setattr(torch, 'randn', lambda *args, **kwargs: drawn.append(randn(*args, **kwargs)) or drawn[-1])
            trained.images()
        steps = [torch.stack(drawn[i:i + 2]) for i in range(0, 6, 2)] + [torch.zeros_like(trained.noise)]
        monkeypatch.setattr('diffusers.schedulers.scheduling_flow_match_euler_discrete.randn_tensor',
                            lambda *args, **kwargs: steps.pop(0))
        close(trained.draw(trained.open(out)), expected)
        assert not steps


@pytest.mark.parametrize('kind', [diffusers.FlowMatchLCMScheduler, diffusers.FlowMatchEulerDiscreteScheduler])
def test_a_foreign_pipeline_of_a_stochastic_scheduler_is_sampled_so(kind, train):
    trained = train('sd3')
    settings = {} if kind is diffusers.FlowMatchLCMScheduler else dict(stochastic_sampling=True)
    kind(shift=3.0, **settings).save_pretrained(trained.folder / 'scheduler')
    index = json.loads((trained.folder / 'model_index.json').read_text())
    (trained.folder / 'model_index.json').write_text(json.dumps(dict(index, scheduler=['diffusers', kind.__name__])))
    method = load_method(str(trained.folder), device='cpu')
    assert method.rollout == 'renoise' and method.backbone.shift((8, 8)) == 3


def test_t5_can_be_left_out_of_a_pipeline_that_has_it(train, tmp_path, monkeypatch):
    trained = train('sd3', backbone=dict(conditioner=dict(t5=False, max_sequence_length=77)))
    out = export(trained.method, tmp_path / 'out')
    parts = json.loads((out / 'cdm_parts.json').read_text())
    assert parts['conditioner'] == dict(t5=False, max_sequence_length=77) and parts['codec'] == {}
    assert not (out / 'text_encoder_3').exists()
    code, scope = run_card(out, monkeypatch)
    assert 'max_sequence_length=77' in code and scope['pipeline'].text_encoder_3 is None
    trained.calling, trained.loading = dict(trained.calling, max_sequence_length=77), TINY['sd3_without_t5'][3]
    close(trained.draw(trained.open(out)), trained.images())
    # Single arguments of one's own leave the folder's as they are.
    method = load_method(str(out), device='cpu')
    halved = MODELS.build(dict(type='SD3Backbone', pretrained=str(out), conditioner=dict(dtype='bfloat16')))
    assert not halved.conditioner.t5 and halved.conditioner.max_sequence_length == 77
    assert {p.dtype for p in halved.conditioner.parameters()} == {torch.bfloat16}
    assert torch.equal(sample_prompts(method, PROMPTS, trained.noise), trained.images())


def test_bfloat16_halves_the_folder(train, tmp_path, monkeypatch):
    trained = train('sd3')
    small, full = export(trained.method, tmp_path / 'small', dtype='bfloat16'), export(trained.method, tmp_path / 'out')
    assert {w.dtype for w in weights(small).values()} == {torch.bfloat16}
    assert {w.dtype for w in weights(full).values()} == {torch.float32}
    assert {p.dtype for p in trained.method.parameters()} == {torch.float32}
    images = trained.draw(trained.open(small, dtype=torch.bfloat16))
    assert (images - trained.images()).abs().max() < 0.2
    code, scope = run_card(small, monkeypatch)
    assert 'dtype=torch.bfloat16' in code and scope['pipeline'].transformer.dtype == torch.bfloat16


def test_parts_that_trained_in_another_dtype_are_exported_in_the_networks(train, tmp_path):
    trained = train('sd3', backbone=dict(conditioner=dict(dtype='bfloat16'), codec=dict(dtype='bfloat16')))
    out = export(trained.method, tmp_path / 'out')
    for name, weight in weights(trained.folder).items():
        if not name.startswith('transformer'):
            assert torch.equal(weights(out)[name], weight), name
    trained.draw(trained.open(out))
    parts = json.loads((out / 'cdm_parts.json').read_text())
    assert parts['conditioner'] == parts['codec'] == dict(dtype='bfloat16')
    assert torch.equal(sample_prompts(load_method(str(out), device='cpu'), PROMPTS, trained.noise), trained.images())


@pytest.mark.parametrize('lora', [None, LORA])
def test_a_student_of_cached_embeddings_gets_its_text_encoders(lora, train, tmp_path, monkeypatch):
    prompts = tmp_path / 'prompts.txt'
    prompts.write_text('\n'.join(PROMPTS))
    text = train('sd3', backbone=dict(conditioner=dict(t5=False, max_sequence_length=77)))
    cached = tmp_path / 'embeddings'
    cache_embeddings(Config(dict(
        model=text.config.model, train_dataloader=dict(dataset=dict(type='PromptDataset', ann_file=str(prompts))))),
        str(cached), dtype='float32', device='cpu')
    monkeypatch.chdir(tmp_path)
    trained = Trained('sd3', text.folder.name, lora=lora,
                      backbone=dict(conditioner=dict(type='EmbeddingConditioner', folder=str(cached))))
    out = export(trained.method, tmp_path / 'out', prompts=PROMPTS)
    assert len(files(out / 'samples', '.png')) == 2
    loaded = load_method(str(out), device='cpu')
    trained.method.backbone.conditioner = loaded.backbone.conditioner
    assert torch.equal(sample_prompts(loaded, PROMPTS, trained.noise), trained.images())
    assert not loaded.backbone.conditioner.t5 and not (out / 'text_encoder_3').exists()
    saved = json.loads((out / 'cdm_parts.json').read_text())['conditioner']
    assert saved == dict(t5=False, max_sequence_length=77)


def test_a_processor_that_cannot_be_loaded_here_is_taken_over(train, tmp_path):
    trained = train('longcat')
    processor, index = trained.folder / 'text_processor', trained.folder / 'model_index.json'
    processor.mkdir()
    (processor / 'preprocessor_config.json').write_text('{"a": 1}')
    (processor / 'old.bin').write_bytes(b'pickled')
    entries = json.loads(index.read_text())
    entries['text_processor'] = ['transformers', 'Qwen2_5_VLProcessor']
    index.write_text(json.dumps(entries))
    out = export(trained.method, tmp_path / 'out')
    assert json.loads((out / 'model_index.json').read_text())['text_processor'] == entries['text_processor']
    assert [p.name for p in (out / 'text_processor').iterdir()] == ['preprocessor_config.json']
    close(trained.draw(trained.open(out)), trained.images())


def test_a_conditioner_of_ones_own_lies_in_the_folder_too(train, tmp_path):
    @MODELS.register_module(force=True)
    class LoudConditioner(MODELS.get('SD3TextConditioner')):
        def encode_texts(self, prompts):
            return super().encode_texts([p.upper() for p in prompts])

    trained = train('sd3')
    config = dict(type='LoudConditioner', pretrained=str(trained.folder))
    trained = Trained('sd3', trained.folder, backbone=dict(conditioner=config))
    out = export(trained.method, tmp_path / 'out')
    shutil.rmtree(trained.folder)
    assert torch.equal(sample_prompts(load_method(str(out), device='cpu'), PROMPTS, trained.noise), trained.images())


# LoRA


@pytest.mark.parametrize('name', NAMES)
def test_the_lora_file_and_the_fused_pipeline_make_the_trained_images(name, train, tmp_path, monkeypatch):
    trained = train(name, lora=LORA)
    expected = trained.images()
    assert (expected - trained.images(ema=False)).abs().max() > 1e-3
    assert (expected - trained.images(False, 'teacher')).abs().max() > 1e-3
    known = name in ('sd3', 'sd3_without_t5', 'flux')  # to sd-scripts
    out = export(trained.method, tmp_path / 'out', config=trained.config, prompts=PROMPTS[:1], sd_scripts=known)
    assert {p.name for p in out.iterdir()} == {
        'pytorch_lora_weights.safetensors', 'scheduler', 'cdm_parts.json', 'README.md', 'samples',
        *(['sd_scripts_lora.safetensors'] if known else [])}
    pipeline = trained.open(trained.folder)
    if name == 'longcat':
        pipeline.transformer.load_lora_adapter(str(out), prefix='transformer', use_safetensors=True)
    else:
        pipeline.load_lora_weights(str(out))
    close(trained.draw(pipeline), expected)
    assert torch.equal(sample_prompts(load_method(str(out), device='cpu'), PROMPTS, trained.noise), expected)
    text = (out / 'README.md').read_text()
    assert str(tmp_path) not in text and '`path/to/source` stands for the folder of the base model' in text
    assert str(tmp_path).encode() not in (out / 'pytorch_lora_weights.safetensors').read_bytes()
    assert json.loads((out / 'cdm_parts.json').read_text())['base']['pretrained'] == str(trained.folder)
    code, scope = run_card(out, monkeypatch, trained.folder)
    assert 'lora' in code and scope['image'].size == (trained.size,) * 2
    # What other tools are told are the levels that diffusers' scheduler has when it is called so.
    levels = [f'{level:.4g}' for level in scope['pipeline'].scheduler.sigmas.tolist()]
    assert f'Euler at the noise levels {", ".join(levels[:-1])}. ' in text and f'`{", ".join(levels)}`' in text
    assert ('`FluxGuidance`' in text) == (name in ('flux', 'flux2'))
    assert ('`sd_scripts_lora.safetensors`' in text) == known
    if not known:
        with pytest.raises(ValueError, match=r'--sd-scripts.*this export is of a \w+Backbone'):
            check_export(trained.method, tmp_path / 'other', sd_scripts=True)
    # One's own weights, and another dtype.
    half = export(trained.method, tmp_path / 'half', ema=False, dtype='bfloat16')
    assert {w.dtype for w in weights(half).values()} == {torch.bfloat16}
    assert (sample_prompts(load_method(str(half), device='cpu'), PROMPTS, trained.noise)
            - trained.images(ema=False)).abs().max() < 0.05

    fused = export(trained.method, tmp_path / 'fused', fuse=True)
    shutil.rmtree(trained.folder)
    close(trained.draw(trained.open(fused)), expected)
    assert not any('lora' in key for key in weights(fused))
    assert not any('lora' in file.read_text() for file in (fused / 'transformer').glob('*.json'))
    close(sample_prompts(load_method(str(fused), device='cpu'), PROMPTS, trained.noise), expected)
    with pytest.raises(FileNotFoundError, match=r'adapters of the base model .*source.*base\.pretrained'):
        load_method(str(out), device='cpu')


def test_a_lora_folder_can_be_fused_later(train, tmp_path):
    trained = train('sd3', lora=LORA)
    out = export(trained.method, tmp_path / 'lora')
    fused = export(load_method(str(out), device='cpu'), tmp_path / 'fused', fuse=True)
    close(trained.draw(trained.open(fused)), trained.images())


def recipe(folder):
    """The table in the card, which is what cdm_parts.json keeps."""
    table = re.search(r'## Recipe\n(.*?)\n## ', (folder / 'README.md').read_text(), re.DOTALL).group(1)
    rows = dict(re.findall(r'^\| (\w.*?) \| (.*) \|$', table, re.MULTILINE))
    kept = json.loads((folder / 'cdm_parts.json').read_text())['recipe']
    assert rows == {key: str(value) for key, value in kept.items()}
    return kept


@pytest.mark.parametrize('lora', [None, LORA], ids=['full', 'lora'])
def test_an_exported_folder_that_is_exported_again_keeps_its_recipe(lora, train, tmp_path):
    trained = train('sd3', lora=lora)
    first = recipe(export(trained.method, tmp_path / 'first'))
    assert first['method'] == 'CDM' and first['weights'] == 'moving average (EMA)' and first['iterations'] == 12
    again = export(load_method(str(tmp_path / 'first'), device='cpu'), tmp_path / 'again')
    assert recipe(again) == first and '- cdm\n' in (again / 'README.md').read_text()
    small = export(load_method(str(again), device='cpu'), tmp_path / 'small', dtype='bfloat16', fuse=lora is not None)
    changed = {'dtype of the files': 'bfloat16', **({} if lora is None else {'LoRA': 'rank 3, alpha 6, fused'})}
    assert recipe(small) == {**first, **changed}
    # What trains from such a folder has a recipe of its own.
    new = Trained('sd3', small, lora=lora, type='FlowMatching')
    assert recipe(export(new.method, tmp_path / 'new', ema=False))['method'] == 'FlowMatching'
    reopened = export(load_method(str(tmp_path / 'new'), device='cpu'), tmp_path / 'reopened')
    assert recipe(reopened)['method'] == 'FlowMatching' and 'guidance_scale=7.0' in (reopened / 'README.md').read_text()


@pytest.mark.parametrize('lora', [None, LORA], ids=['full', 'lora'])
@pytest.mark.parametrize('type', ['CDM', 'FlowMatching'])
def test_a_student_that_is_loaded_alone_has_the_recipe_of_its_run(type, lora, train, tmp_path):
    options = dict(alpha=2.5, losses=dict(dm=dict(weight=0.5))) if type == 'CDM' else {}
    trained = train('sd3', type=type, lora=lora, **options)
    (tmp_path / 'config.py').write_text('\n'.join([
        trained.config.pretty_text, 'train_dataloader = dict()', 'optim_wrapper = dict()', 'train_cfg = dict()']))
    torch.save(dict(state_dict=trained.method.state_dict(), student_ema=trained.method.student_ema.state_dict(),
                    meta=dict(iter=12), config=trained.config.to_dict()), tmp_path / 'iter_12.pth')
    loaded = load_method(str(tmp_path / 'config.py'), str(tmp_path / 'iter_12.pth'), device='cpu')
    first, second = export(trained.method, tmp_path / 'first'), export(loaded, tmp_path / 'second')
    assert recipe(second) == recipe(first) and recipe(first)['method'] == type
    assert weights(first).keys() == weights(second).keys()
    assert all(torch.equal(w, weights(first)[name]) for name, w in weights(second).items())
    if type == 'CDM':
        assert 'dm (DMLoss, weight 0.5)' in recipe(second)['losses'] and recipe(second)['alpha'].startswith('2.5 ')
    # Where the base is itself an exported folder, it is not that one's recipe.
    base = first if lora is None else export(trained.method, tmp_path / 'fused', fuse=True)
    again = Trained('sd3', base, lora=lora, type='DMD2')
    again.method.config = again.config
    assert recipe(export(again.method, tmp_path / 'again'))['method'] == 'DMD2'


def test_adapters_fused_to_a_bfloat16_base_are_not_rounded(train, tmp_path, monkeypatch):
    trained = train('sd3', lora=LORA, backbone=dict(dtype='bfloat16'))
    wide = load_method(str(export(trained.method, tmp_path / 'lora')), device='cpu')
    wide.base.float()  # the rounded base, computed with in float32
    expected = sample_prompts(wide, PROMPTS, trained.noise)
    fused = export(trained.method, tmp_path / 'fused', fuse=True)
    close(trained.draw(trained.open(fused)), expected)
    code, scope = run_card(fused, monkeypatch)
    assert 'dtype' not in code and scope['pipeline'].transformer.dtype == torch.float32
    assert recipe(fused)['dtype of the files'] == 'float32'


def test_a_lora_student_over_a_bfloat16_base(train, tmp_path):
    trained = train('sd3', lora=LORA, backbone=dict(dtype='bfloat16', conditioner=dict(t5=False)))
    out = export(trained.method, tmp_path / 'out')
    assert {w.dtype for w in weights(out).values()} == {torch.float32}
    loaded = load_method(str(out), device='cpu')
    assert loaded.base.dtype == torch.bfloat16 and not loaded.backbone.conditioner.t5
    assert torch.equal(sample_prompts(loaded, PROMPTS, trained.noise), trained.images())
    fused = weights(export(trained.method, tmp_path / 'fused', fuse=True))
    assert {w.dtype for w in fused.values()} == {torch.float32}
    layer, scale = trained.method.base.transformer_blocks[0].attn.to_q, LORA['alpha'] / LORA['rank']
    with trained.method.student_ema.applied():
        expected = layer.base_layer.weight.float() + scale * (
            layer.lora_B['student'].weight @ layer.lora_A['student'].weight)
    found = next(w for name, w in fused.items() if name.endswith('transformer_blocks.0.attn.to_q.weight'))
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)
    small = weights(export(trained.method, tmp_path / 'small', fuse=True, dtype='bfloat16'))
    assert {w.dtype for w in small.values()} == {torch.bfloat16}
    assert 'text_encoder_3=None' in (out / 'README.md').read_text()


def test_a_class_conditional_lora_run_comes_back_too(tmp_path, monkeypatch):
    method = MODELS.build(dict(
        type='CDM', lora=LORA, backbone=dict(type='SD3Backbone', pretrained='asset:digits/teacher')))
    perturb(method.student)
    noise = torch.randn(method.latent_shape(2), generator=torch.Generator().manual_seed(0))
    expected = sample_prompts(method.eval(), [3, 7], noise)
    out = export(method, tmp_path / 'out')
    assert json.loads((out / 'cdm_parts.json').read_text())['base']['pretrained'] == 'asset:digits/teacher'
    assert torch.equal(sample_prompts(load_method(str(out), device='cpu'), [3, 7], noise), expected)
    run_card(out, monkeypatch)
    assert (out / 'image.png').is_file()
    fused = export(method, tmp_path / 'fused', fuse=True)
    assert {p.name for p in fused.iterdir()} == {'transformer', 'scheduler', 'cdm_parts.json', 'README.md'}
    run_card(fused, monkeypatch)
    assert (fused / 'image.png').is_file() and 'The base is where' not in (fused / 'README.md').read_text()
    close(sample_prompts(load_method(str(fused), device='cpu'), [3, 7], noise), expected)


def test_checkpoints_of_lora_runs_load_with_their_config(train, tmp_path):
    trained = train('sd3', lora=LORA)
    (tmp_path / 'config.py').write_text('\n'.join([
        trained.config.pretty_text, 'train_dataloader = dict()', 'optim_wrapper = dict()', 'train_cfg = dict()']))
    torch.save(dict(state_dict=trained.method.state_dict(), student_ema=trained.method.student_ema.state_dict(),
                    meta=dict(iter=12)), tmp_path / 'iter_12.pth')
    loaded = load_method(str(tmp_path / 'config.py'), str(tmp_path / 'iter_12.pth'), device='cpu')
    out = export(loaded, tmp_path / 'out')
    assert torch.equal(sample_prompts(load_method(str(out), device='cpu'), PROMPTS, trained.noise), trained.images())
    assert '| iterations | 12 |' in (out / 'README.md').read_text()


# The model card


def test_the_card_says_what_the_model_is(train, tmp_path):
    trained = train('sd3')
    (trained.folder / 'README.md').write_text(
        '---\nlicense: other\nlicense_name: acme-community\nlicense_link: LICENSE.md\n---\n# Base\n')
    (trained.folder / 'LICENSE.md').write_text('Do good.')
    config = Config(dict(trained.config.to_dict(), note='````', hub=dict(token='hf_secret', others=['a']),
                         work_dir=str(tmp_path / 'gone/run'), data=[dict(ann_file=str(trained.folder / 'README.md'))],
                         pattern='/^a/', root='/'))
    prompts = ['a [red]\nfox']
    out = export(trained.method, tmp_path / 'out', config=config, prompts=prompts, iterations=40)
    text, card = (out / 'README.md').read_text(), ModelCard.load(out / 'README.md')
    assert card.data.library_name == 'diffusers' and card.data.pipeline_tag == 'text-to-image'
    assert {'cdm', 'distillation'} <= set(card.data.tags) and card.data.base_model is None
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        'other', 'acme-community', 'LICENSE.md')
    assert (out / 'LICENSE.md').read_text() == 'Do good.'
    for part in ('| method | CDM |', '| iterations | 40 |', 'alpha', 'DynamicTimeGrid', 'cdm (CDMLoss, weight 1)',
                 f'| torch | {torch.__version__} |', '<details>', "sample_sigmas=[", 'a red fox',
                 '![a red fox](samples/0000.png)', 'guidance_scale=1.0'):
        assert part in text, part
    assert 'hf_secret' not in text and str(tmp_path) not in text
    for part in ("pretrained='.../source'", "work_dir = '.../run'", "ann_file='.../README.md'", "pattern = '/^a/'",
                 "root = '/'"):
        assert part in text, part


HOSTILE = [
    'a fox <img src=x onerror="alert(1)"><script>alert(2)</script>', 'a \x1b[31mred\x07 \x9bfox\x00',
    '# a\n\n---\n\n1. fox', '1. fox', '- fox', '+ fox', '> fox', '---', '===',
    'a *red* __fox__ `in` ~~snow~~ | $x$', '![x](http://evil/x.png)', '[x](javascript:alert(1)) [y][z]',
    '<https://evil> https://evil www.evil.com', '</details> fox', '&lt;b&gt; &copy; fox', '\u202egnp.xof',
    'eine Füchsin, 一只狐狸, 🦊\u200d❄️', '\\*fox\\*', 'a_fox_here', '[fox]: http://evil', '```', '    fox']


def test_prompts_in_the_card_are_text_and_nothing_else(train, tmp_path):
    """As CommonMark reads the card, by a parser of it."""
    from markdown_it import MarkdownIt
    trained = train('sd3')
    out = export(trained.method, tmp_path / 'out', prompts=HOSTILE)
    text = (out / 'README.md').read_text(encoding='utf-8')
    assert not re.search(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]', text)
    samples = text.split('## Samples')[1].split('## Recipe')[0]
    tokens = MarkdownIt('commonmark', dict(html=True)).enable(['strikethrough', 'table']).parse(samples)
    assert {token.type for token in tokens} == {'paragraph_open', 'inline', 'paragraph_close'}
    children = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in children} <= {'text', 'text_special', 'image'}
    images = [child for child in children if child.type == 'image']
    assert [image.attrs['src'] for image in images] == [f'samples/{i:04d}.png' for i in range(len(HOSTILE))]
    shown = [''.join(c.content for c in token.children) for token in tokens if token.type == 'inline'][1:]
    for prompt, line, image in zip(HOSTILE, shown[::2], images):
        plain = re.sub(r'[\x00-\x08\x0e-\x1f\x7f-\x9f\u202e]', '', prompt)
        assert line == ''.join(c.content for c in image.children) == ' '.join(re.sub(r'[\[\]]', ' ', plain).split())
    for address in ('http://', 'https://', 'www.'):  # GitHub makes links of them
        assert address not in samples


def test_what_an_earlier_folder_says_is_text_in_the_card(train, tmp_path):
    trained = train('sd3')
    first = export(trained.method, tmp_path / 'first')
    parts = json.loads((first / 'cdm_parts.json').read_text())
    parts['recipe'].update({'alpha': '7 | x\n\n<script>alert(1)</script>', '<b>': '[x](http://evil)'})
    (first / 'cdm_parts.json').write_text(json.dumps(parts))
    text = (export(load_method(str(first), device='cpu'), tmp_path / 'second') / 'README.md').read_text()
    assert '| alpha | 7 \\| x &lt;script&gt;alert(1)&lt;/script&gt; |' in text
    assert '| &lt;b&gt; | [x\\](http&#58;//evil) |' in text


@pytest.mark.parametrize('what', ['licence', 'processor'])
def test_a_link_in_the_base_is_not_published(what, train, tmp_path):
    trained = train('longcat')
    (tmp_path / 'private').write_text('private key')
    link = 'LICENSE' if what == 'licence' else 'text_processor/extra.json'
    index = json.loads((trained.folder / 'model_index.json').read_text())
    index['text_processor'] = ['transformers', 'Qwen2_5_VLProcessor']
    (trained.folder / 'model_index.json').write_text(json.dumps(index))
    (trained.folder / 'text_processor').mkdir()
    (trained.folder / 'README.md').write_text(f'---\nlicense: other\nlicense_link: {link}\n---\n')
    (trained.folder / link).unlink(missing_ok=True)
    (trained.folder / link).symlink_to(tmp_path / 'private')
    with pytest.raises(ValueError, match='may only name what lies in its folder'):
        export(trained.method, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_the_licence_of_an_unknown_base_is_named_as_such(train, tmp_path):
    trained = train('sd3')
    (trained.folder / 'README.md').write_text('---\n[broken\n---\n')
    out = export(trained.method, tmp_path / 'out')
    assert ModelCard.load(out / 'README.md').data.license == 'other'
    assert 'The licence of the base model, source, applies' in (out / 'README.md').read_text()


def test_a_base_of_the_hub_is_named_by_its_id(sources, tmp_path, monkeypatch):
    commit = '0123456789abcdef0123456789abcdef01234567'
    repo = tmp_path / 'cache/models--acme--tiny'
    shutil.copytree(sources('sd3'), repo / 'snapshots' / commit)
    (repo / 'snapshots' / commit / 'README.md').write_text('---\nlicense: apache-2.0\nlicense_link: L.md\n---\n')
    (repo / 'refs').mkdir()
    (repo / 'refs/main').write_text(commit)
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    hub = dict(cache_dir=str(tmp_path / 'cache'), local_files_only=True)
    trained = Trained('sd3', 'acme/tiny', backbone=hub)
    out = export(trained.method, tmp_path / 'out', dtype='bfloat16')
    card = ModelCard.load(out / 'README.md').data
    assert (card.base_model, card.license) == ('acme/tiny', 'apache-2.0')
    assert card.license_link == 'https://huggingface.co/acme/tiny/blob/main/L.md'
    trained = Trained('sd3', 'acme/tiny', backbone=hub, lora=LORA)
    lora = export(trained.method, tmp_path / 'lora')
    assert "from_pretrained('acme/tiny', dtype=torch.float32)" in (lora / 'README.md').read_text()
    assert torch.equal(sample_prompts(load_method(str(lora), device='cpu'), PROMPTS, trained.noise), trained.images())


def test_the_card_of_an_undistilled_model_keeps_its_guidance(train, tmp_path, monkeypatch):
    trained = train('sd3', type='FlowMatching')
    out = export(trained.method, tmp_path / 'out')
    code, _ = run_card(out, monkeypatch)
    assert 'guidance_scale=7.0' in code and 'num_inference_steps=28' in code and 'sigmas' not in code
    text, card = (out / 'README.md').read_text(), ModelCard.load(out / 'README.md')
    assert '| method | FlowMatching |' in text and 'Guidance is built in' not in text
    # The usual steps and guidance of StableDiffusion3Pipeline.
    assert 'in about 28 steps with a guidance scale of 7' in text and 'to make images in 4 steps' not in text
    assert 'steps of inference' not in text and not {'few-step', 'distillation'} & set(card.data.tags)
    assert len(load_method(str(out), device='cpu').sample_sigmas) == 28


# What an export leaves alone


def test_random_numbers_go_on_as_without_an_export(train, tmp_path):
    trained = train('sd3')
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    export(trained.method, tmp_path / 'out', prompts=PROMPTS, dtype='bfloat16')
    assert torch.equal(torch.rand(4), expected)


def test_a_new_export_replaces_an_earlier_one_whole_or_not_at_all(train, tmp_path, monkeypatch):
    trained = train('sd3')
    out = export(trained.method, tmp_path / 'out', prompts=PROMPTS)
    (out / 'notes.txt').write_text('mine')
    before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(ModelCard, 'save', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(trained.method, out, ema=False)
    assert {p: p.read_bytes() for p in out.rglob('*') if p.is_file()} == before
    without = Trained('sd3_without_t5', trained.folder)
    export(without.method, out)
    assert not (out / 'text_encoder_3').exists() and not (out / 'samples').exists()
    assert (out / 'notes.txt').read_text() == 'mine'
    close(without.draw(without.open(out)), without.images())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'source']


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('fail', [OSError, KeyboardInterrupt])
def test_a_replacement_that_fails_puts_the_earlier_export_back(fail, train, tmp_path, monkeypatch):
    trained = train('sd3')
    (trained.folder / 'README.md').write_text('---\nlicense: other\nlicense_link: LICENSE.md\n---\n')
    (trained.folder / 'LICENSE.md').write_text('Do good.')
    out = export(trained.method, tmp_path / 'out', prompts=PROMPTS)
    (out / 'notes.txt').write_text('mine')
    before, move, moved = content(out), shutil.move, []

    def broken(source, target):
        moved.append(target)
        if len(moved) == 2:
            raise fail('no space left on device')
        return move(source, target)

    for folder in (out, tmp_path / 'fresh'):
        moved.clear()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, 'move', broken)
            with pytest.raises(fail):
                export(trained.method, folder, ema=False)
    assert content(out) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'source']


@pytest.mark.parametrize('function,call', [
    ('shutil.move', 1), ('shutil.move', 4), ('os.rename', 1), ('os.rename', 2), ('os.rename', 6), ('shutil.rmtree', 1)])
def test_a_run_killed_while_it_replaces_an_export_blocks_nothing(function, call, train, tmp_path):
    trained = train('sd3')
    out = export(trained.method, tmp_path / 'out', prompts=PROMPTS)
    before, names = content(out), [p.name for p in out.iterdir()]
    others = [tmp_path / '.out-abcdefgh', tmp_path / '.out-backup']
    for other in others:
        other.mkdir()
        (other / 'mine').write_text('')
    module, name = function.split('.')
    pid = os.fork()
    if pid == 0:  # dies at once, without any cleaning up
        staging = importlib.import_module('cdm_plugin.export.staging')
        real, calls = getattr(getattr(staging, module), name), []

        def dies(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                os._exit(9)
            return real(*args, **kwargs)

        setattr(getattr(staging, module), name, dies)
        try:
            with staging.staged(out, names) as new:
                for part in ('cdm_parts.json', 'model_index.json', 'transformer', 'vae', 'new_part'):
                    (new / part).write_text('new')
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len([p for p in tmp_path.iterdir() if p.name.startswith('.out-')]) == 3
    if function != 'shutil.rmtree':  # then the new content is there, and stays
        if call > 2 or function == 'shutil.move':
            with pytest.raises(FileNotFoundError, match='no folder that `cdm export` wrote'):
                load_method(str(out), device='cpu')
        with pytest.raises(ZeroDivisionError), staged(out, []):  # the next one fails before it replaces anything
            1 / 0
        assert content(out) == before
    export(trained.method, out, prompts=PROMPTS)
    assert content(out).keys() - {'new_part'} == before.keys()
    close(trained.draw(trained.open(out)), trained.images())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.out-abcdefgh', '.out-backup', 'out', 'source']


def test_an_interrupted_folder_can_be_exported_to_and_a_living_run_is_named(train, tmp_path):
    trained = train('sd3')
    out = export(trained.method, tmp_path / 'out')
    previous = out / '.cdm_previous'
    previous.mkdir()
    names = ['cdm_parts.json', 'model_index.json']
    (previous / 'journal.json').write_text(json.dumps(dict(old=[*names, 'vae'], new=names)))
    for name in names:
        shutil.move(out / name, previous / name)
    check_export(trained.method, out)
    with staged(out, []):
        assert {p.name for p in out.iterdir()} >= {*names, 'vae'} and not previous.exists()
        before, pid = sorted(tmp_path.rglob('*')), os.fork()
        if pid == 0:  # another process
            status = 1
            try:
                export(trained.method, out)
            except ValueError as error:
                status = f'{out} is in use: an export, process {os.getppid()} on' not in str(error)
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and sorted(tmp_path.rglob('*')) == before
    export(trained.method, out)
    close(trained.draw(trained.open(out)), trained.images())
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'source']


def test_nothing_of_somebody_elses_is_overwritten(train, sources, tmp_path):
    trained = train('sd3')
    before = sorted(p for p in tmp_path.rglob('*'))
    with pytest.raises(ValueError, match='holds the model that the student was made from'):
        export(trained.method, trained.folder)
    with pytest.raises(ValueError, match='holds the model that the student was made from'):
        export(trained.method, tmp_path)
    with pytest.raises(ValueError, match='that `cdm export` did not write'):
        export(trained.method, sources('longcat'))
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='is a file'):
        export(trained.method, tmp_path / 'file')
    (tmp_path / 'file').unlink()
    assert sorted(p for p in tmp_path.rglob('*')) == before


def test_mistakes_are_named(train, tmp_path):
    trained = train('sd3')
    with pytest.raises(ValueError, match="dtype must be float8, float32, bfloat16"):
        export(trained.method, tmp_path / 'out', dtype='float16')
    with pytest.raises(ValueError, match='fuse=True adds the adapters of model.lora'):
        export(trained.method, tmp_path / 'out', fuse=True)
    with pytest.raises(ValueError, match='adapters of model.lora cannot be exported'):
        export(tiny_method(dtype=torch.float32, lora=dict(rank=2)), tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.gpu
@pytest.mark.parametrize('lora', [None, LORA], ids=['full', 'lora'])
def test_a_method_on_the_gpu_is_exported_from_there(lora, train, tmp_path):
    trained = train('sd3', lora=lora)
    expected = weights(export(trained.method, tmp_path / 'cpu', fuse=lora is not None))
    trained.method.cuda()
    trained.method.student_ema.weights = {k: w.cuda() for k, w in trained.method.student_ema.weights.items()}
    random = torch.cuda.get_rng_state()
    out = export(trained.method, tmp_path / 'gpu', fuse=lora is not None, prompts=PROMPTS)
    assert torch.equal(torch.cuda.get_rng_state(), random) and trained.method.device.type == 'cuda'
    assert all(p.device.type == 'cuda' for p in trained.method.parameters())
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(out).items())


# Other models


def test_a_class_conditional_model_is_a_network_and_its_parts(tmp_path):
    method = tiny_method(dtype=torch.float32).eval()
    out = export(method, tmp_path / 'out', prompts=[0, 2])
    assert {p.name for p in out.iterdir()} == {'transformer', 'scheduler', 'cdm_parts.json', 'samples', 'README.md'}
    noise = torch.randn(method.latent_shape(2))
    assert torch.equal(sample_prompts(load_method(str(out), device='cpu'), [0, 2], noise),
                       sample_prompts(method, [0, 2], noise))


@pytest.mark.parametrize('name', NAMES)
def test_any_pipeline_of_a_known_architecture_opens(name, sources):
    folder, size = sources(name), TINY[name][2]
    method = load_method(str(folder), device='cpu', image_size=size)
    assert len(method.sample_sigmas) == method.backbone.pipeline_defaults()['num_inference_steps'] > 4
    trained = Trained(name, folder)
    expected = sample_prompts(trained.method, PROMPTS, trained.noise, role='teacher')
    assert torch.equal(
        sample_prompts(method, PROMPTS, trained.noise, sigmas=trained.method.sample_sigmas), expected)


def test_load_method_takes_another_image_size_and_says_what_it_cannot_open(train, tmp_path):
    out = export(train('sd3').method, tmp_path / 'out')
    assert load_method(str(out), device='cpu').latent_sizes[0] == (8, 8)
    assert load_method(str(out), device='cpu', image_size=8).latent_sizes[0] == (4, 4)
    assert load_method(str(out), device='cpu', image_size=(8, 16)).latent_sizes[0] == (4, 8)
    with pytest.raises(ValueError, match='image size'):
        load_method(str(out), device='cpu', image_size=17)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='no folder that `cdm export` wrote, and no diffusers pipeline'):
        load_method(str(tmp_path / 'empty'))
    (tmp_path / 'empty/model_index.json').write_text('{"_class_name": "NobodysPipeline"}')
    with pytest.raises(ValueError, match='NobodysPipeline, and no registered backbone.*StableDiffusion3Pipeline'):
        load_method(str(tmp_path / 'empty'))
