"""Writes the reference of the digits recipes' validation: features of the guided teacher's 50-step samples.

They are those that `cdm demo` judges by, so that the distance falls towards the demo's while a student trains.

    python benchmarks/make_reference.py
"""
import numpy as np

from cdm_plugin import assets
from cdm_plugin.commands.demo.distil import RECIPE
from cdm_plugin.commands.demo.judge import NUM_SAMPLES, Judge
from cdm_plugin.inference import load_method


def main() -> None:
    judge = Judge(load_method(RECIPE, device='cpu', roles=('student', 'teacher')), NUM_SAMPLES)
    path = assets.ROOT / 'digits/teacher_features.npz'
    np.savez_compressed(path, features=judge.reference.numpy())
    print(f'{path}: {tuple(judge.reference.shape)}, {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    main()
