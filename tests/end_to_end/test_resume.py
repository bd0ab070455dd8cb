"""What a run takes from a checkpoint, to resume it or to start from it, and what it refuses."""
import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import FlexibleRunner, IterBasedTrainLoop, Runner
from recipes import CDM, TEACHER
from safetensors.torch import save_file
from tests_support import recording_optimizers, same_bits, tiny_method

from cdm_plugin.cli import main
from cdm_plugin.hooks import LoadCheckHook, load_check_hook
from cdm_plugin.inference import load_method

_names = (f'resume{i}' for i in itertools.count())
SAME = ('state_dict', 'student_ema', 'optimizer', 'param_schedulers')
QUIET = {'custom_hooks': [dict(type='CDMHook')], 'train_dataloader.batch_size': 2, 'train_cfg.val_interval': 100,
         'default_hooks.checkpoint.interval': 2, 'default_hooks.checkpoint.max_keep_ckpts': -1}


@pytest.fixture
def run(short_run):
    """Builds a short runner of the digits without pictures and validation: run(iters=..., **options)."""
    return lambda recipe=CDM, iters=4, **options: short_run(recipe, iters=iters, **copy.deepcopy({**QUIET, **options}))


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A checkpoint of two iterations, as a dict, and its run's config file."""
    from cdm_plugin.config import load_config
    folder = tmp_path_factory.mktemp('saved')
    Runner.from_cfg(load_config(CDM, {
        'train_cfg.max_iters': 2, 'log_level': 'WARNING', 'work_dir': str(folder), 'experiment_name': folder.name,
        **copy.deepcopy(QUIET)})).train()
    return torch.load(folder / 'iter_2.pth', weights_only=True)


def command(work_dir, *arguments, iters=3):
    return ['train', CDM, '--work-dir', str(work_dir), *arguments, '--cfg-options', f'train_cfg.max_iters={iters}',
            'train_dataloader.batch_size=2', 'log_level=ERROR', 'custom_hooks.1.interval=1000',
            'custom_hooks.1.teacher_steps=1', 'custom_hooks.1.steps=[]', f'experiment_name={next(_names)}']


# No checkpoint


@pytest.mark.parametrize('resume, there, expected', [
    (['--resume', 'auto'], False, (False, 'start.pth')), (['--resume', 'auto'], True, (True, None)),
    (['--resume'], True, (True, None)), (['--resume', 'a.pth'], False, (True, 'a.pth')),
    ([], True, (False, 'start.pth')), (['--resume'], False, None)],
    ids=['auto, first', 'auto', 'latest', 'file', 'not', 'mistyped'])
def test_where_a_run_starts(resume, there, expected, tmp_path, monkeypatch, capsys):
    """`load_from` is where a new run starts; MMEngine would resume from it."""
    if there:
        (tmp_path / 'iter_2.pth').touch()
    seen = []
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: (seen.append((cfg.resume, cfg.load_from)), 1 / 0))
    arguments = ['train', CDM, '--work-dir', str(tmp_path), *resume, '--cfg-options', 'load_from=start.pth']
    if expected is None:
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count('\n') == 1 and str(tmp_path) in error
        assert '--work-dir' in error and '--resume auto' in error
    else:
        with pytest.raises(ZeroDivisionError):
            main(arguments)
        assert seen == [expected]


@pytest.mark.slow
def test_a_work_directory_without_a_checkpoint_is_an_error_unless_the_start_is_allowed(tmp_path, capsys):
    assert main(command(tmp_path / 'mistyped', '--resume')) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'mistyped' in error and '--work-dir' in error and '--resume auto' in error
    assert not (tmp_path / 'mistyped').exists()
    for iters in (1, 2):  # the first start of a job, and the second
        assert main(command(tmp_path / 'job', '--resume', 'auto', iters=iters)) == 0
        assert torch.load(tmp_path / f'job/iter_{iters}.pth', weights_only=True)['meta']['iter'] == iters
    assert main(command(tmp_path / 'job', '--resume', iters=3)) == 0


@pytest.mark.slow
def test_mmengines_own_runner_says_that_it_starts_from_the_beginning(run, tmp_path):
    for iters in (1, 2):  # the second has one; if it starts in the same second, its log is the first one's
        run(iters=iters, resume=True).train()
        logs = ''.join(file.read_text() for file in (tmp_path / 'run').glob('*/*.log'))
        assert logs.count('has no checkpoint: the training starts at iteration 0') == 1


# Weights


