"""The student's weights as they are exported, one at a time: no second network is ever in memory."""
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import split_torch_state_dict_into_shards
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from cdm_plugin.export.job import BESIDE_FLOAT8, FLOAT8, ExportJob
from cdm_plugin.roles.weights import unwrap

# Names of dtypes in a safetensors file, in their order there: wide ones come first, so that each tensor is aligned.
DTYPES = {torch.int64: 'I64', torch.float64: 'F64', torch.float32: 'F32', torch.int32: 'I32', torch.bfloat16: 'BF16',
          torch.float16: 'F16', torch.float8_e4m3fn: 'F8_E4M3', torch.uint8: 'U8', torch.bool: 'BOOL'}
# Of one file, as in diffusers.
MAX_FILE = '10GB'


def exported_network(job: ExportJob) -> ModelMixin:
    """The student's network without memory, whose `save_pretrained` writes what is exported."""
    network = job.backbone.empty_network()

    def save_pretrained(folder: str | Path, safe_serialization: bool = True) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        network.save_config(folder)
        if job.method.lora is None:
            own = unwrap(job.method.student).state_dict()
            average = job.method.student_ema.weights if job.ema else {}
            value = lambda name: average.get(name, own[name])  # noqa: E731
        else:
            own, value = network.state_dict(), _fused_weights(job)
        narrow = float8_names(job.backbone.empty_network()) if job.dtype == FLOAT8 else ()
        shapes = {name: torch.empty(w.shape, dtype=FLOAT8 if name in narrow else job.file_dtype(w.dtype), device='meta')
                  for name, w in own.items()}
        write_weights(Path(folder), shapes,
                      lambda name: _in_float8(name, value(name)) if name in narrow else value(name))

    network.save_pretrained = save_pretrained
    return network


def float8_names(network: ModelMixin) -> set[str]:
    """Names of the weights that diffusers' layerwise casting keeps in float8: those of linear layers and convolutions
    that the network's class does not leave out. The network is changed."""
    network.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=BESIDE_FLOAT8)
    return {name for name, weight in network.state_dict().items() if weight.dtype == FLOAT8}


def _in_float8(name: str, weight: Tensor) -> Tensor:
    largest = weight.detach().abs().max()
    if largest > torch.finfo(FLOAT8).max:
        raise ValueError(f'{name} has values up to {largest:g}, which float8 has no room for: export with '
                         "dtype='bfloat16'")
    return weight.to(FLOAT8)


def _fused_weights(job: ExportJob) -> Callable[[str], Tensor]:
    """The base as it was trained with, plus the adapters; the sum is rounded once."""
    method = job.method
    wide = torch.float64 if job.backbone.dtype == torch.float64 else torch.float32
    if job.backbone.quantization is None:
        base = {name.replace('.base_layer.', '.'): w for name, w in method.base.state_dict().items()}
    else:
        backbone = copy.copy(job.backbone)
        backbone.quantization = None
        base = backbone.load_network().state_dict()
    adapter = unwrap(method.student).adapter
    with job.weights():
        changes = {f'{name}.weight': (layer.lora_B[adapter].weight.detach().to('cpu', wide, copy=True),
                                      layer.lora_A[adapter].weight.detach().to('cpu', wide, copy=True),
                                      layer.scaling[adapter])
                   for name, layer in method.base.named_modules()
                   if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A}

    def value(name: str) -> Tensor:
        if name not in changes:
            return base[name]
        up, down, scale = changes[name]
        fused = base[name].to('cpu', wide) + up @ down * scale
        if not fused.isfinite().all():
            raise ValueError(f'the adapter of {name} holds NaN or infinity: the student has diverged; export an '
                             'earlier checkpoint')
        return fused

    return value


def write_weights(folder: Path, shapes: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
    """Writes the weights of a network in diffusers' layout, one after the other.

    Args:
        folder (Path): Where to.
        shapes (dict): Tensors without memory, of the shapes and dtypes to write, by name.
        value (Callable): The weight of a name, on any device and of any dtype.
    """
    split = split_torch_state_dict_into_shards(
        dict(shapes), filename_pattern=SAFETENSORS_WEIGHTS_NAME.replace('.safetensors', '{suffix}.safetensors'),
        max_shard_size=MAX_FILE)
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: shapes[name] for name in names}, value)
    if split.is_sharded:
        index = dict(metadata=split.metadata, weight_map=split.tensor_to_filename)
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')


def write_safetensors(path: Path, shapes: Mapping[str, Tensor], value: Callable[[str], Tensor]) -> None:
    """Writes a safetensors file of tensors that are made one after the other: the length of a JSON header, the header,
    and the data. The library's own writer wants all tensors at once. Arguments as in `write_weights`."""
    names = sorted(shapes, key=lambda name: (list(DTYPES).index(shapes[name].dtype), name))
    header: dict[str, object] = {'__metadata__': dict(format='pt')}
    end = 0
    for name in names:
        start, end = end, end + shapes[name].nbytes
        header[name] = dict(dtype=DTYPES[shapes[name].dtype], shape=list(shapes[name].shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name in names:
            tensor = value(name).detach().to('cpu', shapes[name].dtype)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
