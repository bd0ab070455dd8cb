"""The command line `cdm`: it finds a command's module in `cdm_plugin.commands` and imports that one alone.

To import `cdm_plugin` is to register everything, which takes seconds, and most of them are MMEngine's own. So this
package is installed under a second name too, `cdm_command`, which the script `cdm` imports: help and mistakes on the
command line need nothing else. A command's module there is `cdm_command.<name>`, the same file, and imports nothing of
`cdm_plugin` before it runs.
"""
from __future__ import annotations

import argparse
import importlib
import logging
import os
import runpy
import signal
import sys
import traceback
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_plugin.cli.plugin_commands import PluginCommand

# What there is, by task.
COMMANDS = {
    'start': {
        'demo': 'distils the digits teacher and judges the student',
        'configs': 'lists the recipes that come with the package, with a line each',
        'init': 'writes a config of your own to start from, for your model, data and method'},
    'train and check': {
        'train': "trains a config with MMEngine's runner",
        'doctor': 'says what a config resolves to, what it needs and what would fail, before anything is loaded',
        'pairs': "draws pairs of noise and the teacher's sample, for a regression; it resumes",
        'cache': "encodes the prompts of a config's dataset once, for training without text encoders"},
    'make images': {
        'sample': 'samples images from a config, an exported folder or a diffusers pipeline'},
    'evaluate and compare': {
        'evaluate': 'makes images of several models from the same noise, scores and compares them; it resumes',
        'compare': 'draws what trainings have logged, side by side on one HTML page: curves, samples, configs'},
    'export': {
        'export': 'writes a trained student as a diffusers pipeline or LoRA file, with a model card'},
    'other': {
        'plugins': 'lists the plug-ins, and what each has registered'},
}

PACKAGE = Path(find_spec('cdm_plugin').submodule_search_locations[0])  # found, not imported
__path__.append(str(PACKAGE / 'commands'))


class CommandParser(argparse.ArgumentParser):
    """What commands add their arguments to."""

    @staticmethod
    def positive(text: str) -> int:
        """A whole number of 1 or more."""
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f'must be 1 or more, but is {value}')
        return value

    @staticmethod
    def option(text: str) -> str:
        """A config key and its value, which MMEngine reads when the command runs."""
        if '=' not in text:
            raise argparse.ArgumentTypeError(f'must be KEY=VALUE, but is {text!r}')
        return text

    def add_column(self) -> None:
        """Adds `--column`."""
        self.add_argument('--column', default='prompt',
                          help='field of the prompts in a jsonl or csv file (default prompt)')

    def add_config_options(self) -> None:
        """Adds `--cfg-options`."""
        self.add_argument('--cfg-options', nargs='+', action='extend', type=self.option, metavar='KEY=VALUE',
                          help='change config keys: model.type=CDM')


def own_commands() -> dict[str, str]:
    """The commands of this package, name -> line."""
    return {name: line for commands in COMMANDS.values() for name, line in commands.items()}


def build_parser(argv: list[str]) -> argparse.ArgumentParser:
    """The parser of a command line: all commands, and the arguments of the one that is called."""
    own, called = own_commands(), next((word for word in argv if not word.startswith('-')), None)
    outside: dict[str, PluginCommand] = {}
    if called not in own:
        outside = importlib.import_module(f'{__name__}.plugin_commands').find(set(own))
    tasks = COMMANDS | ({'of plug-ins': {name: command.help for name, command in outside.items()}} if outside else {})
    width = max(len(name) for commands in tasks.values() for name in commands)
    table = '\n'.join(f'{task}:\n' + ''.join(f'  {name:<{width}}  {line}\n' for name, line in commands.items())
                      for task, commands in tasks.items())
    parser = argparse.ArgumentParser(
        prog='cdm', description='Distil diffusion models into few-step students.', epilog=table,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    version = runpy.run_path(str(PACKAGE / 'version.py'))['__version__']
    parser.add_argument('--version', action='version', version=f'cdm_plugin {version}')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    subparsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND', parser_class=CommandParser,
                                       help='one of those below; cdm COMMAND --help says more')
    for name, line in own.items():
        command = subparsers.add_parser(name, description=f'{line[0].upper()}{line[1:]}.')
        if name == called:
            _fill(command, importlib.import_module(f'{__name__}.{name}'))
    for name in outside.keys() - own.keys():
        command = subparsers.add_parser(name, description=outside[name].help)
        if name == called:
            _fill_from_plugin(command, outside[name], shows_traceback('--traceback' in argv))
    return parser


