"""A dress rehearsal of a shipped LoRA recipe at full size, without a download: random weights of the published shapes.

    python benchmarks/rehearsal.py sd3-medium                            # a CPU: 64x64 pixels, short texts
    python benchmarks/rehearsal.py sd3-medium --size 1024 --max-steps 25 # a GPU: what training itself will need
    python benchmarks/rehearsal.py z-image --folder /disk/rehearsal      # keeps the pipeline for another call

It builds the pipeline once (network and VAE of the published size, text encoders of the published width but a few
layers, in bfloat16), trains the recipe through `cdm train`, resumes, samples, exports, and runs the code of the
export's model card, which opens it with diffusers. Each step is a process of its own; printed are its seconds, its peak
of memory, pages of mapped files included, and what it wrote; on a GPU also the peak of its memory in training, beside
the estimate of `cdm doctor`. The images are noise: what is rehearsed is memory, time and the way from file to file.

Runs from a checkout, on Linux: tokenizers and text encoders are those of tests/tiny_pipelines.py.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ['a red fox', 'dogs and birds']
GIB = 2**30
SMALL, EMBEDDINGS = 512, 'embeddings'
# Of the sample grid before the first iteration, which would take most of a CPU's time.
FEW_IMAGES = {'custom_hooks.1.num_images': 1, 'custom_hooks.1.teacher_steps': 2}
# Of SD3's autoencoder, for those whose published size does not say them.
SCALES = dict(scaling_factor=1.5305, shift_factor=0.0609)


@dataclass(frozen=True)
class Model:
    """A model that can be rehearsed.

    Attributes:
        recipe (str): The shipped LoRA recipe.
        tiny (str): The function of tests/tiny_pipelines.py that writes a small pipeline of the architecture.
        encoders (Callable): (tiny_pipelines, folder of the small pipeline) -> text encoders of the published width, by
            the pipeline's name of each.
        keys (dict): Config keys for small images: shorter texts, for example.
        cached (dict): At small images, shapes of cached embeddings by field: they stand for texts that are always long.
            Sampling still encodes, and so takes one step. Default: none.
    """
    recipe: str
    tiny: str
    encoders: Callable[[Any, Path], dict[str, Any]]
    keys: dict[str, Any] = field(default_factory=dict)
    cached: dict[str, tuple[int, int]] = field(default_factory=dict)

    def small(self, folder: Path) -> dict[str, Any]:
        """Config keys for small images, of the pipeline in a folder."""
        conditioner = 'model.backbone.conditioner'
        cached = {f'{conditioner}._delete_': True, f'{conditioner}.type': 'EmbeddingConditioner',
                  f'{conditioner}.folder': folder / EMBEDDINGS} if self.cached else {}
        return {**FEW_IMAGES, **self.keys, **cached}


def _sd3_encoders(tiny: Any, folder: Path) -> dict[str, Any]:
    words = len(_tokenizer(folder))
    return dict(text_encoder=tiny.clip_encoder(words, 768), text_encoder_2=tiny.clip_encoder(words, 1280),
                text_encoder_3=tiny.t5_encoder(4096))


def _klein_encoder(tiny: Any, folder: Path) -> dict[str, Any]:
    from transformers import Qwen3ForCausalLM
    # Its condition is three of 27 layers' states, so all of them are there.
    return dict(text_encoder=tiny.qwen3_encoder(_tokenizer(folder), 2560, 28, Qwen3ForCausalLM))


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder / 'tokenizer')


MODELS = {
    'sd3-medium': Model('sd3/cdm_lora_sd3-medium_1xb4_4step_4k.py', 'save_tiny_sd3', _sd3_encoders,
                        {'model.backbone.conditioner.max_sequence_length': 16}),
    'z-image': Model('z-image/cdm_lora_z-image_1xb4_4step_2k.py', 'save_tiny_z_image',
                     lambda tiny, folder: dict(text_encoder=tiny.qwen3_encoder(_tokenizer(folder), 2560))),
    'flux2-klein-4b': Model('flux2/cdm_lora_flux2-klein-4b_1xb4_4step_2k.py', 'save_tiny_klein', _klein_encoder,
                            {'model.backbone.conditioner.max_sequence_length': 64}),
    'longcat-image': Model('longcat/cdm_lora_longcat-image_1xb4_4step_2k.py', 'save_tiny_longcat',
                           lambda tiny, folder: dict(text_encoder=tiny.qwen_encoder(_tokenizer(folder), 3584)),
                           cached=dict(encoder_hidden_states=(16, 3584))),
}


def build(model: Model, folder: Path, seed: int = 0) -> None:
    """Writes the pipeline, unless it is there."""
    import torch
    from mmengine.registry import MODELS as CLASSES

    from cdm_plugin.config import load_config
    from cdm_plugin.files import whole_folder
    sys.path.insert(0, str(ROOT / 'tests'))
    settings = load_config(model.recipe, model.keys).model.backbone
    backbone = CLASSES.get(settings['type'])
    torch.manual_seed(seed)
    with whole_folder(folder) as part_folder:
        _write(model, backbone, settings, part_folder)


def _write(model: Model, backbone: Any, settings: dict[str, Any], folder: Path) -> None:
    import tiny_pipelines
    import torch
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
    from mmengine.registry import MODELS as CLASSES

    from cdm_plugin.data import write_embeddings
    getattr(tiny_pipelines, model.tiny)(folder)
    FlowMatchEulerDiscreteScheduler.from_config(backbone.published_scheduler).save_pretrained(folder / 'scheduler')
    for name, part in model.encoders(tiny_pipelines, folder).items():
        shutil.rmtree(folder / name)
        part.to(torch.bfloat16).save_pretrained(folder / name)
    vae = CLASSES.get(backbone.codec_type).vae_class
    scales = SCALES if vae is AutoencoderKL else {}
    for name, cls, config in (('vae', vae, {**scales, **backbone.published_vae}),
                              ('transformer', backbone.network_class, settings['config'])):
        with init_empty_weights(include_buffers=False):
            part = cls.from_config(dict(config))
        for module in part.modules():
            for key, p in module.named_parameters(recurse=False):
                weight = torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02)
                setattr(module, key, torch.nn.Parameter(weight, requires_grad=False))
        shutil.rmtree(folder / name)
        part.save_pretrained(folder / name)
    for name, prompts in (('00000', PROMPTS), ('null', [''])) if model.cached else ():
        rows = {key: torch.randn(len(prompts), *shape).bfloat16() for key, shape in model.cached.items()}
        write_embeddings(str(folder / EMBEDDINGS / f'{name}.safetensors'), rows, prompts)


def child(arguments: list[str], log: Path, cwd: Path) -> dict[str, float]:
    """Runs a process to its end: its seconds, and the most memory that it had at once, files that it mapped included.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    start = time.monotonic()
    with open(log, 'w') as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, cwd=cwd,
                                   env=dict(os.environ, HF_HUB_OFFLINE='1'))
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    if status:
        raise RuntimeError(f'{" ".join(arguments)} has failed:\n{log.read_text()[-3000:]}')
    return dict(seconds=time.monotonic() - start, gib=usage.ru_maxrss * 1024 / GIB)


