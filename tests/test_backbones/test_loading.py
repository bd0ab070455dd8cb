"""What is loaded from where, and what is refused with which words."""
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file, save_file
from tiny_pipelines import PROMPTS

from cdm_plugin.backbones import FluxBackbone, LongCatImageBackbone, SD3Backbone
from cdm_plugin.backbones.sd3 import SD3TextConditioner
from cdm_plugin.codecs import VAECodec

WEIGHTS = 'transformer/diffusion_pytorch_model.safetensors'


def copied(tiny, tmp_path):
    return Path(shutil.copytree(tiny.folder, tmp_path / 'copy'))


# What is no pipeline, or another architecture's


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    for build in (SD3Backbone, LongCatImageBackbone, FluxBackbone):
        with pytest.raises(FileNotFoundError, match=r'model\.backbone\.pretrained=.*is no diffusers pipeline: it has '
                                                    r'no transformer/config\.json'):
            build(pretrained=str(tmp_path))


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.backbone\.pretrained='.*nowhere' is no folder"):
        LongCatImageBackbone(pretrained=str(tmp_path / 'nowhere'))


BUILD = {
    'model.backbone': lambda pretrained: SD3Backbone(pretrained=pretrained),
    'model.backbone.codec': lambda pretrained: VAECodec(pretrained),
    'model.backbone.codec, lazy': lambda pretrained: VAECodec(pretrained, lazy=True),
    'model.backbone.conditioner': lambda pretrained: SD3TextConditioner(pretrained)}


