"""LoRA files by the names that other tools read: diffusers' loaders and converters, ComfyUI's key maps, sd-scripts."""
import re

import diffusers
import pytest
import torch
from mmengine.registry import MODELS
from safetensors.torch import load_file
from tests_support import perturb
from torch import nn

from cdm_plugin.backbones import (
    Flux2KleinBackbone,
    FluxBackbone,
    Krea2Backbone,
    LongCatImageBackbone,
    QwenImageBackbone,
    SD3Backbone,
    ZImageBackbone,
)
from cdm_plugin.export.sd_scripts import sd_scripts_lora
from cdm_plugin.roles.lora import save_lora

FLUX = dict(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=4, axes_dims_rope=[2, 2, 4])
# Networks of two blocks of each kind.
NETWORKS = {
    SD3Backbone: dict(
        sample_size=4, patch_size=2, in_channels=4, out_channels=4, pos_embed_max_size=4, num_layers=2,
        num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16, joint_attention_dim=8,
        pooled_projection_dim=4, qk_norm='rms_norm', dual_attention_layers=(0,)),
    FluxBackbone: FLUX,
    LongCatImageBackbone: FLUX,
    Flux2KleinBackbone: dict(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 2, 2), guidance_embeds=False),
    QwenImageBackbone: dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(2, 2, 4)),
    ZImageBackbone: dict(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=2, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=[4, 2, 2], axes_lens=[64, 32, 32]),
    Krea2Backbone: dict(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, timestep_embed_dim=16, text_hidden_dim=8, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=2, num_refiner_text_blocks=2,
        axes_dims_rope=(2, 2, 4))}

# What ComfyUI reads behind `transformer.` (comfy/lora.py, model_lora_keys_unet, and the maps of comfy/utils.py, as of
# version 0.26): a layer's name in diffusers, N for a number, and its name there, with the third of the rows it is.
DOUBLE = {
    'transformer_blocks.N.attn.to_q': ('double_blocks.N.img_attn.qkv', 0),
    'transformer_blocks.N.attn.to_k': ('double_blocks.N.img_attn.qkv', 1),
    'transformer_blocks.N.attn.to_v': ('double_blocks.N.img_attn.qkv', 2),
    'transformer_blocks.N.attn.to_out.0': ('double_blocks.N.img_attn.proj', None),
    'transformer_blocks.N.attn.add_q_proj': ('double_blocks.N.txt_attn.qkv', 0),
    'transformer_blocks.N.attn.add_k_proj': ('double_blocks.N.txt_attn.qkv', 1),
    'transformer_blocks.N.attn.add_v_proj': ('double_blocks.N.txt_attn.qkv', 2),
    'transformer_blocks.N.attn.to_add_out': ('double_blocks.N.txt_attn.proj', None)}
SINGLE = {
    'single_transformer_blocks.N.attn.to_q': ('single_blocks.N.linear1', 0),
    'single_transformer_blocks.N.attn.to_k': ('single_blocks.N.linear1', 1),
    'single_transformer_blocks.N.attn.to_v': ('single_blocks.N.linear1', 2)}
