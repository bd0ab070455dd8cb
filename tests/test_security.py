"""Files of strangers (checkpoints, exported folders, caches, pipelines): nothing in them runs, and no name in them
leads out of their folder."""
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from cache_support import toy_cfg
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import FlexibleRunner, Runner
from safetensors.torch import save_file
from tests_support import tiny_backbone
from tiny_pipelines import save_tiny_bert, save_tiny_sd3

from cdm_plugin.cli import main
from cdm_plugin.config import load_config
from cdm_plugin.data import EmbeddingDataset, cache_embeddings
from cdm_plugin.export.staging import staged
from cdm_plugin.files import find_latest_checkpoint, inside, whole_file
from cdm_plugin.inference import load_method
from cdm_plugin.metrics.weights import load_state
from cdm_plugin.pretrained import check_folder

FIRST_ROUND = Path(__file__).parent / 'data/first_round'
CONFIG = str(FIRST_ROUND / 'config.py')
CODE = 'import pathlib\npathlib.Path({marker!r}).touch()\nclass Thing:\n    def __init__(self, **kwargs): pass\n'
# What MMEngine would import and call: code of the library, of torch, of MMEngine, of a module that lies about.
ATTACKS = [
    dict(type='os.system', command='touch {marker}'),
    dict(type='subprocess.run', args=['touch', '{marker}']),
    dict(type='pathlib.Path.touch', self='{marker}'),
    dict(type='builtins.eval', source='1'),
    dict(type='torch.nn.Linear', in_features=1, out_features=1),
    dict(type='a_module_here.Thing'),
    dict(type='ImgDataPreprocessor'),
    dict(type='mmengine.ImgDataPreprocessor'),
    dict(type='mmengine.model.ImgDataPreprocessor'),
    dict(type='UniformSigma', _scope_='a_module_here'),
    dict(type=['os.system']),
]


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that is there if something has run."""
    path = tmp_path / 'owned'
    (tmp_path / 'importable').mkdir()
    (tmp_path / 'importable/a_module_here.py').write_text(CODE.format(marker=str(path)))
    monkeypatch.syspath_prepend(tmp_path / 'importable')
    yield path
    assert not path.exists()
    assert 'a_module_here' not in sys.modules


def aimed(attack, marker):
    return json.loads(json.dumps(attack).replace('{marker}', str(marker)))


def checkpoint(tmp_path, **model):
    state = torch.load(FIRST_ROUND / 'iter_4.pth', weights_only=True)
    state['config']['model'].update(model)
    torch.save(state, tmp_path / 'iter_4.pth')
    return str(tmp_path / 'iter_4.pth')


def exported(tmp_path, **parts):
    folder = shutil.copytree(FIRST_ROUND / 'student', tmp_path / 'student')
    content = json.loads((folder / 'cdm_parts.json').read_text())
    (folder / 'cdm_parts.json').write_text(json.dumps({**content, **parts}))
    return folder


# Types


def in_places(first, *others):
    """Every attack in the first place, one of them in the others."""
    cases = [(attack, first) for attack in ATTACKS] + [(ATTACKS[0], place) for place in others]
    return pytest.mark.parametrize('attack, place', cases, ids=[f'{p}-{a["type"]}{"_scope_" * ("_scope_" in a)}'
                                                                for a, p in cases])


@in_places('time_grid', 'losses.ca', 'fake_sigma')
def test_a_checkpoint_builds_only_what_is_registered(attack, place, tmp_path, marker):
    key, _, name = place.partition('.')
    value = aimed(attack, marker)
    file = checkpoint(tmp_path, **{key: {name: value} if name else value})
    with pytest.raises(ValueError, match='refused') as error:
        load_method(CONFIG, file, device='cpu', roles=('student', 'teacher'))
    text = str(error.value)
    assert file in text and f'config.model.{place}.' in text
    assert '_scope_' in attack or 'DynamicTimeGrid' in text and 'ImgDataPreprocessor' not in text.split('registered')[1]


def test_the_commands_say_it_in_one_line(tmp_path, marker, capsys):
    file = checkpoint(tmp_path, time_grid=aimed(ATTACKS[0], marker))
    for command in (['sample', CONFIG, '--checkpoint', file, '--prompts', '1'],
                    ['export', CONFIG, '--checkpoint', file]):
        assert main([*command, '--out', str(tmp_path / 'out')]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert f"{file}: config.model.time_grid.type='os.system' is refused" in lines[-1]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('model', [dict(type='os.system'), dict(type='ClassConditioner'),
                                   dict(time_grid=dict(type='DynamicTimeGrid', command='touch')),
                                   dict(losses=dict(ca=dict(type='CALoss', nested=[dict(type='os.system')]))),
                                   dict(losses=dict(r=dict(type='RewardLoss', judge=dict(type='DumpResults'))))])
def test_a_checkpoint_names_methods_and_declared_arguments(model, tmp_path, marker):
    with pytest.raises((ValueError, TypeError)):
        load_method(CONFIG, checkpoint(tmp_path, **model), device='cpu', roles=('student', 'teacher'))


def test_what_the_config_itself_says_is_its_own(tmp_path):
    """A config is a program: a class that it names by its path is not the checkpoint's choice."""
    kind = f'{UnregisteredGrid.__module__}.UnregisteredGrid'
    options = {'model.time_grid': dict(type=kind)}
    file = checkpoint(tmp_path, time_grid=dict(type=kind, max_steps=6))
    method = load_method(CONFIG, file, device='cpu', options=options, roles=('student', 'teacher'))
    assert type(method.time_grid).__name__ == 'UnregisteredGrid'


