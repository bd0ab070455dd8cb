"""No file of a run, no log and nothing that is published holds a secret of its config, and runs go on without them."""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MMLogger
from mmengine.registry import MODELS
from mmengine.runner import FlexibleRunner, Runner

from cdm_plugin.backbones import Backbone
from cdm_plugin.cli import main
from cdm_plugin.commands.compare.runs import flat_config
from cdm_plugin.config import load_config
from cdm_plugin.export import export
from cdm_plugin.inference import load_method
from cdm_plugin.losses import ScoreLoss
from cdm_plugin.secrets import MASK, is_secret, mask_text, masked, unmasked

CONFIG = str(Path(__file__).parent / 'data/first_round/config.py')
# Any of them in a file is a leak.
SECRETS = dict(token='plain-hub-token', key='plain-api-key', word='plain-password', login='plain-login')


@pytest.mark.parametrize('key', [
    'token', 'hub_token', 'HF_TOKEN', 'hubToken', 'auth_token', 'api_key', 'apiKey', 'wandb_api_key', 'wandb_key',
    'aws_secret_access_key', 'access_key_id', 'private_key', 'api_keys', 'secret', 'secret_id', 'client_secret',
    'password', 'db_passwd', 'passphrase', 'credentials', 'Authorization'])
def test_keys_of_secrets(key):
    value = ['x'] if key.endswith('s') else 'x'
    assert is_secret(key, value) and masked({key: value}) == {key: [MASK] if key.endswith('s') else MASK}
    assert masked({key: None, 'a': dict(b=[{key: value}])})[key] is None
    assert 'x' not in str(masked({'a': dict(b=[({key: value},)])}))


@pytest.mark.parametrize('key, value', [
    ('key', 'image'), ('keys', ['a']), ('keep_keys', ['a']), ('by_key', 'x'), ('key_indicator', 'a'),
    ('meta_keys', 'a'), ('sort_key', 'resnet50_imagenet1k'), ('monkey', 'x'), ('keyboard', 'x'), ('author', 'x'),
    ('num_tokens', 3), ('max_token', 3), ('pad_token', '<pad>'), ('eos_token', '</s>'), ('tokens', 'x'),
    ('token', None), ('use_auth_token', True), ('tokenizer', 'x'), ('', 'x'), (3, 'x')])
def test_keys_of_anything_else(key, value):
    assert not is_secret(key, value) and masked({key: value}) == {key: value}


@pytest.mark.parametrize('value', ['AKIAIOSFODNN7EXAMPLE', '0123456789abcdef0123456789abcdef01234567'])
def test_a_key_whose_value_looks_like_one(value):
    assert masked(dict(key=value, comet_key=value)) == dict(key=MASK, comet_key=MASK)


@pytest.mark.parametrize('text, expected', [
    ('see https://me:pw@host:80/a@b?x=1', 'see https://***@host:80/a@b?x=1'), ('s3://id@bucket/x', 's3://***@bucket/x'),
    ('https://h/x?a=1&token=pw&api_key=pw;b=2', 'https://h/x?a=1&token=***&api_key=***;b=2'),
    ('https://h/x?X-Amz-Signature=pw&sig=pw', 'https://h/x?X-Amz-Signature=***&sig=***'),
    ('hf_abcdefghijklmnopqrst is a token', '*** is a token'), ('git@github.com:a/b', 'git@github.com:a/b'),
    ('https://h/@me, mail me@host.org', 'https://h/@me, mail me@host.org'), ('hf_transfer', 'hf_transfer')])
def test_urls(text, expected):
    assert mask_text(text) == expected and masked([dict(a=(text,))]) == [dict(a=(expected,))]


def test_a_masked_copy_is_of_the_same_kind_and_the_original_stays():
    cfg = Config(dict(model=dict(token='x', layers=[dict(api_key='x', n=1)], pair=(1, 2))))
    shown = masked(cfg)
    assert type(shown) is Config and type(shown.model) is type(shown.model.layers[0]) is ConfigDict
    assert shown.to_dict() == dict(model=dict(token=MASK, layers=[dict(api_key=MASK, n=1)], pair=(1, 2)))
    assert cfg.model.token == cfg.model.layers[0].api_key == 'x'
    assert unmasked(shown, cfg).to_dict() == cfg.to_dict()
    assert unmasked(shown).to_dict() == dict(model=dict(layers=[dict(n=1)], pair=(1, 2)))


def test_a_lazy_config_names_its_classes_as_before(tmp_path):
    (tmp_path / 'lazy.py').write_text('from cdm_plugin.codecs import PixelCodec\n'
                                      'codec = dict(type=PixelCodec, scale=2, token="x")\n')
    cfg = Config.fromfile(tmp_path / 'lazy.py', lazy_import=True)
    shown = masked(cfg)
    assert shown.pretty_text == cfg.pretty_text.replace("'x'", f"'{MASK}'") and shown.codec.type is cfg.codec.type
    assert 'token="x"' in cfg.text


@MODELS.register_module()
class PaidLoss(ScoreLoss):
    """A loss that wants an account."""

    def __init__(self, api_key='from the environment', **kwargs):
        super().__init__(**kwargs)
        self.api_key = api_key

    def forward(self, inputs):
        return inputs.prediction.x0.square().flatten(1).mean(1), {}


OPTIONS = {
    'model.backbone.token': SECRETS['token'], 'model.losses': dict(paid=dict(type='PaidLoss', api_key=SECRETS['key'])),
    'mirror': f'https://me:{SECRETS["login"]}@host/x', 'notify': dict(password=SECRETS['word']),
    'train_cfg.max_iters': 2, 'default_hooks.checkpoint.interval': 2, 'log_level': 'INFO', 'param_scheduler': None,
    'visualizer': dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend'),
                                                        dict(type='TensorboardVisBackend')])}


