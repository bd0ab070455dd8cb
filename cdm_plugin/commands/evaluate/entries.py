"""What is evaluated: one entry a row of the table."""
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS

from cdm_plugin.assets import resolve
from cdm_plugin.config import find_config, load_config
from cdm_plugin.inference import find_checkpoint
from cdm_plugin.methods import Distillation
from cdm_plugin.registry import is_type
from cdm_plugin.secrets import without_secrets

NAME = re.compile(r'[\w.+-]+')
TEACHER = 'teacher'


@dataclass(frozen=True)
class Entry:
    """One row of the table: whose network makes the images, and how.

    Attributes:
        name (str): Its name, also of its folder of images.
        source (str): A config or a folder, as `cdm sample` takes it.
        checkpoint (str, optional): For a config: a checkpoint or a work directory.
        role (str): 'student' or 'teacher'. Default 'student'.
        steps (int, optional): Sampling steps. Default: `model.sample_sigmas`.
        guidance_scale (float, optional): Default: 1 (off) for a student, 1 + model.alpha for a teacher.
        ema (bool): Whether a student carries its EMA weights, if there are any. Default True.
        options (dict, optional): For a config: changes of it, dotted key -> value.
    """
    name: str
    source: str
    checkpoint: str | None = None
    role: str = 'student'
    steps: int | None = None
    guidance_scale: float | None = None
    ema: bool = True
    options: dict[str, Any] | None = None

    @property
    def model(self) -> tuple[str, str | None]:
        """Entries with the same one are loaded once."""
        return self.source, self.checkpoint

    @property
    def is_folder(self) -> bool:
        """Whether the source is a folder rather than a config."""
        return _is_folder(self.source)

    def fingerprint(self) -> dict[str, Any]:
        """What the images depend on, as JSON values: another one makes other images.

        Files are told apart by name, size and time of change, not by what is in gigabytes of them.
        """
        config, files = None, []
        if self.is_folder:
            files.append(Path(resolve(self.source)))
        else:
            config = without_secrets(load_config(self.source, self.options, keys=('model',)).model.to_dict())
            pretrained = (config.get('backbone') or {}).get('pretrained')
            if pretrained is not None and Path(resolve(pretrained)).exists():
                files.append(Path(resolve(pretrained)))
        if self.checkpoint is not None:
            files.append(Path(find_checkpoint(self.checkpoint)))
        return dict(role=self.role, steps=self.steps, guidance_scale=self.guidance_scale, ema=self.ema,
                    model=None if config is None else _digest(config), weights=_digest([_stamps(f) for f in files]))


def parse_entries(texts: Sequence[str], steps: Sequence[int] = (), teacher: bool = False,
                  teacher_steps: Sequence[int] = (28,), teacher_guidance_scale: float | None = None,
                  ema: bool = True, options: dict[str, Any] | None = None) -> list[Entry]:
    """Entries of the command line.

    Args:
        texts (Sequence[str]): `NAME=SOURCE@CHECKPOINT` each, with or without the name and the checkpoint.
        steps (Sequence[int]): Sampling steps; each model has an entry for each of several. Default: one entry a model,
            with its own `sample_sigmas`.
        teacher (bool): Whether to add the teacher of the first config that has one. Default False.
        teacher_steps, teacher_guidance_scale: Of that teacher.
        ema, options: As in `Entry`.

    Raises:
        FileNotFoundError: If a source or a checkpoint does not exist.
        ValueError: If a text is malformed, two entries have one name, or no config has a teacher.
    """
    models = [replace(_parse(text), ema=ema, options=options) for text in texts]
    entries = [entry for model in models for entry in _by_steps(model, steps or [None])]
    if teacher:
        entries = _by_steps(_teacher_of(models, teacher_guidance_scale), teacher_steps) + entries
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f'two models have the name {name!r}: give each its own, NAME=SOURCE')
    return entries


def _by_steps(model: Entry, steps: Sequence[int | None]) -> list[Entry]:
    if any(n is not None and n < 1 for n in steps) or len(set(steps)) < len(steps):
        raise ValueError(f'steps must be different numbers of 1 or more, but are {list(steps)}')
    if len(steps) == 1:
        return [replace(model, steps=steps[0])]
    return [replace(model, name=f'{model.name}-{n}step', steps=n) for n in steps]


def _teacher_of(models: Sequence[Entry], guidance_scale: float | None) -> Entry:
    for model in models:
        if model.is_folder:
            continue
        if is_type(load_config(model.source, model.options, keys=('model',)).model, Distillation, MODELS):
            return replace(model, name=TEACHER, role='teacher', guidance_scale=guidance_scale)
    raise ValueError('--teacher needs the config of a distillation among the models: exported folders and configs of '
                     'FlowMatching have no teacher')


def _parse(text: str) -> Entry:
    name, equals, place = text.partition('=')
    if not equals or '/' in name or Path(text).is_dir():
        name, place = '', text
    source, at, checkpoint = place.rpartition('@')
    if not at or _is_folder(place):  # a folder may have an @ in its name
        source, checkpoint = place, None
    if name and (not NAME.fullmatch(name) or name in ('.', '..')):
        raise ValueError(f'the name {name!r} of a model names a folder too: use letters, digits and ._+-')
    if not source or checkpoint == '':
        raise ValueError(f'{text!r} is no model: expected SOURCE, SOURCE@CHECKPOINT or NAME=SOURCE@CHECKPOINT')
    if not _is_folder(source):
        find_config(source)
        if checkpoint is not None and not Path(checkpoint).exists():
            raise FileNotFoundError(f'there is no checkpoint {checkpoint}: give a checkpoint or a work directory after '
                                    f'the @ of {text!r}')
    elif checkpoint is not None:
        raise ValueError(f'{source!r} is a folder, which has its weights: leave @{checkpoint} out')
    return Entry(name or _name_of(source, checkpoint), source, checkpoint)


def _is_folder(source: str) -> bool:
    try:
        return Path(resolve(source)).is_dir()
    except FileNotFoundError:  # no such asset
        return False


def _name_of(source: str, checkpoint: str | None) -> str:
    path = Path(source if checkpoint is None else checkpoint)
    if checkpoint is not None and re.fullmatch(r'(iter|epoch)_\d+\.pth', path.name):
        path = path.resolve().parent  # a work directory tells more than its checkpoint
    stem = path.resolve().name if path.is_dir() else path.stem
    return re.sub(r'[^\w.+-]+', '-', stem.split(':')[-1])


def _stamps(path: Path) -> list[tuple[str, int, int]]:
    files = sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]
    return [(str(p.relative_to(path)) if p != path else p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=repr).encode(), digest_size=8).hexdigest()
