"""How near to the guided teacher's samples can a student be that matches perfectly? Particles, without a network.

    python benchmarks/guidance_floor.py settle --start teacher      # one run, 4 to 10 minutes of a core
    python benchmarks/guidance_floor.py renoise                     # 2 minutes
    python benchmarks/guidance_floor.py students --only ROW ...     # rows of the study, against both references

`settle` moves latents freely along the update that DMD2 gives its student's x0, the package's own, against a fake score
that learns them as they move. There is no network between the latents and the update: where they come to rest is what
distribution matching asks for, and its distance to the guided teacher's samples is the metric's part of a student's.
With `--alpha 0` matching has a known fixed point, the teacher's own samples: what is left there is the fault of the
fake score, of the updates' noise, and of a teacher that does not quite hold its own samples for its own. The last
quarter of the particles never trains the fake score: were that to know the others by heart, the quarter would rest
elsewhere.

`renoise` needs no fake score: samples of the teacher are noised anew and sampled to the end again. A field that is the
score of one distribution at every level gives that distribution back; a guided one does not have to.

`students` trains rows of the study and judges their EMA students against each 1,000 of settled particles too, the file
that `--match` names; `settle` says where it has written it. Everything goes to docs/study/guidance-floor.json, run by
run; docs/results.md says what it means.
"""
import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import digits_study
import digits_study_plan as plan
import numpy as np
import torch
from digits_samples import sharpness
from mmengine.registry import MODELS
from torch import Tensor

from cdm_plugin import assets
from cdm_plugin.commands.demo.judge import NUM_SAMPLES
from cdm_plugin.config import load_config
from cdm_plugin.draws import stream
from cdm_plugin.flow import add_noise, shift_sigmas
from cdm_plugin.inference import step_sigmas, student_weights
from cdm_plugin.losses.functional import flow_matching_loss
from cdm_plugin.methods import Distillation
from cdm_plugin.methods.phases import Iteration
from cdm_plugin.metrics import class_accuracy, classifier_features, frechet_distance, pixels_to_images, precision_recall
from cdm_plugin.rollout import Prediction

BATCH = 125
STARTS = ('teacher', 'unguided', 'real')
TEACHER_STEPS = 50
LEVELS = (0.25, 0.5, 0.75)  # of renoise, as the network sees them


def build(alpha: float, fake_steps: int) -> Distillation:
    """DMD2 with a fake score that pools all samples: particles have no anchors."""
    return MODELS.build(load_config(plan.RECIPE, {
        'model.type': 'DMD2', 'model.alpha': alpha, 'model.losses.dm.guided': alpha != 0,
        'model.anchor_aware_fake': False, 'model.student_every': 1, 'model.fake_steps': fake_steps}).model).eval()


def conditions(method: Distillation, labels: list[int]) -> Any:
    """Conditions of a batch of labels."""
    return method.backbone.condition(method.data_preprocessor([dict(prompt=label) for label in labels], False))


def sampled(method: Distillation, noise: Tensor, labels: list[int], alpha: float, sigma: float = 1.0,
            steps: int = TEACHER_STEPS) -> Tensor:
    """Latents by the teacher's grid of so many steps, from `sigma` on, (N, ...).

    Args:
        method (Distillation): With the teacher.
        noise (Tensor): What to start from, at `sigma`, (N, ...).
        labels (list): N labels.
        alpha (float): Of the guidance.
        sigma (float): After the scheduler's shift. Default 1, pure noise.
        steps (int): Of the whole grid. Default 50, as the study's references.
    """
    first = float(shift_sigmas(torch.tensor(sigma, dtype=torch.float64), 1 / method.backbone.shift((8, 8))))
    sigmas = first * step_sigmas(math.ceil(steps * first - 1e-9))
    return torch.cat([method.sample_latents(conditions(method, labels[i:i + BATCH]), noise[i:i + BATCH], sigmas=sigmas,
                                            role='teacher', guidance_scale=1 + alpha)
                      for i in range(0, len(noise), BATCH)])