@pytest.mark.parametrize('key', BUILD)
def test_what_is_no_folder_here_is_told_from_a_hub_id(key, tmp_path, monkeypatch):
    """A path is refused before the hub is asked; an id that is not in the cache, with no network, says both."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'models').mkdir()
    named = re.escape(key.partition(',')[0])
    for path in ('models/sd3', './sd3', 'sd3/', 'work_dirs/a/student', '~/sd3'):
        with pytest.raises(FileNotFoundError, match=f"{named}.pretrained='{path}' is no folder in {tmp_path}: give "):
            BUILD[key](path)
    for hub_id in ('acme/sd3', 'sd3'):
        with pytest.raises(FileNotFoundError, match=f"{named}.pretrained='{hub_id}' is no folder here, and as a hub"):
            BUILD[key](hub_id)
    (tmp_path / 'cache' / 'models--models--sd3').mkdir(parents=True)  # of an owner whose name a folder here has
    with pytest.raises(FileNotFoundError, match="pretrained='models/sd3' is no folder here, and as a hub id"):
        BUILD[key]('models/sd3')


@pytest.mark.parametrize('name, given, fitting', [
    ('longcat', SD3Backbone, LongCatImageBackbone), ('sd3', FluxBackbone, SD3Backbone),
    ('flux', LongCatImageBackbone, FluxBackbone)], ids=lambda x: getattr(x, '__name__', x))
def test_another_architectures_folder_names_the_type_to_set(name, given, fitting, tinies):
    with pytest.raises(ValueError) as error:
        given(pretrained=tinies(name).folder)
    text = str(error.value)
    assert f'model.backbone.type={given.__name__} takes a {given.network_class.__name__}' in text
    assert f"set model.backbone.type='{fitting.__name__}'" in text


# Weights that do not fit


@pytest.mark.parametrize('change, words', [
    (lambda w, name: w.pop(name), 'lacks weights, 1 of them: {}'),
    (lambda w, name: w.update(extra=torch.zeros(2)), 'has weights that nothing takes, 1 of them: extra'),
    (lambda w, name: w.update({name: torch.zeros(5)}), 'cannot be loaded: .*{}'),
], ids=['missing', 'extra', 'shape'])
def test_weights_that_do_not_fit_are_refused(change, words, tiny, tmp_path):
    folder = copied(tiny, tmp_path)
    weights = load_file(folder / WEIGHTS)
    last = dict(z_image='all_final_layer.2-1.linear.bias', klein='proj_out.weight',
                flux2='proj_out.weight', krea2='final_layer.linear.bias').get(tiny.name, 'proj_out.bias')
    change(weights, last)
    save_file(weights, folder / WEIGHTS, metadata=dict(format='pt'))
    with pytest.raises(ValueError, match=r'the network in .*copy. \(model\.backbone\.pretrained\) '
                                         + words.format(re.escape(last))):
        tiny.method(backbone=dict(pretrained=str(folder)))


def test_config_beside_pretrained_states_what_is_expected(tiny):
    heads, text, width, own = dict(z_image=('n_heads', 'cap_feat_dim', 'dim', 16), krea2=(
        'num_attention_heads', 'text_hidden_dim', 'attention_head_dim', 8)).get(
        tiny.name, ('num_attention_heads', 'joint_attention_dim', 'attention_head_dim', 8))
    config = {heads: 2, text: tiny.method().backbone.config[text]}
    assert tiny.method(backbone=dict(config=config)).backbone.config[heads] == 2
    with pytest.raises(ValueError, match=rf'model\.backbone\.config\.{width}=64, but the network in .* has '
                                         f'{own}: .* config only states what is expected'):
        tiny.method(backbone=dict(config={**config, width: 64}))


def test_config_beside_pretrained_may_be_a_file_and_lists_equal_tuples(longcat):
    path = str(Path(longcat.folder, 'transformer', 'config.json'))
    assert longcat.method(backbone=dict(config=path)).student.dtype == torch.float32
    for axes in ([2, 2, 4], (2, 2, 4)):
        longcat.method(backbone=dict(config=dict(axes_dims_rope=axes)))
    with pytest.raises(ValueError, match=r'config\.axes_dims_rope=\(4, 2, 2\)'):
        longcat.method(backbone=dict(config=dict(axes_dims_rope=(4, 2, 2))))


def test_neither_pretrained_nor_config_is_refused():
    with pytest.raises(ValueError, match='needs pretrained .* or config .* but has neither'):
        LongCatImageBackbone()


# Settings


def test_float16_is_refused_everywhere(tiny):
    for part, key in ((dict(dtype='float16'), 'dtype'), (dict(conditioner=dict(dtype='float16')), 'conditioner.dtype'),
                      (dict(codec=dict(dtype='float16')), 'codec.dtype')):
        with pytest.raises(ValueError, match=rf"model\.backbone\.{key} must be float32, bfloat16 or float64, but is "
                                             "'float16' .*take bfloat16"):
            tiny.method(backbone=part)


@pytest.mark.parametrize('name, size, multiple', [('longcat', (72, 64), 16), ('longcat', (64, 8), 16),
                                                  ('flux', (16, 18), 4), ('sd3', (18, 16), 4)], ids=str)
def test_sizes_that_make_no_whole_tokens_are_refused(name, size, multiple, tinies):
    with pytest.raises(ValueError, match=rf'image size .*model\.image_size.* must be multiples of {multiple} pixels'):
        tinies(name).method(image_size=size)


def test_unknown_keys_and_kernels_are_refused(tiny):
    with pytest.raises(ValueError, match=r"model\.backbone\.attention='flesh' is unknown.*did you mean 'flash'"):
        tiny.method(backbone=dict(attention='flesh'))
    with pytest.raises(ValueError, match=r'model\.backbone\.revison is unknown: .*revision'):
        tiny.method(backbone=dict(revison='main'))


@pytest.mark.parametrize('setting', [
    dict(invert_sigmas=True), dict(use_karras_sigmas=True),
    dict(use_exponential_sigmas=True), dict(use_beta_sigmas=True)], ids=str)
def test_unsupported_schedulers_are_refused(setting, longcat, tmp_path, monkeypatch):
    """From the config, and from the pretrained folder; the levels would depend on the whole grid."""
    monkeypatch.setattr('diffusers.schedulers.scheduling_flow_match_euler_discrete.is_scipy_available', lambda: True)
    (name, value), = setting.items()
    words = rf'model\.backbone\.scheduler: {name}={value!r} is not supported'
    with pytest.raises(ValueError, match=words):
        longcat.method(backbone=dict(scheduler=setting))
    folder = copied(longcat, tmp_path)
    FlowMatchEulerDiscreteScheduler(**setting).save_pretrained(folder / 'scheduler')
    with pytest.raises(ValueError, match=words):
        longcat.method(backbone=dict(pretrained=str(folder)))
    assert longcat.method(backbone=dict(pretrained=str(folder), scheduler=dict(shift=3.0))).backbone.shift((8, 8)) == 3


# Where from


def test_a_variant_is_loaded_for_every_part(tiny, tmp_path):
    """A folder with half-precision weights alone; the networks are still float32."""
    tiny.pipeline.save_pretrained(tmp_path, variant='fp16')
    assert not (tmp_path / WEIGHTS).is_file()
    method = tiny.method(backbone=dict(pretrained=str(tmp_path), variant='fp16'))
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    original = tiny.method()
    for ours, theirs in zip(method.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert method.backbone.conditioner.to_config()['variant'] == 'fp16' == method.backbone.codec.to_config()['variant']
    with pytest.raises(OSError):
        tiny.method(backbone=dict(pretrained=str(tmp_path)))


def test_a_revision_reaches_every_part(tiny, monkeypatch):
    seen = {}
    backbone = tiny.method().backbone
    for name, owner, call in (
            ('network', backbone.network_class, 'from_pretrained'), ('config', backbone.network_class, 'load_config'),
            ('scheduler', FlowMatchEulerDiscreteScheduler, 'from_pretrained'),
            ('codec', backbone.codec.vae_class, 'from_pretrained'),
            ('encoders', backbone.pipeline_class(), 'from_pretrained')):
        def record(cls, *args, original=getattr(owner, call).__func__, name=name, **kwargs):
            seen.setdefault(name, []).append((kwargs.get('revision'), kwargs.get('local_files_only')))
            return original(cls, *args, **kwargs)
        monkeypatch.setattr(owner, call, classmethod(record))
    method = tiny.method(backbone=dict(revision='abc', local_files_only=True))
    assert set(seen) == {'network', 'config', 'scheduler', 'codec', 'encoders'}
    for name in seen:  # the pipeline loads some of these classes itself, in its own way
        assert ('abc', True) in seen[name], name
    for part in (method.backbone.conditioner, method.backbone.codec):
        assert part.to_config()['revision'] == 'abc' and 'local_files_only' not in part.to_config()
    assert len(method.backbone.condition(dict(prompt=PROMPTS))) == 2


def test_parts_may_be_left_out_and_are_then_named(tiny, tmp_path):
    for part, other in (('text_encoder', 'conditioner'), ('vae', 'codec')):
        folder = copied(tiny, tmp_path / part)
        shutil.rmtree(folder / part)
        with pytest.raises(ValueError, match=rf'model\.backbone\.{other} is missing: pretrained=.* brings none'):
            tiny.method(backbone=dict(pretrained=str(folder)))
