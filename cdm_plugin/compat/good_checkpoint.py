"""The checkpoint that a run resumes from: the latest one that is sound."""
import logging
import os
import re
from collections.abc import Iterator

from mmengine.dist import broadcast_object_list
from mmengine.logging import print_log

from cdm_plugin.compat.checkpoints import CheckpointError, damage
from cdm_plugin.files import find_latest_checkpoint
from cdm_plugin.ranks import on_first_rank


def find_good_checkpoint(path: str) -> str | None:
    """Finds the checkpoint from which a work_dir resumes, for a runner: every rank must call it, and has the same.

    If the latest one is damaged, it is the latest one before that which is not; the log says what is wrong with which.
    So a run that is started again after every end goes on.

    Args:
        path (str): The work_dir.

    Returns:
        str or None: The checkpoint; None if there is none, good or bad.

    Raises:
        CheckpointError: If all of them are damaged.
    """
    found = [on_first_rank(lambda: _newest_good(path), 'there is no checkpoint to resume from')]
    broadcast_object_list(found)
    return found[0]


def _newest_good(path: str) -> str | None:
    latest = find_latest_checkpoint(path)
    if latest is None or '://' in latest:
        return latest
    bad: dict[str, str] = {}
    for candidate in (latest, *_earlier(latest)):
        problem = damage(candidate)
        if problem is None:
            for name, text in bad.items():
                print_log(f'the checkpoint {name} is damaged ({text}) and is left aside: the run resumes from '
                          f'{candidate}', 'current', level=logging.WARNING)
            return candidate
        bad[candidate] = problem
    raise CheckpointError(f'every checkpoint of {path} is damaged ({"; ".join(f"{k}: {v}" for k, v in bad.items())}): '
                          'copy one of them again, or train anew without resume')


def _earlier(latest: str) -> Iterator[str]:
    """The checkpoints named like this one, but for a smaller number; the largest comes first.

    Larger ones in the same folder are of another run, which had the folder before.
    """
    folder, name = os.path.split(latest)
    before, number, after = re.fullmatch(r'(.*?)(\d*)(\D*)', name).groups()
    numbers = [int(other[len(before):len(other) - len(after)]) for other in os.listdir(folder)
               if re.fullmatch(f'{re.escape(before)}\\d+{re.escape(after)}', other)] if number else []
    for smaller in sorted((n for n in numbers if n < int(number)), reverse=True):
        yield os.path.join(folder, f'{before}{smaller}{after}')
