"""Shipped recipes build, and mistakes in a config are one clear line before anything trains."""
import re
from pathlib import Path
from typing import Annotated

import pytest
from annotated_types import Lt
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, TRANSFORMS
from mmengine.runner import Runner
from recipes import CDM, TEACHER
from type_styles import STYLES, restyled, write_lazy

from cdm_plugin.cli import main
from cdm_plugin.config import RECIPES, check_config, load_config
from cdm_plugin.data import LabelDataset
from cdm_plugin.losses import CALoss

# Those whose models the package carries; tests/test_recipes.py has the others.
SHIPPED = sorted(str(p.relative_to(RECIPES)) for p in RECIPES.glob('digits/*.py'))


def test_the_digits_recipes_are_shipped():
    starts = [name.split('/')[1].split('_')[0] for name in SHIPPED]
    assert sorted(starts) == ['cdm', 'cdm-fixed-grid', 'decoupled-dmd', 'dmd2', 'dmd2-gan', 'tdm', 'teacher']


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
    ('model.losses.ca.alpa', 3, ['model.losses.ca.alpa', 'CALoss', "did you mean 'alpha'"]),
    ('model.losses.cb.alpha', 3, ['model.losses.cb', "['ca', 'cdm', 'dm']"]),
    ('model.losses.ca.type', 'CALos', ['model.losses.ca.type', "did you mean 'CALoss'"]),
    ('model.backbone.conditoner', {'type': 'ClassConditioner'}, ['conditoner', 'conditioner']),
    ('model.backbone.pretrained', './no/such/folder', ['model.backbone.pretrained', './no/such/folder']),
    ('model.backbone.pretrained', 'asset:digits/nothing', ['digits/nothing']),
    ('model.backbone.dtype', 'float8', ['model.backbone.dtype', 'float8']),
    ('model.sample_sigmas', [0.25, 0.5, 1.0], ['model.sample_sigmas', 'descending']),
    ('model.sample_sigmas', [1.5, 1.0], ['model.sample_sigmas', '(0, 1]']),
    ('model.sample_sigmas', [0.9, 0.5], ['model.sample_sigmas', 'start at 1.0']),
    ('model.time_grid.max_steps', 0, ['model.time_grid.max_steps must be a whole number of 1 or more, but is 0']),
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
    (dict(type='EmbeddingDataset', data_root='{longer}'), ['attends to all tokens', '[2, 3]', 'null condition']),
], ids=['missing', 'empty', 'column', 'texts for a class model', 'absent field', 'other width', 'other length'])
def test_bad_data_is_one_line_before_the_first_iteration(dataset, parts, tmp_path, capsys):
    import torch

    from cdm_plugin.data import write_embeddings
    (tmp_path / 'empty.txt').write_text('\n\n')
    (tmp_path / 'captions.csv').write_text('caption\na cat\n')
    write_embeddings(tmp_path / 'narrow' / 'a.safetensors', dict(
        encoder_hidden_states=torch.zeros(2, 2, 21), pooled_projections=torch.zeros(2, 11)), ['a', 'b'])
    write_embeddings(tmp_path / 'longer' / 'a.safetensors', dict(
        encoder_hidden_states=torch.zeros(2, 3, 22), pooled_projections=torch.zeros(2, 11)), ['a', 'b'])
    paths = dict(empty=tmp_path / 'empty.txt', captions=tmp_path / 'captions.csv', narrow=tmp_path / 'narrow',
                 longer=tmp_path / 'longer')
    dataset = {k: v.format(**paths) if isinstance(v, str) else v for k, v in dataset.items()}
    cfg = load_config(CDM, {'log_level': 'ERROR', 'experiment_name': f'bad-data-{parts[-1]}'})
    cfg.train_dataloader.dataset = dataset
    own = tmp_path / 'own.py'
    cfg.dump(str(own))
    assert main(['train', str(own), '--work-dir', str(tmp_path / 'run')]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in error for part in parts), error
    assert not list(Path(tmp_path, 'run').glob('*.pth'))


@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize('recipe', [CDM, TEACHER])
def test_types_may_be_written_in_any_way(recipe, style):
    cfg = restyled(load_config(recipe), style)
    assert cfg.model.type != load_config(recipe).model.type
    check_config(cfg)
    for key in ('model.alpa', 'train_dataloader.dataset.lenght', 'custom_hooks.0.ema_deky'):
        wrong = restyled(load_config(recipe), style)
        wrong.merge_from_dict({key: 3})
        with pytest.raises(ValueError, match=re.escape(key.replace('.0', '[0]')) + ' is unknown: '):
            check_config(wrong)