def fake_runner(resume=True):
    """What LoadCheckHook sees of a runner that resumes, and the checkpoint."""
    method = tiny_method(dtype=torch.float32)
    wrappers = recording_optimizers(method)
    runner = SimpleNamespace(
        model=method, optim_wrapper=wrappers, param_schedulers=None, train_dataloader=[0], work_dir='work',
        _resume=resume, _load_from='changed.pth', _train_loop=object.__new__(IterBasedTrainLoop),
        cfg=SimpleNamespace(model={}))
    return runner, dict(meta=dict(iter=3, epoch=0), message_hub={}, state_dict=dict(method.state_dict()),
                        optimizer=wrappers.state_dict(), param_schedulers=dict(student=(), fake=()))


def halve(state):
    state['state_dict'] = dict(list(state['state_dict'].items())[::2])


def reshape(state):
    state['state_dict']['fake.proj_out.bias'] = torch.zeros(3)


def add(state):
    state['state_dict']['critic.weight'] = torch.zeros(3)


def without(*keys):
    def change(state):
        for key in keys:
            del state[key]
    return change


def without_a_role(state):
    del state['optimizer']['fake']


@pytest.mark.parametrize('change, parts', [
    (halve, ['weights are missing (fake.', 'load_from']),
    (reshape, ['1 have another shape (fake.proj_out.bias (3,), not (16,))', 'load_from']),
    (add, ['1 are unknown (critic.weight)']),
    (without('optimizer'), ['no optimizer', 'save_optimizer=False', 'load_from']),
    (without_a_role, ['no optimizer of fake']),
    (without('meta', 'message_hub'), ['no meta, message_hub'])],
    ids=['half', 'shape', 'unknown', 'optimizer', 'a role', 'progress'])
def test_what_is_resumed_must_be_what_is_trained(change, parts):
    runner, state = fake_runner()
    change(state)
    with pytest.raises(ValueError) as error:
        LoadCheckHook().after_load_checkpoint(runner, state)
    assert all(part in str(error.value) for part in ['changed.pth', *parts]), error.value


def test_what_fits_is_left_as_it_is():
    runner, state = fake_runner()
    before = copy.deepcopy(state)
    LoadCheckHook().after_load_checkpoint(runner, state)
    same_bits(before, state)


@pytest.mark.slow
def test_names_of_wrappers_are_taken_off(saved, run, tmp_path):
    """As data-parallel wrappers and torch.compile write them; MMEngine's loader would leave the weights aside."""
    plain, prefixed = copy.deepcopy(saved), copy.deepcopy(saved)
    prefixed['state_dict'] = {f'module.{k.replace(".", "._orig_mod.", 1)}': v for k, v in saved['state_dict'].items()}
    states = []
    for name, state in (('plain', plain), ('prefixed', prefixed)):
        torch.save(state, tmp_path / f'{name}.pth')
        run(iters=3, resume=True, load_from=str(tmp_path / f'{name}.pth'), work_dir=tmp_path / name).train()
        states.append(torch.load(tmp_path / name / 'iter_3.pth', weights_only=True))
    for part in SAME:
        same_bits(states[0][part], states[1][part], part)


# Settings


SCHEDULE = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=3),
            dict(type='CosineAnnealingLR', eta_min=0, by_epoch=False, begin=3, end=8)]


def warnings_of(folder):
    log = max(folder.glob('*/*.log'), key=lambda file: file.stat().st_mtime).read_text()
    return [line for line in log.splitlines() if 'WARNING' in line]


@pytest.mark.slow
def test_learning_rates_and_schedules_of_the_config_hold_after_a_resume(run, tmp_path):
    """The bits of the schedule are those of a run that had the config from its beginning; other settings hold too."""
    def build(name, stop, **options):
        return run(iters=stop, work_dir=tmp_path / name, param_scheduler=dict(
            student=copy.deepcopy(SCHEDULE), fake=copy.deepcopy(SCHEDULE), _delete_=True), **options)

    changes = {'optim_wrapper.student.optimizer.lr': 1e-3, 'optim_wrapper.fake.optimizer.betas': (0.5, 0.75),
               'optim_wrapper.fake.optimizer.weight_decay': 0.25}
    whole = build('whole', 6, **changes)
    whole.train()
    build('run', 4).train()
    resumed = build('run', 6, resume=True, **changes)
    resumed.train()
    for role in ('student', 'fake'):
        rates = [runner.message_hub.get_scalar(f'train/{role}.lr').data[0] for runner in (whole, resumed)]
        assert rates[0][4:].tolist() == rates[1][4:].tolist()
    state = torch.load(tmp_path / 'run/iter_6.pth', weights_only=True)
    same_bits(torch.load(tmp_path / 'whole/iter_6.pth', weights_only=True)['param_schedulers'],
              state['param_schedulers'])
    (group,) = state['optimizer']['fake']['param_groups']
    assert (group['weight_decay'], tuple(group['betas'])) == (0.25, (0.5, 0.75))
    lines = '\n'.join(warnings_of(tmp_path / 'run'))
    for key, text in (('student.optimizer.lr', '0.001'), ('fake.optimizer.betas', '(0.5, 0.75)'),
                      ('fake.optimizer.weight_decay', '0.25')):
        assert f'optim_wrapper.{key} is {text} from now on, as the config says (until now' in lines


