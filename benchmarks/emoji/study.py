"""Does CDM beat DMD2 on emoji with real captions? The study's main rows on a harder bench than the digits.

    python benchmarks/emoji/make_data.py ...             # once; see there
    python benchmarks/emoji/study.py                     # on a GPU
    python benchmarks/emoji/study.py --small             # the same path on 32x32 pictures with a tiny network, on a CPU
    python benchmarks/emoji/study.py --latents           # and in the latents of a small autoencoder, trained here too
    python benchmarks/emoji/study.py --small --report    # the table of what has run

It trains the teacher with `FlowMatching` and exports it, trains the judge, then trains every row on every seed through
MMEngine's runner, and judges the EMA student at 1, 2, 4 and 8 steps on held-out captions and on captions of the
training set: retrieval of the caption from the picture, and Fréchet distance (FD) to the guided teacher's 50-step
pictures and to the real ones; at 4 steps also at a quarter, half and three quarters of its training. What has run is
not run again, and a teacher that was cut off goes on from its last checkpoint.
"""
import argparse
import copy
import json
import os
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from autoencoder import autoencoder_config, psnr, reconstruct, train_autoencoder
from encoder import Encoder, distances
from judge import Judge, load_pictures, score, train_judge
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner, find_latest_checkpoint
from study_tables import STEPS, curves, kernel_distances, steps_name, table
from torch import Tensor

from cdm_plugin.codecs import VAECodec
from cdm_plugin.config import load_config
from cdm_plugin.data import cache_latents
from cdm_plugin.export import export
from cdm_plugin.files import whole_file
from cdm_plugin.inference import sample_prompts, step_sigmas, student_weights
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.sheets import labelled_grid, save_png

TEACHER = 'emoji/teacher_flow-matching_sd3-emoji_1xb128_20k.py'
RECIPE = 'emoji/{}_sd3-emoji_1xb64_4step_4k.py'
AWARE = {'model.anchor_aware_fake': True}
UNCAPPED = {'model.losses.ca.sigma': dict(type='UniformSigma')}
UNSHIFTED = {'model.sigma_shift': 'none'}  # all methods with one law of the levels
# As `cdm demo`: the levels of inference, and one rollout for both fake-score steps.
ONE_ROLLOUT = {'model.time_grid': dict(type='FixedTimeGrid'), 'model.fake_steps': 2, 'model.student_every': 1}
# Recipe, changes of it and how many times as long as the others, by row.
ROWS = {
    'dmd2': ('dmd2', {}, 1), 'dmd2-aware': ('dmd2', AWARE, 1), 'decoupled-dmd': ('decoupled-dmd', UNSHIFTED, 1),
    'decoupled-dmd-aware': ('decoupled-dmd', {**UNSHIFTED, **AWARE, **UNCAPPED}, 1), 'cdm': ('cdm', {}, 1),
    'cdm-consistent': ('cdm-consistent', {}, 1), 'fixed-grid-one-rollout': ('cdm-consistent', ONE_ROLLOUT, 1),
    'dmd2-long': ('dmd2', {}, 4), 'cdm-long': ('cdm', {}, 4), 'cdm-consistent-long': ('cdm-consistent', {}, 4)}
TEACHER_STEPS = (*STEPS, 50)
PARTS = ('held_out', 'train')
TINY = dict(sample_size=16, patch_size=2, in_channels=12, out_channels=12, pos_embed_max_size=16, num_layers=3,
            num_attention_heads=2, attention_head_dim=32, caption_projection_dim=64, joint_attention_dim=384,
            pooled_projection_dim=384, qk_norm='rms_norm')
# 4x8x8 latents, 16 tokens beside the 24 of the caption.
TINY_LATENT = dict(TINY, sample_size=8, in_channels=4, out_channels=4, pos_embed_max_size=8)


