"""`cdm_parts.json`, which says in an exported folder what its network is called by. It may be a stranger's."""
import json
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS

from cdm_plugin.codecs import Codec
from cdm_plugin.conditioners import Conditioner
from cdm_plugin.registry import checked_types, is_type, registered
from cdm_plugin.secrets import unmasked

PARTS_FILE = 'cdm_parts.json'


def read_parts(folder: str | Path) -> dict[str, Any]:
    """What the folder's file says, with types that are registered; empty if there is none.

    Raises:
        ValueError: If it is damaged, or names anything else. It names the file and the key.
    """
    path = Path(folder, PARTS_FILE)
    if not path.is_file():
        return {}
    try:
        parts = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {error}') from None
    if not isinstance(parts, dict):
        raise ValueError(f'{path} must be a JSON object, but is a {type(parts).__name__}')
    checked = {key: unmasked(checked_types(value, path, key)) for key, value in parts.items()}
    for key, kind in (('conditioner', Conditioner), ('codec', Codec)):
        part = checked.get(key) or {}
        if not isinstance(part, dict) or 'type' in part and not is_type(registered(part['type'], MODELS), kind):
            raise ValueError(f'{path}: {key} must be the config of a {kind.__name__}, but is {parts[key]!r}')
    return checked