def test_settings_of_the_method_are_named_with_both_values_and_adapters_must_be_the_same(monkeypatch):
    lines = []
    monkeypatch.setattr(load_check_hook, 'print_log', lambda text, *args, **kwargs: lines.append(text))
    load_check_hook.check_resumed(dict(alpha=1.0, type='CDM'), dict(alpha=0.5, type='CDM', image_size=64))
    assert lines == ['model.alpha is 0.5 from now on, as the config says (until now 1.0)']
    load_check_hook.check_resumed(dict(lora=dict(rank=4)), dict(lora=dict(rank=4)))
    for saved in (dict(lora=dict(rank=4)), {}):
        with pytest.raises(ValueError, match='model.lora.rank=8, but the run that is resumed was trained with '):
            load_check_hook.check_resumed(saved, dict(lora=dict(rank=8)))


@pytest.mark.parametrize('written, changed', [
    (dict(alpha=7, guidance='plain', rollout='ode', sample_sigmas=[1.0, 0.75, 0.5, 0.25], anchor_aware_fake=False),
     dict(alpha=6.5)),
    (dict(student_every=2, fake_merge=0.001, sigma_shift='none'), dict(student_every=3)),
    (dict(fake_loss=dict(type='FlowMatchingLoss')), dict(fake_loss=dict(type='other.Loss'))),
    (dict(fake_sigma=dict(type='UniformSigma', low=0.02)), dict(fake_sigma=dict(type='UniformSigma', low=0.1)))])
def test_a_default_that_is_written_out_by_now_is_no_change(written, changed, monkeypatch):
    lines = []
    monkeypatch.setattr(load_check_hook, 'print_log', lambda text, *args, **kwargs: lines.append(text))
    for saved, model in (({}, written), (written, {})):
        load_check_hook.check_resumed(dict(saved, type='CDM'), dict(model, type='CDM'))
        assert lines == []
    load_check_hook.check_resumed(dict(written, type='CDM'), dict(written, type='CDM') | changed)
    assert len(lines) == 1 and lines[0].startswith(f'model.{next(iter(changed))} is ')


def test_a_run_of_decoupled_dmd_from_before_its_own_law_does_not_change_it_silently():
    ours, other = tiny_method('DecoupledDMD'), tiny_method('CDM')
    assert (ours.sigma_shift, other.sigma_shift) == ('scheduler', 'none')
    for meta in ({}, dict(sigma_shift='none')):
        with pytest.raises(ValueError, match=r"model.sigma_shift is 'scheduler' by default in DecoupledDMD, but .* "
                                             r"with 'none': set model.sigma_shift='none' to go on"):
            load_check_hook.check_levels(meta, dict(type='DecoupledDMD'), ours)
        load_check_hook.check_levels(meta, dict(sigma_shift='scheduler'), ours)  # which is said as any change
        load_check_hook.check_levels(meta, {}, tiny_method('DecoupledDMD', sigma_shift='none'))
        load_check_hook.check_levels(meta, {}, other)
    load_check_hook.check_levels(dict(sigma_shift='scheduler'), {}, ours)
    with pytest.raises(ValueError, match="is 'none' by default in CDM, but .* 'scheduler'"):  # model.type has changed
        load_check_hook.check_levels(dict(sigma_shift='scheduler'), {}, other)
    load_check_hook.check_levels(dict(sigma_shift=None), {}, tiny_method('FlowMatching'))


def test_a_schedule_that_lacks_a_role_is_named(run):
    with pytest.raises(ValueError, match=r'param_scheduler.fake is missing: student, fake are trained'):
        run(param_scheduler=dict(student=SCHEDULE, _delete_=True)).train()


def test_a_checkpoint_is_read_on_the_cpu():
    """MMEngine's own resume asks for the run's device."""
    places = []

    def load(filename, map_location):
        places.append(map_location)
        raise InterruptedError

    for cls, runner in ((Runner, SimpleNamespace(load_checkpoint=load)), (FlexibleRunner, SimpleNamespace(
            strategy=SimpleNamespace(resume=lambda path, map_location, **kwargs: load(path, map_location))))):
        with pytest.raises(InterruptedError):
            vars(cls)['resume'].__get__(runner)('a.pth')
    assert places == ['cpu', 'cpu']


# Starting from weights