@dataclass(frozen=True)
class Form:
    """How large the study is.

    Attributes:
        name (str): 'full', 'small' or 'latents'.
        data (str): Default folder of the data.
        options (dict): Changes of every recipe, dotted key -> value.
        teacher_options, row_options (dict): Further ones of the teacher's and of the rows'.
        network (dict, optional): Config of the network. Default: the recipes'.
        autoencoder_iters (int): Iterations of the autoencoder in whose latents all trains; 0 for pixels.
        teacher_iters (int): Iterations of the teacher.
        student_steps (int): Student steps of a row.
        teacher_batch (int): Pictures of an iteration.
        batch (int): Captions of an iteration.
        judge_steps (int): Steps of the judge's training.
        samples (int): Pictures of a judgement at most, in each part of the captions.
        seeds (int): Runs of a row.
    """
    name: str = 'full'
    data: str = 'data/emoji'
    options: dict[str, Any] = field(default_factory=dict)
    teacher_options: dict[str, Any] = field(default_factory=dict)
    row_options: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] | None = None
    autoencoder_iters: int = 0
    teacher_iters: int = 20000
    student_steps: int = 2000
    teacher_batch: int = 128
    batch: int = 64
    judge_steps: int = 3000
    samples: int = 1304  # four of each held-out caption
    seeds: int = 5


FULL = Form()
# 32x32 pictures and a network of width 64, with the digits' learning rates.
SMALL = Form('small', 'data/emoji_32',
             {'train_dataloader.num_workers': 0, 'train_dataloader.persistent_workers': False},
             {'optim_wrapper.student.optimizer.lr': 2e-3},
             {'optim_wrapper.student.optimizer.lr': 2e-4, 'optim_wrapper.fake.optimizer.lr': 4e-4},
             TINY, teacher_iters=6000, student_steps=200, teacher_batch=64, batch=32, judge_steps=600, samples=326,
             seeds=2)
LATENTS = replace(SMALL, name='latents', network=TINY_LATENT, autoencoder_iters=2000, teacher_iters=3000,
                  teacher_batch=32, seeds=3)
FORMS = {form.name: form for form in (FULL, SMALL, LATENTS)}


