"""What is left in a student's samples? How strong their guidance looks, and how sharp they are, by sampling steps.

    python benchmarks/digits_samples.py fixed-grid-one-rollout-400 dmd2-aware-one-rollout-equal-forwards --compile

Trains rows of the study (`digits_study_plan.py`) on one seed, and compares the EMA student's samples with the teacher's
at 50 steps at several guidance scales: the scale that they are nearest to (the vertex of a parabola through the
smallest distance and its neighbours), and the mean squared Laplacian of a picture in [0, 1], which speckle and hard
edges raise. Goes on where it was; writes docs/study/samples.json and prints the table of docs/results.md.
"""
import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import digits_study_plan as plan
import torch
from digits_study import Examiner, runner_of, write
from digits_study_report import samples, steps_name
from torch import Tensor

from cdm_plugin.commands.demo.judge import Judge
from cdm_plugin.draws import stream
from cdm_plugin.inference import sample_prompts, step_sigmas, student_weights
from cdm_plugin.metrics import class_accuracy, classifier_features, frechet_distance

STEPS = (1, 2, 3, 4, 6, 8, 16)
SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)


def sharpness(images: Tensor) -> float:
    """Mean squared Laplacian of pictures, (N, 1, H, W) in [-1, 1], on the scale of [0, 1]."""
    x = (images.clamp(-1, 1) + 1) / 2
    inner = 4 * x[..., 1:-1, 1:-1] - x[..., :-2, 1:-1] - x[..., 2:, 1:-1] - x[..., 1:-1, :-2] - x[..., 1:-1, 2:]
    return float(inner.square().mean())


def nearest(scales: Sequence[float], distances: Sequence[float]) -> float:
    """The scale where the parabola through the smallest distance and its two neighbours is lowest."""
    best = min(range(1, len(scales) - 1), key=lambda i: distances[i])
    (a, b, c), (fa, fb, fc) = scales[best - 1:best + 2], distances[best - 1:best + 2]
    rise = (b - a)**2 * (fb - fc) - (b - c)**2 * (fb - fa)
    return b - rise / (2 * ((b - a) * (fb - fc) - (b - c) * (fb - fa)))


def measures(images: Tensor, judge: Judge, teachers: dict[float, Tensor], real: Tensor) -> dict[str, Any]:
    """Of samples of the judge's labels, beside the teacher's features at each scale."""
    features = classifier_features(images, judge.classifier)
    distances = [round(frechet_distance(features, other), 2) for other in teachers.values()]
    return dict(fd=dict(zip(map(str, teachers), distances)), scale=round(nearest(list(teachers), distances), 2),
                fd_real=round(frechet_distance(features, real), 2), sharpness=round(sharpness(images), 4),
                accuracy=class_accuracy(images, judge.labels, judge.classifier))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('rows', nargs='*', metavar='ROW', help='default: only print what has run')
    parser.add_argument('--compile', action='store_true', help='see digits_study.py')
    parser.add_argument('--out', type=Path, default=Path('docs/study/samples.json'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/study'))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.is_file() else dict(rows={})
    teachers: dict[float, Tensor] = {}
    for name in args.rows:
        if name in results['rows']:
            continue
        runner = runner_of(plan.ROWS[name], 0, args.work_dir, args.compile)
        runner.train()
        method = runner.model.eval()
        examiner = Examiner(method, 1000, args.work_dir)
        judge = examiner.judge
        if not teachers:
            other = torch.randn(judge.noise.shape, generator=stream('reference'))
            for scale in SCALES:
                images = sample_prompts(method, judge.labels, other, role='teacher', guidance_scale=scale,
                                        sigmas=step_sigmas(50))
                teachers[scale] = classifier_features(images, judge.classifier)
        rows = results['rows']
        if 'teacher' not in rows:
            for scale in SCALES:
                images = sample_prompts(method, judge.labels, judge.noise, role='teacher', guidance_scale=scale,
                                        sigmas=step_sigmas(50))
                rows.setdefault('teacher', {})[f'scale {scale:g}'] = measures(images, judge, teachers, examiner.real)
        with student_weights(method, ema=True):
            rows[name] = {}
            for steps in STEPS:
                images = sample_prompts(method, judge.labels, judge.noise, role='student', sigmas=step_sigmas(steps))
                rows[name][steps_name(steps)] = measures(images, judge, teachers, examiner.real)
        write(args.out, results)
    print(samples(results))


if __name__ == '__main__':
    main()
