"""The memory of one GPU for every way to share the work among several, from what the doctor has counted.

Formulas as `DistillationDeepSpeedStrategy` lays networks out over N processes (DeepSpeed 0.19), b bytes a weight as the
networks run (2 in bfloat16, 4 in float32), of P trained and F frozen weights:

| | data parallel | ZeRO 1, 2 | ZeRO 3 |
| --- | --- | --- | --- |
| trained weights | as in one process | b P | b P / N, and whole those below the persistence threshold |
| float32 weights, optimizer | as in one process | (4 P + state) / N | (4 P + state) / N |
| gradients that stay | 4 P, DDP's buckets | none | b P / N |
| EMA | 4 P | 4 P / N | 4 P / N |
| frozen weights | as in one process | b F | b F / N, and whole those below the threshold |
| while a step runs | | (b + 4) P / N, a bucket | 4 P / N, gathered weights |

What an iteration adds to that (activations) is as in one process. Stage 1 and 2 differ where gradients accumulate:
stage 1 then keeps b P of them. A bucket has `reduce_bucket_size` elements; at stage 3 each engine holds one for good,
and at most `stage3_max_live_parameters` weights are gathered at a time, but all of a base of LoRA adapters.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn

from cdm_plugin.commands.doctor.report import Memory, Part
from cdm_plugin.methods import DiffusionModel
from cdm_plugin.roles.lora import AdapterRole

# DeepSpeed's defaults.
BUCKET, LIVE, THRESHOLD = 500_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class Sharing:
    """A way to share the work.

    Attributes:
        name (str): As in the table.
        stage (int): ZeRO stage, 0 is data parallelism.
        offload_optimizer (bool): float32 weights, optimizer and EMA wait in the CPU's memory.
        offload_param (bool): So do the networks' weights.
    """
    name: str
    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False


SHARINGS = (
    Sharing('data parallel', 0), Sharing('ZeRO 1', 1), Sharing('ZeRO 2', 2), Sharing('ZeRO 3', 3),
    Sharing('ZeRO 2, optimizer offloaded', 2, True), Sharing('ZeRO 3, all offloaded', 3, True, True))


def chosen(cfg: Config) -> Sharing:
    """How the config itself shares the work."""
    zero = (cfg.get('strategy') or {}).get('zero_optimization')
    if 'strategy' not in cfg:
        return SHARINGS[0]
    zero = zero or {}
    offloads = [(zero.get(key) or {}).get('device', 'none') == 'cpu' for key in ('offload_optimizer', 'offload_param')]
    wanted = (zero.get('stage', 2), *offloads)
    return next((s for s in SHARINGS if (s.stage, s.offload_optimizer, s.offload_param) == wanted),
                Sharing("the config's", *wanted))


def data_parallel(parts: Sequence[Part], phases: dict[str, int], activations: float, gpus: int) -> Memory:
    """The memory of one GPU with whole copies.

    Args:
        parts (Sequence[Part]): What stays in memory in one process.
        phases (dict): What each phase of an iteration adds in one process.
        activations (float): Most that an iteration adds, without gradients.
        gpus (int): Number of processes.
    """
    resident = sum(part.weights + part.optimizer + part.ema for part in parts)
    if gpus == 1:
        return Memory(resident, iteration=max(phases.values()))
    return Memory(resident + sum(part.gradients for part in parts), iteration=activations)


def memory(cfg: Config, method: DiffusionModel, wrappers: dict[str, Any], parts: Sequence[Part],
           activations: float, sharing: Sharing, gpus: int) -> Memory:
    """The memory of one GPU under DeepSpeed.

    Args:
        cfg (Config): The config; `strategy.zero_optimization` has sizes of buckets and thresholds.
        method (DiffusionModel): The method on the meta device.
        wrappers (dict): Its optimizer wrappers by role.
        parts (Sequence[Part]): What stays in memory in one process.
        activations (float): Most that an iteration adds, without gradients and autocast's copies of weights.
        sharing (Sharing): How the work is shared.
        gpus (int): Number of processes, N.
    """
    named = {part.name: part for part in parts}
    total = Memory(iteration=activations)
    zero = (cfg.get('strategy') or {}).get('zero_optimization') or {}
    dtype = run_dtype(cfg, wrappers)
    for role, wrapper in wrappers.items():
        network = getattr(method, role)
        _add_engine(total, network, named[role], wrapper, dtype, sharing, gpus, zero,
                    2 if method.lora is not None and sharing.stage == 3 else sharing.stage)
        if method.base is None:
            total.resident += _bytes(network.buffers(), dtype)
    trained = {id(p) for role in wrappers for p in getattr(method, role).parameters()}
    frozen = {role: getattr(method, role) for role in ('base', *method.denoisers) if role not in wrappers}
    for name, network in frozen.items():
        if network is None or isinstance(network, AdapterRole):
            continue
        tensors = [p for p in network.parameters() if id(p) not in trained]
        quantized = method.backbone.quantization is not None
        _add_frozen(total, named[name].weights if quantized else None, tensors, list(network.buffers()), dtype, sharing,
                    gpus, zero, network is method.base)
    for part in parts:
        if part.name == 'text encoders':
            total.resident += part.weights / (gpus if sharing.stage == 3 else 1)
            if sharing.stage == 3:  # gathered block by block while they encode
                total.step = max(total.step, min(part.weights, LIVE * 2))
        elif part.name in ('VAE', 'losses'):
            total.resident += part.weights
    return total


def run_dtype(cfg: Config, wrappers: dict[str, Any]) -> torch.dtype | None:
    """What the strategy's networks run in; None is the dtype that they have (`DistillationDeepSpeedStrategy`)."""
    amp = any(getattr(wrapper, 'dtype', None) == torch.bfloat16 for wrapper in wrappers.values())
    bf16 = (cfg.get('strategy') or {}).get('bf16')
    return torch.bfloat16 if (amp if bf16 is None else bf16.get('enabled')) else None


