"""Nothing that is not finite gets into a run, or out of one."""
import math
import re

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from recipes import CDM, TEACHER
from safetensors.torch import save_file
from tests_support import tiny_backbone, tiny_method

from cdm_plugin.cli import main
from cdm_plugin.condition import Condition
from cdm_plugin.config import load_config
from cdm_plugin.data import EmbeddingDataset, write_embeddings
from cdm_plugin.data.data_preprocessor import DistillationDataPreprocessor
from cdm_plugin.engine import DistillationOptimWrapperConstructor, StudentEMA
from cdm_plugin.errors import NotFinite
from cdm_plugin.export import export

LR = 'optim_wrapper.student.optimizer.lr'


@HOOKS.register_module()
class BadPromptHook(Hook):
    """In the iterations from `start` to before `stop`, counted from 0, the text encoder gives NaN while training."""

    def __init__(self, start, stop=10**6):
        self.bad = range(start, stop)

    def before_train(self, runner):
        method, condition = runner.model, runner.model.backbone.condition
        method.backbone.condition = lambda batch: Condition({
            name: t * math.nan if method.training and method.iteration in self.bad else t
            for name, t in condition(batch).fields.items()})


def options(tmp_path, *hooks, iters=12, **more):
    return {'train_cfg.max_iters': iters, 'train_dataloader.batch_size': 2, 'train_cfg.val_interval': 100,
            'default_hooks.checkpoint.interval': 4, 'default_hooks.logger.interval': 1, 'log_level': 'WARNING',
            'work_dir': str(tmp_path / 'run'), 'experiment_name': tmp_path.name, 'model.time_grid.max_steps': 2,
            'custom_hooks': [dict(type='CDMHook', max_skipped=3), *hooks], **more}


def log_of(tmp_path):
    return next((tmp_path / 'run').glob('*/*.log')).read_text()


def test_steps_that_are_left_out_are_named_and_the_run_goes_on(tmp_path):
    """Iterations 6 and 7, counted from 1; the sixth has a student step too."""
    Runner.from_cfg(load_config(CDM, options(tmp_path, dict(type='BadPromptHook', start=5, stop=7), iters=8))).train()
    text = log_of(tmp_path)
    assert re.findall(r'iteration (\d+): the step of (\w+) was left out, because (.*) not finite '
                      r'\((\d) in a row, (\d) in all\)', text) == [
        ('6', 'fake', 'its loss is', '1', '1'), ('6', 'student', 'loss_ca, loss_dm, loss_cdm are', '1', '1'),
        ('7', 'fake', 'its loss is', '2', '2')]
    assert '2 steps of fake were left out in all' in text and '1 steps of student' in text
    state = torch.load(tmp_path / 'run/iter_8.pth', weights_only=True)
    assert state['student_ema']['steps'] == 3  # of 4
    assert all(w.isfinite().all() for w in state['state_dict'].values())


def test_a_run_of_bad_steps_ends_with_a_status_of_its_own(tmp_path, capsys):
    """From iteration 6 on; the third bad step of the fake score is that of iteration 8."""
    (tmp_path / 'config.py').write_text(
        f'_base_ = {load_config(CDM).filename!r}\n' + '\n'.join(
            ['train_cfg = dict(max_iters=50, val_interval=100)', 'train_dataloader = dict(batch_size=2)',
             'default_hooks = dict(checkpoint=dict(interval=4))', 'model = dict(time_grid=dict(max_steps=2))',
             "custom_hooks = [dict(type='CDMHook', max_skipped=3), dict(type='BadPromptHook', start=5)]",
             f'experiment_name = {tmp_path.name!r}']))
    with pytest.raises(SystemExit) as end:
        main(['train', str(tmp_path / 'config.py'), '--work-dir', str(tmp_path / 'run')])
    assert end.value.code == 3
    text = log_of(tmp_path)
    assert re.findall(r'iteration (\d+): the step of (\w+)', text) == [
        ('6', 'fake'), ('6', 'student'), ('7', 'fake'), ('8', 'fake')]
    assert 'loss_ca, loss_dm, loss_cdm are not finite' in text
    assert 'iteration 8: the last 3 steps of fake were not finite (CDMHook.max_skipped)' in text
    assert 'iter_4.pth is from before that' in text and not (tmp_path / 'run/iter_8.pth').exists()
    state = torch.load(tmp_path / 'run/iter_4.pth', weights_only=True)
    assert all(w.isfinite().all() for w in state['state_dict'].values())


