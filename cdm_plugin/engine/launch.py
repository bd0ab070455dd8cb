"""Starts a run of several processes: what the launcher must have set, and a process group on machines without GPU."""
import datetime
import os
import subprocess
from typing import Any, Callable, Dict, Optional

import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, get_rank

# What each launcher tells its processes, under its own names.
VARIABLES = {
    'pytorch': dict(RANK='RANK', WORLD_SIZE='WORLD_SIZE', LOCAL_RANK='LOCAL_RANK', MASTER_ADDR='MASTER_ADDR',
                    MASTER_PORT='MASTER_PORT'),
    'slurm': dict(RANK='SLURM_PROCID', WORLD_SIZE='SLURM_NTASKS', LOCAL_RANK='SLURM_LOCALID',
                  MASTER_ADDR='SLURM_NODELIST'),
    'mpi': dict(RANK='OMPI_COMM_WORLD_RANK', WORLD_SIZE='OMPI_COMM_WORLD_SIZE',
                LOCAL_RANK='OMPI_COMM_WORLD_LOCAL_RANK', MASTER_ADDR='MASTER_ADDR')}
EXAMPLES = {
    'pytorch': 'torchrun --nproc_per_node=8 --no-python cdm train CONFIG --launcher pytorch',
    'slurm': 'srun --ntasks=8 cdm train CONFIG --launcher slurm',
    'mpi': 'mpirun -np 8 -x MASTER_ADDR cdm train CONFIG --launcher mpi'}


def start_processes(launcher: str, env_cfg: Optional[Dict[str, Any]] = None) -> None:
    """Checks the launcher's environment, and does what MMEngine's own start leaves out: it starts gloo where there is
    no GPU (MMEngine would set a CUDA device), and LOCAL_RANK under MPI.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
        env_cfg (dict, optional): The config's `env_cfg`; `dist_cfg.timeout` in seconds counts here too.

    Raises:
        ValueError: If the launcher's environment is not there.
    """
    if launcher == 'none' or dist.is_initialized():
        return
    names = VARIABLES[launcher]
    # MMEngine, too, prefers an address that is set to that of Slurm's first node.
    missing = [theirs for ours, theirs in names.items()
               if theirs not in os.environ and not (ours == 'MASTER_ADDR' and ours in os.environ)]
    if missing:
        raise ValueError(f'--launcher {launcher} needs {", ".join(missing)} in the environment, which the launcher '
                         f'sets: {EXAMPLES[launcher]}; leave --launcher out for one process')
    if launcher != 'pytorch':
        os.environ['LOCAL_RANK'] = os.environ[names['LOCAL_RANK']]
    if get_device() != 'cpu':
        return
    for ours in ('RANK', 'WORLD_SIZE'):
        os.environ[ours] = os.environ[names[ours]]
    if 'MASTER_ADDR' not in os.environ:
        hosts = subprocess.run(['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']], capture_output=True,
                               text=True, check=True)
        os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')
    timeout = ((env_cfg or {}).get('dist_cfg') or {}).get('timeout')
    dist.init_process_group('gloo', timeout=None if timeout is None else datetime.timedelta(seconds=timeout))


def stop_processes() -> None:
    """Leaves the process group of a run that has ended well."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_first_rank(function: Callable[[], Any], failed: str) -> Any:
    """Calls a function on rank 0 and returns what it does; None on the other ranks. Every rank must call it.

    Raises:
        Exception: On rank 0, what the function raised; a ValueError on the others, `failed` and what it was.
    """
    result, error = None, None
    if get_rank() == 0:
        try:
            result = function()
        except Exception as raised:  # whatever it is, the others must not wait for it
            error = raised
    message = [None if error is None else f'{failed}: {type(error).__name__}: {error}']
    broadcast_object_list(message)
    if error is not None:
        raise error
    if message[0] is not None:
        raise ValueError(message[0])
    return result


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or 'gloo/transport' in str(error)