def test_a_config_in_plain_python_is_checked(tmp_path):
    path = write_lazy(tmp_path)
    assert load_config(path, {'model.alpha': 2.0}).model.alpha == 2
    for key, message in {'model.losses.ca.alpa': r'model\.losses\.ca\.alpa is unknown: CALoss',
                         'custom_hooks.0.ema_deky': r"custom_hooks\[0\]\.ema_deky .*'ema_decay'",
                         'train_dataloader.sampler.type': "'3' is not registered"}.items():
        with pytest.raises(ValueError, match=message):
            load_config(path, {key: '3'})


@pytest.mark.parametrize('kind, hint', [
    ('mmengine.CMD', 'CDM'), ('cdm_plugin.CDM', 'CDM'), ('cdm_plugin.methods.CMD', 'CDM')])
def test_a_path_that_leads_nowhere_is_named(kind, hint):
    with pytest.raises(ValueError, match=f"model.type='{kind}' is not registered; did you mean '{hint}'"):
        load_config(CDM, {'model.type': kind})


@pytest.mark.parametrize('scope', ['mmengine', 'cdm_plugin', None, 'another_library'])
def test_own_classes_are_checked_under_any_default_scope(scope):
    cfg = load_config(CDM)
    cfg.default_scope = scope
    check_config(cfg)
    for wrong in (dict(type='LabelDataset', num_classes=10, lenght=3), dict(type=LabelDataset, lenght=3),
                  dict(type='another_library.Repeat', dataset=dict(type='LabelDataset', lenght=3)),
                  dict(type='cdm_plugin.data.LabelDatset', num_classes=10)):
        cfg.train_dataloader.dataset = wrong
        with pytest.raises(ValueError, match="'length'|LabelDataset'"):
            check_config(cfg)


def test_what_another_library_should_have_is_left_to_mmengine():
    cfg = load_config(CDM)
    for kind in ('another_library.Dataset', 'another_library.datasets.Dataset'):
        cfg.train_dataloader.dataset = dict(type=kind, pipeline=[dict(type='Resize')])
        check_config(cfg)
    cfg.train_dataloader.dataset = dict(type='TheirDataset')
    with pytest.raises(ValueError, match='TheirDataset'):
        check_config(cfg)
    cfg.default_scope = 'another_library'
    check_config(cfg)


@TRANSFORMS.register_module()
class AcmeAlbu:
    """A transform of another library, which takes types of a third."""

    def __init__(self, transforms):
        self.transforms = transforms


def test_only_what_the_runner_builds_is_checked():
    cfg = load_config(CDM)
    albu = [dict(type='ShiftScaleRotate', shift_limit=0.1)]
    cfg.merge_from_dict(dict(albu_transforms=albu, colours=dict(type='warm'), vis_backends=[dict(type='Mine')]))
    cfg.train_dataloader.dataset.metainfo = dict(type='medical', classes=[dict(type='cell')])
    cfg.train_dataloader.dataset.pipeline = [dict(type='AcmeAlbu', transforms=albu), dict(type='PackInputs')]
    check_config(cfg)
    cfg.train_dataloader.dataset.pipeline[0] = dict(type='AcmeAlbum', transforms=albu)
    with pytest.raises(ValueError, match=r"pipeline\[0\]\.type='AcmeAlbum' .* 'AcmeAlbu'"):
        check_config(cfg)


