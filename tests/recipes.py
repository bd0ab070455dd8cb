"""Names of the shipped recipes, and what `cdm doctor` finds in them."""
import contextlib
import functools
import os
import pickle
import re
import socket
import types
from pathlib import Path
from unittest import mock

import pytest

CDM = 'digits/cdm_sd3-digits_1xb32_4step_800.py'
DECOUPLED = 'digits/decoupled-dmd_sd3-digits_1xb32_4step_800.py'
DMD2 = 'digits/dmd2_sd3-digits_1xb32_4step_800.py'
TEACHER = 'digits/teacher_flow-matching_sd3-digits_1xb128_6k.py'
SD3 = 'sd3/cdm_sd3-medium_8xb16_4step_4k.py'
SD3_CONSISTENT = 'sd3/cdm-consistent_sd3-medium_8xb16_4step_2k.py'
SD3_GAN = 'sd3/dmd2-gan_sd3-medium_8xb16_4step_4k.py'
SD3_LORA = 'sd3/cdm_lora_sd3-medium_1xb4_4step_4k.py'
LONGCAT = 'longcat/cdm_longcat-image_8xb8_4step_2k.py'
LONGCAT_LORA = 'longcat/cdm_lora_longcat-image_1xb4_4step_2k.py'
SD3_ZERO2 = 'sd3/cdm_sd3-medium_8xb16_zero2_4step.py'
SD3_OFFLOAD = 'sd3/cdm_sd3-medium_1xb4_zero2-offload_4step.py'
SD35_MEDIUM = 'sd3/cdm_sd3.5-medium_8xb16_zero2_4step.py'
SD35_LARGE = 'sd3/cdm_sd3.5-large_8xb8_zero3-offload_4step.py'
LONGCAT_ZERO3 = 'longcat/cdm_longcat-image_8xb8_zero3_4step.py'
LONGCAT_OFFLOAD = 'longcat/cdm_longcat-image_1xb2_zero3-offload_4step.py'
FLUX_LORA = 'flux/cdm_lora_flux-dev_1xb1_4step_4k.py'
FLUX2_LORA = 'flux2/cdm_lora_flux2-dev_1xb1_4step_4k.py'
KLEIN = 'flux2/cdm_flux2-klein-4b_8xb8_zero3_4step.py'
KLEIN_CONSISTENT = 'flux2/cdm-consistent_flux2-klein-4b_8xb8_zero3_4step.py'
KLEIN_DMD2 = 'flux2/dmd2-aware_flux2-klein-4b_8xb8_zero3_4step.py'
KLEIN_LORA = 'flux2/cdm_lora_flux2-klein-4b_1xb4_4step_2k.py'
KREA2 = 'krea2/cdm_krea2_8xb4_zero3-offload_4step.py'
KREA2_LORA = 'krea2/cdm_lora_krea2_1xb1_4step_4k.py'
QWEN_IMAGE = 'qwen-image/cdm_qwen-image_8xb4_zero3-offload_4step.py'
QWEN_IMAGE_CONSISTENT = 'qwen-image/cdm-consistent_qwen-image_8xb4_zero3-offload_4step.py'
QWEN_IMAGE_DMD2 = 'qwen-image/dmd2-aware_qwen-image_8xb4_zero3-offload_4step.py'
QWEN_IMAGE_LORA = 'qwen-image/cdm_lora_qwen-image_1xb1_4step_4k.py'
Z_IMAGE = 'z-image/cdm_z-image_8xb4_zero3_4step.py'
Z_IMAGE_CONSISTENT = 'z-image/cdm-consistent_z-image_8xb4_zero3_4step.py'
Z_IMAGE_DMD2 = 'z-image/dmd2-aware_z-image_8xb4_zero3_4step.py'
Z_IMAGE_LORA = 'z-image/cdm_lora_z-image_1xb4_4step_2k.py'

# Every architecture, with weights of its own and with adapters; the others run with `-m slow`.
QUICK = (CDM, TEACHER, SD3, SD3_LORA, LONGCAT, FLUX_LORA)
# Where the processes of a test run share reports, set by conftest.py.
SHARED: Path | None = None


def recipe_params(names):
    """Parameters of a test of recipes: one of each kind always, all of them with `-m slow`."""
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in names]


def gpus_of(recipe):
    """The number of GPUs in a recipe's name."""
    return int(re.search(r'_(\d+)xb', recipe).group(1))


def shipped():
    """All of them, sorted."""
    from cdm_plugin.config import RECIPES
    return sorted(str(p.relative_to(RECIPES)) for p in RECIPES.glob('[!_]*/*.py'))


@contextlib.contextmanager
def nothing_loads():
    """No weights are read and no connection is made inside."""
    import diffusers
    import safetensors.torch
    import torch
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError(f'something is loaded: {args} {kwargs}')

    with contextlib.ExitStack() as stack:
        for owner, name in (
                (diffusers.ModelMixin, 'from_pretrained'), (diffusers.DiffusionPipeline, 'from_pretrained'),
                (transformers.PreTrainedModel, 'from_pretrained'), (safetensors.torch, 'load_file'), (torch, 'load'),
                (socket.socket, 'connect'), (socket, 'getaddrinfo')):
            stack.enter_context(mock.patch.object(owner, name, refuse))
        yield


@functools.cache
def report_of(recipe):
    """The doctor's report of a shipped recipe on its number of GPUs, made without a network and with room on the disk,
    once in a test run."""
    from cdm_plugin.commands.doctor.diagnosis import diagnose
    from cdm_plugin.config import read_config
    file = SHARED / f'{Path(recipe).stem}.report'
    if not file.exists():
        room = types.SimpleNamespace(free=10**15)
        with nothing_loads(), mock.patch('shutil.disk_usage', return_value=room):
            report = diagnose(read_config(recipe), gpus_of(recipe))
        mine = file.with_suffix(f'.{os.getpid()}')
        mine.write_bytes(pickle.dumps(report))
        mine.rename(file)
    return pickle.loads(file.read_bytes())
