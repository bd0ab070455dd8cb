"""The DeepSpeed strategy: two processes on the CPU against one process without it."""
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')

from deepspeed_support import CYCLES, STRATEGIES, build, checkpoint, config, logged, train  # noqa: E402
from scale_support import Workers, free_port, launch, selected, slow  # noqa: E402
from signal_support import SignalAtHook  # noqa: E402
from tests_support import same_bits  # noqa: E402

from cdm_plugin.engine import DistillationDeepSpeedStrategy  # noqa: E402
from cdm_plugin.errors import Stopped  # noqa: E402
from cdm_plugin.export import export  # noqa: E402
from cdm_plugin.inference import load_method, sample_prompts  # noqa: E402
from cdm_plugin.roles.weights import merge_weights  # noqa: E402

ONE_ROLLOUT = dict(fake_steps=2, student_every=1)


def train_all(root, names):
    """Several strategies; their losses by name."""
    return {name: train(f'{root}/{name}', STRATEGIES[name]) for name in names}


@pytest.fixture(scope='module')
def runs(request, tmp_path_factory):
    """The folder of all runs, and their losses by rank and name."""
    root = tmp_path_factory.mktemp('runs')
    single = build(config(root / 'single'))
    single.train()
    # Sums over unaligned memory differ in the last bit, so what is compared to the bit comes first in its process.
    first = launch(train_all, str(root), ['stage2'])
    others = [name for name in selected(request, 'name') if name in STRATEGIES and name not in ('stage2', 'stage3')]
    rest = launch(train_all, str(root), ['stage3', *others])
    return root, logged(single), [{**a, **b} for a, b in zip(first, rest)]


@pytest.mark.parametrize('name', ['stage2', 'stage3', *slow('stage1', 'offload2', 'offload3')])
def test_same_training_as_in_one_process(runs, name):
    """Weights of both roles (fake merge included), EMA and losses after 10 cycles, clipped, with schedules."""
    root, losses, logs = runs
    a, b = (checkpoint(root / run / 'iter_20.pth') for run in ('single', name))
    assert a['state_dict'].keys() == b['state_dict'].keys()
    for key, weight in a['state_dict'].items():
        assert torch.allclose(weight, b['state_dict'][key], rtol=0, atol=1e-5), key
    assert a['student_ema']['steps'] == b['student_ema']['steps'] == CYCLES
    for key, weight in a['student_ema']['weights'].items():
        assert torch.allclose(weight, b['student_ema']['weights'][key], rtol=0, atol=1e-5), key
    for own in logs:
        assert own[name].keys() == losses.keys()
        for key, values in losses.items():
            assert own[name][key] == pytest.approx(values, rel=1e-5, abs=1e-5), key


def same_pieces(a, b):
    """Asserts that two folders hold the same bits on every rank."""
    for rank in range(2):
        x, y = (torch.load(folder / f'rank_{rank}.pth', weights_only=True) for folder in (a, b))
        same_bits(x, y)
    x, y = (torch.load(folder / 'common.pth', weights_only=True) for folder in (a, b))
    same_bits(x['param_schedulers'], y['param_schedulers'])


def test_resumed_run_ends_in_the_same_bits(runs):
    """Weights, EMA, optimizers and schedulers, on every rank; stage 3 is below, with a kill."""
    root = runs[0]
    launch(train, str(root / 'resumed'), STRATEGIES['stage2'], resume=str(root / 'stage2/iter_8.pth'))
    same_pieces(root / 'stage2/iter_20.pth', root / 'resumed/iter_20.pth')


