"""`cdm sample`: images from a config, an exported folder or a diffusers pipeline."""
from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser

# Prompts of a contact sheet.
SHEET_ROWS = 50
# Suffixes of what is meant as a file of prompts, of the three kinds that are read and of others.
FILES = {'.txt', '.jsonl', '.csv', '.tsv', '.json', '.md', '.yaml', '.yml', '.parquet', '.xlsx', '.gz', '.zip'}


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('source', help='an exported folder, a config file or a shipped recipe')
    parser.add_argument('--checkpoint', help='for a config: a checkpoint or a work directory')
    parser.add_argument('--prompts', nargs='+', required=True,
                        help='texts, or class labels, or one txt, jsonl or csv file of prompts')
    parser.add_column()
    parser.add_argument('--untrained', action='store_true', help='a config without --checkpoint')
    parser.add_argument('--num', type=parser.positive, default=4, help='images a prompt (default 4)')
    parser.add_argument('--steps', type=parser.positive, help='default: model.sample_sigmas')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--role', choices=['student', 'teacher', 'fake'], default='student')
    parser.add_argument('--guidance-scale', type=float, default=1.0, help='default 1, off')
    parser.add_argument('--height', type=parser.positive, help='pixels; default: model.image_size')
    parser.add_argument('--width', type=parser.positive, help='pixels; default: as --height')
    parser.add_argument('--teacher', action='store_true', help='the teacher on the same noise beside it')
    parser.add_argument('--teacher-steps', type=parser.positive, default=28, help='default 28')
    parser.add_argument('--teacher-guidance-scale', type=float, help='default 1 + model.alpha')
    parser.add_argument('--batch-size', type=parser.positive, default=4, help='default 4')
    parser.add_argument('--no-ema', action='store_true', help="the student's own weights instead of its EMA's")
    parser.add_argument('--out', default='samples', help='folder for the PNG files (default samples)')
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from cdm_plugin.assets import resolve
    from cdm_plugin.inference import load_method, sample_files, step_sigmas, student_weights
    from cdm_plugin.roles.ema import check_finite
    from cdm_plugin.sheets import labelled_grid, save_png
    texts = read_prompts(args.prompts, args.column)
    size = None
    if args.height or args.width:
        size = (args.height or args.width, args.width or args.height)
    if args.teacher and args.role != 'student':
        raise ValueError(f'--teacher draws the teacher beside the student: leave --role {args.role} out')
    if (args.checkpoint is None and args.role != 'teacher' and not args.untrained
            and not Path(resolve(args.source)).is_dir()):
        raise ValueError('--checkpoint is missing: a checkpoint file or a work directory of this config; --untrained '
                         f'draws the {args.role} as training starts')
    roles = [args.role, *(['teacher'] if args.teacher else [])]
    method = load_method(args.source, args.checkpoint, image_size=size, encoders=True, options=args.cfg_options,
                         roles=roles)
    method.set_attention(training=False)
    for role in roles:
        if not hasattr(method, role):
            raise ValueError(f'{args.source} has no {role}: give the config that trained it, with --checkpoint')
    prompts, out = [p for p in texts for _ in range(args.num)], Path(args.out)
    sigmas = step_sigmas(args.steps) if args.steps else None
    check_finite(method, not args.no_ema, args.checkpoint or args.source)
    before = {path.name for path in out.glob('*.png')}
    drawn = {}
    with student_weights(method, not args.no_ema):
        drawn[args.role] = sample_files(method, prompts, out, args.seed, args.batch_size, sigmas=sigmas,
                                        role=args.role, guidance_scale=args.guidance_scale)
    if args.teacher:
        scale = 1 + method.alpha if args.teacher_guidance_scale is None else args.teacher_guidance_scale
        drawn['teacher'] = sample_files(method, prompts, out, args.seed, args.batch_size, prefix='teacher_',
                                        role='teacher', sigmas=step_sigmas(args.teacher_steps), guidance_scale=scale)
    rows = {}
    for i, text in enumerate(texts[:SHEET_ROWS]):
        for role, small in drawn.items():
            label = f'{i} {str(text)[:40]}' + (f' ({role})' if len(drawn) > 1 else '')
            rows[label] = small[i * args.num:(i + 1) * args.num]
    sheet = save_png(labelled_grid(rows), out / 'grid.png')
    rest = f' of the first {SHEET_ROWS} prompts' if len(texts) > SHEET_ROWS else ''
    written = {'grid.png', *(f'{prefix}{i:04d}.png' for prefix in ('', 'teacher_')[:len(drawn)]
                             for i in range(len(prompts)))}
    if stale := sorted(before - written):
        print(f'{out} has {len(stale)} pictures that this call has not drawn ({", ".join(stale[:3])}, ...)')
    print(f'{len(prompts) * len(drawn)} images in {out}, contact sheet{rest} {sheet}')


def read_prompts(values: list[str], column: str = 'prompt') -> list[str]:
    """Prompts of the command line: texts, or one txt, jsonl or csv file of them.

    Raises:
        ValueError: If one of the texts is a path.
    """
    paths = [value for value in values if not value.isdecimal() and ' ' not in value and (
        Path(value).suffix.lower() in FILES or os.path.exists(value))]
    if not paths:
        return values
    if len(values) > 1 or Path(values[0]).is_dir():
        raise ValueError(f'--prompts: {paths[0]!r} is a path. Give texts, or one txt, jsonl or csv file of prompts; a '
                         'text that is a path too goes into such a file')
    from cdm_plugin.data import PromptDataset
    dataset = PromptDataset(ann_file=values[0], column=column)
    return [dataset[i]['prompt'] for i in range(len(dataset))]
