import importlib
from pathlib import Path

import pytest


@pytest.fixture(scope='session')
def benchmark():
    """Imports a script of benchmarks/ by name; they are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / 'benchmarks'))
        yield importlib.import_module
