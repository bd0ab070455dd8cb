"""The command line: at hand at once, and one line for a mistake."""
import ast
import os
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import cdm_plugin
from cdm_plugin import cli
from cdm_plugin.cli import COMMANDS, build_parser, main, parse_options
from cdm_plugin.commands.sample import read_prompts

PACKAGE = Path(cdm_plugin.__file__).parent
NAMES = [name for commands in COMMANDS.values() for name in commands]
HELP = '''
import sys
import cdm_command
for argv in [['--help'], ['--version'], ['trian'], *([name, '--help'] for name in sys.argv[1:])]:
    try:
        cdm_command.main(argv)
    except SystemExit as stopped:
        print(f'status of {argv[0]}:', stopped.code)
heavy = {'torch', 'mmengine', 'numpy', 'diffusers', 'transformers', 'cdm_plugin'} & set(sys.modules)
print('imported:', sorted(heavy))
'''


@pytest.fixture(scope='module')
def helped():
    """What a process prints that asks for all help there is, and the CPU seconds that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, '-c', HELP, *NAMES], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return done.stdout, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_all_help_needs_neither_mmengine_nor_torch(helped):
    text, seconds = helped
    assert text.splitlines()[-1] == 'imported: []' and seconds < 1
    assert [f'status of {name}: 0' in text for name in ('--help', '--version', *NAMES)] == [True] * (len(NAMES) + 2)
    assert 'status of trian: 2' in text and f'cdm_plugin {cdm_plugin.__version__}' in text


def test_help_lists_the_commands_by_task(helped):
    text = helped[0]
    for task, commands in COMMANDS.items():
        block = text.partition(f'\n{task}:\n')[2].splitlines()[:len(commands)]
        assert [line.split(None, 1) for line in block] == [[name, line] for name, line in commands.items()]


def test_every_command_is_listed_and_every_module_is_a_command():
    modules = {path.stem for path in (PACKAGE / 'commands').iterdir() if not path.name.startswith('_')}
    assert modules == set(NAMES)


def test_nothing_else_imports_a_command():
    files = [path for folder in (PACKAGE, Path(cdm_plugin.hooks.__file__).parent) for path in folder.rglob('*.py')]
    for path in files:
        if path.is_relative_to(PACKAGE / 'commands'):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ''] if isinstance(node, ast.ImportFrom) else [
                name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith('cdm_plugin.commands') for name in names), path


def test_the_module_is_a_command_too(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['cdm', '--version'])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module('cdm_plugin.cli', run_name='__main__')
    assert stopped.value.code == 0 and capsys.readouterr().out == f'cdm_plugin {cdm_plugin.__version__}\n'


@pytest.mark.parametrize('name', NAMES)
def test_an_unknown_argument_is_status_2(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, 'a', '--no-such-argument', '1'])
    assert stopped.value.code == 2 and 'usage: cdm' in capsys.readouterr().err


def test_config_options_are_read_as_mmengine_reads_them():
    texts = ['model.type=CDM', 'a=1', 'b=0.5', 'c=[1,2,(3,4)]', 'd=None', 'e=x=y', 'f=[a,b]', 'g=True', 'h=a,b']
    argv = ['train', 'x.py', '--cfg-options', *texts[:4], '--resume', '--cfg-options', *texts[4:]]
    args = build_parser(argv).parse_args(argv)
    assert (args.cfg_options, args.config, args.resume, args.launcher) == (texts, 'x.py', 'latest', 'none')
    expected = dict(a=1, b=0.5, c=[1, 2, (3, 4)], d=None, e='x=y', f=['a', 'b'], g=True, h=['a', 'b'])
    assert parse_options(texts) == {'model.type': 'CDM', **expected}


def test_a_config_option_without_a_value_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(['train', 'x.py', '--cfg-options', 'model.type'])
    assert "--cfg-options: must be KEY=VALUE, but is 'model.type'" in capsys.readouterr().err


@pytest.mark.parametrize('option', ['--num', '--steps', '--batch-size', '--height'])
def test_numbers_of_1_or_more(option, capsys):
    for value, part in (('0', 'must be 1 or more, but is 0'), ('x', "invalid positive value: 'x'")):
        with pytest.raises(SystemExit):
            main(['sample', 'x', '--prompts', 'a', option, value])
        assert f'argument {option}: {part}' in capsys.readouterr().err


def test_a_mistake_is_one_line_and_its_traceback_at_hand(capsys, monkeypatch):
    assert main(['doctor', 'no\nsuch.py']) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith('cdm doctor: config ')
    assert lines[0].endswith('(cdm --traceback doctor ... shows where)')
    with pytest.raises(FileNotFoundError):
        main(['--traceback', 'doctor', 'no.py'])
    monkeypatch.setenv('CDM_TRACEBACK', '1')
    with pytest.raises(FileNotFoundError):
        main(['doctor', 'no.py'])


LOGINS = ('see https://me:pw@host/x?token=pw of hf_abcdefghijklmnopqrst', 'see https://***@host/x?token=*** of ***')


@pytest.mark.parametrize('error', [ValueError, lambda text: OSError(2, 'No such file', text)], ids=['value', 'os'])
def test_a_mistake_has_no_secret_with_its_traceback_or_without(error, monkeypatch, capsys):
    def look_up(args):
        try:
            raise error(LOGINS[0])
        except Exception as cause:
            raise RuntimeError('a bug') if args.traceback else cause

    monkeypatch.setattr('cdm_plugin.cli.plugins.run', look_up)
    assert main(['plugins']) == 2
    line = capsys.readouterr().err
    assert LOGINS[1] in line and 'pw' not in line
    monkeypatch.setattr(sys, 'argv', ['cdm', '--traceback', 'plugins'])
    monkeypatch.setattr(sys, 'excepthook', None)
    with pytest.raises(RuntimeError) as found:
        cli.script()
    sys.excepthook(found.type, found.value, found.tb)  # as Python does at its end
    text = capsys.readouterr().err
    assert LOGINS[1] in text and 'pw' not in text and text.endswith('RuntimeError: a bug\n') and 'look_up' in text


def test_what_python_says_of_a_mistake_has_its_kind_and_place(monkeypatch, capsys):
    def look_up(args):
        return {}['state_dict']

    monkeypatch.setattr('cdm_plugin.cli.plugins.run', look_up)
    assert main(['plugins']) == 2
    line = look_up.__code__.co_firstlineno + 1
    assert capsys.readouterr().err == (f"cdm plugins: 'state_dict' (KeyError in test_cli.py, line {line}) "
                                       '(cdm --traceback plugins ... shows where)\n')


def test_a_reader_that_has_seen_enough_ends_it_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as stdout:
        monkeypatch.setattr(sys, 'stdout', stdout)
        assert main(['plugins']) == 128 + 13  # as if SIGPIPE had ended it
        monkeypatch.undo()
    assert capsys.readouterr().err == ''


PROMPTS = '{"prompt": "a cat", "text": "a dog"}\n'


@pytest.mark.parametrize('given, message', [
    (['p.json'], r"p\.json has an unknown suffix '\.json': give a \.txt file"),
    (['p.tsv'], r"p\.tsv has an unknown suffix '\.tsv': give a \.txt file"),
    (['folder'], "'folder' is a path. Give texts, or one txt, jsonl or csv file"),
    (['./folder/'], "'./folder/' is a path"),
    (['p.jsonl', 'p.jsonl'], "'p.jsonl' is a path. Give texts, or one"),
    (['a cat', 'p.jsonl'], "'p.jsonl' is a path. Give texts, or one"),
    (['nothing.txt'], 'nothing.txt does not exist'),
    (['p.png'], 'p.png has an unknown suffix')])
def test_a_path_that_is_no_file_of_prompts_is_not_drawn_as_text(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder').mkdir()
    for name in ('p.json', 'p.jsonl', 'p.tsv', 'p.png'):
        (tmp_path / name).write_text(PROMPTS)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_prompts(given)


def test_texts_labels_and_a_column_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '3').mkdir()
    (tmp_path / 'p.jsonl').write_text(PROMPTS)
    for texts in (['a cat.', 'v1.5', 'x' * 5000, 'a folder/with words.txt'], ['3', '7']):
        assert read_prompts(texts) == texts
    assert (read_prompts(['p.jsonl']), read_prompts(['p.jsonl'], 'text')) == (['a cat'], ['a dog'])
    with pytest.raises(ValueError, match="no column 'prompts', there are .*; set `column`"):
        read_prompts(['p.jsonl'], 'prompts')


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise RuntimeError('broken')

    monkeypatch.setattr('cdm_plugin.cli.plugins.run', broken)
    with pytest.raises(RuntimeError, match='broken'):
        main(['plugins'])


def test_an_installation_that_is_not_whole_is_one_line():
    code = "import sys; sys.modules['mmengine'] = None; import cdm_command; sys.exit(cdm_command.main(['plugins']))"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("cdm plugins: No module named 'mmengine")


def test_the_status_of_a_command_is_that_of_the_process(monkeypatch):
    for status, expected in ((None, 0), (0, 0), (1, 1)):
        monkeypatch.setattr('cdm_plugin.cli.plugins.run', lambda args, status=status: status)
        assert main(['plugins']) == expected


def test_a_command_is_the_same_file_under_both_names():
    main_file = Path(cli.__file__).resolve()
    code = 'import cdm_command; print(cdm_command.__file__); cdm_command.build_parser(["train"]); import sys;' \
           'print(sys.modules["cdm_command.train"].__file__)'
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                           env={**os.environ}).stdout.split()
    assert Path(found[0]).name == main_file.name and Path(found[1]).samefile(PACKAGE / 'commands' / 'train.py')


def test_what_libraries_say_at_every_start_is_left_out():
    """DeepSpeed's line on a machine without a GPU, and those of transformers without torchvision."""
    done = subprocess.run([sys.executable, '-m', 'cdm_command', 'plugins'], capture_output=True, text=True, check=True)
    assert not any(words in done.stdout + done.stderr for words in ('real_accelerator', 'requires torchvision'))
