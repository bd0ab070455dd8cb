"""Tiny pipelines of every architecture, and the warnings of a test."""
import logging

import pytest
from mmengine.logging import MMLogger

import tiny_pipelines
from cdm_plugin.backbones import FluxBackbone, LongCatImageBackbone, SD3Backbone
from tiny_pipelines import Tiny


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
            else:
                tiny_pipelines.save_tiny_flux(folder, guidance_embeds=name == 'flux_dev')
                made[name] = Tiny(name, FluxBackbone, folder, guidance='true_cfg_scale')
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


@pytest.fixture(scope='session', params=['sd3', 'longcat', 'flux'])
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