# Key, value, and what the line says of them (by hand).
VALUES = [
    ('train_cfg.max_iters', -5, 'train_cfg.max_iters must be a whole number of 1 or more, but is -5'),
    ('train_cfg.max_itres', 5, "train_cfg.max_itres is unknown: .* did you mean 'max_iters'"),
    ('train_dataloader.batch_size', 'abc', "train_dataloader.batch_size must be a whole number .*, but is 'abc'"),
    ('train_dataloader.num_wrokers', 2, "train_dataloader.num_wrokers is unknown: .* did you mean 'num_workers'"),
    ('train_dataloader.sampler.shuffle', 'yes', "train_dataloader.sampler.shuffle must be True or False, but is 'yes'"),
    ('train_dataloader.dataset', 'banana', "train_dataloader.dataset must be Dataset, but is 'banana'"),
    ('train_dataloader', ['banana'], r"train_dataloader must be .* a dict .*, but is \['banana'\]"),
    ('model.alpha', 'banana', "model.alpha must be a number, but is 'banana'"),
    ('model.alpha', float('inf'), 'model.alpha must be a finite number, but is inf'),
    ('custom_hooks.0.ema_decay', 2, r'custom_hooks\[0\].ema_decay must be a number in \[0, 1\) or None, but is 2'),
    ('optim_wrapper.student.clip_grad.max_norm', -1, 'student.clip_grad.max_norm must be a number above 0, but is -1'),
    ('optim_wrapper.fake.clip_grad.max_nrom', 1, "fake.clip_grad.max_nrom is unknown: .* did you mean 'max_norm'"),
    ('optim_wrapper.student.optimizer.weight_decay', float('inf'), 'optimizer.weight_decay must be a finite number'),
    ('optim_wrapper.student.optimizer.lr', -1e-3, 'student.optimizer.lr must be a number of 0 or more, but is -0.001'),
    ('optim_wrapper.fake.optimizer.betas', [0.9, 'x'], r"betas\[1\] must be a number or Tensor, but is 'x'"),
    ('optim_wrapper.student.accumulative_counts', 0, 'student.accumulative_counts must be a whole number of 1 or more'),
    ('default_hooks.checkpoint.by_epoch', 'banana', "default_hooks.checkpoint.by_epoch must be True or False"),
    ('default_hooks.checkpiont', {'type': 'CheckpointHook'}, "default_hooks.checkpiont .* did you mean 'checkpoint'"),
    ('param_scheduler', [dict(type='LinearLR', by_epoch='banana')], r'param_scheduler\[0\].by_epoch must be True or'),
    ('param_scheduler', [dict(by_epoch=False)], r'param_scheduler\[0\] needs a type, but has by_epoch'),
    ('param_scheduler', dict(student=[dict(type='StepLR', step_size=2, gamma=-1)]), r'\[0\].gamma must be .* above 0'),
    ('custom_hooks', [None], r'custom_hooks\[0\] must be Hook or a dict, but is None'),
    ('param_scheduler', [None], r'param_scheduler\[0\] must be a dict with a type, but is None'),
    ('randomness', dict(seed='x'), "randomness.seed must be a whole number of 0 or more or None, but is 'x'"),
    ('env_cfg.mp_cfg.mp_start_metod', 'fork', "env_cfg.mp_cfg.mp_start_metod is unknown: .* 'mp_start_method'"),
    ('env_cfg.dist_cfg.bakend', 'gloo', "env_cfg.dist_cfg.bakend is unknown: .* 'backend'"),
    ('env_cfg.dist_cfg.timeout', -1, 'env_cfg.dist_cfg.timeout must be .* above 0'),
    ('default_scope', [], r'default_scope must be a text or None, but is \[\]'),
    ('para_scheduler', [], "para_scheduler is no key of a runner; did you mean 'param_scheduler'"),
    ('optim_wraper', {}, "optim_wraper is no key of a runner; did you mean 'optim_wrapper'"),
]


