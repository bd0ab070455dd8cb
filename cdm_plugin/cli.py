"""The command `cdm`: a thin door. Everything works through MMEngine's own Runner too."""
import argparse
import os
import sys
from pathlib import Path
from typing import Any, List, Optional

from mmengine.config import DictAction

# Mistakes in a config or in the data: one line is worth more than a traceback.
USER_ERRORS = (ValueError, TypeError, KeyError, FileNotFoundError, ImportError)


# Prompts of a contact sheet.
SHEET_ROWS = 50


def train(args: argparse.Namespace) -> None:
    """Trains a config with MMEngine's runner."""
    from mmengine.registry import RUNNERS
    from mmengine.runner import FlexibleRunner, Runner

    from cdm_plugin.config import load_config
    from cdm_plugin.engine.launch import is_lost_connection, start_processes, stop_processes
    cfg = load_config(args.config, args.cfg_options)
    cfg.launcher = args.launcher
    if args.launcher != 'none' and cfg.get('model_wrapper_cfg') is None and 'strategy' not in cfg:
        raise ValueError("a run of several processes needs model_wrapper_cfg=dict(type='DistillationDataParallel') in "
                         f'the config, or a strategy (--launcher {args.launcher})')
    start_processes(args.launcher, cfg.get('env_cfg'))
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    stock = Runner if cfg.get('strategy') is None else FlexibleRunner
    runner = stock.from_cfg(cfg) if 'runner_type' not in cfg else RUNNERS.build(cfg)
    try:
        runner.train()
    except USER_ERRORS as error:
        done = getattr(runner._train_loop, 'iter', 0)  # still a config if the loop could not be built
        if done > 0:  # no mistake in the config: the traceback is needed
            raise RuntimeError(f'training stopped in iteration {done}') from error
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        raise RuntimeError('training stopped: another process of this run has ended or cannot be reached, and its own '
                           'output says why; `cdm train --resume` goes on from the last checkpoint') from error
    stop_processes()


def sample(args: argparse.Namespace) -> None:
    """Samples images from a config, an exported folder or a diffusers pipeline."""
    from cdm_plugin.images import labelled_grid, save_png
    from cdm_plugin.inference import load_method, sample_files, step_sigmas, student_weights
    texts = read_prompts(args.prompts)
    size = None
    if args.height or args.width:
        size = (args.height or args.width, args.width or args.height)
    if args.teacher and args.role != 'student':
        raise ValueError(f'--teacher draws the teacher beside the student: leave --role {args.role} out')
    method = load_method(args.source, args.checkpoint, image_size=size, encoders=True, options=args.cfg_options)
    method.set_attention(training=False)
    for role in [args.role, *(['teacher'] if args.teacher else [])]:
        if not hasattr(method, role):
            raise ValueError(f'{args.source} has no {role}: give the config that trained it, with --checkpoint')
    prompts, out = [p for p in texts for _ in range(args.num)], Path(args.out)
    sigmas = step_sigmas(args.steps) if args.steps else None
    drawn = {}
    with student_weights(method, not args.no_ema):
        drawn[args.role] = sample_files(method, prompts, out, args.seed, args.batch_size, sigmas=sigmas,
                                        role=args.role, guidance_scale=args.guidance_scale)
    if args.teacher:
        scale = 1 + method.alpha if args.teacher_guidance_scale is None else args.teacher_guidance_scale
        drawn['teacher'] = sample_files(method, prompts, out, args.seed, args.batch_size, prefix='teacher_',
                                        role='teacher', sigmas=step_sigmas(args.teacher_steps), guidance_scale=scale)
    rows = {}
    for i, text in enumerate(texts[:SHEET_ROWS]):
        for role, small in drawn.items():
            label = f'{i} {str(text)[:40]}' + (f' ({role})' if len(drawn) > 1 else '')
            rows[label] = small[i * args.num:(i + 1) * args.num]
    sheet = save_png(labelled_grid(rows), out / 'grid.png')
    rest = f' of the first {SHEET_ROWS} prompts' if len(texts) > SHEET_ROWS else ''
    print(f'{len(prompts) * len(drawn)} images in {out}, contact sheet{rest} {sheet}')


def read_prompts(values: List[str]) -> List[str]:
    """Prompts of the command line: texts, or one txt, jsonl or csv file of them (column `prompt`)."""
    if len(values) != 1 or Path(values[0]).suffix.lower() not in ('.txt', '.jsonl', '.csv'):
        return values
    from cdm_plugin.data import PromptDataset
    dataset = PromptDataset(ann_file=values[0])
    return [dataset[i]['prompt'] for i in range(len(dataset))]


