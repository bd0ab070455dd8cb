import contextlib
import copy
import gc
import os

import pytest
import recipes
import torch
from mmengine.config import config as mmengine_config
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from plugin_support import make_site, site  # noqa: F401  fixtures


def pytest_configure(config):
    torch.set_num_threads(1)
    # A run of MMEngine formats its config half a dozen times, which takes as long as a few iterations do.
    formatted, stock = {}, mmengine_config.FormatCode

    def format_once(text, **options):
        key = (text, *map(str, options.values()))
        if key not in formatted:
            formatted[key] = stock(text, **options)
        return formatted[key]

    mmengine_config.FormatCode = format_once


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


@contextlib.contextmanager
def left_nothing():
    """What a runner leaves in MMEngine under its name (logger, hub, visualizer, scope) goes: a later one of the same
    name, which has the second it starts in, would get it, with a console that is closed by then."""
    kinds = DefaultScope, MMLogger, MessageHub, Visualizer
    before = [set(kind._instance_dict) for kind in kinds]
    yield
    for kind, names in zip(kinds, before):
        for name in set(kind._instance_dict) - names:
            instance = kind._instance_dict.pop(name)
            for handler in getattr(instance, 'handlers', ()):
                handler.close()


@pytest.fixture(scope='module', autouse=True)
def modules_leave_nothing():
    with left_nothing():
        yield


@pytest.fixture(autouse=True)
def tests_leave_nothing(modules_leave_nothing):
    with left_nothing():
        yield


@pytest.fixture
def labels():
    """A batch of class labels."""
    return dict(prompt=torch.tensor([0, 1, 2, 1, 0]))


@pytest.fixture
def networks_copy():
    """Copies the networks of a method, so that a second implementation can train its own."""
    return lambda method: {role: copy.deepcopy(getattr(method, role)) for role in ('student', 'fake', 'teacher')}
