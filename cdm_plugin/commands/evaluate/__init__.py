"""`cdm evaluate`: images of several models from the same noise, scored and compared."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('models', nargs='+', metavar='NAME=SOURCE@CHECKPOINT',
                        help='a config with a checkpoint or a work directory, or an exported folder; NAME= and '
                             '@CHECKPOINT may be left out')
    parser.add_argument('--prompts', required=True, metavar='FILE',
                        help='a txt, jsonl or csv file of prompts or class labels')
    parser.add_column()
    parser.add_argument('--num', type=parser.positive, default=1, help='images a prompt (default 1)')
    parser.add_argument('--metrics', nargs='+', default=[], metavar='METRIC',
                        help='registered names, or configs with `metrics` or `val_evaluator`; default: val_evaluator '
                             'of the first config')
    parser.add_argument('--steps', type=parser.positive, nargs='+', default=[], help='default: model.sample_sigmas')
    parser.add_argument('--teacher', action='store_true', help='the teacher of the first config too')
    parser.add_argument('--teacher-steps', type=parser.positive, nargs='+', default=[28], help='default 28')
    parser.add_argument('--teacher-guidance-scale', type=float, help='default 1 + model.alpha')
    parser.add_argument('--seed', type=int, default=0, help='of the noise, the same for all models (default 0)')
    parser.add_argument('--height', type=parser.positive, help='pixels; default: model.image_size')
    parser.add_argument('--width', type=parser.positive, help='pixels; default: as --height')
    parser.add_argument('--batch-size', type=parser.positive, default=4, help='default 4')
    parser.add_argument('--no-ema', action='store_true', help="the students' own weights instead of their EMA's")
    parser.add_argument('--out', required=True, help='folder of images and results; another call goes on with it')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from cdm_plugin.commands.evaluate.entries import parse_entries
    from cdm_plugin.commands.evaluate.evaluation import evaluate
    from cdm_plugin.commands.evaluate.metrics import build_metrics
    from cdm_plugin.engine.launch import join_processes, stop_processes
    entries = parse_entries(args.models, args.steps, args.teacher, args.teacher_steps, args.teacher_guidance_scale,
                            not args.no_ema, args.cfg_options)
    join_processes(args.launcher)
    size = (args.height or args.width, args.width or args.height) if args.height or args.width else None
    done = evaluate(entries, args.prompts, build_metrics(args.metrics, entries), args.out, args.seed, args.batch_size,
                    size, args.num, column=args.column)
    if done is not None:
        print(f'\n{done.table}\n')
        for name, reason in done.missing.items():
            print(f'{name} has no value: {reason}')
        print(f'{done.results}, with results.md and grid.png beside it')
    stop_processes()
