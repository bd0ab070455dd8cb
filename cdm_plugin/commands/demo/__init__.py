"""`cdm demo`: distils the digits teacher into a 4-step student on this machine, and judges it."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('--work-dir', default='work_dirs/demo', help='default work_dirs/demo')
    parser.add_argument('--verbose', action='store_true', help="MMEngine's log on the console")
    parser.add_config_options()


def run(args: argparse.Namespace) -> None:
    from cdm_plugin.commands.demo.distil import distil_and_judge
    distil_and_judge(args.work_dir, options=args.cfg_options, verbose=args.verbose)
