import json
from typing import Any, cast

import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from mmengine.runner.loops import _InfiniteDataloaderIterator
from torch.utils.data import DataLoader

from cdm_plugin.data.stream import POSITION, Position, Stream

KEY = 'stream'


@HOOKS.register_module()
class StreamHook(Hook):
    """Lets a stream of training data (`Stream`) go on where a checkpoint was saved, to the sample.

    Each batch says how far its reader has come, so that what workers have read ahead does not count. The ranks tell
    each other in one small message between the CPUs an iteration; checkpoints hold the positions of all of them. With
    other data in the training, the hook does nothing, and MMEngine reads again all that was trained on.
    """

    def __init__(self) -> None:
        self._saved: dict[str, Any] | None = None
        self._ranks: Any = None
        self._positions: dict[int, dict[int, list[int]]] = {}
        self._last: dict[int, int] = {}

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the positions of a run that is resumed."""
        self._saved = checkpoint.get(KEY) if runner._resume else None

    def before_train(self, runner: Any) -> None:
        """Brings the stream to the positions.

        Raises:
            ValueError: If the checkpoint's stream was another one, or was shared among other readers.
        """
        self._positions, self._last = {rank: {} for rank in range(get_world_size())}, {}
        loader = runner.train_dataloader
        if not isinstance(loader.dataset, Stream):
            return
        if not isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(f'a {type(loader.dataset).__name__} has no end: take train_cfg=dict('
                             "type='IterBasedTrainLoop', max_iters=...)")
        self._ranks = dist.new_group(backend='gloo') if get_world_size() > 1 else None
        if self._saved is not None:
            self._go_on(runner.train_loop, loader)

    def _go_on(self, loop: Any, loader: Any) -> None:
        saved, self._saved = self._saved, None
        for key, value in _shape(loader).items():
            if saved[key] != value:
                raise ValueError(f'the stream cannot go on where the checkpoint was saved: {SAYS[key]} is {value!r}, '
                                 f'and was {saved[key]!r}; resume with that, or start anew from the weights with '
                                 'load_from')
        self._positions = {int(rank): {int(worker): position for worker, position in of_rank.items()}
                           for rank, of_rank in saved['positions'].items()}
        self._last = {int(rank): worker for rank, worker in saved['last'].items()}
        own = {worker: Position(*position) for worker, position in self._positions[get_rank()].items()}
        cast(Any, loader.dataset).go_on(own, (self._last[get_rank()] + 1) % max(1, loader.num_workers))
        # The workers that run have the stream at its beginning.
        loader._iterator = None  # of persistent ones
        loop.dataloader_iterator = None
        loop.dataloader_iterator = _Rest(loader, loop.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Notes how far the readers have come."""
        if not isinstance(runner.train_dataloader.dataset, Stream):
            return
        own = torch.tensor(_position(data_batch))
        everyones = [own]
        if self._ranks is not None:
            everyones = [torch.empty_like(own) for _ in range(get_world_size())]
            dist.all_gather(everyones, own, self._ranks)
        for rank, (worker, *position) in enumerate(map(torch.Tensor.tolist, everyones)):
            self._positions[rank][worker], self._last[rank] = position, worker

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Adds the positions."""
        if self._last:
            checkpoint[KEY] = dict(_shape(runner.train_dataloader), positions=self._positions, last=self._last)

    def after_train(self, runner: Any) -> None:
        """Ends the messages between the CPUs."""
        if self._ranks is not None:
            dist.destroy_process_group(self._ranks)
            self._ranks = None


class _Rest(_InfiniteDataloaderIterator):
    """The batches of a loader that has gone on already: for those that MMEngine's loop skips when it resumes it gives
    nothing."""

    def __init__(self, loader: DataLoader, left_out: int) -> None:
        super().__init__(loader)
        self._left_out = left_out

    def __next__(self) -> Any:
        if self._left_out:
            self._left_out -= 1
            return None
        return super().__next__()


SAYS = dict(source='train_dataloader.dataset', ranks='the number of processes', workers='train_dataloader.num_workers',
            shuffle='train_dataloader.dataset.shuffle', share='train_dataloader.dataset.share',
            seed='train_dataloader.dataset.seed')


def _shape(loader: Any) -> dict[str, Any]:
    """What positions depend on."""
    stream = cast(Any, loader.dataset)
    return dict(source=stream.fingerprint, ranks=get_world_size(), workers=max(1, loader.num_workers),
                shuffle=stream.shuffle, share=stream.share, seed=stream.seed)


def _position(batch: Any) -> list[int]:
    """Worker and position behind a batch."""
    if isinstance(batch, list) and batch:  # of samples, as some collate functions leave it
        batch = {POSITION: [batch[-1].get(POSITION)]}
    position = batch.get(POSITION) if isinstance(batch, dict) else None
    if not position or not isinstance(position[-1], str):
        raise ValueError(f'a batch of the stream has no {POSITION!r}: train_dataloader.collate_fn must keep this field '
                         'of the samples, as those of MMEngine do')
    return json.loads(position[-1])
