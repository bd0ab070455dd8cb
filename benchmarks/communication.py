"""What two processes send each other in an iteration: bytes of every collective, counted as they are called.

    python benchmarks/communication.py --out docs/communication.json

The digits' recipe trains on two gloo processes of the CPU, by data parallelism and by each ZeRO stage. Every collective
that torch.distributed dispatches is counted with the bytes of the whole tensor (what an all-gather makes, a
reduce-scatter takes), and compared with a formula of weights and network calls, which `scaling_plan.py` takes on to
larger models and more GPUs. At stage 3 nothing that was gathered is kept for its next use, as between the calls of a
network with more weights than DeepSpeed keeps. Two minutes.
"""
import argparse
import json
import os
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from mmengine.config import Config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

RECIPE = 'digits/cdm_sd3-digits_1xb32_4step_800.py'
CASES = [('CDM', stage, checkpointing) for stage in (0, 1, 2, 3) for checkpointing in (False, True)[:1 + (stage == 3)]]
CASES += [('DMD2', 0, False), ('DMD2', 3, False)]
# Nothing stays gathered, and no weight is whole by its small size.
ZERO_3 = dict(stage3_max_live_parameters=0, stage3_max_reuse_distance=0, stage3_param_persistence_threshold=0,
              stage3_prefetch_bucket_size=0)
NAMES = dict(allreduce_='all-reduce', _allgather_base_='all-gather', _reduce_scatter_base_='reduce-scatter',
             broadcast_='broadcast')


class CountCollectives(TorchDispatchMode):
    """Counts calls and bytes of collectives by name, from Python and from DDP's reducer alike."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()
        self.bytes: Counter = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == 'c10d':
            sizes = [t.nbytes for t in tree_leaves(args) if isinstance(t, Tensor)]
            operation = func.__name__.split('.')[0]
            name = NAMES.get(operation, operation)
            self.calls[name] += 1
            self.bytes[name] += max(sizes) if operation.endswith('base_') else sum(sizes)  # those have two tensors
        return func(*args, **(kwargs or {}))


def gathers(with_gradient: bool, checkpointing: bool) -> int:
    """How often a call needs a network's weights at stage 3: forward, recomputation, backward."""
    return 1 if not with_gradient else 3 if checkpointing else 2


def expected_bytes(stage: int, checkpointing: bool, weights: dict[str, float], calls: dict[Any, float],
                   updates: dict[str, float], merges: float, size: int = 4) -> dict[str, float]:
    """Bytes of the collectives of an iteration.

    Args:
        stage (int): ZeRO stage, 0 is data parallelism.
        checkpointing (bool): Whether activations are recomputed.
        weights (dict): Role -> number of weights.
        calls (dict): (role, with gradient) -> calls.
        updates (dict): Role -> optimizer steps.
        merges (float): Merges of the student into the fake score.
        size (int): Bytes of a weight, and of a gradient. Default 4.
    """
    reduced = sum(weights[role] * n for role, n in updates.items())
    if stage == 3:
        used = sum(weights[role] * n * gathers(grad, checkpointing) for (role, grad), n in calls.items())
        return {'all-gather': used * size, 'reduce-scatter': reduced * size}
    if stage == 0:
        return {'all-reduce': reduced * size}
    return {'all-reduce': reduced * size, 'all-gather': (reduced + weights['fake'] * merges) * size}


def config_of(method: str, stage: int, checkpointing: bool, iterations: int, work_dir: str) -> Config:
    """The digits' recipe for two processes."""
    from cdm_plugin.config import load_config
    cfg = load_config(RECIPE, {'model.type': method})
    cfg.model.activation_checkpointing = checkpointing
    cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size = iterations, 4
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.custom_hooks, cfg.default_hooks.checkpoint = cfg.custom_hooks[:1], None
    cfg.visualizer.vis_backends, cfg.log_level = [], 'ERROR'
    cfg.work_dir, cfg.launcher = work_dir, 'pytorch'
    if stage == 0:
        cfg.model_wrapper_cfg = dict(type='DistillationDataParallel')
    else:
        cfg.strategy = dict(type='DistillationDeepSpeedStrategy',
                            zero_optimization=dict(stage=stage, **(ZERO_3 if stage == 3 else {})))
    return cfg


def train(rank: int, port: int, method: str, stage: int, checkpointing: bool, iterations: int, folder: str) -> None:
    """One of two processes; rank 0 writes what it has counted."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1',
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    from mmengine.runner import FlexibleRunner, Runner

    from cdm_plugin.engine.launch import start_processes, stop_processes
    from cdm_plugin.methods import Distillation
    cfg = config_of(method, stage, checkpointing, iterations, folder)
    start_processes('pytorch')
    runner = (FlexibleRunner if stage else Runner).from_cfg(cfg)
    rows: list[dict[str, Any]] = []
    step = Distillation.train_step

    def counted_step(model: Any, data: Any, optim_wrapper: Any) -> Any:
        with CountCollectives() as count:
            out = step(model, data, optim_wrapper)
        weights = {role: sum(getattr(p, 'ds_numel', p.numel()) for p in getattr(model, role).parameters())
                   for role in ('student', 'fake', 'teacher')}
        turn = model.is_due('student')
        expected = expected_bytes(stage, checkpointing, weights, dict(model.calls),
                                  dict(fake=model.fake_steps, student=int(turn)),
                                  model.fake_steps * (model.fake_merge > 0))
        rows.append(dict(student_step=turn, network_calls=sum(model.calls.values()), calls=dict(count.calls),
                         bytes=dict(count.bytes), expected=expected))
        return out

    Distillation.train_step = counted_step
    runner.train()
    if rank == 0:
        Path(folder, 'rows.json').write_text(json.dumps(rows))
    stop_processes()


def measure(method: str, stage: int, checkpointing: bool, iterations: int = 4) -> list[dict[str, Any]]:
    """What each iteration sent, and what the formula says."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
        probe.close()
        torch.multiprocessing.spawn(train, (port, method, stage, checkpointing, iterations, folder), nprocs=2)
        return json.loads(Path(folder, 'rows.json').read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('docs/communication.json'))
    args = parser.parse_args()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    results = []
    for method, stage, checkpointing in CASES:
        rows = measure(method, stage, checkpointing)
        results.append(dict(method=method, stage=stage, checkpointing=checkpointing, iterations=rows))
        for row in rows:
            difference = max(abs(row['bytes'].get(name, 0) / value - 1) for name, value in row['expected'].items())
            print(f'{method}, {f"ZeRO {stage}" if stage else "data parallel"}{", checkpointing" * checkpointing}, '
                  f'{row["network_calls"]} network calls: '
                  + ', '.join(f'{name} {row["calls"][name]} x, {row["bytes"][name] / 2**20:.1f} MiB'
                              for name in row['expected']) + f'; off the formula by {difference:.2%}', flush=True)
    args.out.write_text(json.dumps(results, separators=(',', ':')) + '\n')


if __name__ == '__main__':
    main()
