"""Workers of MMEngine's dataloaders leave signals to the process that trains."""
import os
import signal
import threading
from typing import Any

import mmengine.runner._flexible_runner as flexible_module
import mmengine.runner.runner as runner_module
from mmengine.dataset import worker_init_fn

# What a cluster, a launcher or a terminal asks a run to stop with.
STOP_SIGNALS = frozenset({signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT})


def shield_workers() -> None:
    """Makes `shielded_worker_init_fn` what workers start with, unless `worker_init_fn` of a dataloader says another."""
    for module in (runner_module, flexible_module):
        if module.default_worker_init_fn is worker_init_fn:
            module.default_worker_init_fn = shielded_worker_init_fn


def shielded_worker_init_fn(*args: Any, **kwargs: Any) -> None:
    """MMEngine's `worker_init_fn`, in a worker that no signal ends but the SIGTERM of its parent.

    Launchers, Slurm and terminals send a signal to the workers too, which would die of it while the parent wants to
    finish its iteration. If the parent is gone they end by themselves, after five seconds (torch sees to that).
    """
    worker_init_fn(*args, **kwargs)
    for number in STOP_SIGNALS - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_heed_parent, daemon=True).start()


def _heed_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
