"""Tiny pipelines of every architecture, and the warnings of a test."""
import logging

import pytest
import tiny_pipelines
from mmengine.logging import MMLogger
from tiny_pipelines import Tiny

from cdm_plugin.backbones import (
    Flux2Backbone,
    Flux2KleinBackbone,
    FluxBackbone,
    Krea2Backbone,
    LongCatImageBackbone,
    QwenImageBackbone,
    SD3Backbone,
    ZImageBackbone,
)

# Whose training runs the code of the others, with text encoders that take long.
HEAVY = ('klein', 'flux2', 'krea2')
LONG = ('checkpointing_changes_no_gradient', 'half_precision', 'step_', 'exported_model', 'gan_on', 'offloaded',
        'every_text', 'velocity_is_float32')


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        name = getattr(item, 'callspec', None) and item.callspec.params.get('tiny')
        if name in HEAVY and any(part in item.originalname for part in LONG):
            item.add_marker('slow')


def true_guidance(scale):
    """Classifier-free guidance of pipelines that may also tell the network one."""
    return dict(true_cfg_scale=scale, negative_prompt=['', ''])


def from_zero(scale):
    """Classifier-free guidance of pipelines that count it from 0."""
    return dict(guidance_scale=scale - 1)


@pytest.fixture(scope='session')
def tinies(tmp_path_factory):
    """By name; each is written once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == 'sd3':
                tiny_pipelines.save_tiny_sd3(folder)
                made[name] = Tiny(name, SD3Backbone, folder)
            elif name == 'longcat':
                tiny_pipelines.save_tiny_longcat(folder)
                made[name] = Tiny(name, LongCatImageBackbone, folder, size=64, loading=dict(text_processor=None),
                                  options=dict(enable_prompt_rewrite=False))
            elif name == 'z_image':
                tiny_pipelines.save_tiny_z_image(folder)
                made[name] = Tiny(name, ZImageBackbone, folder, guidance=from_zero)
            elif name == 'krea2':
                tiny_pipelines.save_tiny_krea2(folder)
                made[name] = Tiny(name, Krea2Backbone, folder, guidance=from_zero)
            elif name == 'klein':
                tiny_pipelines.save_tiny_klein(folder)
                made[name] = Tiny(name, Flux2KleinBackbone, folder, size=32, packed=2)
            elif name == 'flux2':
                tiny_pipelines.save_tiny_flux2(folder)
                made[name] = Tiny(name, Flux2Backbone, folder, size=32, packed=2, guidance=lambda scale: {})
            elif name == 'qwen_image':
                tiny_pipelines.save_tiny_qwen_image(folder)
                made[name] = Tiny(name, QwenImageBackbone, folder, guidance=true_guidance)
            else:
                tiny_pipelines.save_tiny_flux(folder, guidance_embeds=name == 'flux_dev')
                made[name] = Tiny(name, FluxBackbone, folder, guidance=true_guidance)
        return made[name]

    return get


@pytest.fixture(scope='session')
def sd3(tinies):
    return tinies('sd3')


@pytest.fixture(scope='session')
def longcat(tinies):
    return tinies('longcat')


@pytest.fixture(scope='session')
def flux(tinies):
    return tinies('flux')


@pytest.fixture(scope='session')
def flux_dev(tinies):
    """Told its guidance, as FLUX.1-dev."""
    return tinies('flux_dev')


@pytest.fixture(scope='session')
def klein(tinies):
    return tinies('klein')


@pytest.fixture(scope='session')
def flux2(tinies):
    return tinies('flux2')


@pytest.fixture(scope='session')
def krea2(tinies):
    return tinies('krea2')


@pytest.fixture(scope='session')
def qwen_image(tinies):
    return tinies('qwen_image')


@pytest.fixture(scope='session')
def z_image(tinies):
    return tinies('z_image')


@pytest.fixture(scope='session', params=['sd3', 'longcat', 'flux', 'z_image', 'qwen_image', 'klein', 'krea2',
                                        pytest.param('flux2', marks=pytest.mark.slow)])
def tiny(request, tinies):
    """Every architecture."""
    return tinies(request.param)


class Records(logging.Handler):
    """Keeps the texts of warnings."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture
def warned():
    """Warnings so far, by who said them."""
    loggers = dict(ours=MMLogger.get_current_instance(), diffusers=logging.getLogger('diffusers'),
                   transformers=logging.getLogger('transformers'))
    records = {name: Records() for name in loggers}
    for name, logger in loggers.items():
        logger.addHandler(records[name])
    yield {name: r.texts for name, r in records.items()}
    for name, logger in loggers.items():
        logger.removeHandler(records[name])
