"""Virtual environments for tests of what is installed, and the package as its users get it."""
import json
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LOOK = '''
import dataclasses, json, cdm_plugin, cdm_plugin.hooks
from cdm_plugin import plugins
from cdm_plugin.assets import resolve
report = dict(file=cdm_plugin.__file__, hooks=cdm_plugin.hooks.__file__, digits=resolve('asset:digits'),
              plugins=[dataclasses.asdict(info) for info in plugins.loaded()])
'''


class Environment:
    """A virtual environment with this interpreter's libraries, except cdm_plugin, and programs run in it.

    Args:
        folder (Path): Where to.
        without (Sequence[str]): Import packages that are left out too, with their metadata.
    """

    def __init__(self, folder: Path, without: Sequence[str] = ()) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != 'nt')
        self.folder, self.bin = folder, folder / ('Scripts' if os.name == 'nt' else 'bin')
        self.site = next(folder.glob('lib/python*/site-packages' if os.name != 'nt' else 'Lib/site-packages'))
        self.elsewhere = folder / 'elsewhere'
        self.elsewhere.mkdir()
        self._link_libraries(folder / 'libraries', ('cdm_plugin', 'cdm_command', *without))

    def _link_libraries(self, libraries: Path, without: Sequence[str]) -> None:
        libraries.mkdir()
        for place in map(Path, sys.path):
            if place.name in ('site-packages', 'dist-packages') and place.is_dir():
                for entry in place.iterdir():
                    link = libraries / entry.name
                    if not any(name in entry.name for name in without) and not link.exists():
                        link.symlink_to(entry)
        (self.site / 'libraries.pth').write_text(f'{libraries}\n')

    def pip_install(self, *arguments: object) -> None:
        pip('--python', self.bin / 'python', 'install', '--no-deps', '--no-index', '--no-build-isolation', *arguments)

    def install_from_index(self, *requirements: str, whole: bool = False) -> None:
        """Installs distributions, without what they require, or `whole`: with it, and none of the pinned versions
        changed. Skips the test if the package index cannot be reached."""
        needs = ('-c', ROOT / 'constraints.txt') if whole else ('--no-deps',)
        options = ('--disable-pip-version-check', '-q', *needs, '--retries', '1', '--timeout', '20')
        done = subprocess.run([sys.executable, '-m', 'pip', '--python', self.bin / 'python', 'install', *options,
                               *requirements], capture_output=True, text=True, timeout=300)
        if done.returncode and 'from versions: none' in done.stderr:  # of one that is there pip lists the versions
            pytest.skip(f'the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}')
        assert done.returncode == 0, done.stderr

    def run(self, *command: object, cwd: Path = None, **variables: str) -> subprocess.CompletedProcess:
        kept = {key: value for key, value in os.environ.items() if key not in ('PYTHONPATH', 'CDM_DISABLE_PLUGINS')}
        return check(self.bin / command[0], *command[1:], cwd=cwd or self.elsewhere, env={**kept, **variables})

    def look(self, *arguments: object, before: str = 'logs = None', **options) -> dict:
        """What LOOK reports in a fresh process; also the `logs` of a program run before it, and its warnings."""
        program = before + LOOK + 'print(json.dumps(dict(report, logs=logs)))'
        done = self.run('python', '-c', program, *arguments, **options)
        return dict(json.loads(done.stdout.splitlines()[-1]), stderr=done.stderr)


def check(*command: object, **options) -> subprocess.CompletedProcess:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, f'{command} failed:\n{done.stdout}\n{done.stderr}'
    return done


def pip(*arguments: object) -> None:
    check(sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q', *arguments)


def in_parallel(*calls) -> list:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def clean_copy(target: Path) -> Path:
    """What a commit of the working tree would hold, in a folder of its own."""
    if not (ROOT / '.git').exists():
        pytest.skip('needs a git checkout, to tell its files from others')
    listed = check('git', 'ls-files', '-co', '--exclude-standard', '-z', cwd=ROOT).stdout.split('\0')
    for name in filter(None, listed):
        source = ROOT / name
        if source.is_symlink() or source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target