def test_steps_that_only_the_device_knows_of_are_read_now_and_then(tmp_path):
    """Read after iterations 3, 6 and 9: the third bad fake step, that of iteration 8, ends the run after the ninth."""
    runner = Runner.from_cfg(load_config(CDM, options(tmp_path, dict(type='BadPromptHook', start=5), iters=50, **{
        'default_hooks.checkpoint.interval': 100, **{
            f'optim_wrapper.{role}.optimizer.fused': True for role in ('student', 'fake')}})))
    with pytest.raises(NotFinite, match='iteration 8: the last 3 steps of fake were not finite .* no checkpoint yet'):
        runner.train()
    assert runner.iter == 8
    assert runner.model.student_ema.steps == 2  # iterations 2 and 4
    assert all(p.isfinite().all() for p in runner.model.parameters())


def test_old_checkpoints_do_not_give_way_while_steps_are_left_out(tmp_path):
    """Bad are iterations 7 to 9 and 15 and 16, counted from 1: 8 is not saved, and the last one is all the same."""
    runner = Runner.from_cfg(load_config(CDM, options(
        tmp_path, iters=16, **{'default_hooks.checkpoint.max_keep_ckpts': 2, 'custom_hooks': [
            dict(type='CDMHook'), dict(type='BadPromptHook', start=6, stop=9), dict(type='BadPromptHook', start=14)]})))
    saved, save = [], runner.save_checkpoint
    runner.save_checkpoint = lambda *args, **kwargs: (saved.append(runner.iter + 1), save(*args, **kwargs))
    runner.train()
    assert saved == [4, 12, 16]
    assert 'iteration 8: no checkpoint is written, because the last step of fake and student was left out' in log_of(
        tmp_path)
    assert {p.name for p in (tmp_path / 'run').glob('iter_*.pth')} == {'iter_12.pth', 'iter_16.pth'}


