import itertools

import pytest
from mmengine.runner import Runner
from recipes import CDM

from cdm_plugin.config import load_config

_counter = itertools.count()


@pytest.fixture
def short_run(tmp_path):
    """Builds a Runner of a shipped recipe, a few iterations long and quiet: short_run(recipe, **dotted_options)."""

    def build(recipe=CDM, iters=4, work_dir=None, **options):
        defaults = {
            'train_cfg.max_iters': iters, 'train_dataloader.batch_size': 4, 'default_hooks.logger.interval': 1,
            'val_dataloader.dataset.length': 20, 'log_level': 'WARNING', 'work_dir': str(work_dir or tmp_path / 'run'),
            # MMEngine keeps one instance a name, and names runs by the second.
            'experiment_name': f'run{next(_counter)}'}
        return Runner.from_cfg(load_config(recipe, {**defaults, **options}))

    return build
