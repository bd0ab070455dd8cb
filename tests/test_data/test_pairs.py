"""`cdm pairs`, the dataset that reads them, and DMD's regression onto them (arXiv 2311.18828)."""
import os
import shutil
import time

import pytest
import torch
from acme_plugin import config, picture
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from safetensors.torch import load_file
from scale_support import Workers, run_command
from tests_support import recording_optimizers, same_bits, tiny_method

from cdm_plugin.cli import main
from cdm_plugin.data import pairs as data_pairs
from cdm_plugin.inference import load_method

DIGITS = 'digits/dmd2_sd3-digits_1xb32_4step_800.py'
LABELS = dict(type='LabelDataset', num_classes=10, length=6)


def pairs(out, *arguments, num=5, status=0):
    assert main(['pairs', DIGITS, '--out', str(out), '--num', str(num), '--steps', '3', '--batch-size', '2',
                 '--shard-size', '2', *arguments, '--cfg-options', 'train_dataloader.dataset.length=6']) == status


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp('pairs') / 'out'
    pairs(out)
    return out


def dataset(folder, **inner):
    return DATASETS.build(dict(type='PairDataset', dataset=dict(LABELS, **inner), data_root=str(folder)))


def test_a_pair_is_noise_and_where_the_guided_teacher_takes_it(folder):
    """Euler steps written out; guidance scale 2, as alpha is 1; shift 3."""
    method, read = load_method(DIGITS, roles=['teacher'], device='cpu'), dataset(folder)
    assert len(read) == 5
    batch = default_collate([read[i] for i in range(5)])
    noise = method.noise(0, range(5))
    assert torch.equal(batch['pair_noise'], noise) and batch['pair_latents'].shape == (5, 4, 8, 8)
    levels = [3 * s / (1 + 2 * s) for s in (1, 2 / 3, 1 / 3)] + [0.0]
    both = [method.backbone.condition(dict(prompt=batch['prompt'])).fields, method.backbone.conditioner.null()
            .expand(5).fields]
    x = noise
    with torch.no_grad():
        for sigma, following in zip(levels, levels[1:]):
            v, null = (method.teacher(x, timestep=torch.full((5,), 1000 * sigma), return_dict=False, **fields)[0]
                       for fields in both)
            x = x + (following - sigma) * (null + 2 * (v - null))
    torch.testing.assert_close(batch['pair_latents'], x, rtol=1e-4, atol=1e-4)


def test_pairs_go_round_the_dataset_and_keep_what_samples_hold(tmp_path):
    pairs(tmp_path / 'more', num=8)
    read = dataset(tmp_path / 'more')
    assert [read[i]['prompt'] for i in range(8)] == [read.dataset[i % 6]['prompt'] for i in range(8)]
    assert not torch.equal(read[0]['pair_noise'], read[6]['pair_noise'])
    other = dataset(tmp_path / 'more', num_classes=3)
    with pytest.raises(ValueError, match="pair 3 of .*more was made for '3', but the dataset has '0' there"):
        other[3]


def test_a_run_goes_on_where_it_stopped(folder, tmp_path, capsys):
    stopped = tmp_path / 'stopped'
    shutil.copytree(folder, stopped)
    (stopped / '00001.safetensors').unlink()
    (stopped / '00002.safetensors').write_bytes(b'cut')
    with pytest.raises(ValueError, match='00001.safetensors is missing'):
        dataset(stopped)
    before = (stopped / '00000.safetensors').stat().st_mtime_ns
    pairs(stopped)
    assert 'shards of an earlier run: 1' in capsys.readouterr().out
    assert (stopped / '00000.safetensors').stat().st_mtime_ns == before
    for name in ('00000', '00001', '00002'):
        same_bits(*(load_file(root / f'{name}.safetensors') for root in (stopped, folder)))
    pairs(stopped, '--seed', '1', status=2)
    assert 'holds other pairs (seed: 0 there, 1 here)' in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_the_work_and_draw_the_same(folder, tmp_path):
    out = tmp_path / 'shared'
    shutil.copytree(folder, out)
    arguments = ['pairs', DIGITS, '--out', str(out), '--num', '5', '--steps', '3', '--batch-size', '2',
                 '--shard-size', '2', '--launcher', 'pytorch', '--cfg-options', 'train_dataloader.dataset.length=6']
    for lost in (['00000', '00001', '00002'], ['00001'], []):
        for name in lost:
            (out / f'{name}.safetensors').unlink()
        with Workers(run_command, arguments) as workers:
            assert workers.wait(120) == [0, 0], workers.text()
            assert f'5 pairs in {out}, shards of an earlier run: {3 - len(lost)}' in workers.text(0)
            assert 'pairs in' not in workers.text(1)
        for name in ('00000', '00001', '00002'):
            same_bits(*(load_file(root / f'{name}.safetensors') for root in (out, folder)))
        assert (out / 'pairs.json').read_text() == (folder / 'pairs.json').read_text()


def late_second(arguments, file):
    """One process of `cdm pairs`; the second looks at the folder once the first has drawn a shard, if it does."""
    def late(*args, make_pairs=data_pairs.make_pairs):
        end = time.monotonic() + 5
        while os.environ['RANK'] == '1' and not file.exists() and time.monotonic() < end:
            time.sleep(0.01)
        return make_pairs(*args)
    data_pairs.make_pairs = late
    run_command(arguments)