def test_weights_that_the_optimizer_makes_infinite_are_in_no_checkpoint(tmp_path):
    """A gradient that is finite, a learning rate that is not small: the weights overflow. Earlier checkpoints stay."""

    @HOOKS.register_module(force=True)
    class OverflowHook(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 6:
                next(runner.model.fake.parameters()).data.view(-1)[3] = math.inf

    runner = Runner.from_cfg(load_config(CDM, options(tmp_path, **{
        'custom_hooks': [dict(type='OverflowHook', priority='VERY_HIGH'), dict(type='CDMHook')],
        'default_hooks.checkpoint.max_keep_ckpts': 1})))
    with pytest.raises(NotFinite, match=r'iteration 8: fake\.\S+ has values that are not finite, and no checkpoint'):
        runner.train()
    assert [p.name for p in (tmp_path / 'run').glob('iter_*.pth')] == ['iter_4.pth']
    with pytest.raises(NotFinite):  # by whoever saves
        runner.save_checkpoint(str(tmp_path), 'mine.pth')
    assert not (tmp_path / 'mine.pth').exists()


@pytest.fixture
def broken(tmp_path):
    """A checkpoint whose average has a NaN, and its config."""
    method = MODELS.build(dict(type='CDM', backbone=tiny_backbone()))
    method.student_ema = StudentEMA(method.student)
    method.student_ema.weights['proj_out.bias'][2] = math.nan
    torch.save(dict(meta=dict(iter=4), state_dict=method.state_dict(), student_ema=method.student_ema.state_dict()),
               tmp_path / 'iter_4.pth')
    config = f'model = dict(type="CDM", backbone={tiny_backbone()!r})\n'
    config += 'train_dataloader = dict()\noptim_wrapper = dict()\ntrain_cfg = dict()\n'
    (tmp_path / 'config.py').write_text(config)
    return tmp_path, method


def test_sample_and_export_name_what_is_not_finite(broken, capsys):
    folder, method = broken
    for command in (['sample', '--prompts', '1'], ['export', '--out', str(folder / 'out')]):
        arguments = [command[0], str(folder / 'config.py'), '--checkpoint', str(folder / 'iter_4.pth'), *command[1:]]
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert 'has weights that are not finite, student_ema.proj_out.bias for example' in line
        assert command[0] != 'sample' or 'iter_4.pth' in line
    with pytest.raises(ValueError, match='student_ema.proj_out.bias for example'):
        export(method, folder / 'out')
    assert not (folder / 'out').exists()
    method.student_ema = None
    method.student.proj_out.bias.data[0] = -math.inf
    with pytest.raises(ValueError, match=r'student\.proj_out\.bias for example'):
        export(method, folder / 'out')


def test_training_does_not_go_on_from_a_checkpoint_that_is_not_finite(tmp_path):
    runner = Runner.from_cfg(load_config(CDM, options(tmp_path, iters=4)))
    runner.train()
    path = tmp_path / 'run/iter_4.pth'
    state = torch.load(path, weights_only=True)
    name = next(iter(state['state_dict']))
    state['state_dict'][name].view(-1)[0] = math.nan
    torch.save(state, path)
    for resume in (True, False):
        runner = Runner.from_cfg(load_config(CDM, options(tmp_path, **{
            'resume': resume, 'load_from': str(path), 'experiment_name': f'{tmp_path.name}{resume}'})))
        with pytest.raises(ValueError, match=rf'not finite, {re.escape(name)} for example'):
            runner.train()


# Embeddings


def embeddings(**changes):
    return {**dict(encoder_hidden_states=torch.randn(3, 4, 8), pooled_projections=torch.randn(3, 5)), **changes}


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_embeddings_that_are_not_finite_are_neither_written_nor_read(tmp_path, value):
    fields = embeddings()
    fields['encoder_hidden_states'][1, 2, 3] = value
    with pytest.raises(ValueError, match=r"encoder_hidden_states of row 1 \('two'\) of .*a\.safetensors has values"):
        write_embeddings(str(tmp_path / 'a.safetensors'), fields, ['one', 'two', 'three'])
    assert not list(tmp_path.iterdir())
    save_file(fields, tmp_path / 'a.safetensors')  # by somebody else
    dataset = EmbeddingDataset(str(tmp_path))
    assert dataset[0]['condition']['encoder_hidden_states'].isfinite().all()
    with pytest.raises(ValueError, match=r'encoder_hidden_states of row 1 of shard .*a\.safetensors has values'):
        dataset[1]


def test_embeddings_of_whole_numbers_are_refused_and_finite_large_ones_are_not(tmp_path):
    save_file(embeddings(encoder_hidden_states=torch.ones(3, 4, 8, dtype=torch.long)), tmp_path / 'a.safetensors')
    with pytest.raises(ValueError, match=r'encoder_hidden_states of row 0 of shard .* is int64, but embeddings must'):
        EmbeddingDataset(str(tmp_path))[0]
    large = embeddings(pooled_projections=torch.full((3, 5), 3e38), text_ids=torch.ones(3, 4, dtype=torch.long))
    write_embeddings(str(tmp_path / 'a.safetensors'), large)  # its sum overflows
    assert EmbeddingDataset(str(tmp_path))[2]['condition']['pooled_projections'].max() == 3e38


@pytest.mark.parametrize('collate', [pseudo_collate, list])
def test_a_given_embedding_that_is_not_finite_is_named_by_its_place_in_the_batch(collate):
    samples = [dict(condition={k: v[i] for k, v in embeddings().items()}) for i in range(3)]
    samples[2]['condition']['pooled_projections'] = torch.full((5,), math.nan)
    with pytest.raises(ValueError, match='pooled_projections of sample 2 of a batch has values that are not finite'):
        DistillationDataPreprocessor()(collate(samples))
    samples[2]['condition']['pooled_projections'] = torch.ones(5)
    samples = [dict(condition=dict(s['condition'], pooled_projections=torch.ones(5).int())) for s in samples]
    with pytest.raises(ValueError, match='pooled_projections of sample 0 of a batch is int32'):
        DistillationDataPreprocessor()(collate(samples))


# Numbers of a config

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize('key, model', [
    ('model.alpha', dict(alpha=NAN)), ('model.alpha', dict(alpha=INF)), ('model.fake_merge', dict(fake_merge=NAN)),
    ('model.losses.ca.alpha', dict(losses=dict(ca=dict(alpha=-INF)))),
    ('model.losses.dm.weight', dict(losses=dict(dm=dict(weight=INF)))),
    ('model.losses.cdm.min_norm', dict(losses=dict(cdm=dict(min_norm=INF)))),
    ('model.losses.cdm.sigma.low', dict(losses=dict(cdm=dict(sigma=dict(type='UniformSigma', low=NAN))))),
    ('model.time_grid.sigma_low', dict(time_grid=dict(sigma_low=NAN))),
    ('LogitNormalSigma.mean', dict(fake_sigma=dict(type='LogitNormalSigma', mean=INF))),
    ('model.sample_sigmas[1]', dict(sample_sigmas=[1.0, NAN])), ('model.lora.alpha', dict(lora=dict(alpha=NAN))),
    ('model.teacher.lora_scale', dict(teacher=dict(lora_scale=INF))),
    ('model.drop_rate', dict(type='FlowMatching', drop_rate=NAN)),
    ('LogitNormalSigma.std', dict(type='FlowMatching', sigma=dict(type='LogitNormalSigma', std=NAN)))], ids=str)
def test_numbers_of_a_model_must_be_finite(key, model):
    with pytest.raises(ValueError, match=rf'{re.escape(key)} must be a finite number.*, but is -?(nan|inf)'):
        MODELS.build({**dict(type='CDM', backbone=tiny_backbone()), **model})


@pytest.mark.parametrize('key, value', [
    ('optimizer.lr', dict(lr=INF)), ('optimizer.lr', dict(lr=NAN)), ('optimizer.weight_decay', dict(weight_decay=INF)),
    ('optimizer.betas[1]', dict(betas=(0.9, NAN))), ('optimizer.eps', dict(eps=NAN)), ('clip_grad.max_norm', NAN)])
def test_numbers_of_an_optimizer_must_be_finite(key, value):
    bad = dict(optimizer=dict(type='AdamW'), clip_grad=dict(max_norm=value)) if value is NAN else dict(
        optimizer=dict(type='AdamW', **value), clip_grad=dict(max_norm=INF))
    with pytest.raises(ValueError, match=rf'optim_wrapper\.fake\.{re.escape(key)} must be a finite number'):
        DistillationOptimWrapperConstructor(dict(student=dict(optimizer=dict(type='AdamW')), fake=bad))


def test_an_infinite_norm_only_logs():
    wrapper = dict(optimizer=dict(type='AdamW'), clip_grad=dict(max_norm=INF, norm_type=INF))
    method = tiny_method()
    wrappers = DistillationOptimWrapperConstructor(dict(student=wrapper, fake=wrapper))(method)
    logs = method.train_step(dict(prompt=torch.tensor([0, 1])), wrappers)
    assert logs['grad_norm_fake'].isfinite() and wrappers['fake'].guard.taken


def test_numbers_of_a_schedule_must_be_finite(short_run):
    with pytest.raises(ValueError, match=r'param_scheduler\.student\.1\.eta_min must be a finite number, but is inf'):
        short_run(TEACHER, **{'param_scheduler.student.1.eta_min': INF})


def test_max_skipped_is_a_whole_number():
    for value in (0, 2.5, NAN):
        with pytest.raises(ValueError, match=r'CDMHook\.max_skipped must be a whole (finite )?number of 1 or more'):
            HOOKS.build(dict(type='CDMHook', max_skipped=value))


@pytest.mark.parametrize('key', ['custom_hooks.0.ema_decay', 'train_dataloader.batch_size', 'model.alpha'])
def test_a_config_has_no_nan(key):
    with pytest.raises(ValueError, match=r'(custom_hooks\[0\].ema_decay|train_dataloader.batch_size|model.alpha) must '
                                         'be a finite number.*, but is nan'):
        load_config(CDM, {key: NAN})
