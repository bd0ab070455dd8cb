"""LoRA files as sd-scripts names and shapes them: several of diffusers' layers are one of its own."""
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

SD_SCRIPTS_FILE = 'sd_scripts_lora.safetensors'


def sd_scripts_lora(weights: Mapping[str, Tensor], network: nn.Module,
                    layers: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """The weights of a LoRA file by sd-scripts' names (`networks/lora_sd3.py`, `lora_flux.py`).

    Where one of its layers has the rows of several of diffusers', their A lie under each other and their B on the
    diagonal, so that the product is what they add to those rows. Its rank is the sum of theirs.

    Args:
        weights (dict): `<layer>.lora_A.weight`, (rank, in), and `<layer>.lora_B.weight`, (out, rank); scale 1.
        network (nn.Module): Whose layers they are, for the rows of layers that have no adapter.
        layers (dict): `Backbone.sd_scripts_layers`.

    Returns:
        dict: `lora_unet_<layer>.lora_down.weight`, `.lora_up.weight` and `.alpha`, the rank.

    Raises:
        ValueError: If a layer is none of `layers`.
    """
    left, converted = dict(weights), {}
    blocks = sorted({int(number) for name in weights for number in name.split('.')[1:2] if number.isdigit()})
    for block in blocks:
        for own, parts in layers.items():
            names = [part.format(block) for part in parts]
            downs = [left.pop(f'{name}.lora_A.weight') for name in names if f'{name}.lora_A.weight' in left]
            if not downs:
                continue
            ups = [left.pop(f'{name}.lora_B.weight') if f'{name}.lora_B.weight' in left else
                   downs[0].new_zeros(network.get_submodule(name).out_features, 0) for name in names]
            name, down = 'lora_unet_' + own.format(block).replace('.', '_'), torch.cat(downs)
            converted[f'{name}.lora_down.weight'] = down
            converted[f'{name}.lora_up.weight'] = torch.block_diag(*ups)
            converted[f'{name}.alpha'] = torch.tensor(float(len(down)))
    if left:
        raise ValueError(f'sd-scripts has no place for the adapters of {sorted(left)[0].rpartition(".lora_")[0]!r} '
                         '(model.lora.target_modules): attention and feed-forward layers of the blocks alone')
    return converted
