"""Methods of MMEngine's runners that stop short of what a run of several roles, or of one GPU, needs."""
from functools import partialmethod, wraps
from typing import Any

from mmengine._strategy import BaseStrategy
from mmengine.optim import OptimWrapperDict
from mmengine.runner import FlexibleRunner, Runner

_stock_of_runner = Runner.build_param_scheduler
_stock_of_strategy = BaseStrategy.build_param_scheduler


def mend_runners() -> None:
    """Changes them, where they are MMEngine's own."""
    for cls in (Runner, FlexibleRunner):
        if not isinstance(vars(cls)['resume'], partialmethod):
            # MMEngine's default brings all of it to the GPU, beside the model and the optimizers that take it over.
            cls.resume = partialmethod(cls.resume, map_location='cpu')
    if Runner.build_param_scheduler is _stock_of_runner:
        Runner.build_param_scheduler = runner_schedules
    if BaseStrategy.build_param_scheduler is _stock_of_strategy:
        BaseStrategy.build_param_scheduler = strategy_schedules


@wraps(_stock_of_runner)
def runner_schedules(self: Runner, scheduler: Any) -> Any:
    check_schedules(scheduler, self.optim_wrapper)
    return _stock_of_runner(self, scheduler)


@wraps(_stock_of_strategy)
def strategy_schedules(self: BaseStrategy, scheduler: Any, optim_wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    check_schedules(scheduler, optim_wrapper)
    return _stock_of_strategy(self, scheduler, optim_wrapper, *args, **kwargs)


def check_schedules(scheduler: Any, optim_wrapper: Any) -> None:
    """Raises ValueError if `param_scheduler` is keyed by role and lacks one: MMEngine's KeyError says only its name."""
    if isinstance(optim_wrapper, OptimWrapperDict) and isinstance(scheduler, dict) and 'type' not in scheduler:
        roles = list(optim_wrapper.keys())
        for role in roles:
            if role not in scheduler:
                raise ValueError(f'param_scheduler.{role} is missing: {", ".join(roles)} are trained, but '
                                 f'param_scheduler has {", ".join(scheduler) or "nothing"}; an empty list leaves the '
                                 'learning rate as it is')