class UnregisteredGrid:

    def __init__(self, max_steps):
        self.max_steps = max_steps

    def sample(self, generator):
        return torch.tensor([1.0, 0.0])


@in_places('conditioner', 'codec')
def test_an_exported_folder_builds_only_what_is_registered(attack, place, tmp_path, marker):
    folder = exported(tmp_path, **{place: aimed(attack, marker)})
    backbone = dict(type='SD3Backbone', pretrained=str(folder))
    for build in (lambda: load_method(str(folder), device='cpu'),
                  lambda: MODELS.build(dict(type='FlowMatching', backbone=dict(backbone)))):  # trained from it
        with pytest.raises(ValueError, match='refused') as error:
            build()
        assert f'cdm_parts.json: {place}.' in str(error.value)


@pytest.mark.parametrize('parts, message', [
    (dict(backbone='os.system'), "backbone='os.system' is refused: it must be a backbone"),
    (dict(backbone='a_module_here.Thing'), 'is refused'), (dict(backbone='ClassConditioner'), 'is refused'),
    (dict(backbone=None), 'is refused'),
    (dict(conditioner=dict(type='PixelCodec')), 'conditioner must be the config of a Conditioner'),
    (dict(conditioner=dict(type='ClassConditioner', num_classes=3, command='x')), 'conditioner.command is unknown'),
    (dict(conditioner=dict(type='ClassConditioner', num_classes='three')), "num_classes must be .*, but is 'three'"),
    (dict(codec=dict(type='PixelCodec', scale=[2])), r'scale must be .*, but is \[2\]'),
    (dict(lora=dict(rank=2), base=dict(pretrained='x', conditioner=dict(type='os.system', command='x'))),
     "base.conditioner.type='os.system' is refused"),
    (dict(lora=dict(rank=2), base=dict(pretrained='x', _scope_='a_module_here')), 'base._scope_'),
    (dict(lora=dict(rank=2), base='x'), 'base.pretrained must be'),
    (dict(recipe=[dict(type='os.system')]), r"recipe\[0\].type='os.system' is refused")])
def test_no_part_of_an_exported_folder_is_taken_unseen(parts, message, tmp_path, marker):
    with pytest.raises(ValueError, match=message) as error:
        load_method(str(exported(tmp_path, **parts)), device='cpu')
    assert 'cdm_parts.json' in str(error.value)


def test_the_method_that_a_folder_says_it_was_trained_by_is_looked_up_and_not_imported(tmp_path, marker):
    from cdm_plugin.export.job import ExportJob
    from cdm_plugin.export.recipe import is_distilled
    for name, distilled in (('a_module_here.Thing', True), ('FlowMatching', False)):
        method = load_method(str(exported(tmp_path / name, recipe=dict(method=name))), device='cpu')
        assert is_distilled(ExportJob(method, False, None, False, None, None)) is distilled


