"""Names of the shipped recipes, and what `cdm doctor` finds in them."""
import contextlib
import functools
import socket
import types
from unittest import mock

CDM = 'digits/cdm_sd3-digits_1xb32_4step_800.py'
DECOUPLED = 'digits/decoupled-dmd_sd3-digits_1xb32_4step_800.py'
DMD2 = 'digits/dmd2_sd3-digits_1xb32_4step_800.py'
TEACHER = 'digits/teacher_flow-matching_sd3-digits_1xb128_6k.py'
SD3 = 'sd3/cdm_sd3-medium_8xb16_4step_4k.py'
SD3_LORA = 'sd3/cdm_lora_sd3-medium_1xb4_4step_4k.py'
LONGCAT = 'longcat/cdm_longcat-image_8xb8_4step_2k.py'
LONGCAT_LORA = 'longcat/cdm_lora_longcat-image_1xb4_4step_2k.py'
SD3_ZERO2 = 'sd3/cdm_sd3-medium_8xb16_zero2_4step.py'
SD3_OFFLOAD = 'sd3/cdm_sd3-medium_1xb4_zero2-offload_4step.py'
LONGCAT_ZERO3 = 'longcat/cdm_longcat-image_8xb8_zero3_4step.py'
LONGCAT_OFFLOAD = 'longcat/cdm_longcat-image_1xb2_zero3-offload_4step.py'
FLUX_LORA = 'flux/cdm_lora_flux-dev_1xb1_4step_4k.py'


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


@functools.lru_cache(maxsize=None)
def report_of(recipe, gpus=1):
    """The doctor's report of a shipped recipe, made without a network and with room on the disk."""
    from cdm_plugin.config import read_config
    from cdm_plugin.doctor import diagnose
    room = types.SimpleNamespace(free=10**15)
    with nothing_loads(), mock.patch('shutil.disk_usage', return_value=room):
        return diagnose(read_config(recipe), gpus)
