"""Runs a function in several processes, and never waits for them for longer than it was told."""
import dataclasses
import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from cdm_plugin.compat.workers import STOP_SIGNALS

# Processes are forked from one that has imported everything, which takes seconds, and has done nothing else. CUDA does
# not survive a fork.
processes = multiprocessing.get_context('spawn' if torch.cuda.is_available() else 'forkserver')
processes.set_forkserver_preload(['cdm_plugin', 'cdm_plugin.cli', 'cdm_plugin.export', 'cdm_plugin.inference',
                                  'cdm_plugin.commands.evaluate', 'torch._inductor.compile_fx',
                                  'deepspeed.runtime.engine', 'matplotlib.pyplot'])


class WorkersFailed(AssertionError):
    """A process failed or hung; the message has the logs of all."""


def slow(*values):
    """Parameters that only `-m slow` takes."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def selected(request, name):
    """Values of a parameter in the tests of a module that were not deselected: all that its fixtures need to prepare.

    Args:
        request (pytest.FixtureRequest): Of the fixture.
        name (str): The parameter.
    """
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, 'callspec')]
    return list(dict.fromkeys(item.callspec.params[name] for item in items if name in item.callspec.params))


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


def listen():
    """Handles signals as a process of a terminal does: under nohup, or in a shell without jobs, some are ignored."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


class Workers:
    """Processes of one distributed job, with the environment that torchrun would give them.

    Args:
        function (Callable): What each of them calls, a function at the top of a module.
        *args: Its arguments.
        world_size (int): Number of processes. Default 2.
    """

    def __init__(self, function, *args, world_size=2):
        self.folder = tempfile.TemporaryDirectory(prefix='workers')
        shared = dict(os.environ, OMP_NUM_THREADS='1', WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free_port()))
        self.processes, self.logs = [], []
        for rank in range(world_size):
            self.logs.append(Path(self.folder.name, f'rank_{rank}.log'))
            self.processes.append(processes.Process(target=run_worker, args=(
                {**shared, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}, str(self.logs[-1]), function, args)))
            self.processes[-1].start()

    def kill(self, rank=None):
        """SIGKILL for one process, or for all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            process.kill()
            process.join()

    def wait(self, timeout):
        """Waits until all processes have ended.

        Returns:
            list[int]: Their exit statuses.

        Raises:
            WorkersFailed: If one still runs after `timeout` seconds; all are killed then.
        """
        deadline = time.monotonic() + timeout
        while any(process.exitcode is None for process in self.processes):
            if time.monotonic() > deadline:
                alive = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
                for rank in alive:  # faulthandler prints where it hangs
                    os.kill(self.processes[rank].pid, signal.SIGABRT)
                time.sleep(1)
                self.kill()
                raise WorkersFailed(f'ranks {alive} still ran after {timeout} s{self.text()}')
            time.sleep(0.05)
        return [process.exitcode for process in self.processes]

    def text(self, rank=None, limit=6000):
        """The end of the logs of all processes, or of one."""
        logs = {r: log.read_text(errors='replace') for r, log in enumerate(self.logs) if log.exists()}
        if rank is not None:
            return logs[rank]
        return ''.join(f'\n--- rank {r}\n{text[-limit:]}' for r, text in logs.items())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()
        self.folder.cleanup()


def run_worker(env, log, function, args):
    """One process: its environment, its output in a file of its own, one thread."""
    os.environ.clear()
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    listen()
    faulthandler.enable()
    torch.set_num_threads(1)
    gc.freeze()  # what was imported before the fork
    function(*args)


def launch(function, *args, world_size=2, timeout=300, **kwargs):
    """Calls a function in several processes; it starts the process group itself (`init_gloo`).

    Args:
        function (Callable): A function at the top of a module.
        *args: Its arguments.
        world_size (int): Number of processes. Default 2.
        timeout (float): Seconds after which the processes are killed and the test fails. Default 300.
        **kwargs: Its keyword arguments.

    Returns:
        list: What it returned in every process, which `torch.save` takes.

    Raises:
        WorkersFailed: If a process failed, or ran too long.
    """
    with tempfile.TemporaryDirectory(prefix='launch') as folder:
        with Workers(save_result, folder, function, args, kwargs, world_size=world_size) as workers:
            statuses = workers.wait(timeout)
            if any(statuses):
                raise WorkersFailed(f'exit statuses {statuses}{workers.text()}')
        return [torch.load(Path(folder, f'result_{r}'), weights_only=False) for r in range(world_size)]


def save_result(folder, function, args, kwargs):
    """One process of `launch`."""
    result = function(*args, **kwargs)
    torch.save(result, Path(folder, f'result_{os.environ["RANK"]}'))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_command(arguments):
    """One process of a command, `cdm` with these arguments."""
    from cdm_plugin.cli import main
    sys.exit(main(arguments))


def init_gloo():
    """Starts the process group of a worker."""
    torch.distributed.init_process_group('gloo')
    return torch.distributed.get_rank()


def split_draws(draws, rank, world_size, interleaved=False):
    """A rank's share of the draws of a whole batch: rows in a block, or every world_size-th (as InfiniteSampler
    hands out the data)."""

    def part(value):
        rows = len(value) // world_size
        return value[rank::world_size] if interleaved else value[rank * rows:(rank + 1) * rows]

    losses = {name: {key: part(value) for key, value in drawn.items()} for name, drawn in draws.losses.items()}
    return dataclasses.replace(
        draws, anchor=part(draws.anchor), noise=part(draws.noise), losses=losses, moving=None,
        fake_sigma=torch.stack([*map(part, draws.fake_sigma)]), fake_noise=torch.stack([*map(part, draws.fake_noise)]))


def share_draws(method, rank, world_size, interleaved=False):
    """Makes a method draw its share of what one process would draw for the whole batch."""

    def sample_draws(batch, latent_size=None):
        key = dict(seed=method.seed, rank=0, iteration=method.iteration)
        with mock.patch.object(type(method), 'world_size', 1), mock.patch.object(method, 'draw_key', lambda: key):
            draws = type(method).sample_draws(method, batch * world_size, latent_size)
        return split_draws(draws, rank, world_size, interleaved)

    method.sample_draws = sample_draws