COMFYUI = {
    SD3Backbone: {
        'transformer_blocks.N.attn.to_q': ('joint_blocks.N.x_block.attn.qkv', 0),
        'transformer_blocks.N.attn.to_k': ('joint_blocks.N.x_block.attn.qkv', 1),
        'transformer_blocks.N.attn.to_v': ('joint_blocks.N.x_block.attn.qkv', 2),
        'transformer_blocks.N.attn.to_out.0': ('joint_blocks.N.x_block.attn.proj', None),
        'transformer_blocks.N.attn2.to_q': ('joint_blocks.N.x_block.attn2.qkv', 0),
        'transformer_blocks.N.attn2.to_k': ('joint_blocks.N.x_block.attn2.qkv', 1),
        'transformer_blocks.N.attn2.to_v': ('joint_blocks.N.x_block.attn2.qkv', 2),
        'transformer_blocks.N.attn2.to_out.0': ('joint_blocks.N.x_block.attn2.proj', None),
        'transformer_blocks.N.attn.add_q_proj': ('joint_blocks.N.context_block.attn.qkv', 0),
        'transformer_blocks.N.attn.add_k_proj': ('joint_blocks.N.context_block.attn.qkv', 1),
        'transformer_blocks.N.attn.add_v_proj': ('joint_blocks.N.context_block.attn.qkv', 2),
        'transformer_blocks.N.attn.to_add_out': ('joint_blocks.N.context_block.attn.proj', None)},
    FluxBackbone: {**DOUBLE, **SINGLE},
    LongCatImageBackbone: {**DOUBLE, **SINGLE},  # a Flux there
    Flux2KleinBackbone: {
        **DOUBLE,
        'single_transformer_blocks.N.attn.to_qkv_mlp_proj': ('single_blocks.N.linear1', None),
        'single_transformer_blocks.N.attn.to_out': ('single_blocks.N.linear2', None)},
    QwenImageBackbone: {  # as in diffusers
        f'transformer_blocks.N.attn.{layer}': (f'transformer_blocks.N.attn.{layer}', None) for layer in (
            'to_q', 'to_k', 'to_v', 'to_out.0', 'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out')},
    ZImageBackbone: {
        f'{blocks}.N.attention.{layer}': (f'{blocks}.N.attention.{own}', part)
        for blocks in ('layers', 'noise_refiner', 'context_refiner')
        for layer, own, part in (
            ('to_q', 'qkv', 0), ('to_k', 'qkv', 1), ('to_v', 'qkv', 2), ('to_out.0', 'out', None))},
    Krea2Backbone: {
        f'{blocks}.N.attn.{layer}': (f'{own_blocks}.N.attn.{own}', None)
        for blocks, own_blocks in (('transformer_blocks', 'blocks'),
                                   ('text_fusion.layerwise_blocks', 'txtfusion.layerwise_blocks'),
                                   ('text_fusion.refiner_blocks', 'txtfusion.refiner_blocks'))
        for layer, own in (('to_q', 'wq'), ('to_k', 'wk'), ('to_v', 'wv'), ('to_gate', 'gate'), ('to_out.0', 'wo'))}}


@pytest.fixture(scope='module')
def adapted(tmp_path_factory):
    """A network with adapters by its backbone, and the LoRA file that is written of them."""
    made = {}

    def get(backbone):
        if backbone not in made:
            torch.manual_seed(0)
            method = MODELS.build(dict(
                type='CDM', image_size=16, lora=dict(rank=2, alpha=6), backbone=dict(
                    type=backbone, config=NETWORKS[backbone], codec=dict(type='PixelCodec', scale=2),
                    conditioner=dict(type='ClassConditioner', num_classes=2))))
            perturb(method.student)
            made[backbone] = method, load_file(save_lora(method.student, str(tmp_path_factory.mktemp('lora'))))
        return made[backbone]

    return get


def changes(weights, up='.lora_B.weight', down='.lora_A.weight', inputs=None):
    """What a LoRA file adds to each layer, as a reader without metadata adds it; of large layers, what that makes of so
    many random inputs."""
    found = {}
    for name, weight in weights.items():
        if name.endswith(up):
            right = weights[name.removesuffix(up) + down]
            if inputs is not None:
                right = right @ torch.randn(right.shape[1], inputs, generator=torch.Generator().manual_seed(0))
            found[name.removesuffix(up)] = weight @ right
    return found


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert change.abs().max() > 1e-3
        torch.testing.assert_close(found[name], change, rtol=1e-4, atol=1e-6)


def numbered(name):
    """The name with N for its block's number, and that number."""
    number = re.search(r'\.(\d+)\.', name).group(1)
    return name.replace(f'.{number}.', '.N.', 1), number


