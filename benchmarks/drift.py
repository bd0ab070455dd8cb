"""Does a student drift when it trains longer? The demo's recipe at its own length and at twice the student steps.

    python benchmarks/drift.py --seeds 0 1 2 --out docs/drift.json

Prints and writes the Fréchet distance at 4 steps (and at 1, 2, 8) of every run; resumable: a finished run is not run
again. About 8 minutes a seed on one core.
"""
import argparse
import json
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from cdm_plugin.config import load_config
from cdm_plugin.demo import NUM_SAMPLES, RECIPE, Judge, distil
from cdm_plugin.inference import student_weights

STEPS = (1, 2, 4, 8)


def run(seed: int, factor: int, work_dir: Path, recipe: str) -> list:
    """Rows of one run; factor 2 is twice the student steps."""
    done = work_dir / 'rows.json'
    if done.is_file():
        return json.loads(done.read_text())
    cfg = load_config(recipe)
    cfg.train_cfg.max_iters *= factor
    for schedulers in cfg.param_scheduler.values():
        schedulers[-1].end *= factor
    cfg.randomness.seed = seed
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'drift-{seed}-{factor}'
    method = distil(cfg)
    with student_weights(method, ema=True):
        judge = Judge(method, NUM_SAMPLES)
        rows = [asdict(judge.row('student', steps)) for steps in STEPS]
        rows += [asdict(judge.row('teacher', steps)) for steps in STEPS]
    done.write_text(json.dumps(rows, indent=2))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--recipe', default=RECIPE)
    parser.add_argument('--work-dir', default='work_dirs/drift')
    parser.add_argument('--out', default='docs/drift.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in args.seeds:
        for factor in (1, 2):
            rows = run(seed, factor, Path(args.work_dir, f'seed{seed}_x{factor}'), args.recipe)
            runs.append(dict(seed=seed, factor=factor, rows=rows))
            print(f'seed {seed}, {factor} x the steps: ' + ', '.join(
                f'{r["model"]} {r["steps"]}: {r["fd"]:.2f} ({r["accuracy"]:.3f})' for r in rows), flush=True)
            Path(args.out).write_text(json.dumps(runs, indent=1) + '\n')
    at_4 = {f: [r['fd'] for run_ in runs if run_['factor'] == f for r in run_['rows']
                if (r['model'], r['steps']) == ('student', 4)] for f in (1, 2)}
    means = {f: statistics.mean(v) for f, v in at_4.items()}
    print(f'4 steps, mean of {len(args.seeds)} seeds: {means[1]:.2f}, with twice the student steps {means[2]:.2f}, '
          f'ratio {means[2] / means[1]:.3f}')


if __name__ == '__main__':
    main()
