"""Several processes leave out the same steps, whichever of them had the fault."""
import math

import pytest
import torch

pytest.importorskip('deepspeed', reason='needs DeepSpeed, which the extra `test` installs')

from deepspeed_support import STRATEGIES, build, checkpoint, config  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.registry import HOOKS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from scale_support import init_gloo, launch, slow  # noqa: E402
from tests_support import same_bits  # noqa: E402

from cdm_plugin.condition import Condition  # noqa: E402
from cdm_plugin.errors import NotFinite  # noqa: E402
from cdm_plugin.hooks import method_of  # noqa: E402

RUNS = {'ddp': None, 'stage1': STRATEGIES['stage1'], 'stage2': STRATEGIES['stage2'], 'stage3': STRATEGIES['stage3'],
        'offload2': STRATEGIES['offload2'],
        'bfloat16': dict(STRATEGIES['stage2'], bf16=dict(enabled=True))}


@HOOKS.register_module()
class FaultHook(Hook):
    """On one rank, the text encoder of some iterations gives a NaN, or the answers of the teacher, which the student
    loss leaves out and stays finite."""

    def __init__(self, prompts=(), answers=(), rank=1):
        self.prompts, self.answers, self.rank = prompts, answers, rank

    def before_train(self, runner):
        method = method_of(runner)
        condition, velocity = method.backbone.condition, method.velocity

        def spoilt(batch):
            result = condition(batch)
            if runner.rank == self.rank and method.iteration in self.prompts:
                return Condition({name: t * math.nan for name, t in result.fields.items()})
            return result

        def answer(role, *args):
            v = velocity(role, *args)
            bad = role == 'teacher' and runner.rank == self.rank and method.iteration in self.answers
            return v * math.nan if bad else v

        method.backbone.condition, method.velocity = spoilt, answer


def train(folder, strategy, rank, iters, max_skipped, **fault):
    """One run; its end, if it ended itself."""
    cfg = config(folder, 2, iters=iters, strategy=strategy)
    cfg.default_hooks.checkpoint.interval = 4
    cfg.custom_hooks[0].max_skipped = max_skipped
    cfg.param_scheduler = None
    cfg.custom_hooks.append(dict(type='FaultHook', **fault))
    if strategy is None:
        cfg.model_wrapper_cfg, cfg.launcher = dict(type='DistillationDataParallel'), 'pytorch'
    try:
        (Runner.from_cfg(cfg) if strategy is None else build(cfg, 2, rank)).train()
    except NotFinite as end:
        return str(end), end.code


def train_both(root, name):
    """A run with faults that pass, and one with faults that stay."""
    rank = init_gloo()
    train(f'{root}/passing', RUNS[name], rank, 8, 10, answers=[1], prompts=[4, 5, 6, 7])
    return train(f'{root}/staying', RUNS[name], rank, 20, 2, prompts=list(range(6, 20)))


def saved(path):
    """Everything that training has changed, by file."""
    if path.is_dir():
        return {file.name: torch.load(file, weights_only=True) for file in path.glob('rank_*.pth')}
    state = torch.load(path, weights_only=True)
    return {key: dict(state[key]) for key in ('state_dict', 'student_ema', 'optimizer')}


@pytest.mark.parametrize('name', ['ddp', 'stage2', *slow('stage1', 'stage3', 'offload2', 'bfloat16')])
def test_all_ranks_leave_out_the_same_steps_and_end_together(name, tmp_path):
    """The fault is of rank 1 alone. Of the student's steps in iterations 1 and 3 only the first is bad; then four
    iterations leave everything as it is, to the bit."""
    ends = launch(train_both, str(tmp_path), name)
    before, after = tmp_path / 'passing/iter_4.pth', tmp_path / 'passing/iter_8.pth'
    assert checkpoint(before)['student_ema']['steps'] == 1
    assert all(w.isfinite().all() for w in checkpoint(before)['state_dict'].values())
    same_bits(saved(after), saved(before))
    for text, code in ends:
        assert code == 3 and 'the last 2 steps of fake were not finite' in text
        assert 'iter_4.pth is from before that' in text
    assert not (tmp_path / 'staying/iter_8.pth').exists()
    assert (tmp_path / 'staying/last_checkpoint').read_text().endswith('iter_4.pth')