@pytest.mark.parametrize('key, value, message', VALUES, ids=[f'{k}={v}' for k, v, _ in VALUES])
def test_values_are_checked_wherever_they_will_be_used(key, value, message):
    # How a type is written (a path, the class itself, ...) and where it is looked up make no difference.
    place = [k for k, _, _ in VALUES].index(key)
    cfg = restyled(load_config(CDM), STYLES[place % len(STYLES)])
    cfg.default_scope = ('mmengine', 'another_library', None)[place // 3 % 3]
    check_config(cfg)
    cfg.merge_from_dict({key: value})
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


def test_what_trains_as_it_is_meant_is_left_alone():
    right = {'train_cfg.max_iters': 8e2, 'optim_wrapper.student.clip_grad.max_norm': float('inf'), 'models_of_mine': {},
             'optim_wrapper.student.optimizer.betas': [0.9, 0.95], 'log_level': 10, 'model_2': {}, 'dataloader': {},
             'default_hooks.mine': {'type': 'IterTimerHook'}, 'default_hooks.timer': None, 'randomness.seed': None}
    for key, value in right.items():
        load_config(CDM, {key: value})


@MODELS.register_module()
class AcmeScaledLoss(CALoss):
    """Somebody's loss."""

    def __init__(self, scale: Annotated[float, Lt(0)], **kwargs):
        super().__init__(**kwargs)


def test_classes_that_inherit_from_ours_are_checked_too():
    for part, message in ((dict(scale=1), r'losses.acme.scale must be a number below 0, but is 1'),
                          (dict(scale=-1, min_norm=0), r'losses.acme.min_norm must be a number above 0, but is 0'),
                          (dict(scael=-1), "losses.acme.scael is unknown: .* did you mean 'scale'")):
        with pytest.raises(ValueError, match=message):
            load_config(CDM, {'model.losses.acme': dict(type='AcmeScaledLoss', **part)})
    load_config(CDM, {'model.losses.acme': dict(type='AcmeScaledLoss', scale=-1, alpha=3)})


def test_mmengines_own_runner_checks_the_config_as_well(tmp_path):
    cfg = load_config(CDM, {'log_level': 'ERROR', 'experiment_name': 'own-runner', 'work_dir': str(tmp_path)})
    cfg.default_hooks.checkpoint.by_epoch = 'banana'
    with pytest.raises(ValueError, match=r'default_hooks\.checkpoint\.by_epoch must be True or False'):
        Runner.from_cfg(cfg).train()


@pytest.mark.parametrize('key, value, message', [
    ('optim_wrapper.student', 'banana', "optim_wrapper.student must be a dict, but is 'banana'"),
    ('optim_wrapper.student.optimizer.betas', (1.5, 0.9), 'optim_wrapper.student.optimizer: Invalid beta parameter'),
    ('param_scheduler', [dict(type='LinearLR', start_factor=3.0)], r'param_scheduler\[0\]: Starting multiplicative'),
    ('train_dataloader.prefetch_factor', 2, 'train_dataloader: prefetch_factor option could only be specified')])
def test_what_torch_and_mmengine_refuse_is_named(key, value, message, tmp_path, capsys):
    cfg = load_config(CDM, {'log_level': 'ERROR', 'experiment_name': f'named-{key}', key: value})
    cfg.dump(str(tmp_path / 'own.py'))
    assert main(['train', str(tmp_path / 'own.py'), '--work-dir', str(tmp_path / 'run')]) == 2
    assert re.search(message, capsys.readouterr().err)


# A config's text, and what the line says after the path.
PROGRAMS = {
    'syntax': ('a = (1\n', r"own\.py, line 1: SyntaxError: '\(' was never closed"),
    'name': ('\na = 1\nb = nothere\n', r"own\.py, line 3: NameError: name 'nothere' is not defined"),
    'exit': ('import sys\n\nsys.exit(0)\n', r'own\.py, line 3: SystemExit: 0'),
    'base': ("_base_ = 'base.py'\n", r"base\.py, line 2: ZeroDivisionError: division by zero"),
    'itself': ("_base_ = 'own.py'\n", r'own\.py: RecursionError: '),
    'no base': ("_base_ = 'nothing.py'\n", r"nothing\.py"),
    'lazy': ('from mmengine.config import read_base\nwith read_base():\n    from .nothing import *\n',
             r'own\.py: ConfigParsingError: .*nothing\.py not found'),
    'import': ("custom_imports = dict(imports=['no_such_module'])\n", r'own\.py: ImportError: .*no_such_module'),
    'attribute': ('a = {}\na.b\n', r"own\.py, line 2: AttributeError: 'dict' object has no attribute 'b'"),
    'a list': ('[1]', r"own\.json: AttributeError: 'list' object has no attribute"),
    'nul': ('a = 1\n\0', r'own\.py: SyntaxError: source code string cannot contain null bytes'),
}


@pytest.mark.parametrize('name', PROGRAMS)
def test_an_error_of_a_config_is_one_line_with_its_place(name, tmp_path, capsys):
    text, message = PROGRAMS[name]
    (tmp_path / 'base.py').write_text('a = 1\nb = 1 / 0\n')
    own = tmp_path / ('own.json' if name == 'a list' else 'own.py')
    own.write_text(text)
    for command in ('train', 'doctor'):
        assert main([command, str(own)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert re.search(f'^cdm {command}: .*{message}', lines[-1]), lines
    with pytest.raises(ValueError):
        main(['--traceback', 'train', str(own)])


def test_an_option_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r'the option custom_hooks\.9\.x does not go with the config: .*9'):
        load_config(CDM, {'custom_hooks.9.x': 1})


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


def test_an_unknown_config_says_where_they_are_listed_and_what_was_meant(capsys):
    assert main(['train', TEACHER.replace('teacher', 'teachr')]) == 2
    assert f"is no file and no shipped recipe (`cdm configs` lists them); did you mean '{TEACHER}'?" in (
        capsys.readouterr().err)
