"""Commands of plug-ins: listed without an import, imported when they are called, named when they fail."""
import resource
import subprocess
import sys

import pytest

from cdm_plugin.cli import main, own_commands

COMMAND = '''"""`cdm count`: counts to a number.

More of it.
"""

def add_arguments(parser):
    parser.add_argument('number', type=parser.positive)

def run(args):
    print(*range(1, args.number + 1))
    return 7
'''
BROKEN = '"""Breaks."""\nimport no_such_module\n'
QUICK = '''
import sys
sys.path.insert(0, sys.argv[1])
import cdm_command
for argv in [['--help'], ['--version'], ['count', '--help']]:
    try:
        cdm_command.main(argv)
    except SystemExit as stopped:
        assert stopped.code == 0, argv
print({'cdm_plugin', 'torch', 'mmengine', 'counting', 'counting.command'} & set(sys.modules))
'''


def status(*argv):
    with pytest.raises(SystemExit) as stopped:
        main(list(argv))
    return stopped.value.code


def lines(capsys):
    """The commands of `cdm --help`."""
    assert status('--help') == 0
    block = capsys.readouterr().out.partition('of plug-ins:\n')[2]
    return {line.split()[0]: line.split(None, 1)[1] for line in block.splitlines() if line.strip()}


def test_a_command_runs_with_its_arguments_and_status(site, capsys):
    site.install('acme', {}, commands=dict(count='acme_count'), acme_count=COMMAND)
    assert lines(capsys) == dict(count='counts to a number (acme)') and 'acme_count' not in sys.modules
    assert main(['count', '3']) == 7 and capsys.readouterr().out == '1 2 3\n'
    assert status('count', '0') == 2 and 'must be 1 or more' in capsys.readouterr().err


def test_help_imports_neither_the_plugin_nor_the_package(site):
    """The package `counting` says so if it is imported, and its command lies below it."""
    folder = site.folder / 'counting'
    folder.mkdir()
    (folder / '__init__.py').write_text('import torch')
    (folder / 'command.py').write_text(COMMAND)
    site.install('counting', {}, commands=dict(count='counting.command'))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, '-c', QUICK.replace("['count', '--help']", ''), str(site.folder)],
                          capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'set()' and 'count     counts to a number (counting)' in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


def test_a_module_that_cannot_be_read_has_the_line_of_its_distribution(site, capsys):
    site.install('acme', {}, commands=dict(count='acme_nothing'))
    assert lines(capsys) == dict(count='Parts of acme (acme)')


@pytest.mark.parametrize('module, cause', [
    (dict(acme_count=BROKEN), "ModuleNotFoundError: No module named 'no_such_module'"),
    (dict(acme_count='raise SystemExit(3)'), 'SystemExit: 3'),
    (dict(acme_count='run = print'), "AttributeError: module 'acme_count' has no attribute 'add_arguments'"),
    (dict(), "ModuleNotFoundError: No module named 'acme_count'")])
def test_a_command_that_fails_is_named_with_its_distribution(module, cause, site, capsys):
    site.install('acme-parts', {}, commands=dict(count='acme_count'), **module)
    site.install('other', {}, commands=dict(go='other_go'), other_go=COMMAND)
    assert status('count', '3') == 2
    assert (f"cdm count: error: the command 'count' of the distribution 'acme-parts' cannot be loaded ({cause}): "
            'update or uninstall acme-parts') in capsys.readouterr().err
    assert main(['go', '1']) == 7  # the rest goes on
    with pytest.raises((ImportError, AttributeError, SystemExit)) as caught:
        main(['--traceback', 'count', '3'])
    assert str(caught.value) in cause


def test_a_mistake_of_the_user_is_one_line(site, capsys):
    source = COMMAND.replace('    print', '    raise ValueError("no such number")\n    print')
    site.install('acme', {}, commands=dict(count='acme_count'), acme_count=source)
    assert main(['count', '3']) == 2
    assert capsys.readouterr().err == 'cdm count: no such number (cdm --traceback count ... shows where)\n'


def test_names_that_are_taken(site, capsys):
    """Those of `cdm` stay its own; of two plug-ins none is preferred."""
    for name in ('first', 'second'):
        site.install(name, {}, commands=dict(count=f'{name}_count', plugins=f'{name}_count'),
                     **{f'{name}_count': COMMAND})
    assert lines(capsys)['count'] == "two plug-ins give a command 'count': uninstall one of them (first and second)"
    assert status('count', '3') == 2 and 'uninstall one of them (first and second)' in capsys.readouterr().err
    assert main(['plugins']) == 0
    table = capsys.readouterr().out
    assert "plugins  first_count (first 1.0): cdm has a command 'plugins' itself" in table
    assert 'count    second_count (second 1.0): two plug-ins give' in table and 'plugins' in own_commands()


def test_disabled_plugins_have_no_commands(site, monkeypatch, capsys):
    site.install('acme', {}, commands=dict(count='acme_count'), acme_count=COMMAND)
    monkeypatch.setenv('CDM_DISABLE_PLUGINS', '1')
    assert status('count', '3') == 2
    assert 'left out by CDM_DISABLE_PLUGINS (acme)' in capsys.readouterr().err and 'acme_count' not in sys.modules
