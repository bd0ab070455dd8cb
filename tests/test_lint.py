"""ruff and mypy are clean, with the versions of constraints.txt and the settings of pyproject.toml."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize('command', [['ruff', 'check', '--no-cache', '.'], ['mypy']], ids=['ruff', 'mypy'])
def test_the_code_is_clean(command, tmp_path):
    cache = ['--cache-dir', str(tmp_path)] if command == ['mypy'] else []
    checked = subprocess.run([sys.executable, '-m', *command, *cache], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
