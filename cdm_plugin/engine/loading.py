"""What a file of weights holds, whoever wrote it, and whether it fits the model that it is loaded into."""
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import CONFIG_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cdm_plugin.compat.checkpoints import CheckpointError, register_format

# Where others keep the weights of a checkpoint: DeepSpeed's engines, scripts.
WRAPPINGS = ('module', 'model', 'model_state_dict')
# What data-parallel wrappers and torch.compile put into names.
PREFIX = re.compile(r'(^|(?<=\.))(module|_orig_mod)\.')
LORA = (('lora_down.weight', "kohya's"), ('.lora_A.', "PEFT's"), ('.lora.down.', "diffusers' old"))
Shapes = Mapping[str, tuple[int, ...]]


def is_weights(path: str | Path) -> bool:
    """Whether a path is a safetensors file, or a folder in which diffusers keeps one network."""
    path = Path(path)
    return path.suffix == '.safetensors' and path.is_file() or Path(path, CONFIG_NAME).is_file()


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads such a file, or all of such a folder.

    Raises:
        CheckpointError: If there are none, or one is damaged.
    """
    files = sorted(Path(path).glob('*.safetensors')) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise CheckpointError(f'{path} has no *.safetensors file of weights')
    try:
        return {name: weight for file in files for name, weight in load_file(file).items()}
    except SafetensorError as error:
        raise CheckpointError(f'{path} is damaged or was cut short: {error}') from None


register_format(is_weights, read_weights)


def as_checkpoint(content: Any, path: str | Path) -> dict[str, Any]:
    """What was loaded as a checkpoint: a dict with `state_dict`, weights by name.

    Args:
        content: What the file holds: a checkpoint, bare weights, or weights under a name that others use.
        path (str or Path): The file, for messages.

    Raises:
        ValueError: If it holds no weights by name.
    """
    if isinstance(content, Mapping):
        if isinstance(content.get('state_dict'), Mapping):
            return dict(content)
        for weights in (content, *(content.get(key) for key in WRAPPINGS)):
            if isinstance(weights, Mapping) and weights and all(isinstance(w, Tensor) for w in weights.values()):
                return dict(state_dict=dict(weights))
        found = f'a dict of {some(map(str, content))}' if content else 'an empty dict'
    else:
        found = f'a {type(content).__name__}'
    raise ValueError(f'{path} holds {found}, and no weights by name: a checkpoint is a dict with state_dict, or bare '
                     'weights by name')


def named_as(weights: Mapping[str, Tensor], own: Iterable[str], role: str) -> dict[str, Tensor]:
    """Weights by the names that the model has for them: without what wrappers put into them, and with the role's name
    if they are one network's alone.

    Args:
        weights (Mapping[str, Tensor]): By the names of the file.
        own (Iterable[str]): The model's names, `<role>.<name>`.
        role (str): Whose weights bare ones are.
    """
    own = set(own)

    def named(name: str) -> str:
        plain = PREFIX.sub('', name)
        return next((n for n in (name, plain, f'{role}.{name}', f'{role}.{plain}') if n in own), name)

    return {named(name): weight for name, weight in weights.items()}


def check_whole(weights: Mapping[str, Any], own: Shapes, path: str | Path, advice: str) -> None:
    """Refuses a checkpoint that has not just the weights of the model.

    Args:
        weights (Mapping[str, Tensor or tuple]): What is loaded, by the model's names; tensors, or their shapes.
        own (Mapping[str, tuple]): Shapes of the model's.
        path (str or Path): The file.
        advice (str): What to do.

    Raises:
        ValueError: With what differs.
    """
    missing, unknown = own.keys() - weights.keys(), weights.keys() - own.keys()
    other = _reshaped(weights, own)
    parts = [f'{len(missing)} of the {len(own)} weights are missing ({some(missing)})'] if missing else []
    parts += [f'{len(other)} have another shape ({some(other)})'] if other else []
    parts += [f'{len(unknown)} are unknown ({some(unknown)})'] if unknown else []
    if parts:
        raise ValueError(f'the checkpoint {path} does not fit the config\'s model: {"; ".join(parts)}. '
                         f'{_about_lora(weights) or advice}')


def check_start(weights: Mapping[str, Any], own: Shapes, roles: Iterable[str], path: str | Path) -> None:
    """Refuses weights to start from (`load_from`) that leave a role where it was.

    Args:
        weights (Mapping[str, Tensor or tuple]): By the model's names.
        own (Mapping[str, tuple]): Shapes of the model's.
        roles (Iterable[str]): Roles that must have weights.
        path (str or Path): The file.

    Raises:
        ValueError: If a role has none, or one is of another shape.
    """
    matching = weights.keys() & own.keys()
    if not matching:
        raise ValueError(f'load_from: {path} has none of the model\'s weights: it has {some(weights)}, the model '
                         f'{some(own)}. {_about_lora(weights)}')
    if other := _reshaped(weights, own):
        raise ValueError(f'load_from: {path} does not fit the model: {len(other)} have another shape ({some(other)})')
    given = sorted({name.split('.')[0] for name in matching})
    if empty := [role for role in roles if role not in given]:
        raise ValueError(
            f'load_from: {path} has weights of {" and ".join(given)} alone, and {" and ".join(empty)} and the teacher '
            'would stay as they are. To distil a fine-tuned teacher, export it (`cdm export CONFIG --checkpoint '
            f"{path} --out DIR`) and set model.teacher=dict(pretrained='DIR'), or lora='DIR' if it is a LoRA file")


def some(names: Iterable[str], limit: int = 3) -> str:
    """A few names of many, sorted."""
    names = sorted(names)
    return ', '.join(names[:limit]) + (', ...' if len(names) > limit else '')


def _reshaped(weights: Mapping[str, Any], own: Shapes) -> list[str]:
    shapes = {name: tuple(getattr(w, 'shape', w)) for name, w in weights.items()}
    return [f'{name} {shape}, not {tuple(own[name])}' for name, shape in shapes.items()
            if name in own and shape != tuple(own[name])]


def _about_lora(weights: Iterable[str]) -> str:
    kind = next((kind for part, kind in LORA if any(part in name for name in weights)), None)
    if kind is None or any(name.split('.')[1:2] == ['adapters'] for name in weights):
        return ''
    convert = '' if kind == "PEFT's" else (", once it has diffusers' names (`pipeline.load_lora_weights`, then "
                                           '`save_lora_weights`)')
    return (f'These are LoRA weights with {kind} names: give the file as model.lora.student or model.teacher.lora'
            f'{convert}')