def cache(args: argparse.Namespace) -> None:
    """Encodes the prompts of a config's dataset once, for training without text encoders."""
    from cdm_plugin.config import load_config
    from cdm_plugin.data import cache_embeddings
    report = cache_embeddings(load_config(args.config, args.cfg_options), args.out, batch_size=args.batch_size,
                              shard_size=args.shard_size, dtype=args.dtype, dataset=args.dataset)
    cut = ', '.join(f'{n} of them cut to what {encoder} takes' for encoder, n in report.truncated.items())
    reused = f', {report.reused_shards} of them from an earlier run' if report.reused_shards else ''
    print(f'{report.prompts} prompts{" (" + cut + ")" if cut else ""}, {report.bytes / 2**20:.1f} MiB, '
          f'shards: {report.shards}{reused}, in {report.folder}')
    print('to train on them: train_dataloader.dataset=dict(type=\'EmbeddingDataset\', '
          f'data_root={report.folder!r}) and model.backbone.conditioner=dict(type=\'EmbeddingConditioner\', '
          f'folder={report.folder!r})')


def doctor(args: argparse.Namespace) -> int:
    """Says what a config resolves to, what it needs and what would fail (exit status 1), before anything is loaded."""
    from cdm_plugin.config import read_config
    from cdm_plugin.doctor import diagnose, format_report
    report = diagnose(read_config(args.config, args.cfg_options), gpus=args.gpus)
    print(format_report(report))
    return 1 if report.problems else 0


def export(args: argparse.Namespace) -> None:
    """Writes a trained student as a diffusers pipeline or LoRA file, with a model card."""
    from cdm_plugin.export import export as export_student
    from cdm_plugin.inference import load_method
    if args.checkpoint is None and not Path(args.source).is_dir():
        raise ValueError('--checkpoint is missing: a checkpoint file or a work directory of this config')
    method = load_method(args.source, args.checkpoint, device='cpu', options=args.cfg_options)
    folder = export_student(method, args.out, ema=not args.no_ema, dtype=args.dtype, fuse=args.fuse,
                            config=method.config, prompts=args.prompts and read_prompts(args.prompts))
    used = 'EMA' if method.student_ema is not None and not args.no_ema else 'own'
    print(f'exported the student ({used} weights) to {folder}')


def compare(args: argparse.Namespace) -> None:
    """Draws what trainings have logged, side by side on one HTML page: curves, samples, configs."""
    from cdm_plugin.compare import read_runs, write_page
    page = write_page(read_runs(args.runs), args.out)
    print(f'{page}, {page.stat().st_size / 2**20:.1f} MiB: open it in a browser')


def evaluate(args: argparse.Namespace) -> None:
    """Makes images of several models from the same noise, scores and compares them; it resumes."""
    from mmengine.dist import init_dist, is_distributed

    from cdm_plugin.engine.launch import start_processes, stop_processes
    from cdm_plugin.evaluate import evaluate as evaluate_entries
    from cdm_plugin.evaluate import parse_entries
    from cdm_plugin.evaluate.metrics import build_metrics
    entries = parse_entries(args.models, args.steps, args.teacher, args.teacher_steps, args.teacher_guidance_scale,
                            not args.no_ema, args.cfg_options)
    start_processes(args.launcher)
    if args.launcher != 'none' and not is_distributed():  # start_processes has started gloo where there is no GPU
        init_dist(args.launcher)
    size = (args.height or args.width, args.width or args.height) if args.height or args.width else None
    done = evaluate_entries(entries, args.prompts, build_metrics(args.metrics, entries), args.out, args.seed,
                            args.batch_size, size, args.num)
    if done is not None:
        print(f'\n{done.table}\n')
        for name, reason in done.missing.items():
            print(f'{name} has no value: {reason}')
        print(f'{done.results}, with results.md and grid.png beside it')
    stop_processes()


def plugins(args: argparse.Namespace) -> None:
    """Lists what was loaded from where."""
    from cdm_plugin import plugins as manager
    print(manager.format_table(manager.loaded()))


