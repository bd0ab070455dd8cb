import copy
import errno
import math
import os
import re
import shutil

import pytest
import torch
from recipes import CDM, DECOUPLED, DMD2, TEACHER
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests_support import same_bits
from type_styles import named, write_lazy

from cdm_plugin.cli import main
from cdm_plugin.inference import load_method, sample_prompts

SHORT = ['--cfg-options', 'train_cfg.max_iters=6', 'train_dataloader.batch_size=2', 'model.time_grid.max_steps=4',
         'default_hooks.checkpoint.interval=2', 'custom_hooks.1.interval=1000', 'custom_hooks.1.teacher_steps=1',
         'custom_hooks.1.steps=[]', 'val_dataloader.dataset.length=10']


@pytest.mark.parametrize('recipe, method', [
    (DMD2, 'CDM'), pytest.param(CDM, 'DMD2', marks=pytest.mark.slow),
    pytest.param(DECOUPLED, 'CDM', marks=pytest.mark.slow), pytest.param(CDM, 'DecoupledDMD', marks=pytest.mark.slow)])
def test_model_type_alone_swaps_the_method_from_the_command_line(recipe, method, tmp_path):
    status = main(['train', recipe, '--work-dir', str(tmp_path), '--cfg-options', f'model.type={method}',
                   'train_cfg.max_iters=2', 'train_dataloader.batch_size=2', 'log_level=ERROR',
                   f'experiment_name=swap-{method}-{recipe.split("/")[1][:4]}'])
    assert status == 0
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=True)
    trained = load_method(recipe, device='cpu').student.state_dict()
    assert any(not torch.equal(state['state_dict'][f'student.{k}'], v) for k, v in trained.items())


def test_a_config_in_plain_python_trains_to_the_same_bits(tmp_path, capsys):
    lazy, names = write_lazy(tmp_path), str(tmp_path / 'names.py')
    named(lazy).dump(names)
    states = []
    for config in (lazy, names):
        out = tmp_path / f'{len(states)}'
        assert main(['train', config, '--work-dir', str(out), '--cfg-options', 'model.alpha=0.5',
                     f'experiment_name=plain-{len(states)}']) == 0, capsys.readouterr().err
        states.append(torch.load(out / 'iter_2.pth', weights_only=True))
        assert load_method(config, str(out), device='cpu').iteration == 1
    assert "'type': 'CDM'" in str(states[1]['config']['model']) and "'cdm_plugin." in str(states[0]['config']['model'])
    for part in ('state_dict', 'student_ema', 'optimizer'):
        same_bits(states[0][part], states[1][part], part)


def test_checkpoints_hold_what_is_trained_as_plain_tensors(short_run, tmp_path):
    short_run(iters=2).train()
    state = torch.load(tmp_path / 'run/iter_2.pth', weights_only=True)
    roles = {key.split('.')[0] for key in state['state_dict']}
    assert roles == {'student', 'fake'}
    assert state['student_ema']['steps'] == 1
    assert set(state['optimizer']) == {'student', 'fake'}


@pytest.fixture(scope='module')
def damaged(tmp_path_factory):
    """A finished run, and a copy of it that ends earlier and whose latest checkpoint has a flipped bit in a weight."""
    whole, copy = (tmp_path_factory.mktemp('damaged') / name for name in ('whole', 'copy'))
    assert main(['train', CDM, '--work-dir', str(whole), *SHORT, 'experiment_name=whole']) == 0
    copy.mkdir()
    for name in ('iter_2.pth', 'iter_4.pth'):
        shutil.copy(whole / name, copy)
    (copy / 'last_checkpoint').write_text(str(copy / 'iter_4.pth'))
    weight = torch.load(copy / 'iter_4.pth', weights_only=True)['state_dict']['student.proj_out.weight']
    data = bytearray((copy / 'iter_4.pth').read_bytes())
    data[data.index(weight.numpy().tobytes()) + 3] ^= 1 << 6
    (copy / 'iter_4.pth').write_bytes(data)
    return whole, copy


def test_a_run_resumes_from_the_latest_good_checkpoint_to_the_same_bits(damaged, capfd):
    whole, copy = damaged
    assert main(['train', CDM, '--work-dir', str(copy), '--resume', *SHORT, 'experiment_name=copy']) == 0
    said = capfd.readouterr()
    assert re.search(r'iter_4.pth is damaged \(data/\d+ differs from its checksum\)', said.out + said.err)
    a, b = (torch.load(d / 'iter_6.pth', weights_only=True) for d in (whole, copy))
    for part in ('state_dict', 'student_ema', 'optimizer', 'param_schedulers'):
        same_bits(a[part], b[part], part)
    same_bits(*(torch.load(d / 'iter_4.pth', weights_only=True)['state_dict'] for d in (whole, copy)))


