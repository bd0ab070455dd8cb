"""`cdm init`: what it writes trains, and what it cannot write it says."""
import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from PIL import Image
from recipes import shipped
from tiny_pipelines import save_tiny_flux, save_tiny_klein, save_tiny_sd3, save_tiny_z_image

from cdm_plugin.cli import main
from cdm_plugin.commands import init
from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.config import load_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with prompts and with captioned pictures."""
    monkeypatch.chdir(tmp_path)
    Path('prompts.txt').write_text('a red fox\na lighthouse\n')
    Path('mine/images').mkdir(parents=True)
    for name in ('a.png', 'b.png'):
        Image.new('RGB', (24, 20), 'teal').save(f'mine/images/{name}')
    rows = [dict(caption='a red fox', image='a.png', source='web'), dict(caption='dogs and birds', image='b.png')]
    Path('mine/captions.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return tmp_path


def call(*words):
    return main(['init', 'own.py', *words])


def flags(model, method, data, *more):
    return ['--model', model, '--method', method, '--data', data, *more]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize('model, method, data, more, save, size', [
    ('sd3-medium', 'dmd2-gan', 'mine', (), save_tiny_sd3, 16),
    slow('sd3-medium', 'cdm-consistent', 'prompts.txt', (), save_tiny_sd3, 16),
    slow('z-image', 'flow-matching', 'mine', (), save_tiny_z_image, 16),
    slow('sd3-medium', 'dmd2-gan', 'mine', ('--scale', '8gpus'), save_tiny_sd3, 16),
    slow('sd3-medium', 'cdm', 'mine/captions.jsonl', ('--scale', '8gpus'), save_tiny_sd3, 16),
    slow('sd3.5-medium', 'flow-matching', 'mine', (), save_tiny_sd3, 16),
    slow('z-image', 'dmd2-aware', 'prompts.txt', (), save_tiny_z_image, 16),
    slow('z-image', 'dmd2-gan', 'mine', (), save_tiny_z_image, 16),
    slow('flux2-klein-4b', 'decoupled-dmd', 'mine', (), save_tiny_klein, 32),
    slow('flux2-klein-4b', 'dmd2-gan', 'mine', (), save_tiny_klein, 32),
    slow('flux-dev', 'cdm', 'prompts.txt', (), lambda path: save_tiny_flux(path, guidance_embeds=True), 16),
    slow('flux-dev', 'flow-matching', 'mine', (), lambda path: save_tiny_flux(path, guidance_embeds=True), 16)])
def test_what_it_writes_trains(model, method, data, more, save, size, folder, capsys):
    """With its own pipeline in the place of the published one, of other dimensions."""
    save(folder / 'pipeline')
    assert call(*flags(model, method, data, *more, '--pretrained', 'pipeline')) == 0
    assert f'own.py starts from {"sd3" if model.startswith("sd3") else model.split("-")[0]}' in capsys.readouterr().out
    options = {
        'model.backbone.config': None, 'model.image_size': size, 'train_dataloader.batch_size': 2,
        'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False, 'train_cfg.max_iters': 2,
        'log_level': 'ERROR', 'experiment_name': folder.name, 'custom_hooks': [dict(type='CDMHook')]}
    if method in init.PICTURES:
        options['train_dataloader.dataset.pipeline.1.sizes'] = size
    cfg = load_config('own.py', options)
    report = diagnose(cfg)
    assert report.problems == []
    for role in cfg.param_scheduler:  # warm-ups of 100, from nearly nothing
        cfg.optim_wrapper[role].accumulative_counts, cfg.param_scheduler[role] = 1, []
    if method != 'flow-matching':
        cfg.model.student_every = 1
    runner = Runner.from_cfg(cfg)
    roles = runner.model.trained_roles
    assert set(roles) == {'student'} | (set() if method == 'flow-matching' else {'fake'}) | (
        {'discriminator'} if method == 'dmd2-gan' else set())
    before = {role: [p.detach().clone() for p in getattr(runner.model, role).parameters()] for role in roles}
    runner.train()
    for role, weights in before.items():
        assert any(not torch.equal(p, q) for p, q in zip(getattr(runner.model, role).parameters(), weights)), role
    assert Path('work_dirs/own/iter_2.pth').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('method', ['cdm', 'dmd2-gan', 'flow-matching'])
def test_the_digits_train_as_written(method, folder):
    assert call(*flags('sd3-digits', method, 'labels')) == 0
    cfg = load_config('own.py', {'train_cfg.max_iters': 2, 'train_dataloader.batch_size': 4, 'log_level': 'ERROR',
                                 'custom_hooks': [dict(type='CDMHook')], 'val_dataloader': None, 'val_cfg': None,
                                 'val_evaluator': None, 'experiment_name': folder.name})
    assert diagnose(cfg).problems == []
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2 and ('discriminator' in runner.model.trained_roles) == (method == 'dmd2-gan')


@pytest.mark.slow
def test_every_model_and_method_gives_a_config_that_is_right(folder, monkeypatch, capsys):
    """Of every scale, by the check that a training begins with; its own check of the data once is enough."""
    monkeypatch.setattr(init, '_check', lambda config: 0)
    for model, starts in init._starts().items():
        for method in init._methods(model):
            data = 'labels' if model == init.LABELLED else 'mine' if method in init.PICTURES else 'prompts.txt'
            for recipe in starts:
                name = f'{model}_{method}_{recipe.scale}.py'
                assert main(['init', name, *flags(model, method, data, '--scale', recipe.scale)]) == 0
                cfg = load_config(name)
                assert cfg.model.type == init.TYPES.get(method, 'DMD2')
                gan = cfg.model.get('losses', {}).get('gan')
                assert (gan is not None) == (method == 'dmd2-gan') and (gan is None or gan.type == 'GANLoss')
                assert len(Path(name).read_text().splitlines()) < 35
                if method in init.PICTURES and model != init.LABELLED:
                    assert cfg.train_dataloader.dataset.pipeline[1].sizes == cfg.model.image_size
    capsys.readouterr()


@pytest.mark.slow
def test_models_whose_network_has_its_guidance_are_those_of_the_recipes():
    found = {model for model, starts in init._starts().items() if load_config(starts[0].name).model.alpha == 0}
    assert found == {model for model in init._starts() if 'cdm-consistent' not in init._methods(model)}


def test_every_model_of_the_recipes_is_there():
    names = {name.split('_')[1 + ('_lora_' in name)] for name in shipped() if '/cdm_' in name}
    assert {name for name in names if not name.endswith(('style', 'emoji'))} == set(init._starts())


def test_the_same_recipe_is_the_base_alone(folder):
    """DMD2 with its GAN on 8 GPUs is shipped; by LoRA it is not, and its lines are written out."""
    call(*flags('sd3-medium', 'dmd2-gan', 'mine', '--scale', '8gpus'))
    text = Path('own.py').read_text()
    assert "_base_ = 'cdm_plugin::sd3/dmd2-gan_sd3-medium_8xb16_4step_4k.py'" in text and 'GANLoss' not in text
    Path('own.py').unlink()
    call(*flags('sd3-medium', 'dmd2-gan', 'mine'))
    text = Path('own.py').read_text()
    assert "_base_ = 'cdm_plugin::sd3/cdm_lora_sd3-medium_1xb4_4step_4k.py'" in text and 'GANLoss' in text
    cfg = load_config('own.py')
    assert cfg.optim_wrapper.discriminator == cfg.optim_wrapper.fake
    assert cfg.train_dataloader.dataset.data_prefix == dict(image='mine/images')


@pytest.mark.parametrize('method', ['cdm', 'flow-matching'])
def test_captions_beside_the_pictures(method, folder, capsys):
    for name in 'ab':
        Path(f'mine/images/{name}.txt').write_text(f'a picture {name}')
    assert call(*flags('sd3-medium', method, 'mine/images')) == 0 and '2 samples' in capsys.readouterr().out
    sample = DATASETS.build(load_config('own.py').train_dataloader.dataset)[0]
    assert sample['prompt'] == 'a picture a'
    assert ('image' in sample) == (method == 'flow-matching') and ('image' not in sample or sample[
        'image'].shape == (3, 1024, 1024))


@pytest.mark.parametrize('data', ['mine', 'mine/images'])
def test_one_line_says_the_size(data, folder):
    if data == 'mine/images':
        for name in 'ab':
            Path(f'mine/images/{name}.txt').write_text(f'a picture {name}')
    call(*flags('sd3-medium', 'flow-matching', data))
    text = Path('own.py').read_text()
    assert text.count('1024') == 1
    Path('own.py').write_text(text.replace('image_size = 1024', 'image_size = (512, 768)'))
    cfg = load_config('own.py')
    assert tuple(cfg.model.image_size) == tuple(cfg.train_dataloader.dataset.pipeline[1].sizes) == (512, 768)


@pytest.mark.parametrize('words, message', [
    (flags('sd3-medium', 'cdm', 'promts.txt'), "--data 'promts.txt' does not exist; did you mean 'prompts.txt'?"),
    (flags('sd3-medium', 'cdm', 'labels'), "--data 'labels' does not exist"),
    (flags('sd3-medium', 'cdm', 'mine/images'), 'a.png has no caption beside it: write a.txt'),
    (flags('sd3-medium', 'cdm', '.'), "'.' has a.jsonl, b.csv: give the one with the captions"),
    (flags('sd3-medium', 'cdm', 'mine/images/a.png'), 'sd3-medium takes texts'),
    (flags('sd3-medium', 'dmd2-gan', 'prompts.txt'), 'names no pictures, from which dmd2-gan learns'),
    (flags('sd3-medium', 'cdm', 'mine/captions.jsonl', '--column', 'captoin'), "--column 'captoin': "),
    (flags('sd3-medium', 'dmd2-gan', 'mine/captions.jsonl', '--images', '.'), "'a.png', is not in .; --images names"),
    (flags('sd3-digits', 'cdm', 'prompts.txt'), 'sd3-digits takes class labels'),
    (flags('sd3-digits', 'cdm', 'no.npz'), 'no.npz does not exist'),
    (flags('flux-dev', 'cdm-consistent', 'prompts.txt'), '--method cdm-consistent does not go with flux-dev'),
    (flags('flux-dev', 'cdm', 'prompts.txt', '--scale', '8gpus'), '--scale 8gpus: flux-dev has lora'),
    (['--model', 'z-image'], '--method and --data missing'),
])
def test_a_mistake_is_named_and_nothing_is_written(words, message, folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', open(os.devnull))
    for name in ('a.jsonl', 'b.csv'):
        Path(name).touch()
    assert call(*words) == 2
    assert message in capsys.readouterr().err and not Path('own.py').exists()


def test_a_model_that_is_almost_known(capsys):
    with pytest.raises(SystemExit):
        call('--model', 'sd3-midium')
    assert "'sd3-midium' is unknown; did you mean 'sd3-medium'?" in capsys.readouterr().err


def test_a_file_that_is_there_is_left_alone(folder, capsys):
    Path('own.py').write_text('mine')
    assert call(*flags('sd3-digits', 'cdm', 'labels')) == 2
    assert 'own.py is there already' in capsys.readouterr().err and Path('own.py').read_text() == 'mine'
    assert main(['init', 'own.yaml', *flags('sd3-digits', 'cdm', 'labels')]) == 2
    assert 'must end in .py' in capsys.readouterr().err


def test_a_terminal_is_asked(folder, monkeypatch, capsys):
    """A slip of the hand is asked again; an empty answer is the default."""
    answers = iter(['sd3-midium', 'sd3-medium', '', '', 'prompts.txt'])
    monkeypatch.setattr('builtins.input', lambda question: print(question) or next(answers))
    monkeypatch.setattr(sys.stdin, 'isatty', lambda: True, raising=False)
    assert call() == 0
    out = capsys.readouterr().out
    assert "did you mean 'sd3-medium'?" in out and 'method [cdm-consistent]: ' in out and '2 samples' in out
    assert runpy.run_path('own.py')['model']['anchor_aware_fake'] is True

    def nobody(question):
        raise EOFError

    Path('own.py').unlink()
    monkeypatch.setattr('builtins.input', nobody)
    assert call() == 2 and 'nothing is written' in capsys.readouterr().err
    assert DefaultScope.get_current_instance() is not None