@pytest.mark.slow
def test_a_fine_tuned_teacher_is_not_taken_for_a_student(run, tmp_path):
    """Only the student would start from it: teacher and fake score would stay the pretrained ones."""
    run(TEACHER, iters=1, work_dir=tmp_path / 'teacher', custom_hooks=[dict(type='CDMHook')]).train()
    path = str(tmp_path / 'teacher/iter_1.pth')
    with pytest.raises(ValueError, match=r'load_from: .* weights of student alone.*cdm export .*model\.teacher'):
        run(load_from=path).train()
    run(TEACHER, iters=1, load_from=path, work_dir=tmp_path / 'more').train()


def test_load_from_needs_weights_of_every_role():
    runner, state = fake_runner(resume=False)
    LoadCheckHook().after_load_checkpoint(runner, dict(state_dict=state['state_dict']))
    student = {k: v for k, v in state['state_dict'].items() if k.startswith('student.')}
    for content, text in ((student, 'weights of student alone'), (dict(state_dict=student), 'weights of student alone'),
                          ({'conv.weight': torch.zeros(3)}, "none of the model's weights"),
                          ([1, 2], 'changed.pth holds a list')):
        with pytest.raises(ValueError, match=text):
            LoadCheckHook().after_load_checkpoint(runner, content)
    runner._train_loop = {}  # in a validation the student is enough
    content = {k.removeprefix('student.'): v for k, v in student.items()}
    LoadCheckHook().after_load_checkpoint(runner, content)
    same_bits(content, dict(state_dict=student))


def bare(saved):
    return {k.removeprefix('student.'): v for k, v in saved['state_dict'].items() if k.startswith('student.')}


def write(kind, saved, folder):
    """The student's weights as others would write them; the path."""
    weights = bare(saved)
    if kind == 'safetensors':
        save_file(weights, folder / 'weights.safetensors')
        return folder / 'weights.safetensors'
    if kind == 'folder':
        (folder / 'transformer').mkdir()
        (folder / 'transformer/config.json').write_text(json.dumps(dict(_class_name='SD3Transformer2DModel')))
        parts = list(weights.items())
        for i, part in enumerate((parts[::2], parts[1::2])):
            save_file(dict(part), folder / f'transformer/diffusion_pytorch_model-0000{i}-of-00002.safetensors')
        return folder / 'transformer'
    path = folder / f'{kind}.pth'
    torch.save(dict(bare=weights, module=dict(module=weights, ds_config={}, epoch=3),
                    ddp=dict(state_dict={f'module.{k}': v for k, v in weights.items()}),
                    compiled=dict(model={f'_orig_mod.{k}': v for k, v in weights.items()}))[kind], path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['bare', 'module', 'ddp', 'compiled', 'safetensors', 'folder'])
def test_foreign_weights_are_the_students(kind, saved, run, tmp_path):
    path = str(write(kind, saved, tmp_path))
    method = load_method(CDM, path, device='cpu')
    same_bits(dict(method.student.state_dict()), dict(bare(saved)))
    runner = run(TEACHER, iters=1, load_from=path, custom_hooks=[dict(type='CDMHook')],
                 **{'optim_wrapper.student.optimizer.lr': 0.0})
    runner.train()
    same_bits(dict(runner.model.student.state_dict()), dict(bare(saved)))
    with pytest.raises(ValueError, match='weights of student alone'):
        run(load_from=path).train()


@pytest.mark.parametrize('content, parts', [
    ([torch.zeros(2)], ['holds a list']),
    (dict(epoch=3, loss=0.1), ['a dict of epoch, loss', 'state_dict']),
    ({'transformer.a.lora_A.weight': torch.zeros(2)}, ["PEFT's names", 'model.lora.student', 'model.teacher.lora']),
    ({'lora_unet_a.lora_down.weight': torch.zeros(2)}, ["kohya's names", 'save_lora_weights']),
    (dict(state_dict={'conv.weight': torch.zeros(2)}), ['missing', '1 are unknown (conv.weight)'])],
    ids=['list', 'no weights', 'peft', 'kohya', 'other network'])
def test_what_is_no_checkpoint_of_the_model_is_named_in_one_line(content, parts, tmp_path, capsys):
    torch.save(content, tmp_path / 'other.pth')
    for arguments in (['sample', CDM, '--prompts', '1', '--checkpoint', str(tmp_path / 'other.pth')],
                      ['export', CDM, '--checkpoint', str(tmp_path / 'other.pth')]):
        assert main([*arguments, '--out', str(tmp_path / 'out')]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert all(part in error for part in ['other.pth', *parts]), error
    assert not (tmp_path / 'out').exists()


def test_a_pipeline_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / 'model_index.json').write_text('{}')
    assert main(['sample', CDM, '--prompts', '1', '--checkpoint', str(tmp_path), '--out', str(tmp_path / 'out')]) == 2
    assert 'is a pipeline, not a checkpoint' in capsys.readouterr().err
