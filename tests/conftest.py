import copy

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line('markers', 'gpu: needs a CUDA device')
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent.name != 'test_scale')  # the longest files first, so that none is last
    cuda = torch.cuda.is_available()
    for item in items:
        gpu = 'gpu' in item.keywords
        if gpu and not cuda:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))
        elif cuda and not gpu and item.path.parent.name == 'test_scale':
            item.add_marker(pytest.mark.skip(reason='two processes on the CPU: set CUDA_VISIBLE_DEVICES= to run it'))


@pytest.fixture
def labels():
    """A batch of class labels."""
    return dict(prompt=torch.tensor([0, 1, 2, 1, 0]))


@pytest.fixture
def networks_copy():
    """Copies the networks of a method, so that a second implementation can train its own."""
    return lambda method: {role: copy.deepcopy(getattr(method, role)) for role in ('student', 'fake', 'teacher')}
