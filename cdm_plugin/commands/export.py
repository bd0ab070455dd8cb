"""`cdm export`: a trained student as a diffusers pipeline or LoRA file, with a model card."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('source', help='a config file, a shipped recipe, or an exported LoRA folder (with --fuse)')
    parser.add_argument('--checkpoint', help='for a config: a checkpoint or a work directory')
    parser.add_argument('--no-ema', action='store_true', help="the student's own weights instead of its EMA's")
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float8'],
                        help="of the files; default: the network's own, float32 with --fuse")
    parser.add_argument('--fuse', action='store_true', help='a whole pipeline, the adapters added to its weights')
    parser.add_argument('--sd-scripts', action='store_true',
                        help='the LoRA file as sd-scripts names it, too, where that knows the model')
    parser.add_argument('--prompts', nargs='+', help='images of these for the model card; or a file of prompts')
    parser.add_column()
    parser.add_argument('--out', required=True, help='folder to write')
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from cdm_plugin.commands.sample import read_prompts
    from cdm_plugin.export import export
    from cdm_plugin.inference import load_method
    if args.checkpoint is None and not Path(args.source).is_dir():
        raise ValueError('--checkpoint is missing: a checkpoint file or a work directory of this config')
    method = load_method(args.source, args.checkpoint, device='cpu', options=args.cfg_options)
    folder = export(method, args.out, ema=not args.no_ema, dtype=args.dtype, fuse=args.fuse, config=method.config,
                    prompts=args.prompts and read_prompts(args.prompts, args.column), sd_scripts=args.sd_scripts)
    used = 'EMA' if method.student_ema is not None and not args.no_ema else 'own'
    print(f'exported the student ({used} weights) to {folder}')
