"""Plain DDP on two gloo processes."""
import copy
import dataclasses
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from recipes import CDM
from scale_support import Workers, free_port, init_gloo, launch, run_command, selected, share_draws, slow
from tests_support import same_bits, tiny_method

from cdm_plugin.cli import main
from cdm_plugin.config import load_config
from cdm_plugin.engine import DistillationOptimWrapperConstructor
from cdm_plugin.engine.launch import start_processes, stop_processes
from cdm_plugin.inference import load_method

CYCLES, BATCH = 10, 4
WRAPPER = dict(type='DistillationDataParallel')
# Name -> method's arguments, updates of the optimizers' configs, arguments of the wrapper.
CASES = {
    'cdm': (dict(type='CDM', student_every=2, fake_merge=0.1), {}, {}),
    'cdm, anchor-aware, checkpointed': (
        dict(type='CDM', student_every=2, anchor_aware_fake=True, activation_checkpointing=True), {}, {}),
    'cdm, accumulated': (dict(type='CDM', student_every=2), dict(accumulative_counts=2), {}),
    'lora, one rollout': (dict(type='CDM', fake_steps=2, student_every=1, lora=dict(rank=2)), {}, {}),
    'cdm, unused': (dict(type='CDM', student_every=2), {}, dict(find_unused_parameters=True)),
    'tdm, lora': (dict(type='TDM', losses=dict(dm=dict(huber=None)), lora=dict(rank=2)), {}, {}),
    'dmd2': (dict(type='DMD2', student_every=2), {}, {}),
    'decoupled dmd': (dict(type='DecoupledDMD', student_every=2, max_batch_per_call=3), {}, {}),
    'lora': (dict(type='CDM', student_every=2, anchor_aware_fake=True, activation_checkpointing=True,
                  lora=dict(rank=2)), {}, {})}


def train_tiny(case, rank=0, world_size=1, seed=0):
    """Ten cycles of a case on this rank's share of the data and draws: losses, and weights by name."""
    arguments, options, wrapping = CASES[case]
    method = tiny_method(dtype=torch.float32, seed=seed, **arguments)
    if case == 'cdm, unused':
        for role in ('student', 'fake'):
            getattr(method, role).spare = torch.nn.Parameter(torch.ones(3))
    share_draws(method, rank, world_size)
    model = method
    if world_size > 1:
        model = MODEL_WRAPPERS.build(dict(WRAPPER, module=method, device_ids=[rank], **wrapping))
    optimizer = dict(optimizer=dict(type='AdamW', lr=1e-3, eps=1e-6, weight_decay=1e-4),
                     clip_grad=dict(max_norm=1.0), **options)
    wrappers = DistillationOptimWrapperConstructor(dict(student=optimizer, fake=copy.deepcopy(optimizer)))(model)
    iterations = CYCLES * method.student_every
    wrappers.initialize_count_status(model, 0, iterations)
    losses = []
    for method.iteration in range(iterations):
        prompts = (torch.arange(BATCH) + method.iteration) % 3
        rows = BATCH // world_size
        logs = model.train_step(dict(prompt=prompts[rank * rows:(rank + 1) * rows]), wrappers)
        losses.append({k: float(v) for k, v in logs.items() if k.startswith('loss_')})
    return losses, {k: v.clone() for k, v in method.state_dict().items()}


def equality_worker(cases):
    """Every case on two ranks; the seeds of the weights differ, the wrapper has to share rank 0's."""
    rank = init_gloo()
    return {case: train_tiny(case, rank, 2, seed=10 * rank) for case in cases}


@pytest.fixture(scope='module')
def trained(request):
    """Results of the cases on two ranks."""
    return launch(equality_worker, selected(request, 'case'))


@pytest.mark.parametrize('case', [*list(CASES)[:4], *slow(*list(CASES)[4:])])
def test_two_ranks_train_as_one_process_with_the_whole_batch(trained, case):
    losses, weights = train_tiny(case)
    (losses_0, weights_0), (losses_1, weights_1) = (rank[case] for rank in trained)
    assert weights_0.keys() == weights.keys()
    start = tiny_method(dtype=torch.float32, **CASES[case][0]).state_dict()
    moved = max(float((weights[k] - start[k]).abs().max()) for k in start)
    assert moved > 2e-3
    for name, value in weights.items():
        assert torch.equal(weights_0[name], weights_1[name]), name
        assert torch.allclose(weights_0[name], value, rtol=0, atol=1e-5), (name, moved)
    assert len(losses) == len(losses_0) == len(losses_1)
    for whole, one, other in zip(losses, losses_0, losses_1):
        assert whole.keys() == one.keys() == other.keys()
        for name, value in whole.items():
            assert (one[name] + other[name]) / 2 == pytest.approx(value, rel=1e-5, abs=1e-5)


