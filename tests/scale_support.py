"""Runs a function in several processes, and never waits for them for longer than it was told."""
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from cdm_plugin.draws import Draws


class WorkersFailed(AssertionError):
    """A process failed or hung; the message has the logs of all."""


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


class Workers:
    """Processes of one distributed job, with the environment that torchrun would give them.

    Args:
        command (Callable or list): Arguments of the Python interpreter; a callable is called with the rank.
        world_size (int): Number of processes. Default 2.
        env (dict, optional): More environment variables; None removes one.
    """

    def __init__(self, command, world_size=2, env=None):
        self.folder = tempfile.TemporaryDirectory(prefix='workers')
        shared = dict(os.environ, OMP_NUM_THREADS='1', WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()), PYTHONFAULTHANDLER='1')
        self.processes, self.logs = [], []
        for rank in range(world_size):
            own = {**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank), **(env or {})}
            arguments = command(rank) if callable(command) else command
            self.logs.append(Path(self.folder.name, f'rank_{rank}.log'))
            with open(self.logs[-1], 'w') as log:
                self.processes.append(subprocess.Popen(
                    [sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    env={key: value for key, value in own.items() if value is not None}))

    def kill(self, rank=None):
        """SIGKILL for one process, or for all, with their children."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()

    def wait(self, timeout):
        """Waits until all processes have ended.

        Returns:
            list[int]: Their exit statuses.

        Raises:
            WorkersFailed: If one still runs after `timeout` seconds; all are killed then.
        """
        deadline = time.monotonic() + timeout
        while any(process.poll() is None for process in self.processes):
            if time.monotonic() > deadline:
                alive = [rank for rank, process in enumerate(self.processes) if process.poll() is None]
                for rank in alive:  # faulthandler prints where it hangs
                    self.processes[rank].send_signal(signal.SIGABRT)
                time.sleep(1)
                self.kill()
                raise WorkersFailed(f'ranks {alive} still ran after {timeout} s{self.text()}')
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def text(self, rank=None, limit=6000):
        """The end of the logs of all processes, or of one."""
        logs = {r: log.read_text(errors='replace') for r, log in enumerate(self.logs)}
        if rank is not None:
            return logs[rank]
        return ''.join(f'\n--- rank {r}\n{text[-limit:]}' for r, text in logs.items())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.folder.cleanup()


def launch(function, *args, world_size=2, timeout=120, env=None, **kwargs):
    """Calls a function in several processes; it starts the process group itself (`init_gloo`).

    Args:
        function (Callable): A function at the top of a module, called with the arguments, which `torch.save` takes.
        *args: Its arguments.
        world_size (int): Number of processes. Default 2.
        timeout (float): Seconds after which the processes are killed and the test fails. Default 120.
        env (dict, optional): More environment variables.
        **kwargs: Its keyword arguments.

    Returns:
        list: What it returned in every process.

    Raises:
        WorkersFailed: If a process failed, or ran too long.
    """
    with tempfile.TemporaryDirectory(prefix='launch') as folder:
        torch.save((args, kwargs), Path(folder, 'arguments'))
        module = sys.modules[function.__module__]
        code = (f'import sys; sys.path.insert(0, {str(Path(module.__file__).parent)!r}); '
                f'sys.path.insert(0, {str(Path(__file__).parent)!r}); from scale_support import run_worker; '
                f'run_worker({Path(module.__file__).stem!r}, {function.__name__!r}, {folder!r})')
        with Workers(['-c', code], world_size, env) as workers:
            statuses = workers.wait(timeout)
            if any(statuses):
                raise WorkersFailed(f'exit statuses {statuses}{workers.text()}')
        return [torch.load(Path(folder, f'result_{r}'), weights_only=False) for r in range(world_size)]


def run_worker(module, function, folder):
    """One process of `launch`."""
    torch.set_num_threads(1)
    args, kwargs = torch.load(Path(folder, 'arguments'), weights_only=False)
    result = getattr(__import__(module), function)(*args, **kwargs)
    torch.save(result, Path(folder, f'result_{os.environ["RANK"]}'))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def init_gloo():
    """Starts the process group of a worker."""
    torch.distributed.init_process_group('gloo')
    return torch.distributed.get_rank()


def split_draws(draws, rank, world_size):
    """A rank's share of the draws of a whole batch."""

    def part(value):
        rows = len(value) // world_size
        return value[rank * rows:(rank + 1) * rows]

    losses = {name: {key: part(value) for key, value in drawn.items()} for name, drawn in draws.losses.items()}
    return dataclasses.replace(
        draws, anchor=part(draws.anchor), noise=part(draws.noise), fake_sigma=part(draws.fake_sigma),
        fake_noise=part(draws.fake_noise), losses=losses, moving=None)


def share_draws(method, rank, world_size):
    """Makes a method draw its share of what one process would draw for the whole batch."""

    def sample_draws(batch):
        draws = Draws.sample(
            seed=method.seed, rank=0, iteration=method.iteration, shape=method.latent_shape(batch * world_size),
            time_grid=method.time_grid, fake_sigma=method.fake_sigma,
            losses=method.losses if method.is_student_turn() else {}, shift=method.shift)
        return split_draws(draws, rank, world_size).to(method.device, method.math_dtype)

    method.sample_draws = sample_draws
