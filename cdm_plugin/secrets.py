"""Secrets in configs and texts: what is logged, shown, saved or published has a mask in their place.

One pattern of keys and one of URLs. What a run writes down is read again without its masks: a key that is masked counts
as not given, so that a token comes from the config at hand or, as the hub's does, from the environment.
"""
import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging.logger import MMFormatter
from mmengine.runner import FlexibleRunner, Runner

MASK = '***'
WORDS = re.compile(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+')
ALWAYS = re.compile(r'secret|passw|passphrase|credential|authori[sz]ation|apikey|accesskey|privatekey')
# Words that make a key one to keep. Others (`sort_key`, `meta_keys`) do not, unless the value looks like a key.
KEEPERS = {'access', 'account', 'api', 'auth', 'client', 'deploy', 'encryption', 'hf', 'hub', 'private', 'session',
           'signing', 'ssh', 'storage', 'wandb'}
# Tokens of a tokenizer, not of an account.
TEXT_TOKENS = {'pad', 'eos', 'bos', 'unk', 'sep', 'cls', 'mask', 'start', 'end', 'image', 'special'}
# What an account's key looks like: long, without spaces, of letters and digits.
RANDOM = re.compile(r'(?=\w*\d)(?=\w*[A-Za-z])[A-Za-z0-9]{16,}')
# In any text: who logs in, in a URL; a parameter of one; a token of the hub.
LOGIN = re.compile(r'(?<=://)[^\s/@\'"]+@')
QUERY = re.compile(r'(?<=[?&;])([\w.%-]+)=([^\s&#;\'"]+)')
HUB_TOKEN = re.compile(r'\bhf_[A-Za-z0-9]{16,}')


def is_secret(key: Any, value: Any = '') -> bool:
    """Whether a key names a secret, `hub_token`, `api_key`, `secret_id`, `password` for example.

    Args:
        key (Any): Of a dict, or the last part of a dotted one.
        value (Any): What it has; it decides where the key alone does not, as `key` or `wandb_login_key` do.
    """
    words = [word.lower() for word in WORDS.findall(str(key))]
    if not words or isinstance(value, (bool, type(None))):
        return False
    if any(ALWAYS.match(word) for word in words):
        return True
    before = set(words[:-1])
    if words[-1] in ('token', 'authtoken'):
        return isinstance(value, (str, Mapping)) and not before & TEXT_TOKENS
    if words[-1] in ('key', 'keys') or words[-2:] == ['key', 'id']:
        return isinstance(value, (str, Mapping, list, tuple)) and (
            bool(before & KEEPERS) or isinstance(value, str) and RANDOM.search(value.replace('-', '')) is not None)
    return False


def mask_text(text: str) -> str:
    """A text without logins and secret parameters in its URLs, and without tokens of the hub."""
    text = LOGIN.sub(f'{MASK}@', text)
    text = QUERY.sub(lambda m: f'{m[1]}={MASK}' if is_secret(m[1], m[2]) or 'sig' in m[1].lower() else m[0], text)
    return HUB_TOKEN.sub(MASK, text)


def masked(value: Any, secret: bool = False) -> Any:
    """A copy of nested data with `MASK` in the place of each secret.

    Args:
        value (Any): Dicts, lists and tuples of any kind, and what they hold; a Config too.
        secret (bool): Whether the value itself is one. Default False.
    """
    if isinstance(value, (Config, Mapping)):
        return _with_items(value, {key: masked(child, secret or is_secret(key, child))
                                   for key, child in _items(value)})
    if type(value) in (list, tuple):
        return type(value)(masked(child, secret) for child in value)
    if secret and isinstance(value, (str, bytes, int, float, Path)) and not isinstance(value, bool):
        return MASK
    return mask_text(value) if isinstance(value, str) else value


def unmasked(value: Any, given: Any = None) -> Any:
    """A copy of data that was written with masks: a masked key has what `given` has in its place, or is left out."""
    if isinstance(value, (Config, Mapping)):
        given = dict(_items(given)) if isinstance(given, (Config, Mapping)) else {}
        hidden = {key for key, child in _items(value) if isinstance(child, str) and child == MASK}
        return _with_items(value, {key: given[key] if key in hidden else unmasked(child, given.get(key))
                                   for key, child in _items(value) if key not in hidden or key in given})
    if type(value) in (list, tuple):
        given = given if isinstance(given, (list, tuple)) and len(given) == len(value) else [None] * len(value)
        return type(value)(unmasked(child, one) for child, one in zip(value, given))
    return value


def without_secrets(value: Any) -> Any:
    """A copy of nested data without its secrets, masked or not: for a comparison of what else is the same."""
    return unmasked(masked(value))


def _items(value: Config | Mapping) -> Iterable[tuple[Any, Any]]:
    """Those of dict itself: a ConfigDict's build what a lazy config only names."""
    value = value._cfg_dict if isinstance(value, Config) else value
    return dict.items(value) if isinstance(value, dict) else value.items()


def _with_items(value: Config | Mapping, items: dict[Any, Any]) -> Any:
    """A copy of a config or dict, of its own kind, with other items."""
    if isinstance(value, Config):
        copied = copy.copy(value)
        vars(copied).update(_cfg_dict=_with_items(value._cfg_dict, items), _text=mask_text(value._text or ''))
        return copied
    if not isinstance(value, dict):
        return items
    copied = copy.copy(value)
    dict.clear(copied)
    dict.update(copied, items)
    return copied


class _ShownConfig:
    """`runner.cfg`: MMEngine logs, dumps, shows and saves it, and builds nothing of its secrets."""

    def __get__(self, runner: Any, owner: Any = None) -> Any:
        if runner is None:
            return self
        try:
            return vars(runner)['cfg']
        except KeyError:
            raise AttributeError('cfg') from None

    def __set__(self, runner: Any, cfg: Config) -> None:
        vars(runner)['cfg'] = masked(cfg)


def hide_secrets() -> None:
    """Masks the config that MMEngine's runners show, and what its loggers write."""
    for cls in (Runner, FlexibleRunner):
        cls.cfg = _ShownConfig()
    if not hasattr(MMFormatter.format, 'stock'):
        stock = MMFormatter.format
        MMFormatter.format = lambda self, record: mask_text(stock(self, record))
        MMFormatter.format.stock = stock