@pytest.mark.parametrize('backbone', [b for b in NETWORKS if b is not LongCatImageBackbone])
def test_the_pipelines_loader_takes_the_file(backbone, adapted):
    """Its names are diffusers' own, so that no converter changes them, and its network adds what was trained."""
    method, weights = adapted(backbone)
    pipeline = getattr(diffusers, backbone.pipeline_name)
    found = pipeline.lora_state_dict({name: w.clone() for name, w in weights.items()})
    assert found.keys() == weights.keys() and all(torch.equal(w, weights[name]) for name, w in found.items())
    network = method.backbone.network_class.from_config(method.base.config)
    pipeline.load_lora_into_transformer(found, transformer=network, **(
        dict(network_alphas=None) if backbone is FluxBackbone else {}))
    layers = {name: m for name, m in network.named_modules() if hasattr(m, 'get_delta_weight')}
    close({name: m.get_delta_weight('default_0') for name, m in layers.items()},
          {name: method.base.get_submodule(name).get_delta_weight('student') for name in layers})
    assert len(layers) == len(weights) / 2


@pytest.mark.parametrize('backbone', NETWORKS)
def test_comfyui_knows_every_layer(backbone, adapted):
    method, weights = adapted(backbone)
    table = COMFYUI[backbone]
    layers = {name.removeprefix('transformer.').rpartition('.lora_')[0] for name in weights}
    assert all(name.startswith('transformer.') and name.endswith(('.lora_A.weight', '.lora_B.weight'))
               for name in weights)
    assert {numbered(layer)[0] for layer in layers} == table.keys()
    for layer in layers:  # ComfyUI counts rows of a part by the width of the network
        part = table[numbered(layer)[0]][1]
        if part is not None:
            assert len(weights[f'transformer.{layer}.lora_B.weight']) == method.backbone.width


@pytest.mark.parametrize('backbone', [Flux2KleinBackbone, Krea2Backbone])
def test_diffusers_converter_brings_comfyuis_names_back(backbone, adapted):
    """ComfyUI's layers by the table above are those that diffusers' converter of its LoRA files takes for these."""
    _, weights = adapted(backbone)
    fused = {}
    for name, weight in sorted(weights.items()):
        layer, _, kind = name.removeprefix('transformer.').rpartition('.lora_')
        pattern, number = numbered(layer)
        own, part = COMFYUI[backbone][pattern]
        fused.setdefault((own.replace('.N.', f'.{number}.'), kind), {})[part or 0] = weight
    native = {f'diffusion_model.{own}.lora_{kind}': (torch.cat if kind.startswith('A') else lambda t: torch.block_diag(
        *t))([parts[i] for i in sorted(parts)]) for (own, kind), parts in fused.items()}
    assert len(native) < len(weights) or backbone is Krea2Backbone
    found = getattr(diffusers, backbone.pipeline_name).lora_state_dict(native)
    close(changes(found), changes(weights))


@pytest.mark.parametrize('backbone', [QwenImageBackbone, ZImageBackbone])
def test_diffusers_converter_brings_kohyas_names_back(backbone, adapted):
    """Those with underscores and an alpha, as kohya's tools write these architectures."""
    _, weights = adapted(backbone)
    flat = {}
    for name, weight in weights.items():
        layer, _, kind = name.removeprefix('transformer.').rpartition('.lora_')
        own = 'lora_unet_' + layer.replace('.', '_')
        flat[f'{own}.lora_{dict(A="down", B="up")[kind[0]]}.weight'] = weight
        flat[f'{own}.alpha'] = torch.tensor(2.0)
    found = getattr(diffusers, backbone.pipeline_name).lora_state_dict(flat)
    close(changes(found), changes(weights))


# sd-scripts: layers of its networks/lora_sd3.py and lora_flux.py (their modules' names in library/sd3_models.py and
# flux_models.py), written down by hand.


