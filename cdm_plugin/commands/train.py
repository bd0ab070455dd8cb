"""`cdm train`: trains a config with MMEngine's runner."""
from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config

    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('config', help='a config file or a shipped recipe, digits/cdm_...py')
    parser.add_argument('--work-dir', help='default work_dirs/<config>')
    parser.add_argument('--resume', nargs='?', const='latest', metavar='CHECKPOINT',
                        help='go on from the latest checkpoint of the work directory, or from this one; auto starts '
                             'from the beginning if there is none, for jobs that a cluster starts again')
    parser.add_argument('--amp', action='store_true', help="every role's AmpOptimWrapper, in bfloat16")
    parser.add_argument('--verbose', action='store_true',
                        help="MMEngine's tables on the console too: the machine, the config, the hooks")
    parser.add_config_options()
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')


def run(args: argparse.Namespace) -> None:
    import contextlib

    from cdm_plugin.engine.console import quiet_console
    from cdm_plugin.engine.launch import watched
    with contextlib.nullcontext() if args.verbose else quiet_console(), watched(args.launcher):
        _train(args)


def _train(args: argparse.Namespace) -> None:
    import logging

    from mmengine.logging import print_log
    from mmengine.registry import RUNNERS
    from mmengine.runner import FlexibleRunner, Runner

    from cdm_plugin.config import load_config, naming_parts
    from cdm_plugin.data.sample import SampleError
    from cdm_plugin.engine.launch import is_lost_connection, start_processes, stop_processes
    from cdm_plugin.engine.refusals import add_missing_hook, refusals
    from cdm_plugin.errors import USER_ERRORS, Stopped
    from cdm_plugin.files import full_disk
    from cdm_plugin.locks import take
    cfg = load_config(args.config, args.cfg_options)
    if args.amp:
        cfg.optim_wrapper.update({role: dict(wrapper, type='AmpOptimWrapper', dtype='bfloat16')
                                  for role, wrapper in cfg.optim_wrapper.items() if isinstance(wrapper, dict)})
    added = add_missing_hook(cfg)
    for refusal in refusals(cfg, 1 if args.launcher == 'none' else 2):
        raise ValueError(refusal)
    cfg.launcher = args.launcher
    start_processes(args.launcher, cfg.get('env_cfg'))
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    if args.resume is not None:
        _resume(cfg, args.resume)
    # CheckpointHook takes it too, for all processes, but after the networks are loaded, which takes minutes.
    lock = take(cfg.work_dir, 'a training') if args.launcher == 'none' else None
    stock = Runner if cfg.get('strategy') is None else FlexibleRunner
    with naming_parts(cfg):
        runner = stock.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    for line in added:
        print_log(line, 'current', logging.WARNING)
    for handler in runner.logger.handlers:
        if isinstance(handler, logging.FileHandler) and not args.verbose:
            print_log(f'the whole log, with the config and the machine: {handler.baseFilename}', 'current')
    say = threading.excepthook
    # TensorBoard writes in a thread of its own; that of the training meets the full disk too, and ends.
    threading.excepthook = lambda thread: None if full_disk(thread.exc_value) else say(thread)
    try:
        with naming_parts(cfg):
            runner.train()
    except Stopped:
        stop_processes()
        raise
    except USER_ERRORS as error:
        done = getattr(runner._train_loop, 'iter', 0)  # still a config if the loop could not be built
        if done > 0 and not isinstance(error, SampleError):  # no mistake in the config: the traceback is needed
            raise RuntimeError(f'training stopped in iteration {done}') from error
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise RuntimeError('training stopped: another process of this run has ended or cannot be reached, and its own '
                           'output says why; `cdm train --resume` goes on from the last checkpoint') from error
    finally:
        threading.excepthook = say
        if lock is not None:
            lock.release()
    stop_processes()


def _resume(cfg: Config, resume: str) -> None:
    """Settles `resume` and `load_from` of a config."""
    from mmengine.logging import print_log

    from cdm_plugin.files import find_latest_checkpoint
    if resume in ('auto', 'latest') and find_latest_checkpoint(cfg.work_dir) is None:
        if resume == 'latest':
            raise ValueError(f'the work directory {cfg.work_dir!r} has no checkpoint to resume from: check --work-dir, '
                             'or start from the beginning with --resume auto')
        cfg.resume = False  # load_from, if there is one, is where the run starts
        print_log(f'{cfg.work_dir} has no checkpoint: the training starts at iteration 0', 'current')
    else:
        cfg.resume, cfg.load_from = True, None if resume in ('auto', 'latest') else resume
