"""Shipped recipes build, and mistakes in a config are one clear line before anything trains."""
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from recipes import CDM, TEACHER

from cdm_plugin.cli import main
from cdm_plugin.config import RECIPES, load_config

# Those whose models the package carries; tests/test_recipes.py has the others.
SHIPPED = sorted(str(p.relative_to(RECIPES)) for p in RECIPES.glob('digits/*.py'))


def test_the_digits_recipes_are_shipped():
    starts = [name.split('/')[1].split('_')[0] for name in SHIPPED]
    assert sorted(starts) == ['cdm', 'cdm-fixed-grid', 'decoupled-dmd', 'dmd2', 'teacher']


@pytest.mark.parametrize('recipe', SHIPPED)
def test_every_shipped_recipe_builds(recipe):
    cfg = load_config(recipe)
    method = MODELS.build(cfg.model)
    assert type(method).__name__ == cfg.model.type
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    method.backbone.condition(method.data_preprocessor([dataset[0]]))
    for hook in cfg.custom_hooks:
        HOOKS.build(hook)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type=cfg.optim_wrapper.pop('constructor'), optim_wrapper_cfg=cfg.optim_wrapper))
    assert tuple(constructor(method).keys()) == method.trained_roles


def test_recipes_resolve_as_a_base_of_ones_own_config(tmp_path):
    own = tmp_path / 'own.py'
    own.write_text(f"_base_ = 'cdm_plugin::{CDM}'\nmodel = dict(alpha=3.0)\n")
    cfg = Config.fromfile(own)
    assert (cfg.model.type, cfg.model.alpha) == ('CDM', 3.0)


MISTAKES = [
    # option, value, parts of the one line
    ('model.type', 'CMD', ['model.type', "'CMD'", "did you mean 'CDM'"]),
    ('model.alpa', 3, ['model.alpa', 'alpha']),
    ('model.losses.ca.alpa', 3, ['CALoss', 'alpa']),
    ('model.losses.cb.alpha', 3, ['model.losses.cb', "['ca', 'cdm', 'dm']"]),
    ('model.losses.ca.type', 'CALos', ['model.losses.ca.type', "did you mean 'CALoss'"]),
    ('model.backbone.conditoner', {'type': 'ClassConditioner'}, ['conditoner', 'conditioner']),
    ('model.backbone.pretrained', './no/such/folder', ['model.backbone.pretrained', './no/such/folder']),
    ('model.backbone.pretrained', 'asset:digits/nothing', ['digits/nothing']),
    ('model.backbone.dtype', 'float8', ['model.backbone.dtype', 'float8']),
    ('model.sample_sigmas', [0.25, 0.5, 1.0], ['model.sample_sigmas', 'descending']),
    ('model.sample_sigmas', [1.5, 1.0], ['model.sample_sigmas', '(0, 1]']),
    ('model.sample_sigmas', [0.9, 0.5], ['model.sample_sigmas', 'start at 1.0']),
    ('model.time_grid.max_steps', 0, ['model.time_grid', 'max_steps=0']),
    ('model.student_every', 0, ['model.student_every', '0']),
    ('model.fake_steps', 1.5, ['model.fake_steps', '1.5']),
    ('model.fake_merge', 1.5, ['model.fake_merge', '1.5']),
    ('model.image_size', 17, ['model.image_size', 'divisible by 2']),
    ('optim_wrapper.fakes', {'optimizer': {'type': 'SGD', 'lr': 0.1}}, ['optim_wrapper.fakes', 'student']),
    ('train_dataloader.dataset.num_classes', 12, ['num_classes=10', '0..9']),
    ('custom_hooks.0.ema_deky', 0.9, ['ema_deky', 'ema_decay']),
    ('custom_hooks.0.type', 'CDMHok', ['custom_hooks[0].type', 'CDMHook']),
]


