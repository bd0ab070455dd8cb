"""Generates, scores and compares."""
import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.dist import is_main_process
from mmengine.evaluator import BaseMetric

from cdm_plugin.commands.evaluate.entries import Entry
from cdm_plugin.commands.evaluate.generate import Prompt, check_folder, generate, how_file
from cdm_plugin.commands.evaluate.metrics import Scores, score
from cdm_plugin.commands.evaluate.report import format_table, win_rates, write_results, write_sheet
from cdm_plugin.data import PromptDataset
from cdm_plugin.files import clear_parts
from cdm_plugin.locks import held
from cdm_plugin.metrics.prepare import prepare_on_all_ranks
from cdm_plugin.ranks import on_first_rank


class Evaluation(NamedTuple):
    """What an evaluation leaves.

    Attributes:
        results (Path): results.json; results.md, scores.csv and grid.png lie beside it.
        table (str): The comparison of all models, in Markdown.
        missing (dict): Metrics that could not run, with what is missing and how to get it, or what stopped them.
    """
    results: Path
    table: str
    missing: dict[str, str]


def read_prompt_file(path: str, column: str = 'prompt') -> list[Prompt]:
    """Prompts of a txt, jsonl or csv file; whole numbers throughout are class labels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has another suffix, is malformed or holds no prompt.
    """
    dataset = PromptDataset(ann_file=path, column=column)
    texts = [dataset[i]['prompt'] for i in range(len(dataset))]
    return [int(text) for text in texts] if all(text.isdecimal() for text in texts) else texts


def evaluate(entries: Sequence[Entry], prompts_file: str, metrics: Sequence[BaseMetric], out: str, seed: int = 0,
             batch_size: int = 4, image_size: tuple[int, int] | None = None, num: int = 1, confidence: float = 0.95,
             resamples: int = 2000, column: str = 'prompt') -> Evaluation | None:
    """Makes the images of all entries on the same noise, scores them, and writes the comparison.

    It goes on where an earlier call was stopped. Every rank must call it.

    Args:
        entries (Sequence[Entry]): The models.
        prompts_file (str): See `read_prompt_file`.
        metrics (Sequence[BaseMetric]): MMEngine metrics.
        out (str): The folder of images and results.
        seed (int): Of the noise. Default 0.
        batch_size (int): Samples of one batch. Default 4.
        image_size (tuple, optional): (height, width) in pixels. Default: each model's own.
        num (int): Images a prompt. Default 1.
        confidence (float): Of the intervals, in (0, 1). Default 0.95.
        resamples (int): Of the bootstrap. Default 2000.
        column (str): Field of the prompts in a jsonl or csv file. Default 'prompt'.

    Returns:
        Evaluation: On rank 0; None on the others.

    Raises:
        ValueError: If no metric can run, the prompts are unusable, or the folder holds images of something else or is
            in use.
    """
    prompts, folder = read_prompt_file(prompts_file, column), Path(out)
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(f'confidence must lie in (0, 1) and resamples be 1 or more, but are {confidence}, {resamples}')
    ready, missing = prepare_on_all_ranks(metrics)
    if not ready:
        raise ValueError('no metric can run. ' + '; '.join(f'{name}: {text}' for name, text in missing.items()))
    digest = hashlib.blake2b(json.dumps(prompts).encode(), digest_size=8).hexdigest()
    shared = dict(seed=seed, prompts=digest, num=num, image_size=image_size and list(image_size))
    with contextlib.ExitStack() as stack:
        def open_folder() -> None:
            stack.enter_context(held(folder, 'cdm evaluate'))
            for place in (folder, *folder.glob('images/*')):
                clear_parts(place)
            check_folder(folder, entries, shared)

        on_first_rank(open_folder, '--out cannot be used')
        _release(ready)  # the generator needs the memory
        generate(entries, [prompt for prompt in prompts for _ in range(num)], folder, seed, batch_size, image_size)
        scores: dict[str, Scores] = {entry.name: Scores() for entry in entries}
        for metric in ready:
            for entry in entries:
                found = score(metric, entry, prompts, num, folder, confidence, resamples)
                if found is not None:
                    scores[entry.name].values.update(found.values)
                    scores[entry.name].images.update(found.images)
                    if found.failed is not None:
                        missing[type(metric).__name__] = f'{entry.name}: {found.failed}'
            _release([metric])
        if not is_main_process():
            return None
        how = {entry.name: json.loads(how_file(folder, entry).read_text(encoding='utf-8')) for entry in entries}
        about: dict[str, Any] = dict(prompts_file=prompts_file, prompts=len(prompts), images_a_prompt=num, seed=seed,
                                     image_size=shared['image_size'], confidence=confidence, resamples=resamples)
        results = write_results(folder, about, entries, how, prompts, scores,
                                win_rates(scores, confidence, resamples), missing)
        write_sheet(folder, entries, len(prompts), num)
        return Evaluation(results, format_table(how, scores, len(prompts) * num), missing)


def _release(metrics: Sequence[BaseMetric]) -> None:
    for metric in metrics:
        getattr(metric, 'release', lambda: None)()
