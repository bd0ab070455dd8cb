"""A hook that sends its own process a signal at a chosen point of a run."""
import os
import signal

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class SignalAtHook(Hook):
    """Sends `number` when `point` is called for the `count`-th time, on one rank."""

    def __init__(self, point, count=1, number=int(signal.SIGTERM), rank=0):
        self.left = count

        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0 and get_rank() == rank:
                os.kill(os.getpid(), number)

        setattr(self, point, call)