def _fill(command: CommandParser, module: Any) -> None:
    module.add_arguments(command)
    command.set_defaults(run=module.run)


def _fill_from_plugin(command: CommandParser, found: PluginCommand, shown: bool) -> None:
    """Ends the process in one line if the plug-in cannot be asked."""
    if found.problem:
        command.error(found.help)
    try:
        _fill(command, found.points[0].load())
    except (Exception, SystemExit) as error:
        if shown:
            raise
        command.error(f'the command {found.name!r} of the distribution {found.distribution!r} cannot be loaded '
                      f'({type(error).__name__}: {" ".join(str(error).split())}): update or uninstall '
                      f'{found.distribution}')


def shows_traceback(asked: bool) -> bool:
    """Whether a mistake is to be shown with where it comes from."""
    return asked or os.environ.get('CDM_TRACEBACK') == '1'


def parse_options(texts: list[str]) -> dict[str, Any]:
    """`--cfg-options` as dotted key -> value; imports MMEngine."""
    from mmengine.config import DictAction
    values = argparse.Namespace()
    DictAction(['--cfg-options'], 'options', nargs='+')(None, values, texts)
    return values.options


def script() -> None:
    """The script `cdm`: `main` in a process of its own, whose tracebacks have no secrets. DeepSpeed, which MMEngine
    imports, and transformers do not say at every start what they do without."""
    for name in ('DeepSpeed', 'transformers.utils.import_utils'):
        logging.getLogger(name).addFilter(_is_news)
    sys.excepthook = _print_masked
    sys.exit(main())


def _is_news(record: logging.LogRecord) -> bool:
    text = record.getMessage()
    return 'Setting accelerator to CPU' not in text and 'requires torchvision (not installed)' not in text


def _print_masked(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    sys.stderr.write(_masked(''.join(traceback.format_exception(kind, error, place))))


def _masked(text: str) -> str:
    secrets = sys.modules.get('cdm_plugin.secrets')
    return text if secrets is None else secrets.mask_text(text)  # without it, nothing that has any was read


def main(argv: list[str] | None = None) -> int:
    """Runs a command; mistakes of the user become one line on stderr and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(build_parser(argv).parse_args(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at its end
        return 128 + signal.SIGPIPE


def _run(args: argparse.Namespace) -> int:
    try:
        if getattr(args, 'cfg_options', None):
            args.cfg_options = parse_options(args.cfg_options)
        return args.run(args) or 0
    except BrokenPipeError:
        raise
    except Exception as error:
        errors = runpy.run_path(str(PACKAGE / 'errors.py'))  # a command that needs nothing of the package fails at once
        files = sys.modules.get('cdm_plugin.files')
        full = files and files.full_disk(error)
        if shows_traceback(args.traceback) or not (full or isinstance(error, errors['USER_ERRORS'])):
            raise
        text = ' '.join(errors['describe'](error).split())
        if full is not None:  # at any moment, so the error may say little
            text = (f'{full.strerror}{f", for {full.filename}" if full.filename else ""}: free some and call it again; '
                    'what was whole before is so still')
        print(f'cdm {args.command}: {_masked(text)} (cdm --traceback {args.command} ... shows where)',
              file=sys.stderr)
        return 2