@in_places('encoder')
def test_a_cache_builds_only_what_is_registered(attack, place, tmp_path, marker):
    cache_embeddings(toy_cfg(['a', 'bb']), str(tmp_path / 'cache'), dtype='float32')
    index = json.loads((tmp_path / 'cache/index.json').read_text())
    (tmp_path / 'cache/index.json').write_text(json.dumps({**index, place: aimed(attack, marker)}))
    backbone = tiny_backbone()
    backbone['conditioner'] = dict(type='EmbeddingConditioner', folder=str(tmp_path / 'cache'))
    (tmp_path / 'config.py').write_text(f'model = dict(type="FlowMatching", backbone={backbone!r})\n'
                                        'train_dataloader = optim_wrapper = train_cfg = dict()\n')
    with pytest.raises(ValueError, match='refused') as error:
        load_method(str(tmp_path / 'config.py'), device='cpu', encoders=True)
    assert 'index.json: encoder.' in str(error.value)
    load_method(str(tmp_path / 'config.py'), device='cpu')  # the embeddings alone need no encoder


# Programs


@pytest.mark.parametrize('stock', [Runner, FlexibleRunner])
def test_a_resumed_checkpoint_runs_no_config_of_its_own(stock, tmp_path, marker):
    """Runners of MMEngine run `meta['config']`, which old versions wrote."""
    work_dir = tmp_path / 'run'
    work_dir.mkdir()
    state = torch.load(FIRST_ROUND / 'iter_4.pth', weights_only=True)
    state['meta']['config'] = f'import pathlib\npathlib.Path({str(marker)!r}).touch()\n'
    torch.save(state, work_dir / 'iter_4.pth')
    cfg = load_config(CONFIG, {'work_dir': str(work_dir), 'resume': True, 'train_cfg.max_iters': 5,
                               'param_scheduler': None, 'log_level': 'ERROR', 'hub_token': 'x',
                               'experiment_name': f'{work_dir}{stock.__name__}'})
    runner = stock.from_cfg(cfg)
    runner.train()
    assert runner.iter == 5 and runner.cfg.hub_token == '***' and cfg.hub_token == 'x'


@pytest.fixture(scope='module')
def pipelines(tmp_path_factory):
    root = tmp_path_factory.mktemp('pipelines')
    save_tiny_sd3(root / 'sd3')
    save_tiny_bert(root / 'bert')
    return root


@pytest.mark.parametrize('attack', ['component', 'known library', 'pipeline', 'None'])
def test_a_pipelines_folder_brings_no_code(attack, pipelines, tmp_path, marker):
    folder = shutil.copytree(pipelines / 'sd3', tmp_path / 'base')
    index = json.loads((folder / 'model_index.json').read_text())
    code = CODE.format(marker=str(marker))
    if attack == 'pipeline':
        index['_class_name'] = ['mine', 'Thing']
        (folder / 'mine.py').write_text(code)
    elif attack == 'None':
        (folder / 'None.py').write_text(code)
    else:
        library = 'mine' if attack == 'component' else 'transformers'
        index['text_encoder'] = [library, 'Thing']
        (folder / f'text_encoder/{library}.py').write_text(code)
    (folder / 'model_index.json').write_text(json.dumps(index))
    with pytest.raises((ValueError, OSError)):
        MODELS.build(dict(type='SD3Backbone', pretrained=str(folder)))


def test_an_encoders_folder_brings_no_code_and_nobody_is_asked(pipelines, tmp_path, marker, monkeypatch):
    folder = shutil.copytree(pipelines / 'bert', tmp_path / 'bert')
    config = json.loads((folder / 'config.json').read_text())
    config.update(model_type='mine', auto_map={name: 'mine.Thing' for name in ('AutoConfig', 'AutoModel')})
    (folder / 'config.json').write_text(json.dumps(config))
    (folder / 'mine.py').write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr('builtins.input', lambda question: 'y')
    with pytest.raises(FileNotFoundError, match='no text encoder'):
        MODELS.build(dict(type='TextEncoderConditioner', pretrained=str(folder)))


