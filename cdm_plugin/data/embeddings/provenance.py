"""Who encoded cached text embeddings: what an index says of it, and whether that is this encoder."""
import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import MODELS

from cdm_plugin.assets import resolve
from cdm_plugin.data.embeddings.files import INDEX, read_index
from cdm_plugin.data.wrappers import leaves
from cdm_plugin.registry import class_of, registered
from cdm_plugin.secrets import without_secrets

# Folders of a pipeline that decide its text embeddings.
TEXT_PARTS = ('text_', 'tokenizer')
# Arguments of from_pretrained that say how to load, not what.
LOADING_KEYS = ('cache_dir', 'local_files_only', 'token', 'force_download', 'use_safetensors')
BLOCKS, BLOCK_BYTES = 64, 4096


def check_encoder(folder: str, conditioner: Mapping[str, Any]) -> None:
    """Checks that a conditioner's embeddings are those in a folder that `cdm cache` made. Loads no encoder.

    Args:
        folder (str): The folder, or a shard in it.
        conditioner (dict): Config of the conditioner, as it would stand in `model.backbone.conditioner`. Arguments
            that are left out have their defaults; those without a default (`pretrained`, `revision`, `variant`) and
            `type` are compared only where they are given. The folder or the hub's local copy of `pretrained`, where
            there is one, is compared by its files.

    Raises:
        ValueError: If the folder has no index, or another encoder made it; names the entries that differ.
    """
    root = Path(resolve(folder))
    root = root if root.is_dir() else root.parent
    index = read_index(root)
    if index is None:
        raise ValueError(f'{root} has no {INDEX}, which says what encoder made its embeddings: make the folder with '
                         '`cdm cache`, or leave `encoder` out')
    kind = conditioner.get('type', index['encoder'].get('type'))
    cls = class_of(kind, MODELS) if kind != index['encoder'].get('type') else registered(kind, MODELS)
    given = {**conditioner, 'type': getattr(cls, '__name__', str(kind))}
    parameters = _parameters(cls)
    known = {*index['encoder'], *parameters, 'revision', 'variant', *LOADING_KEYS}
    unknown = sorted(set(given) - known)
    if unknown and parameters:
        raise ValueError(f'encoder.{unknown[0]} is unknown: {given["type"]} takes {", ".join(sorted(parameters))}')
    full = {**_defaults(parameters), **given}
    # What the encoder did not write down, such as where it keeps its weights, does not change embeddings.
    compared = {key for key in (*index['encoder'], 'revision', 'variant') if key in full}
    source = _describe_source(full, given.get('cache_dir'))
    differences = _encoder_differences(index, {key: full[key] for key in compared}, source, compared)
    if differences:
        raise ValueError(f'another encoder made the embeddings in {root} ({"; ".join(differences)}): take the folder '
                         'of this encoder, or make one with `cdm cache`')


def check_cache(dataset: Any, backbone: Any) -> None:
    """Checks that cached embeddings belong to a model: that its own text encoders made them, and that the null
    condition is of the same cache. Folders without an index (not made by `cdm cache`) are taken as they are.

    Args:
        dataset (Dataset): The training dataset, of any kind.
        backbone (Backbone): The model's.

    Raises:
        ValueError: If they do not; names the folder and what differs.
    """
    own = backbone.default_parts().get('conditioner')
    null_folder = getattr(backbone.conditioner, 'folder', None)
    null_index = read_index(Path(null_folder)) if null_folder and Path(null_folder).is_dir() else None
    for root in _cache_folders(dataset):
        index = read_index(root) if root.is_dir() else None
        if index is None:
            continue
        if own is not None:  # how the encoders were used is the cache's business, which encoders they are is not
            check_encoder(str(root), {**index['encoder'], **{k: v for k, v in own.items() if k in index['encoder']
                                                             or k in ('revision', 'variant')}})
        for key in ('encoder', 'source', 'fields'):
            if null_index is not None and null_index[key] != index[key]:
                difference = describe_difference(key, null_index[key], index[key])
                raise ValueError(f'the null condition (model.backbone.conditioner.folder={null_folder!r}) and the '
                                 f'embeddings in {root} are of two caches ({difference}): take one folder for both')


def _cache_folders(dataset: Any) -> list[Path]:
    """Folders of all embedding datasets inside a dataset."""
    return [Path(part.data_root) for part in leaves(dataset)
            if isinstance(getattr(part, 'data_root', None), str) and hasattr(part, 'null_condition')]