def test_a_file_for_sd_scripts_has_its_layers_of_sd3(adapted):
    method, weights = adapted(SD3Backbone)
    converted = sd_scripts_lora({name.removeprefix('transformer.'): w for name, w in weights.items()}, method.base,
                                SD3Backbone.sd_scripts_layers)
    found = changes(converted, '.lora_up.weight', '.lora_down.weight')
    first = ['x_block_attn_qkv', 'x_block_attn_proj', 'x_block_attn2_qkv', 'x_block_attn2_proj',
             'context_block_attn_qkv', 'context_block_attn_proj']
    second = ['x_block_attn_qkv', 'x_block_attn_proj', 'context_block_attn_qkv']  # the last block's text goes nowhere
    assert found.keys() == {f'lora_unet_joint_blocks_{i}_{layer}' for i, layers in enumerate((first, second))
                            for layer in layers}
    for name, change in found.items():
        assert converted[f'{name}.alpha'] == len(converted[f'{name}.lora_down.weight']) == (
            6 if name.endswith('qkv') else 2) and change.shape == (48 if name.endswith('qkv') else 16, 16)
    for layer, change in changes(weights).items():
        pattern, number = numbered(layer.removeprefix('transformer.'))
        own, part = COMFYUI[SD3Backbone][pattern]
        whole = found['lora_unet_' + own.replace('N', number).replace('.', '_')]
        rows = slice(None) if part is None else slice(16 * part, 16 * part + 16)
        torch.testing.assert_close(whole[rows], change, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize('more', [(), ('ff.net.0.proj', 'ff.net.2', 'ff_context.net.0.proj', 'ff_context.net.2',
                                       'proj_mlp', 'proj_out')], ids=['attention', 'feed-forward too'])
def test_diffusers_converter_brings_sd_scripts_names_of_flux_back(more):
    """It has the published widths built in, so these are the shapes of FLUX.1-dev."""
    with torch.device('meta'):
        network = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    torch.manual_seed(0)
    weights, targets = {}, (*FluxBackbone.lora_targets, *more)
    for name, module in network.named_modules():
        if '_blocks.' in name and isinstance(module, nn.Linear) and name.endswith(targets):
            weights[f'{name}.lora_A.weight'] = torch.randn(2, module.in_features)
            weights[f'{name}.lora_B.weight'] = torch.randn(module.out_features, 2)
    converted = sd_scripts_lora(weights, network, FluxBackbone.sd_scripts_layers)
    layers = ['double_blocks_0_img_attn_qkv', 'double_blocks_0_img_attn_proj', 'double_blocks_0_txt_attn_qkv',
              'double_blocks_0_txt_attn_proj', 'single_blocks_0_linear1']
    if more:
        layers += ['double_blocks_0_img_mlp_0', 'double_blocks_0_img_mlp_2', 'double_blocks_0_txt_mlp_0',
                   'double_blocks_0_txt_mlp_2', 'single_blocks_0_linear2']
    assert {name.partition('.')[0] for name in converted} == {f'lora_unet_{layer}' for layer in layers}
    found = changes(diffusers.FluxPipeline.lora_state_dict(converted), inputs=3)
    found = {name.removeprefix('transformer.'): change for name, change in found.items()}
    if not more:  # of linear1, what no adapter changes
        assert not found.pop('single_transformer_blocks.0.proj_mlp').any()
    close(found, changes(weights, inputs=3))


def test_layers_that_sd_scripts_lacks_are_named(adapted):
    method, _ = adapted(SD3Backbone)
    weights = {f'proj_out.lora_{kind}.weight': torch.ones(1, 1) for kind in 'AB'}
    with pytest.raises(ValueError, match="no place for the adapters of 'proj_out'.*target_modules"):
        sd_scripts_lora(weights, method.base, SD3Backbone.sd_scripts_layers)
