"""The method behind a runner."""
from typing import Any

from mmengine.model import is_model_wrapper

from cdm_plugin.methods import DiffusionModel


def method_of(runner: Any) -> DiffusionModel:
    """The method that a runner trains, without a data-parallel wrapper.

    Raises:
        TypeError: If its model is none of the methods.
    """
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, DiffusionModel):
        raise TypeError(f'CDMHook and the hooks in it work with the methods of cdm_plugin (model.type CDM, '
                        f'DecoupledDMD, DMD2, FlowMatching), but model.type is {type(model).__name__}')
    return model