def stop_after_five(root):
    """A run whose second rank gets a signal in its fifth iteration; the status that every rank would exit with."""
    def build_stopping(*args):
        runner = build(*args)
        runner.register_hook(SignalAtHook('after_train_iter', count=5, rank=1))
        return runner

    with pytest.raises(Stopped) as error:
        train(f'{root}/stopped', STRATEGIES['stage2'], build=build_stopping)
    return error.value.code


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits_and_a_changed_learning_rate_holds(runs):
    root = runs[0]
    assert launch(stop_after_five, str(root)) == [143, 143]
    assert (root / 'stopped/iter_5.pth').is_dir()
    launch(train, str(root / 'stopped'), STRATEGIES['stage2'], resume=True)
    same_pieces(root / 'stage2/iter_20.pth', root / 'stopped/iter_20.pth')
    launch(train_at_another_rate, str(root))
    groups = [torch.load(root / 'faster/iter_20.pth' / f'rank_{rank}.pth', weights_only=True)['optimizer']
              for rank in range(2)]
    for own in groups:  # the schedules are over: a warm-up of the student, a factor of the fake score
        assert [own[role]['groups'][0]['lr'] for role in ('student', 'fake')] == [pytest.approx(2e-2), 1e-2]
        assert own['student']['groups'][0]['weight_decay'] == 0.25


def train_at_another_rate(root):
    cfg = config(f'{root}/faster', 2, strategy=STRATEGIES['stage2'])
    cfg.resume, cfg.load_from = True, f'{root}/stage2/iter_16.pth'
    cfg.optim_wrapper.student.optimizer.update(lr=2e-2, weight_decay=0.25)
    build(cfg, 2, int(os.environ['RANK'])).train()


def test_method_loads_from_shards_in_one_process(runs, tmp_path):
    root = runs[0]
    cfg = config(tmp_path)
    cfg.dump(str(tmp_path / 'config.py'))
    method = load_method(str(tmp_path / 'config.py'), str(root / 'stage3/iter_20.pth'), device='cpu')
    single = checkpoint(root / 'single/iter_20.pth')
    for name, weight in method.student.named_parameters():
        assert torch.allclose(weight, single['state_dict'][f'student.{name}'], rtol=0, atol=1e-5)
        assert torch.allclose(method.student_ema.weights[name], single['student_ema']['weights'][name], atol=1e-5)
    export(method, tmp_path / 'shards', config=cfg)
    single = load_method(str(tmp_path / 'config.py'), str(root / 'single'), device='cpu')
    export(single, tmp_path / 'single', config=cfg)
    a, b = (load_method(str(tmp_path / name), device='cpu') for name in ('shards', 'single'))
    noise = torch.randn(a.latent_shape(2))
    assert torch.allclose(sample_prompts(a, [0, 1], noise), sample_prompts(b, [0, 1], noise), atol=1e-4)


def train_alone(root, out):
    """Goes on from two processes' checkpoint, and starts from one that knows no shards without changing anything."""
    train(f'{out}/resumed', STRATEGIES['stage2'], resume=f'{root}/stage3/iter_8.pth')
    cfg = config(f'{out}/loaded', strategy=STRATEGIES['stage3'], iters=1)
    cfg.model.fake_merge, cfg.load_from = 0, f'{root}/single/iter_20.pth'
    cfg.optim_wrapper.fake.optimizer.lr = cfg.optim_wrapper.student.optimizer.lr = 0
    build(cfg).train()


def test_other_world_size_and_stage_cut_the_shards_anew(runs, tmp_path):
    """From two processes at stage 3 to one at stage 2, which goes on as one process always did."""
    root = runs[0]
    resumed = tmp_path / 'resumed'
    launch(train_alone, str(root), str(tmp_path), world_size=1)
    a, b = (checkpoint(folder / 'iter_20.pth') for folder in (root / 'single', resumed))
    for key, weight in a['state_dict'].items():
        assert torch.allclose(weight, b['state_dict'][key], rtol=0, atol=1e-5), key
    same_bits(dict(checkpoint(tmp_path / 'loaded/iter_1.pth')['state_dict']), dict(a['state_dict']))


def build_apart(cfg, world_size, rank):
    """The ranks' own draws and other data, and the grid of samples."""
    cfg.custom_hooks.append(dict(type='SampleGridHook', interval=4, num_images=3, teacher_steps=2))
    cfg.train_dataloader.dataset.num_classes = 3 if rank else 1
    return build(cfg, world_size, rank, share=False)


