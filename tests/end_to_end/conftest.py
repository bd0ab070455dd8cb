import itertools

import mmengine.config
import pytest
from mmengine.runner import Runner
from recipes import CDM

from cdm_plugin.config import load_config

_counter = itertools.count()


@pytest.fixture(scope='module', autouse=True)
def plain_configs():
    """Dumped configs are not laid out by yapf, which takes as long as a short training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine.config.config, 'FormatCode', lambda text, **style: (text, True))
        yield


@pytest.fixture
def short_run(tmp_path):
    """Builds a Runner of a shipped recipe, a few iterations long and quiet: short_run(recipe, **dotted_options)."""

    def build(recipe=CDM, iters=4, work_dir=None, **options):
        defaults = {
            'train_cfg.max_iters': iters, 'train_dataloader.batch_size': 4, 'default_hooks.logger.interval': 1,
            'val_dataloader.dataset.length': 20, 'log_level': 'WARNING', 'work_dir': str(work_dir or tmp_path / 'run'),
            # MMEngine keeps one instance a name, and names runs by the second.
            'experiment_name': f'run{next(_counter)}'}
        if 'custom_hooks' not in options:  # the recipe's pictures of 28 teacher steps cost more than the iterations
            defaults.update({'custom_hooks.1.teacher_steps': 2, 'custom_hooks.1.steps': []})
        return Runner.from_cfg(load_config(recipe, {**defaults, **options}))

    return build
