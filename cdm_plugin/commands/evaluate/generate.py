"""Images of all entries on the disk, made by all processes together; what is there is not made again."""
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import barrier, get_rank, get_world_size, is_main_process
from tqdm import tqdm

from cdm_plugin.commands.evaluate.entries import Entry
from cdm_plugin.files import inside, whole_file
from cdm_plugin.inference import load_method, sample_prompts, step_sigmas, student_weights
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.roles.ema import check_finite
from cdm_plugin.sheets import save_png, to_pixels

SETTINGS = 'settings.json'
Prompt = str | int


def image_file(out: Path, entry: Entry, index: int) -> Path:
    """Where an entry's image of a number lies."""
    return out / 'images' / entry.name / f'{index:06d}.png'


def how_file(out: Path, entry: Entry) -> Path:
    """Where it says how an entry's images were made: `steps`, `guidance_scale`, and network `calls` an image."""
    return out / 'images' / entry.name / 'how.json'


def write_json(value: Any, path: Path) -> Path:
    """Writes a JSON file whole or not at all, and returns its path."""
    with whole_file(path) as part:
        part.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding='utf-8')
    return path


def check_folder(out: Path, entries: Sequence[Entry], shared: dict[str, Any]) -> None:
    """Refuses a folder with images of something else under these names, and notes what its images are of.

    Args:
        out (Path): The folder; made if need be.
        entries (Sequence[Entry]): What goes there.
        shared (dict): What the images of all entries depend on, JSON values.

    Raises:
        ValueError: If an earlier call made images there with other settings (it names the first that differs), or a
            name leads out of the folder.
    """
    file = out / SETTINGS
    if out.exists() and not out.is_dir():
        raise ValueError(f'--out must be a folder, but {str(out)!r} is a file')
    for entry in entries:
        inside(out / 'images', entry.name, 'the name of a model', links=False)
    known = json.loads(file.read_text(encoding='utf-8')) if file.is_file() else dict(shared, models={})
    models = {entry.name: entry.fingerprint() for entry in entries}
    for key, value in shared.items():
        if known.get(key) != value:
            raise ValueError(f'the images in {str(out)!r} were made with {key} {known.get(key)!r}, not {value!r}: give '
                             'another --out, or delete the folder')
    for name, fingerprint in models.items():
        earlier = known['models'].get(name, fingerprint)
        for key, value in fingerprint.items():
            if earlier.get(key) != value:
                what = dict(model='another config', weights='other weights').get(
                    key, f'{key} {earlier.get(key)!r}, not {value!r}')
                raise ValueError(f'the images of {name!r} in {str(out)!r} were made with {what}: give another --out or '
                                 f'another name, or delete {str(out / "images" / name)!r} and its entry in {SETTINGS}')
    out.mkdir(parents=True, exist_ok=True)
    known['models'].update(models)
    write_json(known, file)


def generate(entries: Sequence[Entry], prompts: Sequence[Prompt], out: Path, seed: int = 0, batch_size: int = 4,
             image_size: tuple[int, int] | None = None) -> None:
    """Makes the images that are missing; every rank must call it.

    The noise of an image depends on the seed and on its number alone. A batch is the same prompts in every
    call, whatever the number of processes and whatever is there already, so that not even rounding differs.

    Args:
        entries (Sequence[Entry]): Whose images.
        prompts (Sequence): Texts or class labels, one an image.
        out (Path): The evaluation's folder.
        seed (int): Of the noise. Default 0.
        batch_size (int): Samples of one batch. Default 4.
        image_size (tuple, optional): (height, width) in pixels. Default: each model's own.

    Raises:
        ValueError: If an image holds NaN or infinity.
    """
    batches = [range(i, min(i + batch_size, len(prompts))) for i in range(0, len(prompts), batch_size)]
    todo = {entry: [batch for batch in batches[get_rank()::get_world_size()]
                    if not all(image_file(out, entry, i).is_file() for i in batch)] for entry in entries}
    for model in dict.fromkeys(entry.model for entry in entries):
        group = [entry for entry in entries if entry.model == model and todo[entry]]
        if group:
            method = load_method(*model, image_size=image_size, encoders=True, options=group[0].options,
                                 roles=tuple({entry.role for entry in group}))
            method.set_attention(training=False)
            for entry in group:
                _generate(method, entry, prompts, todo[entry], out, seed)
            del method
    barrier()


def _generate(method: DiffusionModel, entry: Entry, prompts: Sequence[Prompt], batches: list[range], out: Path,
              seed: int) -> None:
    check_finite(method, entry.ema, entry.name)
    guidance = entry.guidance_scale
    if guidance is None:
        guidance = 1 + method.alpha if entry.role == 'teacher' else 1.0
    sigmas = method.sample_sigmas if entry.steps is None else step_sigmas(entry.steps)
    if is_main_process():
        how = dict(steps=len(sigmas), guidance_scale=guidance, calls=len(sigmas) * (1 if guidance == 1 else 2))
        write_json(how, how_file(out, entry))
    with student_weights(method, entry.ema), tqdm(total=sum(map(len, batches)), desc=entry.name, unit='image',
                                                  disable=get_rank() > 0) as bar:
        for batch in batches:
            images = sample_prompts(method, [prompts[i] for i in batch], method.noise(seed, batch), len(batch),
                                    role=entry.role, sigmas=sigmas, guidance_scale=guidance)
            bad = [i for i, image in zip(batch, images) if not torch.isfinite(image).all()]
            if bad:
                raise ValueError(f'images of {entry.name!r} hold NaN or infinity (numbers {bad[:3]}): '
                                 'the model has diverged; leave it out')
            pixels = to_pixels(images)
            for i, image in zip(batch, pixels[..., 0] if images.shape[1] == 1 else pixels):
                if not image_file(out, entry, i).is_file():
                    save_png(image, image_file(out, entry, i))
            bar.update(len(batch))
