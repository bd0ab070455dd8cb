"""Peak memory of what has the whole model in hand, in child processes: `python tests/memory_support.py` at any size."""
import sys

import pytest
from memory_support import child

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')]

# Beyond the weights: the largest weight three times in float32 (the base's, the change and their sum, 14 MB each),
# and what the allocator keeps of small tensors.
CONSTANT = 64 * 2**20


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """64 million parameters: 127 MB in bfloat16, 255 MB in float32, five times that in a checkpoint."""
    folder = tmp_path_factory.mktemp('memory')
    child('make', folder, '--layers', 3, '--heads', 12)
    return folder


@pytest.mark.parametrize('step, times', [
    # A run of full weights, with optimizers and average: what is saved is in memory anyway, and no second time.
    ('save', 1.05),
    # The weights lie in the checkpoint's file, which is mapped: what is not used is never read, and what is, once.
    ('load', 0.05),
    ('sample', 1.05),
    ('export', 1.05),
    # Adapters merged into a bfloat16 base, written in float32.
    ('fuse', 1.3),
])
def test_peak_is_within_the_weights(step, times, folder):
    measured = child('measure', step, folder)
    assert measured['weights'] > 100e6
    assert measured['peak'] <= times * measured['weights'] + CONSTANT, measured