def check_pieces(method):
    """A merge and a swapped-in EMA act on float32 pieces, and reach what the networks compute with."""

    def seen(engine, name, piece):
        parameter = dict(engine.module.named_parameters())[name]
        whole = parameter.ds_tensor if hasattr(parameter, 'ds_tensor') else parameter[...].flatten()[piece.start:]
        return whole.flatten()[:piece.numel].float()

    def check(engine, expected):
        for name, piece in engine.weight_shards.pieces.items():
            assert torch.equal(engine.weight_shards.weights[name], expected[name]), name
            assert torch.equal(seen(engine, name, piece), expected[name].bfloat16().float()), name

    student, fake = ({name: w.clone() for name, w in engine.weight_shards.weights.items()}
                     for engine in (method.student, method.fake))
    merge_weights(method.fake, method.student, 0.001)
    check(method.fake, {name: w.lerp(student[name], 0.001) if name in student else w for name, w in fake.items()})
    with method.student_ema.applied():
        check(method.student, method.student_ema.weights)
    check(method.student, student)


def train_variants(root, names):
    """bfloat16, LoRA with accumulated gradients, and fake-score steps on one rollout, a few iterations each."""
    for stage in ('stage1', 'stage3'):
        if f'bf16_{stage}' in names:
            cfg = config(f'{root}/bf16_{stage}', 2, 8, dict(STRATEGIES[stage], bf16=dict(enabled=True)))
            runner = build(cfg, 2, int(os.environ['RANK']))
            runner.train()
            check_pieces(runner.model)
    if 'lora' in names:
        train(f'{root}/lora', STRATEGIES['stage2'], iters=8, accumulate=2, lora=dict(rank=2))
    if 'one_rollout' in names:
        train(f'{root}/one_rollout', STRATEGIES['stage3'], iters=8, **ONE_ROLLOUT)
    # Ranks that have nothing in common but the networks: other data, their own draws, and the grid of samples.
    train(f'{root}/apart', STRATEGIES['stage3'], iters=8, build=build_apart)


@pytest.fixture(scope='module')
def variants(request, tmp_path_factory):
    """The folder of the runs of `train_variants`."""
    root = tmp_path_factory.mktemp('variants')
    launch(train_variants, str(root), selected(request, 'name'))
    return root


@pytest.mark.parametrize('name, options, tolerance', [
    ('bf16_stage3', {}, 0.05), ('lora', dict(accumulate=2, lora=dict(rank=2)), 1e-5),
    pytest.param('bf16_stage1', {}, 0.05, marks=pytest.mark.slow),
    pytest.param('one_rollout', ONE_ROLLOUT, 1e-5, marks=pytest.mark.slow)])
def test_variants_train_as_in_one_process(variants, tmp_path, name, options, tolerance):
    build(config(tmp_path, iters=8, **options)).train()
    expected, state = checkpoint(tmp_path / 'iter_8.pth'), checkpoint(variants / name / 'iter_8.pth')
    assert expected['state_dict'].keys() == state['state_dict'].keys()
    for key, weight in expected['state_dict'].items():
        assert state['state_dict'][key].dtype == torch.float32
        assert torch.allclose(state['state_dict'][key], weight, rtol=0, atol=tolerance), key


def test_ranks_with_other_data_and_draws_do_not_hang(variants):
    assert (variants / 'apart/iter_8.pth/rank_1.pth').is_file()