@pytest.fixture(scope='module', params=[Runner, pytest.param(FlexibleRunner, marks=pytest.mark.slow)])
def run(request, tmp_path_factory):
    """A run whose config has secrets of every kind, and its config."""
    work_dir = tmp_path_factory.mktemp(request.param.__name__)
    cfg = load_config(CONFIG, {**OPTIONS, 'work_dir': str(work_dir), 'experiment_name': str(work_dir)})
    runner = request.param.from_cfg(cfg)
    runner.train()
    return runner, cfg


def leaks(folder):
    return [(str(path), secret) for path in folder.rglob('*') if path.is_file()
            for secret in SECRETS.values() if secret.encode() in path.read_bytes()]


def test_no_file_of_a_run_has_a_secret_and_the_run_had_them(run):
    runner, cfg = run
    method, work_dir = getattr(runner.model, 'module', runner.model), Path(runner.work_dir)
    assert method.backbone.load_kwargs['token'] == SECRETS['token']
    assert method.losses['paid'].api_key == SECRETS['key']
    suffixes = {path.suffix for path in work_dir.rglob('*')}
    assert {'.log', '.py', '.json', '.pth'} <= suffixes and any('tfevents' in p.name for p in work_dir.rglob('*'))
    assert leaks(work_dir) == []
    for file in (*work_dir.rglob('*.py'), *work_dir.rglob('*.log'), next(work_dir.rglob('*tfevents*'))):
        text = file.read_bytes().decode(errors='replace')
        assert f"token='{MASK}'" in text and f"api_key='{MASK}'" in text and f'https://{MASK}@host' in text, file
    saved = torch.load(work_dir / 'iter_2.pth', weights_only=True)['config']
    assert saved['model']['backbone']['token'] == saved['notify']['password'] == MASK
    assert cfg.model.backbone.token == SECRETS['token']  # what was given is as it was


def test_what_a_run_has_written_is_gone_on_with(run, tmp_path, monkeypatch, capsys):
    work_dir = shutil.copytree(run[0].work_dir, tmp_path / 'run')
    written, file = str(next(work_dir.glob('*.py'))), str(work_dir / 'iter_2.pth')
    seen = []
    monkeypatch.setattr(Backbone, '_load_config', lambda self, config, stock=Backbone._load_config: (
        seen.append(self.load_kwargs), stock(self, config))[1])
    both = ('student', 'teacher')
    given = load_method(CONFIG, file, device='cpu', roles=both, options=OPTIONS)
    assert given.losses['paid'].api_key == SECRETS['key'] and seen[-1]['token'] == SECRETS['token']
    bare = load_method(written, file, device='cpu', roles=both)
    assert bare.losses['paid'].api_key == 'from the environment' and seen[-1] == {}
    Runner.from_cfg(Config(dict(Config.fromfile(written).to_dict(), work_dir=str(tmp_path / 'stock'),
                                experiment_name=str(tmp_path)))).train()
    assert seen[-1] == {}  # a hub token, without `cdm`
    capsys.readouterr()
    assert main(['train', written, '--resume', '--work-dir', str(work_dir), '--cfg-options', 'train_cfg.max_iters=3',
                 'default_hooks.checkpoint.interval=1', f'experiment_name={tmp_path}resumed']) == 0
    assert 'with other settings' not in ''.join(capsys.readouterr())
    assert (work_dir / 'iter_3.pth').is_file()


def test_no_page_and_no_card_has_a_secret(run, tmp_path):
    runner, cfg = run
    page = tmp_path / 'page.html'
    assert main(['compare', runner.work_dir, '--out', str(page)]) == 0
    assert "'***'" in page.read_text()
    text = f"model = dict(backbone=dict(token='{SECRETS['token']}', type='A'), keys=['a'])\nurl = 'http://a:pw@b'\n"
    assert flat_config(text) == {  # a log of before, or of another program
        'model.backbone.token': "'***'", 'model.backbone.type': "'A'", 'model.keys': "['a']", 'url': "'http://***@b'"}
    method = load_method(CONFIG, str(Path(runner.work_dir, 'iter_2.pth')), device='cpu', options=OPTIONS)
    export(method, tmp_path / 'out', config=cfg, ema=False)
    assert leaks(tmp_path) == []


def test_the_log_has_no_login(tmp_path):
    logger = MMLogger.get_instance(f'{tmp_path}', log_file=str(tmp_path / 'x.log'))
    logger.info('Load checkpoint from %s', 'https://me:pw@host/x.pth?token=pw')
    assert re.search(r'from https://\*\*\*@host/x.pth\?token=\*\*\*$', (tmp_path / 'x.log').read_text().strip())


def test_a_cache_is_known_again_with_another_token(tmp_path):
    from cache_support import toy_cfg

    from cdm_plugin.data import cache_embeddings
    for token in (SECRETS['token'], 'another'):
        cfg = toy_cfg(['a', 'bb'])
        cfg.model.backbone.token = token
        cache_embeddings(cfg, str(tmp_path / 'cache'), dtype='float32')
    assert leaks(tmp_path) == [] and 'token' not in json.loads((tmp_path / 'cache/index.json').read_text())['encoder']


def test_pairs_are_known_again_with_another_token(tmp_path):
    for token in (SECRETS['token'], 'another'):
        assert main(['pairs', 'digits/dmd2_sd3-digits_1xb32_4step_800.py', '--out', str(tmp_path), '--num', '1',
                     '--steps', '1', '--cfg-options', f'model.backbone.token={token}']) == 0
    assert leaks(tmp_path) == [] and (tmp_path / 'pairs.json').is_file()
