from typing import Any

from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS

from cdm_plugin.hooks.method import method_of


@HOOKS.register_module()
class PrecisionHook(Hook):
    """Lets the networks sample in the dtype in which they train, and switches them to an attention kernel for it."""

    def before_run(self, runner: Any) -> None:
        """Hands over the dtype of the student's autocast; the weights' own counts where there is none."""
        method = method_of(runner)
        if isinstance(runner.optim_wrapper, OptimWrapperDict):  # a run without training has none
            method.autocast_dtype = getattr(runner.optim_wrapper[method.main_role], 'dtype', None)
        method.set_attention(method.autocast_dtype, training=runner._train_loop is not None)

    def after_train(self, runner: Any) -> None:
        """The method is as before the training, but for its weights."""
        method_of(runner).autocast_dtype = None