def options(work_dir, **more):
    """A short run of the digits recipe on every rank."""
    return {
        'train_cfg.max_iters': 8, 'train_dataloader.batch_size': 2, 'train_dataloader.num_workers': 0,
        'val_dataloader.dataset.length': 10,
        'default_hooks.checkpoint.interval': 4, 'default_hooks.logger.interval': 3,
        'custom_hooks.0.histogram_interval': 4, 'custom_hooks.1.teacher_steps': 2, 'custom_hooks.1.interval': 4,
        'model_wrapper_cfg.type': WRAPPER['type'],
        'log_level': 'WARNING', 'work_dir': str(work_dir), 'launcher': 'pytorch',
        'experiment_name': Path(work_dir).name, **more}


def message_of(function, *args):
    """What a ValueError says."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return 'nothing'


def train_and_record(folder):
    """A run with every hook; this rank's own losses, and MMEngine's history of them."""
    config = load_config(CDM, options(Path(folder, 'whole')))
    config.custom_hooks.append(dict(type='PipelineExportHook', prompts=[3]))
    runner = Runner.from_cfg(config)
    method, losses = runner.model.module, []
    finish = method.finish

    def recording_finish(logs):
        losses.append(float(logs['loss_fake']))
        if runner.rank == 0:
            logs = dict(logs, rank_0_only=torch.tensor(2.0))
        return finish(logs)

    method.finish = recording_finish
    runner.train()
    history = runner.message_hub.get_scalar('train/loss_fake').data[0].tolist()
    if runner.rank == 0:
        assert runner.message_hub.get_scalar('train/rank_0_only').data[0].tolist() == [2] * 8
    return dict(losses=losses, history=history, seed=method.seed, weights=method.student.state_dict(),
                ema=method.student_ema.state_dict())


def build(folder, name, **changes):
    config = load_config(CDM, options(Path(folder, name)))
    config.merge_from_dict(changes)
    return config


def train_config(config):
    Runner.from_cfg(config).train()


def runner_worker(folder):
    """The Runner's way through: a whole run, and what must be refused."""
    rank = init_gloo()
    result = train_and_record(folder)
    without = build(folder, 'without')
    without.pop('model_wrapper_cfg')
    result['no wrapper'] = message_of(train_config, without)
    stock = build(folder, 'stock')
    stock.model_wrapper_cfg = dict(type='MMSeparateDistributedDataParallel', device_ids=None)
    result['stock wrapper'] = message_of(train_config, stock)
    result['batch sizes'] = message_of(
        train_config, build(folder, 'batches', **{'train_dataloader.batch_size': 2 + rank}))
    seeded = Runner.from_cfg(build(folder, 'seeds', **{'randomness.diff_rank_seed': True, 'train_cfg.max_iters': 1}))
    seeded.train()
    result['seeds'] = (seeded.seed, seeded.model.module.seed)
    return result


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Folder and results of `runner_worker`."""
    folder = tmp_path_factory.mktemp('ddp')
    return folder, launch(runner_worker, str(folder))


def test_checkpoints_have_the_keys_of_a_single_process(run):
    folder, results = run
    state = torch.load(folder / 'whole/iter_8.pth', weights_only=True)
    method = load_method(CDM, str(folder / 'whole'), device='cpu', roles=('student', 'fake'))
    assert state['state_dict'].keys() == method.state_dict().keys()
    assert not any('module.' in key for key in state['state_dict'])
    for result in results:
        for key, value in result['weights'].items():
            assert torch.equal(value, state['state_dict'][f'student.{key}'])
        for key, value in result['ema']['weights'].items():
            assert torch.equal(value, state['student_ema']['weights'][key])
    same_bits(method.student_ema.state_dict()['weights'], state['student_ema']['weights'])


def test_logged_losses_are_means_over_the_ranks(run):
    _, (one, other) = run
    assert len(one['losses']) == 8 and one['losses'] != other['losses']
    for result in (one, other):
        assert result['history'] == pytest.approx([(a + b) / 2 for a, b in zip(one['losses'], other['losses'])])


def test_hooks_write_once(run):
    folder, _ = run
    assert (folder / 'whole/export/samples/0000.png').is_file()
    load_method(str(folder / 'whole/export'), device='cpu')
    files = (folder / 'whole').glob('*/vis_data/vis_image/samples*.png')
    grids = Counter(file.stem.rsplit('_', 1)[0] for file in files)
    assert grids == {'samples': 3, **{f'samples_{steps}_steps': 3 for steps in (1, 2, 8)}}


def test_what_ranks_must_agree_on(run):
    _, results = run
    for result in results:
        assert "model_wrapper_cfg=dict(type='DistillationDataParallel')" in result['no wrapper']
        assert "model_wrapper_cfg.type must be 'DistillationDataParallel'" in result['stock wrapper']
        assert 'train_dataloader.batch_size' in result['batch sizes'] and '[2, 3]' in result['batch sizes']
    assert [result['seeds'] for result in results] == [(0, 0), (1, 0)]


def cli(work_dir, *extra, **changes):
    """Arguments of `cdm` for training."""
    changed = {key: value for key, value in options(work_dir, **changes).items() if key not in ('work_dir', 'launcher')}
    return ['train', CDM, '--launcher', 'pytorch', '--work-dir', str(work_dir), *extra,
            '--cfg-options', *[f'{key}={value}' for key, value in changed.items()]]


def apart_worker():
    """Ranks with draws as different as can be, and a rank that samples on its own between the iterations."""
    rank = init_gloo()
    method = tiny_method(dtype=torch.float32, student_every=2, losses=dict(cdm=dict(guided=True)))
    sample_draws = method.sample_draws

    def far_apart(*args):
        draws = sample_draws(*args)
        last = len(draws.sigmas) - 1
        return dataclasses.replace(draws, anchor=torch.full_like(draws.anchor, rank * last), rollout_steps=last,
                                   noise=draws.noise * (1 + 100 * rank), moving=None)

    method.sample_draws = far_apart
    model = MODEL_WRAPPERS.build(dict(WRAPPER, module=method))
    optimizer = dict(optimizer=dict(type='AdamW', lr=1e-3))
    wrappers = DistillationOptimWrapperConstructor(dict(student=optimizer, fake=copy.deepcopy(optimizer)))(model)
    calls = []
    for method.iteration in range(6):
        labels = torch.full((3,), 2 * rank)
        model.train_step(dict(prompt=labels), wrappers)
        calls.append(dict(method.calls))
        if rank == 0:
            method.sample(method.backbone.condition(dict(prompt=labels)))
    return calls, {**method.state_dict(), **{f'teacher.{k}': v for k, v in train_teacher(rank).items()}}


def train_teacher(rank):
    """Three steps of flow matching, in bfloat16."""
    method = tiny_method('FlowMatching', dtype=torch.float32)
    model = MODEL_WRAPPERS.build(dict(WRAPPER, module=method))
    wrappers = DistillationOptimWrapperConstructor(dict(student=dict(
        type='AmpOptimWrapper', dtype='bfloat16', optimizer=dict(type='AdamW', lr=1e-3))))(model)
    for method.iteration in range(3):
        images = torch.full((2, 1, 8, 8), rank - 0.5)
        model.train_step(dict(prompt=torch.tensor([0, rank]), image=images), wrappers)
    return method.student.state_dict()


def test_ranks_that_have_nothing_in_common_do_not_hang():
    (calls, weights), (other_calls, other_weights) = launch(apart_worker)
    assert calls == other_calls
    same_bits(weights, other_weights)


@pytest.mark.parametrize('launcher, variable', [
    ('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID'), ('mpi', 'OMPI_COMM_WORLD_RANK')])
def test_a_launcher_without_its_environment_is_one_line(launcher, variable, tmp_path, monkeypatch, capsys):
    for name in list(os.environ):
        if name.startswith(('SLURM_', 'OMPI_')) or name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR'):
            monkeypatch.delenv(name)
    arguments = ['train', CDM, '--launcher', launcher, '--work-dir', str(tmp_path)]
    assert main([*arguments, '--cfg-options', f'model_wrapper_cfg.type={WRAPPER["type"]}']) == 2
    error = capsys.readouterr().err
    assert variable in error and f'--launcher {launcher}' in error and error.count('\n') == 1
    assert main(arguments) == 2
    assert "model_wrapper_cfg=dict(type='DistillationDataParallel')" in capsys.readouterr().err


def test_one_process_goes_on_with_the_checkpoint_and_the_config_of_two(run, tmp_path):
    config = load_config(CDM, options(tmp_path / 'one', launcher='none', resume=True, **{'train_cfg.max_iters': 9}))
    config.load_from = str(run[0] / 'whole/iter_8.pth')
    Runner.from_cfg(config).train()
    before, after = (torch.load(file, weights_only=True) for file in (config.load_from, tmp_path / 'one/iter_9.pth'))
    assert before['state_dict'].keys() == after['state_dict'].keys()
    assert after['meta']['iter'] == 9 and after['student_ema']['steps'] == before['student_ema']['steps']
    steps = [state['optimizer']['fake']['state'][0]['step'] for state in (before, after)]
    assert steps == [8, 9]


@pytest.mark.parametrize('launcher, variables', [
    ('slurm', dict(SLURM_PROCID='0', SLURM_NTASKS='1', SLURM_LOCALID='0')),
    ('mpi', dict(OMPI_COMM_WORLD_RANK='0', OMPI_COMM_WORLD_SIZE='1', OMPI_COMM_WORLD_LOCAL_RANK='0'))])
@pytest.mark.skipif(torch.cuda.is_available(), reason='MMEngine starts the processes of machines with a GPU')
def test_slurm_and_mpi_start_gloo_without_a_gpu(launcher, variables, monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.setenv(name, 'overwritten')
    for name, value in dict(variables, MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port())).items():
        monkeypatch.setenv(name, value)
    start_processes(launcher, dict(dist_cfg=dict(backend='nccl')))
    assert torch.distributed.get_backend() == 'gloo' and os.environ['LOCAL_RANK'] == '0'
    stop_processes()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def single(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('lora', [None, dict(rank=2)])
def test_wrapped_and_plain_methods_take_each_others_state(lora, single):
    plain = tiny_method(dtype=torch.float32, lora=lora, seed=1)
    method = tiny_method(dtype=torch.float32, lora=lora)
    model = MODEL_WRAPPERS.build(dict(WRAPPER, module=method, device_ids=[0]))
    wrapped = [name for name, part in model.module.named_children() if isinstance(part, MMDistributedDataParallel)]
    assert sorted(wrapped) == ['fake', 'student']
    method.load_state_dict(plain.state_dict())
    same_bits(dict(plain.state_dict()), dict(method.state_dict()))
    load_state_dict(method, {k: torch.zeros_like(v) for k, v in plain.state_dict().items()}, strict=True)
    assert all(not v.any() for v in method.state_dict().values())
    plain.load_state_dict(method.state_dict())
    broken = plain.state_dict()
    broken['student.extra'] = torch.zeros(1)
    with pytest.raises(RuntimeError, match='extra'):
        method.load_state_dict(broken)


def test_no_sync_keeps_every_role_from_reducing(single):
    method = tiny_method(dtype=torch.float32)
    model = MODEL_WRAPPERS.build(dict(WRAPPER, module=method))
    with model.no_sync():
        assert not method.student.require_backward_grad_sync and not method.fake.require_backward_grad_sync
    assert method.student.require_backward_grad_sync and method.fake.require_backward_grad_sync


def test_other_wrappers_and_other_models_are_refused(single):
    with pytest.raises(ValueError, match="model_wrapper_cfg=dict\\(type='DistillationDataParallel'\\)"):
        MMDistributedDataParallel(tiny_method(), device_ids=[0])
    with pytest.raises(ValueError, match='model.type is Linear'):
        MODEL_WRAPPERS.build(dict(WRAPPER, module=torch.nn.Linear(2, 2)))


@pytest.mark.gpu
def test_one_gpu_trains_through_the_launcher(tmp_path):
    with Workers(run_command, cli(tmp_path / 'gpu', **{'train_cfg.max_iters': 2}), world_size=1) as workers:
        assert workers.wait(300) == [0], workers.text()
    assert (tmp_path / 'gpu/iter_2.pth').is_file()
