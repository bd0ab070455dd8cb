from collections import Counter
from typing import Any

from mmengine.registry import HOOKS

from cdm_plugin.arguments import Count, Decay
from cdm_plugin.hooks.anchor_histogram_hook import AnchorHistogramHook
from cdm_plugin.hooks.bad_records_hook import BadRecordsHook
from cdm_plugin.hooks.collapse_watch_hook import CollapseWatchHook
from cdm_plugin.hooks.config_check_hook import ConfigCheckHook
from cdm_plugin.hooks.data_check_hook import DataCheckHook
from cdm_plugin.hooks.hook_group import HookGroup, every_hook
from cdm_plugin.hooks.iteration_hook import IterationHook
from cdm_plugin.hooks.load_check_hook import LoadCheckHook
from cdm_plugin.hooks.non_finite_hook import NonFiniteHook
from cdm_plugin.hooks.plain_checkpoint_hook import PlainCheckpointHook
from cdm_plugin.hooks.precision_hook import PrecisionHook
from cdm_plugin.hooks.scalars_hook import ScalarsHook
from cdm_plugin.hooks.signal_hook import SignalHook
from cdm_plugin.hooks.stream_hook import StreamHook
from cdm_plugin.hooks.student_ema_hook import StudentEMAHook
from cdm_plugin.hooks.validation_hook import ValidationHook


@HOOKS.register_module()
class CDMHook(HookGroup):
    """What every run of a method needs from the runner, one hook a job; each says in its own file what it does.

    They may stand in `custom_hooks` one by one as well, in this order.

    Args:
        ema_decay (float, optional): Upper limit of the EMA's decay; None turns the EMA off. Default 0.999.
        histogram_interval (int): Iterations between two histograms of the anchors' noise levels in TensorBoard.
            Default 100.
        max_skipped (int): Steps of one role in a row that are left out, because a loss or a gradient is not finite,
            before the run ends with exit status 3. Default 10.
    """

    def __init__(self, ema_decay: Decay | None = 0.999, histogram_interval: Count = 100,
                 max_skipped: Count = 10) -> None:
        super().__init__([
            ConfigCheckHook(),
            LoadCheckHook(),
            IterationHook(),
            SignalHook(),
            PrecisionHook(),
            *([] if ema_decay is None else [StudentEMAHook(ema_decay)]),
            ValidationHook(),
            DataCheckHook(),
            StreamHook(),
            BadRecordsHook(),
            ScalarsHook(),
            AnchorHistogramHook(histogram_interval),
            NonFiniteHook(max_skipped),
            CollapseWatchHook(),
            PlainCheckpointHook()])  # last: it packs what the others have added

    def before_run(self, runner: Any) -> None:
        """Refuses a job that two hooks would do.

        Raises:
            ValueError: If `custom_hooks` names a hook of this one again.
        """
        counts = Counter(map(type, every_hook(runner)))
        twice = sorted(type(part).__name__ for part in self.hooks if counts[type(part)] > 1)
        if twice:
            raise ValueError(f'custom_hooks has {", ".join(twice)} twice: CDMHook contains it, so remove one of them')
        super().before_run(runner)