@pytest.mark.slow
def test_killed_rank_ends_the_job_and_the_last_checkpoint_resumes(runs, tmp_path):
    root = runs[0]
    with Workers(train, str(tmp_path), STRATEGIES['stage3']) as workers:
        deadline = time.monotonic() + 60
        while not (tmp_path / 'last_checkpoint').exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        workers.kill(1)
        statuses = workers.wait(30)
        assert statuses[0] not in (0, None)
        assert 'Error' in workers.text(0)
    assert (tmp_path / 'iter_8.pth/common.pth').is_file() and not (tmp_path / 'iter_20.pth').exists()
    launch(train, str(tmp_path), STRATEGIES['stage3'], resume=True)
    same_pieces(root / 'stage3/iter_20.pth', tmp_path / 'iter_20.pth')


@pytest.mark.parametrize('strategy, options, part', [
    (dict(zero_optimization=dict(stage=4)), {}, 'stage must be 1, 2 or 3'),
    (dict(zero_optimization=dict(stage=2, offload_param=dict(device='cpu'))), {}, 'needs stage=3'),
    (dict(zero_optimization=dict(stage=3, offload_param=dict(device='nvme'))), {}, 'offload_param.device'),
    (dict(zero_optimization=dict(stage=2, reduce_buckets=1)), {}, 'strategy.zero_optimization.reduce_buckets'),
    (dict(communication_datatype='fp32'), {}, "did you mean 'communication_data_type'?"),
    (dict(gradient_clipping=1.0), {}, 'optim_wrapper.<role>.clip_grad'),
    (dict(fp16=dict(enabled=True)), {}, 'strategy.bf16'),
    (dict(train_micro_batch_size_per_gpu=3), {}, 'train_dataloader.batch_size=4')])
def test_mistakes_are_one_line(strategy, options, part, tmp_path):
    with pytest.raises(ValueError) as error:
        build(config(tmp_path, strategy=strategy, **options)).train()
    assert part in str(error.value) and '\n' not in str(error.value)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_without_deepspeed_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'deepspeed', None)
    with pytest.raises(ImportError, match=r"strategy needs deepspeed: pip install 'cdm_plugin\[scale\]'"):
        DistillationDeepSpeedStrategy()


@pytest.mark.parametrize('break_it, part', [
    (lambda folder: (folder / 'rank_1.pth').unlink(), 'has no rank_1.pth'),
    (lambda folder: (folder / 'rank_1.pth').write_bytes(b'PK'), 'is damaged'),
    (lambda folder: torch.save(dict(format='other'), folder / 'common.pth'), 'has the format')])
def test_damaged_shards_are_refused_by_name(runs, break_it, part, tmp_path):
    folder = tmp_path / 'iter_8.pth'
    shutil.copytree(runs[0] / 'stage3/iter_8.pth', folder)
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=part):
        checkpoint(folder)


@pytest.mark.slow
def test_deepspeed_launches_cdm_train(tmp_path):
    """The command of the README, on two processes of this machine."""
    cfg = config(tmp_path / 'run', 2, iters=2, strategy=STRATEGIES['stage2'])
    cfg.default_hooks.checkpoint.interval = 2
    cfg.dump(str(tmp_path / 'config.py'))
    launched = subprocess.run(
        [sys.executable, '-m', 'deepspeed.launcher.runner', '--num_gpus', '2', '--master_port', str(free_port()),
         '--no_python', '--no_local_rank', sys.executable, '-m', 'cdm_plugin.cli', 'train',
         str(tmp_path / 'config.py'), '--launcher', 'pytorch'],
        env=dict(os.environ, OMP_NUM_THREADS='1'), capture_output=True, text=True, timeout=300)
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert sorted(path.name for path in (tmp_path / 'run/iter_2.pth').iterdir()) == [
        'common.pth', 'rank_0.pth', 'rank_1.pth']


@pytest.mark.gpu
@pytest.mark.parametrize('stage', STRATEGIES)
def test_one_gpu_trains_every_stage_in_bfloat16(stage, tmp_path):
    launch(train, str(tmp_path), dict(STRATEGIES[stage], bf16=dict(enabled=True)), iters=8, world_size=1)
    state = checkpoint(tmp_path / 'iter_8.pth')['state_dict']
    assert state and all(weight.isfinite().all() for weight in state.values())