def start(method: Distillation, kind: str, count: int, seed: int) -> Tensor:
    """Latents where particles start, (count, ...), their labels 0 to 9 in turn: samples of the teacher as the method
    guides it ('teacher') or without guidance ('unguided'), or the package's digits ('real')."""
    if kind == 'real':
        with np.load(assets.resolve('asset:digits/digits_16.npz')) as data:
            images, labels = data['images'], data['labels']
        rows = [np.flatnonzero(labels == label)[seed * count // 10:] for label in range(10)]
        chosen = [rows[i % 10][i // 10] for i in range(count)]
        return method.backbone.codec.encode(pixels_to_images(images[chosen]))
    noise = torch.randn(method.latent_shape(count), generator=stream('guidance floor', seed))
    return sampled(method, noise, _labels(count), method.alpha if kind == 'teacher' else 0.0)


def _labels(count: int) -> list[int]:
    return [i % 10 for i in range(count)]


# The update


def iteration_of(method: Distillation, x0: Tensor, labels: list[int]) -> Iteration:
    """An iteration of the method in which the student has predicted `x0`, (B, ...)."""
    condition, pure = conditions(method, labels), torch.ones(len(x0))
    anchor = Prediction(x0, pure, torch.zeros_like(x0), x0.clone().requires_grad_())
    return Iteration(dict(prompt=labels), condition, method.sample_draws(len(x0)), anchor)


def moved(method: Distillation, iteration: Iteration, rate: float) -> Tensor:
    """x0 + rate w delta, (B, ...): a step along the negative gradient of the method's student loss."""
    x0 = iteration.anchor.x0
    gradient, = torch.autograd.grad(method.student_loss(iteration), x0)
    return (x0 - rate * x0.numel() / 2 * gradient).detach()  # the gradient is -2 w delta / numel


def fit(method: Distillation, iteration: Iteration, optimizer: torch.optim.Optimizer) -> None:
    """The iteration's fake-score steps."""
    for step in range(method.fake_steps):
        optimizer.zero_grad()
        method.fake_loss_at(iteration, step).backward()
        torch.nn.utils.clip_grad_norm_(method.fake.parameters(), 1.0)
        optimizer.step()


def annealed(left: float, length: float, last: float) -> float:
    """1 until `length` sweeps are left, then a cosine to `last`."""
    return last + (1 - last) * (1 + math.cos(math.pi * max(0.0, 1 - left / length))) / 2


@torch.no_grad()
def losses_of(method: Distillation, role: str, x0: Tensor, labels: list[int]) -> list[float]:
    """A network's flow-matching loss on the first quarter of the particles, which trains the fake score, and on the
    last, which does not; with the same noise."""
    quarter = len(x0) // 4
    noise = torch.randn(method.latent_shape(quarter), generator=stream('fake losses'))
    sigma = torch.linspace(0.05, 0.95, quarter)[torch.randperm(quarter, generator=stream('levels'))]
    losses = []
    for part in (slice(0, quarter), slice(len(x0) - quarter, None)):
        own, z = x0[part], add_noise(x0[part], noise, sigma)
        velocity = torch.cat([method.velocity(role, z[i:i + BATCH], sigma[i:i + BATCH],
                                              conditions(method, labels[part][i:i + BATCH]))
                              for i in range(0, quarter, BATCH)])
        losses.append(round(flow_matching_loss(velocity, own, noise).mean().item(), 5))
    return losses


# The measures


class Measures:
    """Judges latents in blocks of 1,000, as the study judges students.

    Args:
        examiner (Examiner): The study's, with its references.
    """

    def __init__(self, examiner: digits_study.Examiner) -> None:
        self.examiner, self.judge = examiner, examiner.judge

    def features(self, latents: Tensor) -> Tensor:
        return classifier_features(self.images(latents), self.judge.classifier)

    def images(self, latents: Tensor) -> Tensor:
        return self.judge.method.backbone.codec.decode(latents)

    def fd(self, latents: Tensor) -> float:
        """To the teacher's samples, of the first block."""
        return round(frechet_distance(self.features(latents[:NUM_SAMPLES]), self.judge.reference), 3)

    def blocks(self, latents: Tensor) -> list[dict[str, float]]:
        """Every measure of each block; `fd_first` is to the first block."""
        blocks, first = [], self.features(latents[:NUM_SAMPLES])
        for block in latents.split(NUM_SAMPLES):
            features = self.features(block)
            precision, recall = precision_recall(features, self.judge.reference)
            blocks.append(dict(
                fd=self.fd(block), fd_real=round(frechet_distance(features, self.examiner.real), 3),
                fd_first=round(frechet_distance(features, first), 3),
                accuracy=class_accuracy(self.images(block), _labels(len(block)), self.judge.classifier),
                precision=precision, recall=recall))
        return blocks

    def quarters(self, latents: Tensor) -> list[dict[str, float]]:
        """FD and sharpness of each quarter; the last has not trained the fake score."""
        return [dict(fd=round(frechet_distance(self.features(part), self.judge.reference), 3),
                     fd_real=round(frechet_distance(self.features(part), self.examiner.real), 3),
                     sharpness=round(sharpness(self.images(part)), 4)) for part in latents.chunk(4)]


def settle(method: Distillation, measures: Measures, x0: Tensor, sweeps: int, annealing: int, rate: float,
           seed: int) -> tuple[dict[str, Any], Tensor]:
    """Moves the particles `sweeps` times each; in the last `annealing` of them the steps go to 0 and the fake score's
    rate to a tenth.

    Returns:
        tuple: What was measured, and where the particles are, (N, ...).
    """
    labels, x0, first = _labels(len(x0)), x0.clone(), x0
    learning = len(x0) * 3 // 4
    method.fake.load_state_dict(method.teacher.state_dict())
    optimizer = torch.optim.AdamW(method.fake.parameters(), lr=4e-4, betas=(0.0, 0.999), weight_decay=1e-4, fused=True)
    method.seed, method.iteration = seed, 0
    curve = [dict(sweep=0, fd=measures.fd(x0))]
    for sweep in range(sweeps):
        order = torch.randperm(learning, generator=stream('order', seed, sweep))
        rest = learning + torch.randperm(len(x0) - learning, generator=stream('rest', seed, sweep))
        batches = [(part, True) for part in order.split(BATCH)] + [(part, False) for part in rest.split(BATCH)]
        step = annealed(sweeps - sweep, annealing, 0.0)
        optimizer.param_groups[0]['lr'] = 4e-4 * annealed(sweeps - sweep, annealing, 0.1)
        for i in torch.randperm(len(batches), generator=stream('batches', seed, sweep)).tolist():
            part, learns = batches[i]
            iteration = iteration_of(method, x0[part], [labels[j] for j in part.tolist()])
            if learns:
                fit(method, iteration, optimizer)
            x0[part] = moved(method, iteration, rate * step)
            method.iteration += 1
        if (sweep + 1) % max(1, sweeps // 10) == 0:
            curve.append(dict(sweep=sweep + 1, fd=measures.fd(x0),
                              moved=round((x0 - first).square().mean().sqrt().item(), 4)))
            print(curve[-1], flush=True)
    losses = {role: losses_of(method, role, x0, labels) for role in ('fake', 'teacher')}
    return dict(curve=curve, blocks=measures.blocks(x0), quarters=measures.quarters(x0), losses=losses), x0


def renoised(method: Distillation, measures: Measures, rounds: int, steps: int) -> list[dict[str, Any]]:
    """The distances of 1,000 teacher's samples that are noised to a level and sampled from there, again and again."""
    labels, results = _labels(NUM_SAMPLES), []
    first = start(method, 'teacher', NUM_SAMPLES, 0)
    for sigma in LEVELS:
        x0, distances = first, [measures.fd(first)]
        for number in range(rounds):
            noise = torch.randn(x0.shape, generator=stream('renoise', sigma, number))
            x0 = sampled(method, add_noise(x0, noise, torch.full((len(x0),), sigma)), labels, method.alpha, sigma,
                         steps)
            distances.append(measures.fd(x0))
        results.append(dict(alpha=method.alpha, sigma=sigma, steps=steps, fd=distances))
        print(results[-1], flush=True)
    return results


def student_of(row: plan.Row, seed: int, work_dir: Path, match: Path, compiled: bool) -> dict[str, Any]:
    """Trains a row of the study, and judges its EMA student against the guided teacher's samples and the particles."""
    runner = digits_study.runner_of(row, seed, work_dir, compiled)
    runner.train()
    measures = Measures(digits_study.Examiner(runner.model.eval(), NUM_SAMPLES, work_dir))
    judge, final = measures.judge, []
    blocks = [measures.features(block) for block in torch.load(match, weights_only=True).split(NUM_SAMPLES)]
    with student_weights(judge.method, ema=True):
        for steps in digits_study.STUDENT_STEPS:
            features = classifier_features(judge.sample('student', steps), judge.classifier)
            fd, *others = (round(frechet_distance(features, other), 3) for other in (judge.reference, *blocks))
            final.append(dict(steps=steps, fd=fd, fd_match=others))
    return dict(seed=seed, match=match.name, final=final)


# The results


def read(file: Path) -> dict[str, Any]:
    """What was measured so far."""
    if file.is_file():
        return json.loads(file.read_text())
    return dict(num_samples=NUM_SAMPLES, settled=[], renoised=[], students={})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('settle', 'renoise', 'students'))
    parser.add_argument('--alpha', type=float, default=1.0)
    parser.add_argument('--start', choices=STARTS, default='teacher')
    parser.add_argument('--count', type=int, default=4 * NUM_SAMPLES, help='particles, in blocks of 1,000')
    parser.add_argument('--sweeps', type=int, default=40, help='steps of each particle')
    parser.add_argument('--annealing', type=int, default=20, help='the last of them, with ever smaller steps')
    parser.add_argument('--rate', type=float, default=0.2, help='of a step, times w delta')
    parser.add_argument('--fake-steps', type=int, default=2, help='fake-score steps a particle step')
    parser.add_argument('--rounds', type=int, default=4, help='of renoise')
    parser.add_argument('--steps', type=int, default=TEACHER_STEPS, help="of renoise's whole grid")
    parser.add_argument('--only', nargs='+', metavar='ROW', choices=list(plan.ROWS), default=[], help='of students')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--match', type=Path, help='of students: settled particles')
    parser.add_argument('--compile', action='store_true', help='torch.compile of the networks')
    parser.add_argument('--out', type=Path, default=Path('docs/study/guidance-floor.json'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/study'))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    if args.what == 'students':
        if args.match is None:
            parser.error('students needs --match, a file that settle has written')
        for name in args.only:
            done = student_of(plan.ROWS[name], args.seed, args.work_dir, args.match, args.compile)
            add(args.out, lambda result: result['students'].setdefault(name, []).append(done))
        return
    method = build(args.alpha, args.fake_steps)
    if args.compile:
        digits_study.compile_networks(method)
    measures = Measures(digits_study.Examiner(method, NUM_SAMPLES, args.work_dir))
    if args.what == 'renoise':
        found = renoised(method, measures, args.rounds, args.steps)
        add(args.out, lambda result: result['renoised'].extend(found))
        return
    settings = {name: getattr(args, name) for name in (
        'alpha', 'start', 'count', 'sweeps', 'annealing', 'rate', 'fake_steps', 'seed')}
    x0 = start(method, args.start, args.count, args.seed)
    done, x0 = settle(method, measures, x0, args.sweeps, args.annealing, args.rate, args.seed)
    done = dict(settings, cpu_seconds=round(time.process_time() - begun), **done)
    add(args.out, lambda result: result['settled'].append(done))
    print(done['blocks'], done['losses'], flush=True)
    file = args.work_dir / ('settled-' + '-'.join(f'{value}' for value in settings.values()) + '.pt')
    torch.save(x0, file)
    print(file)


def add(file: Path, change: Any) -> None:
    """Adds to what the file holds by now."""
    result = read(file)
    change(result)
    digits_study.write(file, result)


if __name__ == '__main__':
    main()
