"""`cdm compare`: what trainings have logged, side by side on one page."""
from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cdm_plugin.cli import CommandParser


def add_arguments(parser: CommandParser) -> None:
    parser.add_argument('runs', nargs='+', metavar='RUN', help='work directories of trainings')
    parser.add_argument('--out', default='compare.html', help='default compare.html')
    parser.add_argument('--watch', nargs='?', const=30, type=parser.positive, metavar='SECONDS',
                        help='write the page again every so many seconds (30), and have the open page follow, until '
                             'Ctrl-C')


def run(args: argparse.Namespace) -> None:
    import time

    from cdm_plugin.commands.compare.page import write_page
    from cdm_plugin.commands.compare.runs import NoLogs, read_runs
    if args.watch is not None:
        print(f'Watching: {args.out} is written every {args.watch} s; Ctrl-C ends it.', flush=True)
    try:
        while args.watch is not None:
            try:
                write_page(read_runs(args.runs), args.out, reload=args.watch)
            except NoLogs as error:  # not yet
                print(error, flush=True)
            time.sleep(args.watch)
    except KeyboardInterrupt:
        pass
    page = write_page(read_runs(args.runs), args.out)
    print(f'{page}, {page.stat().st_size / 2**20:.1f} MiB: open it in a browser')
