import contextlib
import warnings
from typing import Any, Dict, List, Optional

import torch
from mmengine.dist import all_gather_object, broadcast_object_list, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook, LoggerHook
from mmengine.logging import print_log
from mmengine.model import MMSeparateDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.registry import HOOKS
from torch import Tensor
from torch.utils.data import IterableDataset

from cdm_plugin.condition import Condition
from cdm_plugin.data import check_cache
from cdm_plugin.engine import DistillationDataParallel, StudentEMA
from cdm_plugin.evaluation.prepare import check_shares, prepare_on_all_ranks
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.methods.base import TRAINED_KEYS
from cdm_plugin.mmengine_compat import pack_message_hub, plain, unpack_message_hub

# TensorBoard's own bins grow by a tenth each: all of [0.91, 1] would be one.
HISTOGRAM_EDGES = torch.linspace(0, 1, 51, dtype=torch.float64).tolist()


def method_of(runner: Any) -> DiffusionModel:
    """The method that a runner trains, without a data-parallel wrapper."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, DiffusionModel):
        raise TypeError(f'CDMHook works with the methods of cdm_plugin (model.type CDM, DecoupledDMD, DMD2, '
                        f'FlowMatching), but model.type is {type(model).__name__}')
    return model


def seed_of(runner: Any) -> int:
    """The run's seed, equal on every rank (with `randomness.diff_rank_seed` the ranks' own differ)."""
    seed = [runner.seed]
    broadcast_object_list(seed)
    return seed[0]


def batch_size_of(data: Any) -> int:
    """Number of samples in a batch, as either of MMEngine's collate functions makes it."""
    while isinstance(data, dict):
        data = next(iter(data.values()))
    return len(data)


def check_resumed(saved: Dict[str, Any], model: Dict[str, Any]) -> None:
    """Compares the model's config with that of the checkpoint: adapters must be the same, the rest may change."""
    for key in ('rank', 'alpha', 'target_modules'):
        old, new = ((m.get('lora') or {}).get(key) for m in (saved, model))
        if old != new:
            raise ValueError(f'model.lora.{key}={new!r}, but the run that is resumed was trained with {old!r}')
    changed = [key for key in TRAINED_KEYS if key != 'lora' and saved.get(key) != model.get(key)]
    if changed:
        print_log(f'the run is resumed with other settings than it was trained with: model.{", model.".join(changed)}',
                  'current', level=30)


