import gc

import pytest


@pytest.fixture(scope='session', autouse=True)
def _imports_out_of_the_garbage_collector():
    """MMEngine collects garbage for every dataset that it builds: a fifth of a second among the imported libraries."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