def test_a_bad_checkpoint_is_one_line(damaged, tmp_path, capfd):
    shutil.copy(damaged[0] / 'iter_6.pth', tmp_path / 'bad.pth')
    with open(tmp_path / 'bad.pth', 'r+b') as file:
        file.truncate(100_000)
    bad, out = str(tmp_path / 'bad.pth'), str(tmp_path / 'out')
    for arguments in (['train', CDM, '--work-dir', out, '--resume', bad, *SHORT],
                      ['sample', CDM, '--checkpoint', bad, '--prompts', '3'],
                      ['export', CDM, '--checkpoint', bad, '--out', out]):
        assert main(arguments) == 2
        line, = [line for line in capfd.readouterr().err.splitlines() if line.startswith('cdm ')]
        assert 'bad.pth is damaged or was cut short' in line and 'Traceback' not in line


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(tmp_path, monkeypatch, capfd):
    fsync, synced = os.fsync, []

    def full(handle):
        synced.append(os.readlink(f'/proc/self/fd/{handle}'))
        if len([name for name in synced if '.pth' in name]) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, 'fsync', full)
    arguments = ['train', CDM, '--work-dir', str(tmp_path), *SHORT, 'default_hooks.checkpoint.max_keep_ckpts=1']
    assert main(arguments) == 2
    err = capfd.readouterr().err
    assert f'cdm train: No space left on device, for {tmp_path}/iter_4.pth: free some' in err and 'Traceback' not in err
    assert sorted(path.name for path in tmp_path.glob('iter*')) == ['iter_2.pth']
    assert torch.load(tmp_path / 'iter_2.pth', weights_only=True)['meta']['iter'] == 2


def test_tensorboard_shows_the_run(short_run, tmp_path):
    short_run(iters=8, **{'custom_hooks.0.histogram_interval': 4, 'custom_hooks.1.interval': 4}).train()
    events = EventAccumulator(str(next((tmp_path / 'run').glob('*/vis_data'))), size_guidance=dict(images=0)).Reload()
    tags = events.Tags()
    wanted = {'loss_fake', 'loss_student', 'loss_ca', 'loss_dm', 'loss_cdm', 'grad_norm_student', 'grad_norm_fake',
              'student.lr', 'fake.lr', 'clamp_ca', 'clamp_dm', 'clamp_cdm', 'cosine_ca_dm', 'anchor_sigma', 'time',
              'calls_student', 'calls_fake', 'calls_teacher', 'grid_steps'}
    assert wanted <= set(tags['scalars'])
    for tag in tags['scalars']:
        values = [event.value for event in events.Scalars(tag)]
        assert all(math.isfinite(v) for v in values), tag
    assert -1 <= events.Scalars('cosine_ca_dm')[-1].value <= 1
    for event in events.Histograms('train/anchor_sigma_histogram'):
        assert torch.tensor(event.histogram_value.bucket_limit).diff().sub(0.02).abs().max() < 1e-6
        assert sum(event.histogram_value.bucket) == 4 * 4
    assert [event.step for event in events.Images('samples')] == [0, 4, 8]


def test_sample_grid_rows_come_from_the_roles_named(short_run):
    runner = short_run(iters=2)
    runner.train()
    hook = next(h for h in runner.hooks if type(h).__name__ == 'SampleGridHook')
    rows = list(hook.rows(runner).values())
    student, ema, teacher, fake = rows
    assert all(r.shape == (10, 1, 16, 16) for r in rows)
    for i, a in enumerate(rows):
        assert all(not torch.equal(a, b) for b in rows[i + 1:])
    assert torch.equal(hook.rows(runner)['student, 4 steps'], student)


