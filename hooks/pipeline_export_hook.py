import logging
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from cdm_plugin.arguments import Count
from cdm_plugin.export import check_export, export
from cdm_plugin.hooks.method import method_of


@HOOKS.register_module()
class PipelineExportHook(Hook):
    """Exports the student after training, see `cdm_plugin.export.export`; training goes on as if it had not.

    In a run of several processes the first one exports; while training (`interval`) the others wait for it in their
    next step, for `env_cfg.dist_cfg.timeout` seconds at most.

    An export that fails is logged as an error and stops nothing: the checkpoint is written before it.

    Args:
        out_dir (str, optional): Where to. Default: `export` in the run's work_dir.
        interval (int, optional): Iterations between exports while training, to `iter_N` in that folder. Default:
            none while training.
        ema (bool): Whether to write the EMA weights (the student's own if there are none). Default True.
        dtype (str, optional): Of the weights in the files, 'float32', 'bfloat16' or 'float8'. Default: the network's
            own, and float32 with `fuse`.
        fuse (bool): Whether to add LoRA adapters to the weights of their base. Default False.
        prompts (list, optional): Texts or class labels to draw images of, for the model card.
    """
    priority = 'LOWEST'  # after CheckpointHook

    def __init__(self, out_dir: str | None = None, interval: Count | None = None, ema: bool = True,
                 dtype: str | None = None, fuse: bool = False, prompts: list | None = None) -> None:
        self.out_dir, self.interval, self.ema = out_dir, interval, ema
        self.dtype, self.fuse, self.prompts = dtype, fuse, prompts

    def before_train(self, runner: Any) -> None:
        """Finds what would fail before hours are spent on it."""
        try:
            check_export(method_of(runner), self._folder(runner), self.dtype, self.fuse)
        except ValueError as error:
            raise ValueError(f'PipelineExportHook: {error}') from error

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """An export every `interval` iterations; that of the last one is left to `after_train`."""
        done = runner.iter + 1
        if self.interval is not None and done % self.interval == 0 and done < runner.max_iters:
            self._export(runner, self._folder(runner) / f'iter_{done}', done)

    def after_train(self, runner: Any) -> None:
        """The export of the trained student."""
        self._export(runner, self._folder(runner), runner.iter)

    def _folder(self, runner: Any) -> Path:
        return Path(self.out_dir or Path(runner.work_dir, 'export'))

    def _export(self, runner: Any, folder: Path, iterations: int) -> None:
        if hasattr(method_of(runner).student, 'weight_shards'):  # no rank has them whole
            runner.logger.warning('the weights are sharded and are not exported while training: run `cdm export` with '
                                  f'a checkpoint of {runner.work_dir}')
            return
        if not is_main_process():
            return
        try:
            export(method_of(runner), folder, ema=self.ema, dtype=self.dtype, fuse=self.fuse, config=runner.cfg,
                   prompts=self.prompts, iterations=iterations)
            runner.logger.info(f'exported the student to {folder}')
        except Exception as error:  # whatever it is, training must not end by it
            runner.logger.log(logging.ERROR, f'the export to {folder} failed ({type(error).__name__}: {error}); '
                              f'training is not affected, its checkpoints are in {runner.work_dir}, and `cdm export` '
                              'repeats the export from one', exc_info=True)