# Names


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / 'victim'
    path.mkdir()
    (path / 'a.safetensors').write_text('precious')
    yield path
    assert (path / 'a.safetensors').read_text() == 'precious' and len(list(path.iterdir())) == 1


@pytest.mark.parametrize('name', ['../victim', '/etc/passwd', 'a/../../victim', '..', '.', '', 'a\0b', None, 3, ['a']])
def test_a_name_stays_in_its_folder(name, tmp_path):
    (tmp_path / 'folder').mkdir()
    with pytest.raises(ValueError, match='index.json names .* may only name what lies in its folder'):
        inside(tmp_path / 'folder', name, 'index.json')


def test_a_link_stays_in_its_folder_or_the_hubs_cache(victim, tmp_path):
    repo = tmp_path / 'models--acme--tiny'
    folder = repo / 'snapshots/abc'
    folder.mkdir(parents=True)
    (repo / 'blobs').mkdir()
    (repo / 'blobs/1').touch()
    (folder / 'good').symlink_to('../../blobs/1')
    (folder / 'bad').symlink_to(victim / 'a.safetensors')
    (folder / 'there').symlink_to(victim)
    assert inside(folder, 'good', 'x') == folder / 'good'
    for name in ('bad', 'there', 'there/a.safetensors'):
        with pytest.raises(ValueError, match='may only name'):
            inside(folder, name, 'x')
    assert inside(folder, 'bad', 'x', links=False) == folder / 'bad'


def test_a_file_is_not_written_through_a_link(victim, tmp_path):
    (tmp_path / 'index.json.part').symlink_to(victim / 'a.safetensors')
    with whole_file(tmp_path / 'index.json') as part:
        part.write_text('new')
    assert (tmp_path / 'index.json').read_text() == 'new' and not (tmp_path / 'index.json').is_symlink()


@pytest.mark.parametrize('names', [dict(old=[], new=['../victim']), dict(old=['../victim'], new=[]),
                                   dict(old=[], new=['/victim']), dict(old=[], new=['samples', '..'])])
def test_an_export_removes_nothing_outside(names, victim, tmp_path):
    folder = tmp_path / 'out'
    (folder / '.cdm_previous').mkdir(parents=True)
    (folder / 'samples').mkdir()
    text = json.dumps(names).replace('/victim"', f'{victim}"') if names['new'] == ['/victim'] else json.dumps(names)
    (folder / '.cdm_previous/journal.json').write_text(text)
    with pytest.raises(ValueError, match=r'\.cdm_previous/journal\.json names'), staged(folder, []):
        pass
    assert (folder / 'samples').is_dir()


def test_an_earlier_export_that_is_a_link_is_not_put_back(victim, tmp_path):
    folder = tmp_path / 'out'
    folder.mkdir()
    (folder / '.cdm_previous').symlink_to(victim)
    with pytest.raises(OSError), staged(folder, []) as new:  # there is no making a folder of that name
        (new / 'x').touch()
    assert (folder / '.cdm_previous').is_symlink()