def test_validation_runs_the_ema_student_and_gives_the_weights_back(short_run):
    runner = short_run(iters=2, val_cfg=dict(), val_evaluator=dict(type='DigitMetric'), val_dataloader=dict(
        batch_size=10, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'), dataset=dict(type='LabelDataset', num_classes=10, length=20)))
    seen = []
    original = type(runner.model).sample

    def spy(self, *args, **kwargs):
        seen.append(copy.deepcopy(self.student.state_dict()))
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        runner.train()
        before = copy.deepcopy(runner.model.student.state_dict())
        patch.setattr(type(runner.model), 'sample', spy)
        metrics = runner.val_loop.run()
    same_bits(dict(before), dict(runner.model.student.state_dict()))
    ema = runner.model.student_ema.weights
    assert all(torch.equal(seen[0][name], weight) for name, weight in ema.items())
    assert 0.9 <= metrics['digits/accuracy'] <= 1


def test_amp_recipe_trains_in_bfloat16_with_float32_weights(short_run):
    amp = {f'optim_wrapper.{role}.{k}': v for role in ('student', 'fake')
           for k, v in dict(type='AmpOptimWrapper', dtype='bfloat16').items()}
    runner = short_run(iters=2, **amp)
    runner.train()
    assert type(runner.optim_wrapper['student']).__name__ == 'AutocastOptimWrapper'
    assert {p.dtype for p in runner.model.student.parameters()} == {torch.float32}


def test_accumulation_updates_every_second_step_only(short_run):
    runner = short_run(iters=8, **{'optim_wrapper.student.accumulative_counts': 2})
    runner.train()
    assert runner.model.student_ema.steps == 2  # 4 student steps
    assert runner.optim_wrapper['fake'].optimizer.state_dict()['state'][0]['step'] == 8


def test_teacher_recipe_trains_on_images(short_run, tmp_path):
    runner = short_run(TEACHER, iters=3, **{'custom_hooks.1.interval': 2})
    runner.train()
    state = torch.load(tmp_path / 'run/iter_3.pth', weights_only=True)
    assert state['student_ema']['steps'] == 3
    assert all(key.startswith('student.') for key in state['state_dict'])


def test_exported_student_gives_the_same_images(short_run, tmp_path):
    short_run(iters=2).train()
    assert main(['export', CDM, '--checkpoint', str(tmp_path / 'run'), '--out', str(tmp_path / 'out')]) == 0
    trained = load_method(CDM, str(tmp_path / 'run'), device='cpu')
    exported = load_method(str(tmp_path / 'out'), device='cpu')
    noise = torch.randn(trained.latent_shape(3), generator=torch.Generator().manual_seed(0))
    with trained.student_ema.applied():
        expected = sample_prompts(trained, [1, 2, 3], noise)
    assert torch.equal(sample_prompts(exported, [1, 2, 3], noise), expected)
    assert not torch.equal(sample_prompts(trained, [1, 2, 3], noise), expected)
    files = {p.suffix for p in (tmp_path / 'out').rglob('*') if p.is_file()}
    assert files == {'.json', '.md', '.safetensors'}


def test_sample_command_writes_images(tmp_path, capsys):
    assert main(['sample', 'asset:digits/teacher', '--prompts', '3', '7', '--num', '2', '--steps', '2',
                 '--guidance-scale', '2', '--out', str(tmp_path)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ['0000.png', '0001.png', '0002.png', '0003.png', 'grid.png']
    assert 'not drawn' not in capsys.readouterr().out
    assert main(['sample', 'asset:digits/teacher', '--prompts', '3', '--num', '2', '--steps', '2', '--out',
                 str(tmp_path)]) == 0
    assert '2 pictures that this call has not drawn (0002.png, 0003.png' in capsys.readouterr().out


def test_an_untrained_student_is_drawn_only_if_asked_for(tmp_path):
    assert main(['sample', CDM, '--prompts', '3', '--num', '1', '--untrained', '--out', str(tmp_path)]) == 0
    assert (tmp_path / '0000.png').is_file()


@pytest.mark.parametrize('arguments, parts', [
    (['sample', 'asset:digits/teacher', '--prompts', '1', '--role', 'teacher'], ['has no teacher', 'config']),
    (['sample', 'asset:digits/teacher', '--prompts', '1', '--checkpoint', 'x.pth'], ['x.pth', 'folder']),
    (['sample', CDM, '--prompts', '1', '--checkpoint', 'no.pth'], ['no.pth']),
    (['sample', CDM, '--prompts', '1', '--checkpoint', '{damaged}'], ['damaged.pth']),
    (['sample', CDM, '--prompts', '1', '--checkpoint', '{other}'], ['other.pth', 'does not fit']),
    (['sample', CDM, '--prompts', 'eleven', '--untrained'], ['class labels']),
    (['sample', CDM, '--prompts', '1'], ['--checkpoint is missing', '--untrained']),
], ids=['role', 'folder with checkpoint', 'missing', 'damaged', 'other model', 'text', 'untrained'])
def test_mistakes_in_sampling_are_one_line(arguments, parts, tmp_path, capsys):
    (tmp_path / 'damaged.pth').write_bytes(b'PK')
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / 'other.pth')
    files = {name: str(tmp_path / f'{name}.pth') for name in ('damaged', 'other')}
    assert main([a.format(**files) for a in arguments] + ['--out', str(tmp_path / 'out')]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(part in error for part in parts), error
    assert not (tmp_path / 'out').exists()
