from collections.abc import Callable, Sequence
from typing import Any

from mmengine.hooks import Hook


class HookGroup(Hook):
    """Several hooks that a runner sees as one: whatever it calls goes to all of them, in their order.

    Args:
        hooks (Sequence[Hook]): The hooks. Their own priorities do not count, the group's does.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = tuple(hooks)

    def get_triggered_stages(self) -> list[str]:
        """The points at which some hook of the group does something, for the runner's table."""
        triggered = {stage for hook in self.hooks for stage in hook.get_triggered_stages()}
        return [stage for stage in Hook.stages if stage in triggered]


def every_hook(runner: Any) -> list[Hook]:
    """A runner's hooks in their order, those of a group one by one."""
    return [part for hook in runner.hooks for part in getattr(hook, 'hooks', [hook])]


def _to_all(point: str) -> Callable[..., None]:
    def call(self: HookGroup, *args: Any, **kwargs: Any) -> None:
        for hook in self.hooks:
            getattr(hook, point)(*args, **kwargs)

    call.__name__, call.__doc__ = point, f'Calls `{point}` of every hook of the group.'
    return call


for _point in Hook.stages:
    setattr(HookGroup, _point, _to_all(_point))