@pytest.mark.parametrize('name', ['../victim/a.safetensors', 'link.safetensors'])
def test_a_cache_reads_nothing_outside(name, victim, tmp_path):
    cache_embeddings(toy_cfg(['a', 'bb']), str(tmp_path / 'cache'), dtype='float32')
    (tmp_path / 'cache/link.safetensors').symlink_to(victim / 'a.safetensors')
    index = json.loads((tmp_path / 'cache/index.json').read_text())
    index['shards'][0]['name'] = name
    (tmp_path / 'cache/index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match='index.json names .* may only name what lies in its folder'):
        EmbeddingDataset(str(tmp_path / 'cache')).full_init()


def test_pairs_are_read_from_their_folder(tmp_path):
    (tmp_path / 'pairs.json').write_text(json.dumps(dict(version=1, count=1, shards=[dict(name='../a.safetensors')])))
    with pytest.raises(ValueError, match=r"pairs.json names '../a.safetensors'"):
        DATASETS.build(dict(type='PairDataset', dataset=dict(type='LabelDataset', num_classes=2),
                            data_root=str(tmp_path)))


def test_a_judge_of_a_url_is_kept_in_the_cache_of_torch(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', lambda url, **how: asked.append(how['file_name']))
    for url in ('https://host/a/b%20c.pth', 'https://host/..%2F..%2Fvictim.pth', 'https://host/x?y=/..%2Fz'):
        load_state(url)
    assert asked == ['b c.pth', 'victim.pth', 'z']


@pytest.mark.parametrize('part', ['transformer', 'vae', 'text_encoder'])
def test_an_index_of_weights_reads_nothing_outside(part, pipelines, tmp_path):
    folder = shutil.copytree(pipelines / 'sd3', tmp_path / 'base')
    name = 'model' if part == 'text_encoder' else 'diffusion_pytorch_model'
    save_file(dict(a=torch.ones(1)), tmp_path / 'victim.safetensors')
    (folder / part / f'{name}.safetensors').unlink()
    (folder / part / f'{name}.safetensors.index.json').write_text(
        json.dumps(dict(metadata={}, weight_map=dict(a='../../victim.safetensors'))))
    with pytest.raises(ValueError, match=f"{part}/{name}.safetensors.index.json names '../../victim.safetensors'"):
        MODELS.build(dict(type='SD3Backbone', pretrained=str(folder)))


@pytest.mark.parametrize('text', ['{', '{}', '[]', '{"weight_map": 3}'])
def test_a_damaged_index_of_weights_is_named(text, tmp_path):
    (tmp_path / 'model.safetensors.index.json').write_text(text)
    with pytest.raises(ValueError, match='model.safetensors.index.json is damaged'):
        check_folder(str(tmp_path), str(tmp_path), 'x', 'a folder')


@pytest.mark.parametrize('name', ['..', '.', '../x'])
def test_an_evaluated_model_has_no_name_that_leads_out(name, tmp_path, capsys, monkeypatch):
    from cdm_plugin.commands.evaluate.entries import Entry
    from cdm_plugin.commands.evaluate.generate import check_folder
    (tmp_path / 'prompts.txt').write_text('1\n')
    monkeypatch.chdir(tmp_path)
    if '/' not in name:
        assert main(['evaluate', f'{name}={CONFIG}', '--prompts', 'prompts.txt', '--metrics', 'DigitMetric',
                     '--out', 'out']) == 2
        assert f'the name {name!r} of a model' in capsys.readouterr().err
    with pytest.raises(ValueError, match='the name of a model names'):
        check_folder(tmp_path / 'out', [Entry(name, CONFIG)], {})
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('named', ['..', '.', 'elsewhere/iter_9.pth', '/', '', 'https://evil/iter_9.pth'])
def test_the_latest_checkpoint_is_one_of_this_run(named, tmp_path):
    work_dir, other = tmp_path / 'run', tmp_path / 'elsewhere'
    for folder in (work_dir, other):
        folder.mkdir()
    (other / 'iter_9.pth').touch()
    (work_dir / 'iter_4.pth').touch()
    (work_dir / 'last_checkpoint').write_text(str(tmp_path / named) if named.startswith('else') else named)
    assert find_latest_checkpoint(str(work_dir)) == str(work_dir / 'iter_4.pth')


@pytest.mark.parametrize('info', [
    dict(best_ckpt='..'), dict(best_ckpt_x='.'), dict(best_ckpt='{victim}/a.safetensors'), dict(best_ckpt='{victim}'),
    dict(best_ckpt=''), dict(best_ckpt=3), dict(best_ckpt='iter_4.pth'), dict(keep_ckpt_ids=['/../../victim/a']),
    dict(keep_ckpt_ids='a')])
def test_a_resumed_run_removes_no_file_that_the_checkpoint_names(info, victim, tmp_path):
    from cdm_plugin.compat import unpack_message_hub
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/iter_4.pth').touch()
    info = json.loads(json.dumps(info).replace('{victim}', str(victim)))
    state = dict(log_scalars={}, runtime_info=info, resumed_keys={})
    assert unpack_message_hub(state, str(tmp_path / 'run'))['runtime_info'] == {}
    assert os.listdir(tmp_path / 'run') == ['iter_4.pth']
