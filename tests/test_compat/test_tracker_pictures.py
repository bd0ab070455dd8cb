"""Pictures for experiment trackers."""
import types

import numpy as np
from mmengine.visualization import MLflowVisBackend

import cdm_plugin  # noqa: F401  mends it
from cdm_plugin.sheets import bars


def test_mlflow_gets_a_picture_under_its_name_and_step(tmp_path):
    """MLflow's `log_image` takes either a file's name, which must say the format, or a key and a step."""
    calls = []
    backend = MLflowVisBackend(str(tmp_path))
    backend._mlflow = types.SimpleNamespace(log_image=lambda image, **named: calls.append((image, named)))
    backend._env_initialized = True
    picture = np.zeros((2, 3, 3), np.uint8)
    backend.add_image('samples', picture, step=4)
    ((image, named),) = calls
    assert image is picture and named == dict(key='samples', step=4)


def test_bars_are_as_high_as_their_counts():
    picture = bars(np.array([0, 1, 2, 4]), width=3, height=8)
    assert picture.shape == (8, 12, 3) and picture.dtype == np.uint8
    filled = (picture != 255).all(2)
    assert filled.sum(0).tolist() == [0] * 3 + [2] * 3 + [4] * 3 + [8] * 3
    assert filled[-1, 3:].all() and not filled[:-2, :6].any()
    assert not (bars(np.array([0, 0])) != 255).any()
