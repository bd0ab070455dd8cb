"""Training in several processes with whole copies of the networks (DDP)."""
import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, get_world_size
from mmengine.model import MMDistributedDataParallel, MMSeparateDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import nn


class RoleDataParallel(MMDistributedDataParallel):
    """DDP around one trained role's network. Its state_dict has the network's own keys, so that a checkpoint does not
    depend on how many processes wrote it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # Its newer name is unknown to torch before 2.13.
            warnings.filterwarnings('ignore', message='`broadcast_buffers` is deprecated')
            super().__init__(*args, broadcast_buffers=False, **kwargs)
        self.register_load_state_dict_pre_hook(self._add_prefix)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's."""
        return self.module.state_dict(*args, **kwargs)

    @staticmethod
    def _add_prefix(module: nn.Module, state: Any, prefix: str, *args: Any) -> None:
        # MMEngine's loader looks behind wrappers, torch's does not.
        for key in [k for k in state if k.startswith(prefix)]:
            state[f'{prefix}module.{key[len(prefix):]}'] = state.pop(key)


@MODEL_WRAPPERS.register_module()
class DistillationDataParallel(MMSeparateDistributedDataParallel):
    """Data parallelism for methods, chosen by `model_wrapper_cfg=dict(type='DistillationDataParallel')`: every rank
    holds all networks, and the gradients of student and fake score are averaged over the ranks, each in its own DDP.

    The launch is MMEngine's (`launcher='pytorch'`, 'slurm' or 'mpi'). On machines without a GPU, where MMEngine would
    set a CUDA device, `cdm train --launcher` starts gloo; a launch of one's own calls
    `torch.distributed.init_process_group('gloo')` before it builds the Runner.

    Frozen networks stay as they are. Without gradient nothing is communicated, so ranks may sample on their own. Any
    number of passes with gradient may come before one backward pass: DDP reduces a parameter's gradient when its sum
    over all passes is complete. The whole network must take part in each of them, or, with `find_unused_parameters`,
    the same part.

    Args:
        module (nn.Module): A method.
        find_unused_parameters (bool): Whether some trained weights take no part in training. Default False; True all
            the same where the backbone has such weights.
        bucket_cap_mb (float): MiB of gradients that are reduced at once. Default 25.
        gradient_as_bucket_view (bool): Whether gradients live in the buckets, which spares a copy of them. Default
            True.
        device_ids (list, optional): Left aside: the Runner sets it, and tensors are on their device already.
    """

    def __init__(self, module: nn.Module, find_unused_parameters: bool = False, bucket_cap_mb: float = 25,
                 gradient_as_bucket_view: bool = True, device_ids: list[Any] | None = None) -> None:
        # Not MMSeparateDistributedDataParallel's: it wraps whatever can be trained, also the base of LoRA adapters,
        # to which the roles' parameters belong too.
        nn.Module.__init__(self)
        roles = getattr(module, 'trained_roles', None)
        if roles is None:
            raise ValueError(f"model_wrapper_cfg.type='DistillationDataParallel' wraps the methods of cdm_plugin, but "
                             f'model.type is {type(module).__name__}')
        self.module = module.to(get_device())
        find_unused_parameters = find_unused_parameters or module.backbone.has_idle_weights
        self.roles = tuple(roles)
        self._share_new_weights()
        for role in self.roles:
            setattr(module, role, RoleDataParallel(
                getattr(module, role), find_unused_parameters=find_unused_parameters, bucket_cap_mb=bucket_cap_mb,
                gradient_as_bucket_view=gradient_as_bucket_view))

    @torch.no_grad()
    def _share_new_weights(self) -> None:
        """Frozen networks that were not loaded were drawn, perhaps from another seed on every rank (DDP shares the
        trained ones itself)."""
        if self.module.backbone.pretrained is not None or get_world_size() == 1:
            return
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            broadcast(tensor.data)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients of passes inside are not reduced."""
        with contextlib.ExitStack() as stack:
            for role in self.roles:
                stack.enter_context(getattr(self.module, role).no_sync())
            yield