@pytest.mark.parametrize('key, value, parts', MISTAKES, ids=[f'{k}={v}' for k, v, _ in MISTAKES])
def test_a_mistake_is_one_line_that_names_the_key(key, value, parts, tmp_path, capsys):
    # DictAction reads text; a config of one's own carries any value.
    own = tmp_path / 'own.py'
    own.write_text(f"_base_ = 'cdm_plugin::{CDM}'\n")
    cfg = Config.fromfile(own)
    # A label outside the conditioner's classes must come early in the data to be seen in the first sample.
    cfg.merge_from_dict({'log_level': 'ERROR', 'train_dataloader.batch_size': 64,
                         'experiment_name': f'mistake-{MISTAKES.index((key, value, parts))}', key: value})
    cfg.dump(str(own))
    status = main(['train', str(own), '--work-dir', str(tmp_path / 'run'), '--cfg-options', 'train_cfg.max_iters=1'])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2
    assert error.startswith('cdm train: ')
    for part in parts:
        assert part in error, error
    assert not list(Path(tmp_path, 'run').glob('*.pth'))


@pytest.mark.parametrize('dataset, parts', [
    (dict(type='PromptDataset', ann_file='none.txt'), ['ann_file', 'none.txt']),
    (dict(type='PromptDataset', ann_file='{empty}'), ['ann_file', 'empty.txt']),
    (dict(type='PromptDataset', ann_file='{captions}', column='prompt'), ['column', 'caption']),
    (dict(type='PromptDataset', ann_file='{captions}', column='caption'), ['class labels', 'conditioner']),
    (dict(type='LabelDataset', num_classes=10, pipeline=[dict(type='PackInputs', prompt='caption')]),
     ['caption', 'PackInputs']),
    (dict(type='EmbeddingDataset', data_root='{narrow}'), ['encoder_hidden_states', '21', '22']),
], ids=['missing', 'empty', 'column', 'texts for a class model', 'absent field', 'other width'])
def test_bad_data_is_one_line_before_the_first_iteration(dataset, parts, tmp_path, capsys):
    import torch

    from cdm_plugin.data import write_embeddings
    (tmp_path / 'empty.txt').write_text('\n\n')
    (tmp_path / 'captions.csv').write_text('caption\na cat\n')
    write_embeddings(tmp_path / 'narrow' / 'a.safetensors', dict(
        encoder_hidden_states=torch.zeros(2, 2, 21), pooled_projections=torch.zeros(2, 11)), ['a', 'b'])
    paths = dict(empty=tmp_path / 'empty.txt', captions=tmp_path / 'captions.csv', narrow=tmp_path / 'narrow')
    dataset = {k: v.format(**paths) if isinstance(v, str) else v for k, v in dataset.items()}
    cfg = load_config(CDM, {'log_level': 'ERROR', 'experiment_name': f'bad-data-{parts[-1]}'})
    cfg.train_dataloader.dataset = dataset
    own = tmp_path / 'own.py'
    cfg.dump(str(own))
    assert main(['train', str(own), '--work-dir', str(tmp_path / 'run')]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in error for part in parts), error
    assert not list(Path(tmp_path, 'run').glob('*.pth'))


def test_missing_parts_of_a_run_are_named(tmp_path, capsys):
    def run(name, change):
        cfg = load_config(CDM, {'log_level': 'ERROR', 'experiment_name': f'missing-{name}'})
        change(cfg)
        own = tmp_path / 'own.py'
        cfg.dump(str(own))
        assert main(['train', str(own), '--work-dir', str(tmp_path / 'run')]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    assert 'optim_wrapper' in run('optimizer', lambda cfg: cfg.pop('optim_wrapper'))
    assert 'optim_wrapper.fake' in run('fake', lambda cfg: cfg.optim_wrapper.pop('fake'))
    assert 'CDMHook' in run('hook', lambda cfg: cfg.custom_hooks.pop(0))


def test_unknown_config_lists_what_there_is(capsys):
    assert main(['train', 'digits/nothing.py']) == 2
    assert TEACHER in capsys.readouterr().err