def size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob('*') if p.is_file()) if path.is_dir() else path.stat().st_size


def rehearse(name: str, folder: Path, work: Path, pixels: int, iterations: int,
             max_steps: int) -> list[dict[str, Any]]:
    """All steps, as rows with `step`, `seconds`, `gib` and, of what it wrote, `files`."""
    model, rows, cdm = MODELS[name], [], [sys.executable, '-m', 'cdm_command']
    work.mkdir(parents=True, exist_ok=True)
    (work / 'prompts.txt').write_text('\n'.join(PROMPTS))
    keys: dict[str, Any] = {
        'model.backbone.pretrained': folder, 'model.image_size': pixels, 'model.time_grid.max_steps': max_steps,
        'train_dataloader.batch_size': 1, 'train_dataloader.num_workers': 0,
        'train_dataloader.persistent_workers': False, 'train_dataloader.dataset.ann_file': work / 'prompts.txt',
        'optim_wrapper.student.accumulative_counts': 1, 'optim_wrapper.fake.accumulative_counts': 1,
        'default_hooks.logger.interval': 1, 'default_hooks.checkpoint.interval': 2, 'custom_hooks.1.interval': 10**6,
        **(model.small(folder) if pixels < SMALL else {})}
    options = ['--cfg-options', *(f'{key}={value}' for key, value in keys.items())]
    run, lora = work / 'run', work / 'lora'

    def step(title: str, arguments: list[str], wrote: Path | None = None, cwd: Path = work) -> None:
        measured = child(arguments, work / f'{title.split()[0]}.log', cwd)
        rows.append(dict(step=title, **measured, files=None if wrote is None else size(wrote) / GIB))
        print(_line(rows[-1]), flush=True)

    if not folder.exists():
        step('build', [sys.executable, __file__, name, '--folder', str(folder), '--build'], folder)
    step('doctor', [*cdm, 'doctor', model.recipe, *options])
    estimate = re.search(r'this config on 1 GPU: .*', (work / 'doctor.log').read_text()).group()
    step('train', [*cdm, 'train', model.recipe, '--work-dir', str(run), *options,
                   f'train_cfg.max_iters={iterations}'], run / f'iter_{iterations}.pth')
    scalars = [json.loads(line) for file in run.rglob('scalars.json') for line in file.read_text().splitlines()]
    peak = max((line.get('memory', 0) for line in scalars), default=0)
    rows[-1].update(estimate=estimate, gpu_gib=peak / 1024 or None)
    print(f'  doctor: {estimate}' + (f'; measured on the GPU: {peak / 1024:.1f} GiB' if peak else ''), flush=True)
    step('resume', [*cdm, 'train', model.recipe, '--work-dir', str(run), '--resume', *options,
                    f'train_cfg.max_iters={iterations + 2}'])
    checkpoint = ['--checkpoint', str(run)]
    steps = ['--steps', '1'] if model.cached and pixels < SMALL else []
    step('sample', [*cdm, 'sample', model.recipe, *checkpoint, '--prompts', PROMPTS[0], '--num', '1', *steps, '--out',
                    str(work / 'samples'), *options])
    step('export', [*cdm, 'export', model.recipe, *checkpoint, '--out', str(lora), *options], lora)
    code = re.search(r'```python\n(.*?)```', (lora / 'README.md').read_text(), re.DOTALL).group(1)
    code = code.replace(f'path/to/{folder.name}', str(folder))
    (lora / 'card.py').write_text(code)
    step('open in diffusers, as the card says', [sys.executable, 'card.py'], lora / 'image.png', cwd=lora)
    return rows


def _line(row: dict[str, Any]) -> str:
    files = '' if row['files'] is None else f'{row["files"]:.2f} GiB'
    return f'| {row["step"]} | {row["seconds"]:.0f} s | {row["gib"]:.1f} GiB | {files} |'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('model', choices=list(MODELS))
    parser.add_argument('--folder', type=Path, help='of the pipeline, kept; default: a temporary one')
    parser.add_argument('--size', type=int, default=64, help='pixels of a side (default 64)')
    parser.add_argument('--iterations', type=int, default=4, help='before it resumes for 2 more (default 4)')
    parser.add_argument('--max-steps', type=int, default=4, help='of the time grid (default 4)')
    parser.add_argument('--json', type=Path, help='file for the figures')
    parser.add_argument('--build', action='store_true', help='write the pipeline alone')
    args = parser.parse_args()
    if args.build:
        build(MODELS[args.model], args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary, args.model)).absolute()
        rows = rehearse(args.model, folder, Path(temporary, 'work'), args.size, args.iterations, args.max_steps)
    if args.json is not None:
        args.json.write_text(json.dumps(dict(model=args.model, size=args.size, rows=rows), indent=1))


if __name__ == '__main__':
    main()
