"""What a backbone of one's own lacks is named when it is built, not where it is missed."""
import diffusers
import pytest
import torch
from mmengine.registry import MODELS
from tests_support import TINY_SD3, tiny_backbone
from torch import nn

from cdm_plugin.backbones import Backbone, SD3Backbone
from cdm_plugin.export import export

PARTS = {name: tiny_backbone()[name] for name in ('conditioner', 'codec')}


def build(base, **stated):
    """A backbone class that states these, built on tiny dimensions."""
    config = {key: value for key, value in TINY_SD3.items() if key not in stated.pop('unknown', ())}
    return type('AcmeBackbone', (base,), stated)(config=config, **PARTS)


def nothing(self, *args):
    """In the place of a method that is written."""


@pytest.mark.parametrize('stated, lacks', [
    ({}, 'lacks network_class (a ModelMixin and ConfigMixin), call, condition_widths:'),
    (dict(network_class=diffusers.SD3Transformer2DModel, call=nothing), 'lacks condition_widths:'),
    (dict(network_class=nn.Linear, call=nothing, condition_widths=nothing), 'lacks network_class (a ModelMixin'),
    (dict(network_class='Acme', call=nothing, condition_widths=nothing, build_network=nothing),
     'lacks network_class (a Module):')])
def test_all_that_is_lacking_is_named_at_once(stated, lacks):
    with pytest.raises(ValueError) as error:
        build(Backbone, **stated)
    assert f'the backbone AcmeBackbone {lacks}' in str(error.value)


def test_a_network_without_the_usual_keys_needs_members_in_their_place():
    class AcmeNetwork(diffusers.ModelMixin, diffusers.ConfigMixin):
        @diffusers.configuration_utils.register_to_config
        def __init__(self, channels: int = 4):
            super().__init__()

    stated = dict(network_class=AcmeNetwork, call=nothing, condition_widths=nothing)
    for name in ('latent_channels', 'default_latent_size'):
        kind = type('AcmeBackbone', (Backbone,), stated)
        with pytest.raises(ValueError, match=f'AcmeBackbone lacks {name}: the config of a AcmeNetwork has no '):
            kind(config={}, **PARTS)
        stated[name] = property(lambda self: 4) if name == 'latent_channels' else lambda self: (4, 4)
    assert type('AcmeBackbone', (Backbone,), stated)(config={}, **PARTS).latent_channels == 4


@pytest.mark.parametrize('returned, found', [
    (lambda x: (x,), 'returned a tuple'), (lambda x: x[:, :2], r'returned a Tensor \(2, 2, 4, 4\)'),
    (lambda x: None, 'returned a NoneType')])
def test_what_a_call_returns_is_looked_at(returned, found):
    backbone = build(SD3Backbone, call=lambda self, network, x, sigma, fields: returned(x))
    x = torch.zeros(2, 4, 4, 4)
    with pytest.raises(ValueError, match=r'AcmeBackbone\.call must return the velocity, a tensor \(2, 4, 4, 4\).*'
                                         + found):
        backbone.velocity(nn.Linear(1, 1), x, torch.ones(2), backbone.conditioner.encode([0, 1]))


@pytest.mark.parametrize('stated, lacks', [
    (dict(time_embedder=None), 'time_embedder'),
    (dict(time_embedding_width=Backbone.time_embedding_width, with_width=False), 'time_embedding_width')])
def test_what_the_anchor_aware_score_needs_is_named(stated, lacks):
    with_width = stated.pop('with_width', True)
    backbone = build(SD3Backbone, **stated)
    if not with_width:
        backbone.config.pop('num_attention_heads')
        backbone.build_network = lambda dtype=None: diffusers.SD3Transformer2DModel(**TINY_SD3)
    with pytest.raises(ValueError, match=f'AcmeBackbone lacks {lacks}, .*model.anchor_aware_fake'):
        MODELS.build(dict(type='DMD2', backbone=backbone, anchor_aware_fake=True))


def test_adapters_need_a_network_that_takes_them(monkeypatch):
    monkeypatch.setattr('cdm_plugin.roles.lora.PeftAdapterMixin', diffusers.loaders.IPAdapterMixin)
    with pytest.raises(ValueError, match='model.lora needs .* that takes adapters: derive SD3Transformer2DModel'):
        MODELS.build(dict(type='DMD2', backbone=tiny_backbone(), lora=dict(rank=2)))


def test_what_no_pipeline_knows_is_exported_as_a_network(tmp_path):
    backbone = build(SD3Backbone, pipeline_name=None, conditioner_type=None)
    backbone.save_pretrained(backbone.build_network(), tmp_path / 'base')
    again = type(backbone)(pretrained=str(tmp_path / 'base'), **PARTS)
    (tmp_path / 'base/text_encoder').mkdir()  # which nothing here knows how to call
    (tmp_path / 'base/cdm_parts.json').unlink()
    with pytest.raises(ValueError, match='conditioner is missing: .* AcmeBackbone states no conditioner_type'):
        type(backbone)(pretrained=str(tmp_path / 'base'), codec=PARTS['codec'])
    for name, base in dict(new=backbone, trained=again).items():
        card = (export(MODELS.build(dict(type='DMD2', backbone=base)), tmp_path / name) / 'README.md').read_text()
        assert 'distilled to make images in 4 steps' in card and "load_method('.')" in card
        assert ('The licence of the base model' in card) == (base is again)