@HOOKS.register_module()
class CDMHook(Hook):
    """What every run of a method needs from the runner: the iteration and the seed, the student's moving average, the
    attention kernel, a first look at the data, scalars that wait on the device until they are logged, and checkpoints
    of plain tensors.

    In a run of several processes the logged scalars are means over the ranks, taken when they are logged; the histogram
    of the anchors is that of rank 0. Seeds and batch sizes that differ between ranks would let their network calls
    differ: the seed is rank 0's on every rank, and another batch size is an error.

    The average (`method.student_ema`) replaces the student's weights in validation and test, and is in every
    checkpoint under `student_ema`. A metric of the validation whose package or weights are missing is reported before
    training starts, and left out.

    Args:
        ema_decay (float, optional): Upper limit of the EMA's decay; None turns the EMA off. Default 0.999.
        histogram_interval (int): Iterations between two histograms of the anchors' noise levels in TensorBoard.
            Default 100.
    """
    priority = 'NORMAL'

    def __init__(self, ema_decay: Optional[float] = 0.999, histogram_interval: int = 100) -> None:
        if histogram_interval < 1:
            raise ValueError(f'CDMHook.histogram_interval must be 1 or more, but is {histogram_interval}')
        self.ema_decay, self.histogram_interval = ema_decay, histogram_interval
        self.anchor_sigmas: List[Tensor] = []
        # Whether the average belongs to the student's present weights: not before a checkpoint or training says so.
        self._ema_loaded = False
        self._loaded_before_run = False
        self._swapped: Optional[contextlib.ExitStack] = None
        self._prepared: List[Any] = []
        self._logs: List[Dict[str, Any]] = []
        self._log_intervals: List[int] = []
        self._checkpoint_hooks: List[CheckpointHook] = []
        self._batch_sizes: List[int] = []
        self._batches_seen = False

    def before_run(self, runner: Any) -> None:
        """Hands over the seed and starts the EMA."""
        method = method_of(runner)
        if isinstance(runner.model, MMSeparateDistributedDataParallel) and not isinstance(
                runner.model, DistillationDataParallel):
            raise ValueError(f"model_wrapper_cfg.type must be 'DistillationDataParallel', but is "
                             f'{type(runner.model).__name__!r}')
        method.seed = seed_of(runner)
        if isinstance(runner.optim_wrapper, OptimWrapperDict):  # a run without training has none
            method.autocast_dtype = getattr(runner.optim_wrapper['student'], 'dtype', None)
        method.set_attention(method.autocast_dtype, training=runner._train_loop is not None)
        if self._loaded_before_run:  # FlexibleRunner loads before this
            self._loaded_before_run = False
        else:
            self._start_ema(method)

    def _start_ema(self, method: DiffusionModel) -> None:
        self._ema_loaded = False
        if self.ema_decay is not None:
            method.student_ema = StudentEMA(method.student, self.ema_decay)

    def before_train(self, runner: Any) -> None:
        """Checks the first sample before the first iteration; the EMA starts from the weights that a checkpoint
        without one, or `load_from`, may have brought."""
        method = method_of(runner)
        if not isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise ValueError("optim_wrapper needs constructor='DistillationOptimWrapperConstructor' and one entry a "
                             f'role: {", ".join(method.trained_roles)}')
        method.seed = seed_of(runner)  # a resume restores the seed of an unseeded run
        if runner._resume and runner.cfg.get('randomness', {}).get('seed') is None:
            print_log('randomness.seed is not set: a resumed run draws its data in another order', 'current', level=30)
        # The student's schedule counts iterations, as MMEngine steps it, so it starts before the student's optimizer.
        warnings.filterwarnings('ignore', message='Detected call of `scheduler.step')
        if method.student_ema is not None and not (runner._resume and self._ema_loaded):
            method.student_ema.reset()
            self._ema_loaded = True
        self._prepare_metrics(runner.val_loop, 'val_dataloader')
        self._defer_logs(runner, method)
        self._check_data(runner, method)
        self._check_accumulation(runner, method)

    def _defer_logs(self, runner: Any, method: DiffusionModel) -> None:
        """Scalars wait on the device until the logger wants them: MMEngine would wait for the device once a scalar in
        every iteration."""
        self._log_intervals = [hook.interval for hook in runner.hooks if isinstance(hook, LoggerHook)]
        self._checkpoint_hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
        self._logs.clear()
        self._batch_sizes.clear()
        self._batches_seen = False
        method.log_sink = self._logs.append if self._log_intervals else None

    def after_train(self, runner: Any) -> None:
        """The method is as before the training, but for its weights."""
        self._flush_logs(runner)
        method = method_of(runner)
        method.log_sink = method.autocast_dtype = None

    def _logs_are_due(self, runner: Any, batch_idx: int) -> bool:
        """Whether a LoggerHook or a CheckpointHook, which come later, reads them in this iteration."""
        return (any(self.every_n_inner_iters(batch_idx, interval) for interval in self._log_intervals)
                or any(not hook.by_epoch and self.every_n_train_iters(runner, hook.interval)
                       for hook in self._checkpoint_hooks)
                or self.end_of_epoch(runner.train_dataloader, batch_idx) or self.is_last_train_iter(runner))

    def _flush_logs(self, runner: Any) -> None:
        """Brings the waiting scalars to the host in one copy, and their means over the ranks into MMEngine's history,
        in their order."""
        tensors = [value for logs in self._logs for value in logs.values() if isinstance(value, Tensor)]
        device = method_of(runner).device
        numbers = iter(torch.stack([t.detach().to(device, torch.float32).reshape(()) for t in tensors]).tolist()
                       if tensors else [])
        own = [{key: next(numbers) if isinstance(value, Tensor) else value for key, value in logs.items()}
               for logs in self._logs]
        self._logs.clear()
        # As objects: a plug-in may log on one rank only.
        everyones = all_gather_object(own) if get_world_size() > 1 else [own]
        for i, logs in enumerate(own):
            for key in logs:
                values = [theirs[i][key] for theirs in everyones if key in theirs[i]]
                runner.message_hub.update_scalar(f'train/{key}', sum(values) / len(values))

    @staticmethod
    def _check_data(runner: Any, method: DiffusionModel) -> None:
        dataset = runner.train_dataloader.dataset
        if isinstance(dataset, IterableDataset):
            return  # a look would take the sample away
        if len(dataset) == 0:
            raise ValueError('train_dataloader.dataset is empty: check its ann_file, data_file or filters')
        check_cache(dataset, method.backbone)
        data = method.data_preprocessor([dataset[0]], True)
        with torch.no_grad():
            condition = method.backbone.condition(data).to(method.device)
            try:
                Condition.cat([condition, method.null_condition(1)])
            except (RuntimeError, KeyError):
                raise ValueError(
                    'the null condition has other fields or shapes than the data\'s embeddings: set model.backbone.'
                    "conditioner=dict(type='EmbeddingConditioner', folder=...) to the embeddings' folder") from None

    @staticmethod
    def _check_accumulation(runner: Any, method: DiffusionModel) -> None:
        """Gradients that wait for their update are in no checkpoint."""
        cycle = max((w._accumulative_counts * (getattr(method, 'student_every', 1) if role == 'student' else 1)
                     for role, w in runner.optim_wrapper.items() if w._accumulative_counts > 1), default=1)
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.interval > 0 and not hook.by_epoch and hook.interval % cycle:
                print_log(f'default_hooks.checkpoint.interval={hook.interval} is no multiple of {cycle} (student_every '
                          'x accumulative_counts): a run resumed from such a checkpoint loses the gradients '
                          'accumulated until then and differs from an uninterrupted one', 'current', level=30)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Tells the method the iteration."""
        method_of(runner).iteration = runner.iter
        if get_world_size() > 1:
            self._batch_sizes.append(batch_size_of(data_batch))
            if not self._batches_seen:  # later ones are looked at when the scalars are, to save messages
                self._check_batch_sizes()

    def _check_batch_sizes(self) -> None:
        """The number of network calls is one of the largest anchor of all ranks, which every rank draws by itself: with
        another batch size it draws others, and sharded runs would hang."""
        self._batches_seen = True
        for sizes in zip(*all_gather_object(self._batch_sizes)):
            if len(set(sizes)) > 1:
                raise ValueError('every rank needs the same train_dataloader.batch_size, but the ranks have batches of '
                                 f'{list(sizes)} samples')
        self._batch_sizes.clear()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Updates the EMA after a student step and collects the anchors' noise levels."""
        method = method_of(runner)
        if method.student_updated and method.student_ema is not None:
            method.student_ema.update()
        if self._logs and self._logs_are_due(runner, batch_idx):
            if get_world_size() > 1:
                self._check_batch_sizes()
            self._flush_logs(runner)
        if method.anchor_sigma is not None:
            self.anchor_sigmas.append(method.anchor_sigma)
        if self.anchor_sigmas and self.every_n_train_iters(runner, self.histogram_interval):
            self._add_histogram(runner, torch.cat(self.anchor_sigmas).float().cpu())
            self.anchor_sigmas.clear()

    @staticmethod
    def _add_histogram(runner: Any, sigmas: Tensor) -> None:
        if not is_main_process():
            return
        for backend in runner.visualizer._vis_backends.values():
            if hasattr(backend.experiment, 'add_histogram'):
                backend.experiment.add_histogram('train/anchor_sigma_histogram', sigmas, runner.iter + 1,
                                                 bins=HISTOGRAM_EDGES)

    # Validation and test, with the EMA

    def _prepare_metrics(self, loop: Any, key: str) -> None:
        if loop is None or loop in self._prepared:
            return
        self._prepared.append(loop)
        check_shares(loop.dataloader, key)
        loop.evaluator.metrics, _ = prepare_on_all_ranks(loop.evaluator.metrics)

    def _swap_in(self, runner: Any, loop: Any) -> None:
        method = method_of(runner)
        method.validated, method.validation_size = 0, len(loop.dataloader.dataset)
        if method.student_ema is not None and self._ema_loaded:
            self._swapped = contextlib.ExitStack()
            self._swapped.enter_context(method.student_ema.applied())

    def _swap_out(self) -> None:
        if self._swapped is not None:
            self._swapped.close()
            self._swapped = None

    def before_val(self, runner: Any) -> None:
        self._prepare_metrics(runner.val_loop, 'val_dataloader')

    def before_test(self, runner: Any) -> None:
        self._prepare_metrics(runner.test_loop, 'test_dataloader')

    def before_val_epoch(self, runner: Any) -> None:
        self._swap_in(runner, runner.val_loop)

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        self._swap_out()

    def before_test_epoch(self, runner: Any) -> None:
        self._swap_in(runner, runner.test_loop)

    def after_test_epoch(self, runner: Any, metrics: Any = None) -> None:
        self._swap_out()

    # Checkpoints

    def before_save_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Adds the EMA, and turns MMEngine's objects into tensors and plain data (torch's weights_only)."""
        method = method_of(runner)
        if self._logs and get_world_size() == 1:  # the other ranks are not here; for CheckpointHook nothing waits
            self._flush_logs(runner)
            checkpoint['message_hub'] = runner.message_hub.state_dict()
        if method.student_ema is not None:
            checkpoint['student_ema'] = method.student_ema.state_dict()
        checkpoint['message_hub'] = pack_message_hub(checkpoint['message_hub'])
        checkpoint['config'] = runner.cfg.to_dict()
        for key in ('config', 'meta', 'optimizer', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = plain(checkpoint[key])

    def after_load_checkpoint(self, runner: Any, checkpoint: Dict[str, Any]) -> None:
        """Takes the EMA back; the inverse of `before_save_checkpoint`.

        Raises:
            ValueError: If a run is resumed with other adapters than it has trained.
        """
        method = method_of(runner)
        if runner._resume and 'config' in checkpoint:
            check_resumed(checkpoint['config'].get('model', {}), runner.cfg.model)
        if method.seed is None:  # before_run has not been
            self._start_ema(method)
            self._loaded_before_run = True
        if method.student_ema is not None and 'student_ema' in checkpoint:
            method.student_ema.load_state_dict(checkpoint['student_ema'])
            self._ema_loaded = True
        elif method.student_ema is not None and runner._resume:
            print_log('the checkpoint has no student_ema: the EMA starts again from the student', 'current', level=30)
        if 'message_hub' in checkpoint:
            checkpoint['message_hub'] = unpack_message_hub(checkpoint['message_hub'], runner.work_dir)