def _add_engine(total: Memory, network: nn.Module, part: Part, wrapper: Any, dtype: torch.dtype | None,
                sharing: Sharing, gpus: int, zero: dict[str, Any], stage: int) -> None:
    """A trained role."""
    tensors = [p for p in network.parameters() if p.requires_grad]
    numel = sum(p.numel() for p in tensors)
    low = _bytes(tensors, dtype)
    bucket = zero.get('reduce_bucket_size', BUCKET) * (low / max(numel, 1))
    masters = (4 * numel + part.optimizer + part.ema) / gpus
    if sharing.offload_optimizer:
        total.cpu += masters + low / gpus  # and the gradients on their way to them
        masters = 0
    total.resident += masters
    gradients = 0 if sharing.offload_optimizer else 4 * numel / gpus
    if stage < 3:
        kept = low if stage == 1 and getattr(wrapper, '_accumulative_counts', 1) > 1 else 0
        total.resident += low + kept
        overlap = 2 if zero.get('overlap_comm') else 1
        total.step = max(total.step, low / gpus + gradients + min(bucket, low) * overlap)
        return
    whole = _bytes([p for p in tensors if p.numel() < zero.get('stage3_param_persistence_threshold', THRESHOLD)], dtype)
    weights = 0 if sharing.offload_param else low / gpus
    total.cpu += low / gpus - weights
    total.resident += weights + whole + bucket + (0 if sharing.offload_optimizer else low / gpus)
    total.step = max(total.step, gradients + _gathered(tensors, low, zero))


def _add_frozen(total: Memory, quantized: float | None, tensors: list[Tensor], buffers: list[Tensor],
                dtype: torch.dtype | None, sharing: Sharing, gpus: int, zero: dict[str, Any], shared: bool) -> None:
    """The teacher, or (`shared`) the base of adapters."""
    if quantized is not None:
        total.resident += quantized
        return
    low, total.resident = _bytes(tensors, dtype), total.resident + _bytes(buffers, dtype)
    if sharing.stage < 3:
        total.resident += low
        return
    threshold = zero.get('stage3_param_persistence_threshold', THRESHOLD)
    total.resident += _bytes([p for p in tensors if p.numel() < threshold], dtype)
    if sharing.offload_param:
        total.cpu += low / gpus
    else:
        total.resident += low / gpus
    # The student calls its base twice before one backward pass, which releases the base's weights at its end only.
    total.step = max(total.step, low if shared else _gathered(tensors, low, zero))


def _gathered(tensors: Sequence[Tensor], low: float, zero: dict[str, Any]) -> float:
    """Most that is gathered at a time."""
    each = low / max(sum(t.numel() for t in tensors), 1)
    return min(low, each * zero.get('stage3_max_live_parameters', LIVE))


def _bytes(tensors: Any, dtype: torch.dtype | None) -> int:
    """Bytes of tensors if those of floating point had this dtype."""
    return sum(t.numel() * (dtype.itemsize if dtype is not None and t.is_floating_point() else t.element_size())
               for t in tensors)