class Bench:
    """The study on one set of data.

    Args:
        form (Form): How large.
        data (Path): Folder that make_data.py made.
        work_dir (Path): Where trainings leave their files.
        encoder (bool): Whether students are judged by a public picture encoder too. Default False.

    Raises:
        SystemExit: If there is no data.
    """

    def __init__(self, form: Form, data: Path, work_dir: Path, encoder: bool = False) -> None:
        if not (data / 'embeddings/index.json').is_file():
            raise SystemExit(f'{data} holds no data of the bench: make it with benchmarks/emoji/make_data.py, '
                             'or name its folder with --data')
        self.form, self.data, self.work_dir, self.encoder = form, data, work_dir, encoder
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'
        self.captions = {part: [json.loads(line) for line in (data / f'{part}.jsonl').open(encoding='utf-8')]
                         for part in PARTS}

    # Configs

    def config(self, recipe: str, options: dict[str, Any], iterations: int, batch: int, work_dir: Path) -> Config:
        """A shipped recipe in the form's size."""
        cfg = load_config(recipe, {**self.form.options, **options})
        if self.form.network:
            cfg.model.backbone.config = copy.deepcopy(self.form.network)
        if self.form.autoencoder_iters:
            cfg.model.backbone.codec = dict(type='VAECodec', pretrained=str(self.work_dir / 'autoencoder'), lazy=True)
        cfg.model.backbone.conditioner.folder = str(self.data / 'embeddings')
        if 'pretrained' in cfg.model.backbone:
            cfg.model.backbone.pretrained = str(self.work_dir / 'teacher')
        cfg.train_dataloader.dataset.data_root = str(self.data)
        cfg.train_dataloader.batch_size = batch
        warm_up = max(1, iterations // 20)
        for role, (first, second) in cfg.param_scheduler.items():
            first.end, second.begin, second.end = warm_up, warm_up, iterations
            if self.device == 'cpu':  # bfloat16 is no faster there
                cfg.optim_wrapper[role].type = 'OptimWrapper'
                cfg.optim_wrapper[role].pop('dtype')
        cfg.train_cfg.max_iters = iterations
        cfg.default_hooks.checkpoint.update(interval=max(1, iterations // 4), max_keep_ckpts=1)
        cfg.custom_hooks[1].interval = max(1, iterations // 4)
        cfg.work_dir, cfg.log_level = str(work_dir), 'WARNING'
        cfg.experiment_name = f'emoji-{os.getpid()}-{time.time_ns()}'
        return cfg

    def teacher_config(self) -> Config:
        """The teacher's, on pictures."""
        return self.config(TEACHER, self.form.teacher_options, self.form.teacher_iters, self.form.teacher_batch,
                           self.work_dir / 'teacher_run')

    def row_config(self, name: str, seed: int) -> Config:
        """A row's, on one seed."""
        recipe, options, length = ROWS[name]
        options = {**self.form.row_options, **options, 'randomness.seed': seed}
        iterations = self.form.student_steps * length * options.get('model.student_every', 2)
        cfg = self.config(RECIPE.format(recipe), options, iterations, self.form.batch,
                          self.work_dir / f'{name}_{seed}')
        cfg.default_hooks.checkpoint = None  # a run that is cut off is run again
        return cfg

    # What is trained before the rows

    def autoencoder(self) -> None:
        """Trains the autoencoder if that is not done."""
        if not (self.work_dir / 'autoencoder').is_dir():
            cfg = autoencoder_config(self.data, self.work_dir / 'autoencoder_run', self.form.autoencoder_iters)
            train_autoencoder(cfg, self.pictures('train'), self.work_dir / 'autoencoder')

    def teacher(self) -> None:
        """Trains and exports the teacher if that is not done."""
        if (self.work_dir / 'teacher').is_dir():
            return
        cfg = self.teacher_config()
        if self.form.autoencoder_iters:
            cache_latents(cfg, str(self.work_dir / 'cache'), batch_size=64, shard_size=4096)
            cfg.train_dataloader.dataset = dict(type='LatentDataset', data_root=str(self.work_dir / 'cache'))
        cfg.resume = find_latest_checkpoint(cfg.work_dir) is not None
        runner = Runner.from_cfg(cfg)
        runner.train()
        export(runner.model.eval(), self.work_dir / 'teacher')

    def texts(self, part: str) -> tuple[list[str], Tensor]:
        """Captions of a part, and their sentence embeddings."""
        captions = [entry['caption'] for entry in self.captions[part]]
        conditioner = MODELS.build(dict(type='EmbeddingConditioner', folder=str(self.data / 'embeddings')))
        return captions, conditioner.encode(captions).fields['pooled_projections'].float()

    def pictures(self, part: str) -> Tensor:
        """Real pictures of a part."""
        return load_pictures([self.data / 'images' / entry['image'] for entry in self.captions[part]])

    def judge(self) -> Judge:
        """The judge, trained if that is not done."""
        file, texts = self.work_dir / 'judge.pt', torch.cat([self.texts(part)[1] for part in PARTS])
        if file.is_file():
            judge = Judge(texts.shape[1])
            judge.load_state_dict(torch.load(file, weights_only=True))
            return judge.to(self.device).eval()
        pictures = torch.cat([self.pictures(part) for part in PARTS])
        judge = train_judge(pictures, texts, self.form.judge_steps, self.device)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        torch.save(judge.state_dict(), file)
        return judge

    def run(self, name: str, seed: int, examiner: 'Examiner') -> tuple[DiffusionModel, float, list[dict[str, Any]]]:
        """Trains a row; the method, the seconds of its training, and how it was judged on the way."""
        runner = Runner.from_cfg(self.row_config(name, seed))
        hook = ExaminerHook(examiner)
        runner.register_hook(hook)
        start = time.perf_counter()
        runner.train()
        return runner.model.eval(), time.perf_counter() - start - hook.seconds, hook.curve


class Examiner:
    """Judges samples of a method, the same captions and noise for all.

    Args:
        bench (Bench): The bench, its teacher trained.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.judge = bench, bench.judge()
        self.asked, self.texts, self.prompts, self.references = {}, {}, {}, {}
        self.encoder = Encoder(bench.device) if bench.encoder else None
        method = MODELS.build(bench.row_config('dmd2', 0).model).to(bench.device).eval()
        self.guidance = 1 + method.alpha
        file = bench.work_dir / 'reference_pictures.pt'
        made = torch.load(file, weights_only=True) if file.is_file() else {}
        for part in PARTS:
            captions, self.texts[part] = bench.texts(part)
            count = bench.form.samples if part == 'held_out' else min(bench.form.samples, len(captions))
            # All captions again and again, or as many as are wanted from all over the alphabet.
            self.asked[part] = [i * max(1, len(captions) // count) % len(captions) for i in range(count)]
            self.prompts[part] = [captions[i] for i in self.asked[part]]
            if part not in made:  # from other noise than any row's, so that the teacher's own row shows the floor
                made[part] = self.sample(method, part, 'teacher', 50, method.noise(1, range(count)))
            real = bench.pictures(part)[sorted(set(self.asked[part]))]
            self.references[part] = dict(fd=self.judge.features(made[part]), fd_real=self.judge.features(real))
            if self.encoder and part == 'held_out':
                self.kernel_references = dict(kd=self.encoder.features(made[part]), kd_real=self.encoder.features(real))
        torch.save(made, file)

    def sample(self, method: DiffusionModel, part: str, role: str, steps: int, noise: Tensor | None = None,
               count: int | None = None) -> Tensor:
        """Pictures of a role; the teacher is guided."""
        if isinstance(method.backbone.codec, VAECodec):
            method.backbone.codec.vae.disable_slicing()  # so small pictures are decoded faster together
        prompts = self.prompts[part][:count]
        noise = method.noise(0, range(len(prompts))) if noise is None else noise
        return sample_prompts(method, prompts, noise, sigmas=step_sigmas(steps), role=role,
                              guidance_scale=self.guidance if role == 'teacher' else 1.0)

    def judge_part(self, method: DiffusionModel, part: str, role: str, steps: int) -> dict[str, float | None]:
        """All scores of a role on one part of the captions; the public encoder's on held-out ones alone."""
        pictures = self.sample(method, part, role, steps)
        scores = score(self.judge, pictures, self.texts[part], self.asked[part], self.references[part])
        if self.encoder and part == 'held_out':
            scores.update(distances(self.encoder.features(pictures), self.kernel_references))
        return scores

    def examine(self, method: DiffusionModel, role: str, steps: int) -> dict[str, Any]:
        """All scores of a role at a number of steps, by part."""
        return dict(steps=steps, **{part: self.judge_part(method, part, role, steps) for part in PARTS})

    def reconstructions(self) -> dict[str, Any]:
        """What the autoencoder keeps of the real pictures, by part: all that a model in its latents can reach."""
        codec, scores = MODELS.build(self.bench.teacher_config().model.backbone.codec).to(self.bench.device), {}
        for part in PARTS:
            asked = sorted(set(self.asked[part]))
            real = self.bench.pictures(part)[asked]
            made = reconstruct(codec, real)
            scores[part] = dict(psnr=round(psnr(made, real), 2), **score(
                self.judge, made, self.texts[part], asked, dict(fd_real=self.references[part]['fd_real'])))
        return dict(parameters=sum(p.numel() for p in codec.parameters()), **scores)

    def real(self) -> dict[str, Any]:
        """Retrieval from the real pictures: what is left to gain."""
        return {part: {f'retrieval@{k}': round(self.judge.retrieval(
            self.references[part]['fd_real'], self.texts[part], sorted(set(self.asked[part])), k), 4) for k in (1, 5)}
                for part in PARTS}


class ExaminerHook(Hook):
    """Judges the EMA student on held-out captions at 4 steps while it trains: after a quarter, half, three quarters.

    Args:
        examiner (Examiner): What judges.
    """
    priority = 'VERY_LOW'

    def __init__(self, examiner: Examiner) -> None:
        self.examiner, self.curve, self.seconds = examiner, [], 0.0

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done, length = runner.iter + 1, runner.max_iters
        if done not in [round(length * share / 4) for share in (1, 2, 3)]:
            return
        start, method = time.perf_counter(), runner.model
        method.eval()
        with student_weights(method, ema=True):
            self.curve.append(dict(student_steps=done // method.student_every, **self.examiner.judge_part(
                method, 'held_out', 'student', 4)))
        method.train()
        self.seconds += time.perf_counter() - start


def study(bench: Bench, out: Path, rows: list[str], seeds: int, pictures: int = 12) -> dict[str, Any]:
    """Runs what is missing, and writes the results after every run.

    Args:
        bench (Bench): The bench.
        out (Path): JSON file of the results.
        rows (list[str]): Names of ROWS.
        seeds (int): Runs of a row.
        pictures (int): Held-out captions of each row's picture. Default 12.
    """
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else dict(form=bench.form.name, rows={})
    if bench.form.autoencoder_iters:
        bench.autoencoder()
    bench.teacher()
    examiner = Examiner(bench)
    if 'teacher' not in results:
        method = MODELS.build(bench.row_config('dmd2', 0).model).to(bench.device).eval()
        results.update(
            device=torch.cuda.get_device_name() if bench.device == 'cuda' else f'{torch.get_num_threads()} CPU threads',
            parameters=sum(p.numel() for p in method.teacher.parameters()),
            **(dict(autoencoder=examiner.reconstructions()) if bench.form.autoencoder_iters else {}),
            real=examiner.real(), teacher=[examiner.examine(method, 'teacher', steps) for steps in TEACHER_STEPS])
        write(out, results)
    for seed in range(seeds):
        for name in rows:
            done = results['rows'].setdefault(name, [])
            if seed in [run['seed'] for run in done]:
                continue
            method, trained, curve = bench.run(name, seed, examiner)
            with student_weights(method, ema=True):
                final = [examiner.examine(method, 'student', steps) for steps in STEPS]
                images = {f'{name}, {steps_name(steps)}': examiner.sample(
                    method, 'held_out', 'student', steps, count=pictures) for steps in STEPS}
            images['teacher, 50 steps'] = examiner.sample(method, 'held_out', 'teacher', 50, count=pictures)
            save_png(labelled_grid(images), bench.work_dir / f'{name}_{seed}.png')
            done.append(dict(seed=seed, train_seconds=round(trained, 1), curve=curve, final=final))
            write(out, results)
            print(name, seed, [(entry['steps'], entry['held_out']) for entry in final], flush=True)
    return results


def write(file: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    with whole_file(file) as part:
        part.write_text(json.dumps(results, separators=(',', ':')) + '\n')


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument('--small', action='store_const', dest='form', const='small', default='full',
                      help='a tiny network and short trainings, for a CPU')
    size.add_argument('--latents', action='store_const', dest='form', const='latents',
                      help='as --small, in the latents of an autoencoder')
    parser.add_argument('--report', action='store_true', help='print the table of what has run, and run nothing')
    parser.add_argument('--encoder', action='store_true', help='judge by EfficientNet-Lite0 too')
    parser.add_argument('--rows', nargs='+', metavar='ROW', choices=list(ROWS),
                        default=[name for name in ROWS if not name.endswith('-long')],
                        help='default: all but those of four times the length')
    parser.add_argument('--seeds', type=int, help='runs of a row; default 5, 2 in the small form, 3 in latents')
    parser.add_argument('--data', type=Path, help='default: data/emoji, or data/emoji_32')
    parser.add_argument('--work-dir', type=Path, help='default: work_dirs/emoji, _small or _latents')
    parser.add_argument('--out', type=Path, help='default: docs/emoji/full.json, small.json or latents.json')
    args = parser.parse_args(argv)
    form = FORMS[args.form]
    out = args.out or Path(f'docs/emoji/{form.name}.json')
    if args.report:
        if not out.is_file():
            raise SystemExit(f'{out} does not exist: nothing has run')
        results = json.loads(out.read_text())
    else:
        work_dir = args.work_dir or Path('work_dirs', 'emoji' if form is FULL else f'emoji_{form.name}')
        bench = Bench(form, args.data or Path(form.data), work_dir, args.encoder)
        results = study(bench, out, args.rows, args.seeds or form.seeds)
    for part in PARTS:
        print(f'\n{part} captions\n\n{table(results, part)}')
    print(f'{curves(results)}\n{kernel_distances(results)}')


if __name__ == '__main__':
    main()