@pytest.mark.slow
def test_a_process_that_comes_late_shares_the_same_work(folder, tmp_path):
    out = tmp_path / 'shared'
    shutil.copytree(folder, out)
    for shard in out.glob('*.safetensors'):
        shard.unlink()
    arguments = ['pairs', DIGITS, '--out', str(out), '--num', '5', '--steps', '3', '--batch-size', '2',
                 '--shard-size', '2', '--launcher', 'pytorch', '--cfg-options', 'train_dataloader.dataset.length=6']
    with Workers(late_second, arguments, out / '00000.safetensors') as workers:
        assert workers.wait(120) == [0, 0], workers.text()
        assert f'5 pairs in {out}, shards of an earlier run: 0' in workers.text(0)
    assert (out / 'pairs.json').read_text() == (folder / 'pairs.json').read_text()


def test_unfinished_and_absent_folders(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='make pairs there with `cdm pairs`'):
        dataset(tmp_path)
    shutil.copytree(folder, tmp_path / 'unfinished')
    index = tmp_path / 'unfinished' / 'pairs.json'
    index.write_text(index.read_text().replace('"count": 5', '"count": 7'))
    with pytest.raises(ValueError, match='unfinished: it has 5 of 7 pairs; run `cdm pairs` again'):
        dataset(tmp_path / 'unfinished')
    index.write_text(index.read_text()[:40])
    with pytest.raises(ValueError, match='pairs.json is damaged'):
        dataset(tmp_path / 'unfinished')


def batch(rows=3, **more):
    torch.manual_seed(1)
    pair = dict(pair_noise=torch.randn(rows, 4, 4, 4), pair_latents=torch.randn(rows, 4, 4, 4))
    return dict(prompt=torch.arange(rows) % 3, **pair, **more)


@pytest.mark.parametrize('backbone', ['sd3', 'flux'])
def test_the_gradient_is_that_of_the_formula(backbone, tmp_path):
    kwargs = dict(type='DecoupledDMD', student_every=1, losses=dict(
        ca=None, dm=dict(weight=1e-30), regression=dict(type='RegressionLoss', weight=0.5)))
    data = batch()
    if backbone == 'flux':
        from tiny_pipelines import save_tiny_flux
        save_tiny_flux(tmp_path / 'flux')
        torch.manual_seed(0)
        method = MODELS.build(dict(kwargs, backbone=dict(type='FluxBackbone', pretrained=str(tmp_path / 'flux')),
                                   image_size=16))
        channels = method.backbone.latent_channels
        data = dict(prompt=['a red fox', 'a lighthouse', 'dogs'],
                    **{k: torch.randn(3, channels, *method.latent_sizes[0]) for k in ('pair_noise', 'pair_latents')})
        method.seed, method.iteration = 5, 0
        method.train()
    else:
        method = tiny_method(**kwargs)
    optimizers = recording_optimizers(method, lr=0.0)
    logs = method.train_step(data, optimizers)
    condition = method.backbone.condition(method.data_preprocessor(data, True))
    velocity = method.backbone.velocity(method.student, data['pair_noise'], torch.ones(3), condition)
    expected = sum((n - v - y).square().sum() for n, v, y in zip(data['pair_noise'], velocity, data['pair_latents']))
    expected = expected / data['pair_noise'].numel()
    assert float(logs['loss_regression']) == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.autograd.grad(0.5 * expected, list(method.student.parameters()), allow_unused=True)
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 1e-3
    for ours, theirs in zip(optimizers['student'].gradients, gradients):
        theirs = torch.zeros(()) if theirs is None else theirs
        ours = torch.zeros_like(theirs) if ours is None else ours
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_pairs_beside_pictures_of_another_size_are_named():
    method = tiny_method(type='DMD2', losses=dict(regression=dict(type='RegressionLoss')))
    data = batch(image=torch.stack([picture(i, 4, 4) for i in range(3)]))
    with pytest.raises(ValueError, match=r'latents of \[\(2, 2\), \(4, 4\)\]: bring the pictures to the size'):
        method.train_step(data, recording_optimizers(method))


def test_by_config_alone_it_trains_and_resumes_to_the_bit(folder, tmp_path):
    def run(name, iterations, resume=False):
        torch.manual_seed(0)
        backbone = dict(type='SD3Backbone', pretrained='asset:digits/teacher')
        cfg = config(tmp_path / name, iterations, resume, type='DMD2', backbone=backbone, losses=dict(
            regression=dict(type='RegressionLoss')))
        del cfg.optim_wrapper['discriminator']
        cfg.train_dataloader.dataset = dict(type='PairDataset', dataset=LABELS, data_root=str(folder))
        runner = Runner.from_cfg(Config(cfg.to_dict()))
        runner.train()
        return torch.load(tmp_path / name / f'iter_{iterations}.pth', weights_only=True)

    whole = run('whole', 8)
    run('parts', 4)
    parts = run('parts', 8, resume=True)
    for part in ('state_dict', 'optimizer', 'student_ema', 'param_schedulers'):
        same_bits(whole[part], parts[part], part)


def test_a_dataset_without_pairs_is_named_before_training(tmp_path):
    cfg = config(tmp_path, 2, type='CDM', losses=dict(regression=dict(type='RegressionLoss')))
    del cfg.optim_wrapper['discriminator']
    with pytest.raises(ValueError, match=r'RegressionLoss \(model.losses\) needs pairs, .*`cdm pairs`.*PairDataset'):
        Runner.from_cfg(cfg).train()