def demo(args: argparse.Namespace) -> None:
    """Distils the digits teacher and judges the student."""
    from cdm_plugin.demo import run
    run(args.work_dir, options=args.cfg_options)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be 1 or more, but is {value}')
    return value


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog='cdm', description='Distil diffusion models into few-step students.')
    parser.add_argument('--traceback', action='store_true', help='show where an error comes from')
    commands = parser.add_subparsers(dest='command', required=True)

    def add(function: Any, **kwargs: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(function.__name__, help=function.__doc__, description=function.__doc__, **kwargs)
        command.set_defaults(function=function)
        return command

    options = dict(nargs='+', action=DictAction, metavar='KEY=VALUE', help='change config keys: model.type=CDM')
    command = add(train)
    command.add_argument('config', help='a config file or a shipped recipe, digits/cdm_...py')
    command.add_argument('--work-dir', help='default work_dirs/<config>')
    command.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                         help='go on from the latest checkpoint of the work directory, or from this one')
    command.add_argument('--cfg-options', **options)
    command.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')

    command = add(sample)
    command.add_argument('source', help='an exported folder, a config file or a shipped recipe')
    command.add_argument('--checkpoint', help='for a config: a checkpoint or a work directory')
    command.add_argument('--prompts', nargs='+', required=True,
                         help='texts, or class labels, or one txt, jsonl or csv file of prompts')
    command.add_argument('--num', type=positive, default=4, help='images a prompt (default 4)')
    command.add_argument('--steps', type=positive, help='default: model.sample_sigmas')
    command.add_argument('--seed', type=int, default=0)
    command.add_argument('--role', choices=['student', 'teacher', 'fake'], default='student')
    command.add_argument('--guidance-scale', type=float, default=1.0, help='default 1, off')
    command.add_argument('--height', type=positive, help='pixels; default: model.image_size')
    command.add_argument('--width', type=positive, help='pixels; default: as --height')
    command.add_argument('--teacher', action='store_true', help='the teacher on the same noise beside it')
    command.add_argument('--teacher-steps', type=positive, default=28, help='default 28')
    command.add_argument('--teacher-guidance-scale', type=float, help='default 1 + model.alpha')
    command.add_argument('--batch-size', type=positive, default=4, help='default 4')
    command.add_argument('--no-ema', action='store_true', help="the student's own weights instead of its EMA's")
    command.add_argument('--out', default='samples', help='folder for the PNG files (default samples)')
    command.add_argument('--cfg-options', **options)

    command = add(export)
    command.add_argument('source', help='a config file, a shipped recipe, or an exported LoRA folder (with --fuse)')
    command.add_argument('--checkpoint', help='for a config: a checkpoint or a work directory')
    command.add_argument('--no-ema', action='store_true', help="the student's own weights instead of its EMA's")
    command.add_argument('--dtype', choices=['float32', 'bfloat16'],
                         help="of the files; default: the network's own, float32 with --fuse")
    command.add_argument('--fuse', action='store_true', help='a whole pipeline, the adapters added to its weights')
    command.add_argument('--prompts', nargs='+', help='images of these for the model card; or a file of prompts')
    command.add_argument('--out', required=True, help='folder to write')
    command.add_argument('--cfg-options', **options)

    command = add(cache)
    command.add_argument('config', help='a config file or a shipped recipe')
    command.add_argument('--out', required=True, help='folder of the embeddings')
    command.add_argument('--dataset', default='train_dataloader.dataset', metavar='KEY',
                         help='where the dataset stands in the config (default train_dataloader.dataset)')
    command.add_argument('--dtype', choices=['bfloat16', 'float16', 'float32'], default='bfloat16')
    command.add_argument('--batch-size', type=positive, default=32)
    command.add_argument('--shard-size', type=positive, default=1024, help='prompts a file (default 1024)')
    command.add_argument('--cfg-options', **options)

    command = add(doctor)
    command.add_argument('config', help='a config file or a shipped recipe')
    command.add_argument('--gpus', type=positive, default=1, help='GPUs that it will run on (default 1)')
    command.add_argument('--cfg-options', **options)

    command = add(compare)
    command.add_argument('runs', nargs='+', metavar='RUN', help='work directories of trainings')
    command.add_argument('--out', default='compare.html', help='default compare.html')

    command = add(evaluate)
    command.add_argument('models', nargs='+', metavar='NAME=SOURCE@CHECKPOINT',
                         help='a config with a checkpoint or a work directory, or an exported folder; NAME= and '
                              '@CHECKPOINT may be left out')
    command.add_argument('--prompts', required=True, metavar='FILE',
                         help='a txt, jsonl or csv file of prompts or class labels')
    command.add_argument('--num', type=positive, default=1, help='images a prompt (default 1)')
    command.add_argument('--metrics', nargs='+', default=[], metavar='METRIC',
                         help='registered names, or configs with `metrics` or `val_evaluator`; default: val_evaluator '
                              'of the first config')
    command.add_argument('--steps', type=positive, nargs='+', default=[], help='default: model.sample_sigmas')
    command.add_argument('--teacher', action='store_true', help='the teacher of the first config too')
    command.add_argument('--teacher-steps', type=positive, nargs='+', default=[28], help='default 28')
    command.add_argument('--teacher-guidance-scale', type=float, help='default 1 + model.alpha')
    command.add_argument('--seed', type=int, default=0, help='of the noise, the same for all models (default 0)')
    command.add_argument('--height', type=positive, help='pixels; default: model.image_size')
    command.add_argument('--width', type=positive, help='pixels; default: as --height')
    command.add_argument('--batch-size', type=positive, default=4, help='default 4')
    command.add_argument('--no-ema', action='store_true', help="the students' own weights instead of their EMA's")
    command.add_argument('--out', required=True, help='folder of images and results; another call goes on with it')
    command.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    command.add_argument('--cfg-options', **options)

    add(plugins)

    command = add(demo)
    command.add_argument('--work-dir', default='work_dirs/demo', help='default work_dirs/demo')
    command.add_argument('--cfg-options', **options)
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Runs the command; mistakes of the user become one line on stderr and exit status 2."""
    args = build_parser().parse_args(argv)
    if args.traceback or os.environ.get('CDM_TRACEBACK') == '1':
        return args.function(args) or 0
    try:
        return args.function(args) or 0
    except USER_ERRORS as error:
        text = str(error.args[0]) if error.args and isinstance(error, KeyError) else str(error)
        print(f'cdm {args.command}: {" ".join(text.split())} (cdm --traceback {args.command} ... shows where)',
              file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