def index_differences(index: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between who made an index's embeddings and who would go on with them."""
    parameters = _parameters(registered(wanted['encoder'].get('type'), MODELS))
    new = {**_defaults(parameters), **wanted['encoder']}
    differences = _encoder_differences(index, new, wanted['source'], {*index['encoder'], *wanted['encoder']})
    if not differences and index['fields'] != wanted['fields']:
        differences.append(describe_difference('fields', index['fields'], wanted['fields']))
    return differences


def describe_difference(key: str, old: Any, new: Any) -> str:
    """One entry of a message."""
    return f'{key}: {old!r} in the cache, {new!r} here'


def describe_encoder(backbone: Any, backbone_cfg: Mapping[str, Any]) -> dict[str, Any]:
    """`encoder` and `source` of the index."""
    conditioner_cfg = backbone_cfg.get('conditioner')
    conditioner_cfg = dict(conditioner_cfg) if isinstance(conditioner_cfg, Mapping) else {}
    encoder = backbone.conditioner.to_config()
    if encoder is None:  # the next best: what the config says of it
        encoder = {**conditioner_cfg, 'type': type(backbone.conditioner).__name__}
        encoder = {key: value for key, value in encoder.items() if key not in LOADING_KEYS}
    cache_dir = conditioner_cfg.get('cache_dir') or getattr(backbone, 'load_kwargs', {}).get('cache_dir')
    return dict(encoder=_plain(encoder), source=_describe_source(encoder, cache_dir))


def describe_codec(codec: Any, load_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`codec` and `source` of an index of latents."""
    config = codec.to_config() or dict(type=type(codec).__name__)
    return dict(codec=_plain(config), source=_describe_source(
        config, load_kwargs.get('cache_dir'), (config.get('subfolder') or 'vae',)))


def codec_differences(index: Mapping[str, Any], wanted: Mapping[str, Any], but: tuple[str, ...] = ()) -> list[str]:
    """What differs between the codec of an index of latents and another one, but for the keys `but`; both as
    `describe_codec` says it."""
    compared = {*index['codec'], *wanted['codec']} - set(but)
    return _encoder_differences(dict(encoder=index['codec'], source=index['source']), wanted['codec'], wanted['source'],
                                compared)


def _describe_source(encoder: Mapping[str, Any], cache_dir: str | None,
                     parts: tuple[str, ...] = TEXT_PARTS) -> dict[str, Any]:
    """Where the files in folders that begin with `parts` are from: `commit` (None for a folder) and `files`, a digest
    by name.

    Nothing is downloaded; what is not on this machine is not described.
    """
    pretrained = encoder.get('pretrained')
    if not isinstance(pretrained, str):
        return dict(commit=None, files={})
    folder, commit = Path(_absolute(pretrained)), None
    if not folder.is_dir():
        folder, commit = _hub_snapshot(pretrained, encoder.get('revision'), cache_dir)
    return dict(commit=commit, files={} if folder is None else _digest_files(folder, parts))


def _hub_snapshot(repo: str, revision: str | None, cache_dir: str | None) -> tuple[Path | None, str | None]:
    """Folder and commit of the hub's local copy of a repository."""
    from huggingface_hub import try_to_load_from_cache
    for name in ('model_index.json', 'config.json'):
        try:
            path = try_to_load_from_cache(repo, name, cache_dir=cache_dir, revision=revision)
        except ValueError:  # no repository's name
            return None, None
        if isinstance(path, str):
            return Path(path).parent, Path(path).parent.name
    return None, None


def _digest_files(folder: Path, parts: tuple[str, ...]) -> dict[str, str]:
    folders = [part for part in folder.iterdir() if part.is_dir() and part.name.startswith(parts)]
    files = [file for part in folders for file in part.rglob('*')] or list(folder.iterdir())
    return {file.relative_to(folder).as_posix(): _digest(file) for file in sorted(files)
            if file.is_file() and file.suffix != '.md' and not file.name.startswith('.')}


def _digest(path: Path) -> str:
    """Digest of a file's size and of its content; of a large file's content, blocks all over it.

    To read all weights would take as long as to load them, and the size alone is that of any fine-tuned copy.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open('rb') as file:
        if size <= BLOCKS * BLOCK_BYTES:
            digest.update(file.read())
        else:
            for i in range(BLOCKS):
                file.seek(i * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()[:16]


def _encoder_differences(index: Mapping[str, Any], encoder: Mapping[str, Any], source: Mapping[str, Any],
                         compared: Any) -> list[str]:
    """What differs between the encoder of an index and another one, in the keys `compared`."""
    old = {**_defaults(_parameters(registered(index['encoder'].get('type'), MODELS))), **index['encoder']}
    new = _plain(encoder)
    old_files, files = index['source']['files'], source['files']
    if isinstance(new.get('pretrained'), str):
        # A folder that was moved is the same encoder.
        new['pretrained'] = old['pretrained'] if files and files == old_files else _absolute(new['pretrained'])
    differences = [describe_difference(key, old.get(key), new.get(key)) for key in sorted(compared)
                   if old.get(key) != new.get(key)]
    # Only files that both know: the hub's copy grows with what is loaded of it.
    changed = [name for name in files if old_files.get(name, files[name]) != files[name]]
    if changed and old.get('pretrained') == new.get('pretrained'):
        differences.append(f'{len(changed)} files of {new["pretrained"]} have changed, such as {changed[0]}')
    return differences


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """Arguments of a conditioner's class and its bases; empty if there is none."""
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(getattr(cls, '__mro__', ())):
        if '__init__' in vars(base):
            found.update(inspect.signature(base.__init__).parameters)
    return {name: p for name, p in found.items()
            if name != 'self' and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def _defaults(parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    return _plain({name: p.default for name, p in parameters.items() if p.default is not p.empty})


def _absolute(pretrained: str) -> str:
    path = Path(resolve(pretrained))
    return str(path.resolve()) if path.is_dir() else pretrained


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists; without secrets, which change no embedding."""
    return json.loads(json.dumps(without_secrets(dict(value)), default=str))
