"""MMEngine's visualisation backends, where they stop a run."""
import numpy as np
from mmengine.visualization import MLflowVisBackend


def mend_backends() -> None:
    """Changes them, where they are MMEngine's own."""
    if MLflowVisBackend.add_image.__module__.startswith('mmengine.'):
        MLflowVisBackend.add_image = add_image_to_mlflow


def add_image_to_mlflow(self: MLflowVisBackend, name: str, image: np.ndarray, step: int = 0, **kwargs) -> None:
    """MMEngine's takes the name for a file's, which must end like one (`samples.png`), and writes every step over the
    one before.

    Args:
        name (str): Of the picture.
        image (ndarray): RGB, (H, W, 3).
        step (int): Its step. Default 0.
    """
    self.experiment.log_image(image, key=name, step=step)
