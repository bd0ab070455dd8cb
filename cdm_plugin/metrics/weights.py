"""Weights of judges from a file, a folder, the hub or a URL; only tensors are unpickled."""
import os
from typing import Any
from urllib.parse import unquote

import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor

from cdm_plugin import assets


def find_file(pretrained: str, name: str) -> str:
    """The path of one file of a judge.

    Args:
        pretrained (str): The file itself, a folder that holds it, or a hub id.
        name (str): The file's name.

    Raises:
        OSError: There is none, or the hub cannot be reached.
    """
    path = assets.resolve(pretrained)
    if os.path.isdir(path):
        path = os.path.join(path, name)
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
    return path if os.path.isfile(path) else hf_hub_download(pretrained, name)


def load_state(pretrained: str, name: str = '') -> dict[str, Tensor]:
    """A state dict, on the CPU.

    Args:
        pretrained (str): A URL of a file, or what `find_file` takes.
        name (str): The file's name in a folder or on the hub.

    Raises:
        OSError: There is none, or the network cannot be reached.
    """
    if pretrained.startswith('https://'):
        return torch.hub.load_state_dict_from_url(pretrained, map_location='cpu', weights_only=True,
                                                  file_name=os.path.basename(unquote(pretrained)))
    path = find_file(pretrained, name)
    if path.endswith('.safetensors'):
        return load_file(path)
    return torch.load(path, map_location='cpu', weights_only=True)


def download_command(pretrained: str, name: str = '') -> str:
    """How a person gets what `load_state` did not find."""
    if pretrained.startswith('https://'):
        return f'curl -LO {pretrained}'
    return f'hf download {pretrained} {name}'.strip()


def image_processor(kind: str) -> type[Any]:
    """The image processor of transformers that works with Pillow alone, such as 'CLIPImageProcessor'."""
    # transformers 5 calls it ...Pil, and gives the plain name to the one that needs torchvision
    return getattr(transformers, f'{kind}Pil', None) or getattr(transformers, kind)
