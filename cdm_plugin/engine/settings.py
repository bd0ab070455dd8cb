"""What a resumed run takes from its config and what from the checkpoint: settings of the one, progress of the other.

An optimizer's state carries its settings, and a schedule's its own, so that by itself a resumed run would keep those of
the checkpoint, whatever the config says by now.
"""
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import ReduceOnPlateauParamScheduler

# What of a schedule's state is progress.
PROGRESS = {'last_step', '_global_step', '_last_value'}
MISSING = object()


def settle(wrappers: Mapping[str, OptimWrapper], schedules: Mapping[str, Sequence[Any]],
           optimizers: Mapping[str, Any], saved_schedules: Mapping[str, Any],
           iterations: int, epochs: int, epoch_length: int) -> dict[str, Any]:
    """Brings the config's settings into the state that is loaded next, and names each that has changed.

    Where a learning rate or a schedule has changed, the schedule goes on as if the config had always said so: the new
    one is gone through from its beginning to the iteration that is resumed.

    Args:
        wrappers (Mapping): The run's optimizer wrappers by role, as the config has built them.
        schedules (Mapping): Its schedules by role, likewise.
        optimizers (Mapping): What the checkpoint has of each role's optimizer, with `param_groups`; changed in place.
        saved_schedules (Mapping): What it has of each role's schedules.
        iterations (int): Iterations that the run has made.
        epochs (int): Epochs, of a loop that counts them.
        epoch_length (int): Iterations of an epoch.

    Returns:
        dict: The state of each role's schedules.

    Raises:
        ValueError: If the checkpoint belongs to other optimizers.
    """
    settled = {}
    for role, wrapper in wrappers.items():
        key = f'optim_wrapper.{role}.optimizer'
        own, theirs = list(schedules.get(role, ())), saved_schedules.get(role, ())
        _check_kind(key, wrapper, optimizers[role]['param_groups'])
        base = optimizers[role].get('base_param_settings')  # MMEngine's wrappers keep what no group changes
        groups = list(zip(wrapper.param_groups, [*optimizers[role]['param_groups'], *([] if base is None else [base])]))
        scheduled = {schedule.param_name for schedule in own}
        settings = _settle_groups(key, groups, scheduled)
        changed = _changed_schedules(f'param_scheduler.{role}', own, theirs)
        for line in (*settings, *changed):
            _warn(line)
        settled[role] = theirs
        if changed or {'lr', *scheduled} & set(settings.values()):
            _replay(own, iterations, epochs, epoch_length)
            for now, saved in groups:
                saved.update({name: value for name, value in now.items()
                              if name.removeprefix('initial_') in {'lr', *scheduled}})
            settled[role] = [schedule.state_dict() for schedule in own]
            _warn(f'{key}.lr goes on with {groups[0][1]["lr"]:.4g}, as if the config had always been so')
    return settled


def _check_kind(key: str, wrapper: OptimWrapper, theirs: Sequence[Mapping[str, Any]]) -> None:
    own = wrapper.optimizer.param_groups
    sizes = [[len(group['params']) for group in groups if 'params' in group] for groups in (own, theirs)]
    if len(own) != len(theirs) or sizes[1] and sizes[0] != sizes[1]:  # shards do not count them
        raise ValueError(f'{key}: the checkpoint has {len(theirs)} parameter groups of {sizes[1]} weights, the config '
                         f'makes {len(own)} of {sizes[0]}: resume with the paramwise_cfg that it was trained with')
    a, b = (groups[0].keys() - {'params'} for groups in (own, theirs))
    if a - b and any(name for name in b - a if not name.startswith('initial_')):  # a newer torch may know more settings
        raise ValueError(f'{key}.type is {type(wrapper.optimizer).__name__}, with {", ".join(sorted(a - b))}, but the '
                         f'checkpoint is of an optimizer with {", ".join(sorted(b - a))}: resume with the type that it '
                         'was trained with')


def _settle_groups(key: str, groups: Sequence[tuple[dict, dict]], scheduled: set[str]) -> dict[str, str]:
    """Takes over the config's settings, but for the present values of what is scheduled.

    Returns:
        dict: The name of each setting that has changed, by what to say of it.
    """
    changes = {}
    for own, saved in groups:
        for name in sorted(own.keys() - {'params', *scheduled}):
            old = saved.get('initial_lr', saved['lr']) if name == 'lr' else saved.get(name, MISSING)
            if not _same(old, own[name]):
                saved[name] = own[name]
                if old is not MISSING:
                    setting = name.removeprefix('initial_')
                    changes[_change(f'{key}.{setting}', old, own[name])] = setting
    return changes


def _changed_schedules(key: str, own: Sequence[Any], theirs: Sequence[Mapping[str, Any]]) -> list[str]:
    if len(own) != len(theirs):
        return [_change(f'{key}: the number of schedules', len(theirs), len(own))]
    changes = []
    for i, (schedule, saved) in enumerate(zip(own, theirs)):
        state = {name: value for name, value in schedule.state_dict().items()
                 if name not in PROGRESS and not callable(value)}
        if isinstance(schedule, ReduceOnPlateauParamScheduler):  # it cannot be gone through again
            continue
        if state.keys() != saved.keys() - PROGRESS:
            changes.append(f'{key}[{i}] is another schedule from now on, as the config says: '
                           f'{type(schedule).__name__}')
            continue
        changes += [_change(f'{key}[{i}].{name}', saved[name], value) for name, value in state.items()
                    if name != 'base_values' and not _same(saved[name], value)]  # that is the optimizer's
    return changes


def _change(key: str, old: Any, new: Any) -> str:
    old, new = (f'{value:.4g}' if isinstance(value, float) else str(value) for value in (old, new))
    return f'{key} is {new} from now on, as the config says (until now {old})'


def _warn(line: str) -> None:
    print_log(line, 'current', level=logging.WARNING)


def _replay(schedules: Sequence[Any], iterations: int, epochs: int, epoch_length: int) -> None:
    """Steps schedules as ParamSchedulerHook has, or would have, until now."""
    for i in range(1, iterations + 1):
        ends = epoch_length and not i % epoch_length and i // epoch_length <= epochs
        for schedule in schedules:
            if not getattr(schedule, 'need_val_args', False) and (ends if schedule.by_epoch else True):
                schedule.step()


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    try:
        return bool(a == b)
    except (RuntimeError, ValueError):  # tensors of other shapes
        return False

