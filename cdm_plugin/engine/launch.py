"""Starts a run of several processes: what the launcher must have set, a process group on machines without GPU, and a
watch that ends them together."""
import contextlib
import datetime
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import init_dist

from cdm_plugin.errors import Stopped
from cdm_plugin.secrets import mask_text

# Seconds that the first process, if it fails, stays for the others to hear of it, and that those which end well wait.
GRACE = 20
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


def settle_environment(launcher: str) -> None:
    """Checks the launcher's environment, and sets what MMEngine's own start leaves out: all that torch knows the
    processes by, and LOCAL_RANK.

    Args:
        launcher (str): 'pytorch', 'slurm' or 'mpi'.

    Raises:
        ValueError: If the launcher's environment is not there.
    """
    if missing := _missing(launcher):
        raise ValueError(f'--launcher {launcher} needs {", ".join(missing)} in the environment, which the launcher '
                         f'sets: {EXAMPLES[launcher]}; leave --launcher out for one process')
    for ours in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        os.environ[ours] = os.environ[VARIABLES[launcher][ours]]
    if 'MASTER_ADDR' not in os.environ:
        hosts = subprocess.run(['scontrol', 'show', 'hostname', os.environ['SLURM_NODELIST']], capture_output=True,
                               text=True, check=True)
        os.environ['MASTER_ADDR'] = hosts.stdout.split()[0]
    os.environ.setdefault('MASTER_PORT', '29500')


def _missing(launcher: str) -> list[str]:
    # MMEngine, too, prefers an address that is set to that of Slurm's first node.
    return [theirs for ours, theirs in VARIABLES[launcher].items()
            if theirs not in os.environ and not (ours == 'MASTER_ADDR' and ours in os.environ)]


def start_processes(launcher: str, env_cfg: dict[str, Any] | None = None) -> None:
    """Starts gloo where there is no GPU, where MMEngine would set a CUDA device.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
        env_cfg (dict, optional): The config's `env_cfg`; `dist_cfg.timeout` in seconds counts here too.

    Raises:
        ValueError: If the launcher's environment is not there.
    """
    if launcher == 'none' or dist.is_initialized():
        return
    settle_environment(launcher)
    if get_device() == 'cpu':
        timeout = ((env_cfg or {}).get('dist_cfg') or {}).get('timeout')
        dist.init_process_group('gloo', timeout=None if timeout is None else datetime.timedelta(seconds=timeout))


def join_processes(launcher: str) -> None:
    """`start_processes` of a command without a runner, which would start NCCL and set the CUDA device."""
    start_processes(launcher)
    if launcher != 'none' and not dist.is_initialized():
        init_dist(launcher)


@contextlib.contextmanager
def watched(launcher: str) -> Iterator[None]:
    """Ends this process when another one of the run has failed inside, and says what that one said: it may wait in a
    collective, or for the process group, that the other never comes to. torchrun does it itself.

    Args:
        launcher (str): 'none', 'pytorch', 'slurm' or 'mpi'.
    """
    if launcher == 'none' or 'TORCHELASTIC_RUN_ID' in os.environ or _missing(launcher):
        yield
        return
    settle_environment(launcher)
    rank, others = int(os.environ['RANK']), int(os.environ['WORLD_SIZE']) - 1
    # The process group's own server, which is in the first process: torch shares one of the same port.
    store = dist.PrefixStore('cdm', dist.TCPStore(
        os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']), is_master=rank == 0, wait_for_workers=False,
        multi_tenant=True))
    done, heard = threading.Event(), list[str]()
    watch = threading.Thread(target=_watch, args=(store, done, heard), daemon=True)
    watch.start()
    try:
        yield
    except BaseException as error:
        done.set()
        watch.join()
        _listen(store, heard)
        if heard and isinstance(error, Exception):  # a consequence
            raise ValueError(f'training stopped: {heard[0]}') from error
        if not heard and not isinstance(error, Stopped):
            text = mask_text(' '.join(str(error).split())) or type(error).__name__
            with contextlib.suppress(RuntimeError):  # the first process is gone
                store.compare_set('failed', '', f'rank {rank} has failed: {text}')
                deadline = time.monotonic() + GRACE
                while rank == 0 and store.add('heard', 0) < others and time.monotonic() < deadline:
                    time.sleep(0.1)  # the others read it here
        raise
    finally:
        done.set()
        watch.join()


def _watch(store: dist.Store, done: threading.Event, heard: list[str]) -> None:
    while not heard and not done.wait(1):
        _listen(store, heard)
    if heard and not done.wait(5):
        print(f'cdm train: training stopped: {heard[0]}', file=sys.stderr, flush=True)
        os._exit(1)


def _listen(store: dist.Store, heard: list[str]) -> None:
    try:
        if not heard and store.check(['failed']):
            heard.append(store.get('failed').decode())
            store.add('heard', 1)
    except RuntimeError:
        heard.append('rank 0 has ended, and its own output says why')


def stop_processes() -> None:
    """Leaves the process group of a run that has ended well, together: gloo fails in a process that still waits for
    what another one sent before it closed its connections. None waits longer than `GRACE` for the others."""
    if not dist.is_initialized():
        return
    store, others = dist.distributed_c10d._get_default_store(), dist.get_world_size() - 1
    deadline = time.monotonic() + GRACE

    def wait(key: str, count: int) -> None:
        while store.add(key, 0) < count and time.monotonic() < deadline:
            time.sleep(0.01)

    with contextlib.suppress(RuntimeError):  # the process that has the store is gone
        store.add('cdm/ended', 1)
        wait('cdm/ended', others + 1)
        if dist.get_rank() == 0:  # it may have the store
            wait('cdm/left', others)
        else:
            store.add('cdm/left', 1)
    dist.destroy_process_group()


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached; gloo's have no class of their own."""
    return isinstance(error, dist.DistError) or 'gloo/transport' in str(error)
