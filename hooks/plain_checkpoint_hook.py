from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from cdm_plugin.compat import pack_message_hub, plain, unpack_message_hub


@HOOKS.register_module()
class PlainCheckpointHook(Hook):
    """Checkpoints of tensors and plain data, which torch loads with `weights_only=True`, and with the run's config."""

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Turns MMEngine's objects into tensors and plain data."""
        checkpoint['message_hub'] = pack_message_hub(checkpoint['message_hub'])
        checkpoint['config'] = runner.cfg.to_dict()
        for key in ('config', 'meta', 'optimizer', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = plain(checkpoint[key])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Gives MMEngine its objects back."""
        if 'message_hub' in checkpoint:
            checkpoint['message_hub'] = unpack_message_hub(checkpoint['message_hub'], runner.work_dir)
