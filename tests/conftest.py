import copy
import gc
import os

import pytest
import recipes
import torch
from mmengine.registry import DefaultScope
from plugin_support import make_site, site  # noqa: F401  fixtures


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    # What starts processes comes first: it takes longest, and one forkserver has what all of it needs.
    items.sort(key=lambda item: not hasattr(getattr(item, 'module', None), 'launch'))
    cuda = torch.cuda.is_available()
    for item in items:
        gpu = 'gpu' in item.keywords
        if gpu and not cuda:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
        elif cuda and not gpu and item.path.parent.name == 'test_scale':
            item.add_marker(pytest.mark.skip(reason='two processes on the CPU: set CUDA_VISIBLE_DEVICES= to run it'))
    gc.collect()
    gc.freeze()  # MMEngine's datasets collect garbage, which looks through all that was imported: a second each time


@pytest.fixture(scope='session', autouse=True)
def share_reports(tmp_path_factory):
    """xdist's processes have folders side by side."""
    own = tmp_path_factory.getbasetemp()
    recipes.SHARED = own.parent if 'PYTEST_XDIST_WORKER' in os.environ else own


@pytest.fixture(autouse=True)
def leave_scopes():
    """A command stays in the scope of its config, a test does not."""
    before = set(DefaultScope._instance_dict)
    yield
    for name in set(DefaultScope._instance_dict) - before:
        DefaultScope._instance_dict.pop(name)


@pytest.fixture
def labels():
    """A batch of class labels."""
    return dict(prompt=torch.tensor([0, 1, 2, 1, 0]))


@pytest.fixture
def networks_copy():
    """Copies the networks of a method, so that a second implementation can train its own."""
    return lambda method: {role: copy.deepcopy(getattr(method, role)) for role in ('student', 'fake', 'teacher')}
