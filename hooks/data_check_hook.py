from itertools import islice
from typing import Any

import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.utils.data import IterableDataset

from cdm_plugin.condition import Condition
from cdm_plugin.data import Stream, check_cache, check_channel_order, check_latents, check_pictures
from cdm_plugin.draws import randomness_kept
from cdm_plugin.hooks.method import method_of

# Iterations between two comparisons of the ranks' batch sizes, each one message.
INTERVAL = 50
# Samples that are looked at before training.
LOOKED_AT = 8


@HOOKS.register_module()
class DataCheckHook(Hook):
    """Looks at some samples before the first iteration, and at the batch sizes of all ranks.

    The number of network calls is that of the largest anchor of all ranks, which every rank draws by itself: with
    another batch size it draws others, and sharded runs would hang. So batches of other sizes are an error.
    """

    def __init__(self) -> None:
        self._batch_sizes: list[int] = []
        self._compared = False

    def before_train(self, runner: Any) -> None:
        """Encodes the first sample, and looks at some pictures.

        Raises:
            ValueError: If there is none, its embeddings do not go with the model, a loss cannot do with it, or pictures
                are not in [-1, 1].
        """
        self._batch_sizes.clear()
        self._compared = False
        dataset, method = runner.train_dataloader.dataset, method_of(runner)
        if isinstance(dataset, IterableDataset) and not isinstance(dataset, Stream):
            return  # a look would take the sample away
        if not isinstance(dataset, Stream):
            if len(dataset) == 0:
                raise ValueError('train_dataloader.dataset is empty: check its ann_file, data_file or filters')
            check_batches(runner.train_dataloader)
        check_cache(dataset, method.backbone)
        check_latents(dataset, method.backbone, method.latent_sizes)
        check_channel_order(dataset)
        with randomness_kept():  # so that the data come as without a look
            samples = list(islice(dataset.once(), LOOKED_AT)) if isinstance(dataset, Stream) else [
                dataset[i] for i in range(0, len(dataset), -(-len(dataset) // LOOKED_AT))]
        if not samples:
            raise ValueError('train_dataloader.dataset gives no sample in a whole pass: its pipeline leaves all out')
        check_pictures([sample['image'] for sample in samples if isinstance(sample, dict) and 'image' in sample],
                       method.backbone, method.latent_sizes)
        data = method.data_preprocessor(samples[:1], True)
        with torch.no_grad():
            condition = method.backbone.condition(data).to(method.device)
            try:
                both = Condition.cat([condition, method.null_condition(1)])
            except (RuntimeError, KeyError):
                raise ValueError(
                    'the null condition has other fields or shapes than the data\'s embeddings: set model.backbone.'
                    "conditioner=dict(type='EmbeddingConditioner', folder=...) to the embeddings' folder") from None
            method.backbone.check_condition(both)
            for loss in getattr(method, 'active_losses', {}).values():
                loss.check(data, method.backbone)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Compares the first batches at once, before a network is called."""
        if get_world_size() > 1:
            self._batch_sizes.append(batch_size_of(data_batch))
            if not self._compared:
                self._compare()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Compares later ones now and then, to save messages."""
        if self._batch_sizes and (self.every_n_train_iters(runner, INTERVAL) or self.is_last_train_iter(runner)):
            self._compare()

    def _compare(self) -> None:
        self._compared = True
        for sizes in zip(*all_gather_object(self._batch_sizes)):
            if len(set(sizes)) > 1:
                raise ValueError('every rank needs the same train_dataloader.batch_size, but the ranks have batches of '
                                 f'{list(sizes)} samples')
        self._batch_sizes.clear()


def check_batches(loader: Any) -> None:
    """Raises ValueError if an epoch has no batch, or not as many on every rank: the others would wait for the last one
    until the timeout."""
    if isinstance(getattr(loader.batch_sampler, 'sampler', None), InfiniteSampler):
        return  # it begins again
    numbers = all_gather_object(len(loader)) if get_world_size() > 1 else [len(loader)]
    if len(set(numbers)) > 1:
        raise ValueError(f'every rank needs as many batches of train_dataloader, but they have {numbers}: set '
                         "train_dataloader.sampler=dict(type='InfiniteSampler'), or its round_up=True")
    if not numbers[0]:
        raise ValueError(f'train_dataloader makes no batch of its {len(loader.sampler)} samples a rank: lower '
                         f'train_dataloader.batch_size={loader.batch_size}, or set drop_last=False')


def batch_size_of(data: Any) -> int:
    """Number of samples in a batch, as either of MMEngine's collate functions makes it."""
    while isinstance(data, dict):
        data = next(iter(data.values()))
    return len(data)
