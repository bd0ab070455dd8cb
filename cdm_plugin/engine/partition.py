"""Networks whose weights are partitioned over the ranks (ZeRO-3).

A pretrained network is loaded by rank 0 alone, which hands it out weight by weight; the other ranks start from its
shapes. So one process at a time holds one whole network, whatever the number of ranks.
"""
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, get_rank
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from cdm_plugin.backbones import Backbone
from cdm_plugin.engine.deepspeed_config import import_deepspeed, initialize
from cdm_plugin.ranks import on_first_rank

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def build_partitioned(backbone: Backbone, config: dict[str, Any], dtype: torch.dtype | None = None,
                      run_dtype: torch.dtype | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A pretrained network, partitioned. Every rank must call it.

    Args:
        backbone (Backbone): What builds it.
        config (dict): DeepSpeed's config, stage 3.
        dtype (torch.dtype, optional): Of the weights as they are loaded. Default: the backbone's.
        run_dtype (torch.dtype, optional): Of the partitioned weights. Default: as loaded.

    Returns:
        tuple: The network, and this rank's pieces of the weights as they were loaded, flat, by name, if `run_dtype`
        rounds them.

    Raises:
        ValueError: On every rank, if rank 0 cannot load it.
    """
    network = on_first_rank(lambda: backbone.load_network(dtype), 'rank 0 could not load a network')
    layout = _share_layout(network)
    if network is None:
        network = backbone.empty_network(dtype)
    pieces = _hand_out(network, layout, config, run_dtype)
    return backbone.compile_blocks(network), pieces


def _share_layout(network: nn.Module | None) -> Layout:
    layout = [None if network is None else {
        name: (tuple(t.shape), t.dtype) for name, t in (*network.named_parameters(), *network.named_buffers())}]
    broadcast_object_list(layout)
    return layout[0]


@torch.no_grad()
def _hand_out(network: nn.Module, layout: Layout, config: dict[str, Any],
              run_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Partitions the weights of rank 0's network, one module at a time; buffers become the same on all ranks."""
    deepspeed = import_deepspeed()
    device, rank = torch.device(get_device()), get_rank()

    def receive(name: str, tensor: Tensor) -> Tensor:
        shape, dtype = layout[name]
        whole = tensor.to(device) if rank == 0 else torch.empty(shape, dtype=dtype, device=device)
        torch.distributed.broadcast(whole, 0)
        return whole

    pieces: dict[str, Tensor] = {}
    # Children come first: what is partitioned already is left alone.
    for prefix, module in reversed(list(network.named_modules())):
        prefix = f'{prefix}.' if prefix else ''
        wholes = {}
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = receive(prefix + name, buffer)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                wholes[name] = whole = receive(prefix + name, parameter)
                dtype = run_dtype if whole.is_floating_point() and run_dtype is not None else whole.dtype
                module._parameters[name] = nn.Parameter(whole.to(dtype), requires_grad=parameter.requires_grad)
        if not wholes:
            continue
        deepspeed.zero.Init(module=module, config_dict_or_path=config)
        for name, whole in wholes.items():
            partitioned = module._parameters[name]
            if whole.dtype != partitioned.dtype:
                size = partitioned.ds_tensor.ds_numel
                pieces[prefix + name] = whole.flatten()[rank * size:(rank + 1) * size].clone()
    return pieces


def partition_frozen(network: nn.Module, config: dict[str, Any]) -> Any:
    """Hooks on a frozen network gather its weights block by block from now on; it is called as before, and gradients
    pass through. LoRA adapters in it stay whole: they belong to the roles.

    Returns:
        DeepSpeedEngine: To be kept as long as the network.
    """
    config['bf16'] = dict(enabled=next(network.parameters()).dtype == torch.bfloat16)
    config['zero_optimization'].pop('offload_optimizer', None)
    with _without_adapters(network):
        engine = initialize(network, config)
    engine.eval()
    return engine


@contextlib.contextmanager
def _without_adapters(network: nn.Module) -> Iterator[None]:
    taken: list[tuple[nn.Module, str, nn.Module]] = [
        (layer, name, layer._modules.pop(name)) for layer in list(network.modules())
        if isinstance(layer, BaseTunerLayer) for name in ('lora_A', 'lora_B')]
    try:
        yield
    finally:
        for layer, name, adapters in taken:
            layer._modules[name] = adapters
