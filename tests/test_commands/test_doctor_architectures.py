"""What `cdm doctor` knows of an architecture comes from that architecture's own file, inside the package or out."""
import ast
import re
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import SD3Transformer2DModel
from mmengine.config import Config
from mmengine.registry import MODELS
from recipes import nothing_loads
from tests_support import TINY_SD3, tiny_backbone

import cdm_plugin
from cdm_plugin import backbones, codecs, conditioners, hooks
from cdm_plugin.backbones import Backbone
from cdm_plugin.commands.doctor.diagnosis import diagnose
from cdm_plugin.commands.doctor.report import format_report
from cdm_plugin.conditioners import Conditioner, Encoder, PipelineConditioner

PACKAGE = Path(cdm_plugin.__file__).parent
# The format of LoRA files has the name of the pipeline that it came with, and an exported card speaks of that pipeline.
ELSEWHERE = {'roles/lora.py': {'SD3LoraLoaderMixin'}, 'commands/init.py': {'sd3'},  # the digits' recipe
             'export/card.py': {'StableDiffusion3Pipeline', 'FluxGuidance'}}  # a node of ComfyUI


def config(backbone, **model):
    """A training config over a backbone."""
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
    return Config(dict(
        model=dict(type='CDM', backbone=backbone, **model),
        train_dataloader=dict(batch_size=4, dataset=dict(type='LabelDataset', num_classes=3)),
        optim_wrapper=dict(constructor='DistillationOptimWrapperConstructor', student=wrapper, fake=wrapper),
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=10),
        custom_hooks=[dict(type='CDMHook'), dict(type='SampleGridHook', interval=5)]))


# Inside the package


def published_encoders():
    clip, t5, qwen = transformers.CLIPTextConfig, transformers.T5Config, transformers.Qwen2_5_VLConfig
    large = clip(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 projection_dim=768)
    big = clip(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
               projection_dim=1280)
    xxl = t5(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
             feed_forward_proj='gated-gelu', tie_word_embeddings=False)
    seven = qwen(
        text_config=dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                         num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
        vision_config=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584),
        tie_word_embeddings=False)
    three = transformers.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True)
    vision = transformers.Qwen3VLConfig(
        text_config=dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
                         num_key_value_heads=8, head_dim=128, vocab_size=151936),
        vision_config=dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560,
                           num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]))
    projected, plain, encoder = (transformers.CLIPTextModelWithProjection, transformers.CLIPTextModel,
                                 transformers.T5EncoderModel)
    return dict(
        SD3TextConditioner=[(projected, large), (projected, big), (encoder, xxl)],
        FluxTextConditioner=[(plain, large), (encoder, xxl)],
        LongCatImageTextConditioner=[(transformers.Qwen2_5_VLForConditionalGeneration, seven)],
        QwenImageTextConditioner=[(transformers.Qwen2_5_VLForConditionalGeneration, seven)],
        Flux2TextConditioner=[(transformers.Mistral3ForConditionalGeneration, transformers.Mistral3Config(
            tie_word_embeddings=False))],
        Krea2TextConditioner=[(transformers.Qwen3VLModel, vision)],
        Flux2KleinTextConditioner=[(transformers.Qwen3ForCausalLM, three)],
        ZImageTextConditioner=[(transformers.Qwen3Model, three)])


@pytest.mark.parametrize('name, models', published_encoders().items())
def test_published_text_encoders_have_the_parameters_of_transformers_models(name, models):
    for (model, shape), encoder in zip(models, MODELS.get(name).published_encoders, strict=True):
        with torch.device('meta'):
            assert sum(p.numel() for p in model(shape).parameters()) == encoder.parameters


def shipped_backbones():
    return [cls for cls in vars(backbones).values() if isinstance(cls, type) and cls is not Backbone
            and issubclass(cls, Backbone)]


def words(file):
    """Identifiers of a module and its texts, but docstrings and names of recipes."""
    tree = ast.parse(file.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                  if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings and not node.value.endswith('.py'):
                yield node.value
        else:
            yield from (value for key in ('id', 'attr', 'name', 'asname', 'arg', 'module')
                        if isinstance(value := getattr(node, key, None), str))


def test_no_other_room_names_an_architecture():
    names = {name for cls in shipped_backbones() for name in (
        cls.__name__.removesuffix('Backbone'), cls.pipeline_name, cls.network_class.__name__,
        *(cls.network_class._no_split_modules or ()), *(cls.network_class._repeated_blocks or ()))}
    assert {'SD3', 'Flux', 'LongCatImage', 'StableDiffusion3Pipeline', 'JointTransformerBlock'} <= names
    pattern = re.compile(rf'\w*(?:{"|".join(sorted(names))})\w*', re.I)
    found = {}
    for root in (PACKAGE, Path(hooks.__file__).parent):
        for file in root.rglob('*.py'):
            if 'backbones' not in file.parts and '.mim' not in file.parts:
                named = {name for word in words(file) for name in pattern.findall(word)}
                found.update({str(file.relative_to(root)): named} if named else {})
    assert found == ELSEWHERE
    assert any(pattern.search(word) for word in words(Path(backbones.__file__).with_name('sd3.py')))


@pytest.mark.parametrize('name, dimensions', [
    # Flux Fill: latents, the masked image's and the mask's 256 pixels a token. Canny and Depth: latents, and a picture.
    ('FluxBackbone', dict(in_channels=384, out_channels=64, num_layers=1, num_single_layers=1)),
    ('FluxBackbone', dict(in_channels=128, out_channels=64, num_layers=1, num_single_layers=1)),
    ('SD3Backbone', dict(TINY_SD3, in_channels=9))], ids=['fill', 'canny, depth', 'sd3 with a mask'])
def test_networks_that_need_another_image_are_refused(name, dimensions, tmp_path):
    part = f"takes {dimensions['in_channels']} channels and gives {dimensions['out_channels']}"
    backbone = dict(tiny_backbone(), type=name, config=dimensions)
    with pytest.raises(ValueError, match=part):
        MODELS.build(dict(backbone))
    assert any(part in problem for problem in diagnose(config(backbone)).problems)
    # At load: a folder with such a network, and no word of it in the config.
    MODELS.get(name).network_class(**dict(dimensions, num_layers=1)).save_config(tmp_path / 'transformer')
    with pytest.raises(ValueError, match=part):
        MODELS.build(dict(backbone, config=None, pretrained=str(tmp_path)))


# From outside


class AcmeNetwork(SD3Transformer2DModel):
    """Another class than any that the package knows."""


class AcmeAutoencoder(diffusers.AutoencoderKL):
    """Likewise."""


@MODELS.register_module()
class AcmeCodec(codecs.VAECodec):
    vae_class = AcmeAutoencoder


@MODELS.register_module()
class AcmeTextConditioner(PipelineConditioner):
    pipeline_name = 'AcmePipeline'
    published_encoders = (Encoder('text_encoder', 'Acme-7B', 7_000_000_000),
                          Encoder('text_encoder_2', 'Acme-1B', 1_000_000_000))

    @classmethod
    def expected_tokens(cls, lines=3, **arguments):
        return 64 * lines


@MODELS.register_module()
class AcmeCountedBackbone(Backbone):
    network_class = AcmeNetwork
    pipeline_name = 'AcmePipeline'
    conditioner_type = 'AcmeTextConditioner'
    time_embedder = 'time_text_embed'
    patch = 2
    published_scheduler = dict(shift=5.0)
    published_vae = dict(block_out_channels=(4, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=2,
                         down_block_types=('DownEncoderBlock2D',) * 3, up_block_types=('UpDecoderBlock2D',) * 3)

    def call(self, network, x, sigma, fields):
        return network(x, timestep=sigma, encoder_hidden_states=fields['encoder_hidden_states'],
                       pooled_projections=fields['pooled_projections'], return_dict=False)[0]

    def condition_widths(self):
        return dict(encoder_hidden_states=8, pooled_projections=4)


def test_an_architecture_from_outside_gets_a_full_report():
    """Its classes alone say what is published: the model is not on this machine."""
    backbone = dict(type='AcmeCountedBackbone', pretrained='acme/acme-1', config=dict(TINY_SD3),
                    conditioner=dict(dtype='bfloat16', lines=2))
    with nothing_loads():
        report = diagnose(config(backbone, image_size=16))
    assert report.problems == []
    assert not any('not counted' in note or 'could not be estimated' in note for note in report.warnings)
    assert report.recipe['backbone'] == 'AcmeCountedBackbone, acme/acme-1'
    # Three levels of the autoencoder: a latent is 4 pixels wide, a token 2 latents.
    assert report.recipe['image'] == '16x16 pixels, 4 tokens, 128 of text'
    assert 'after the shift of 5' in report.recipe['sample_sigmas']
    assert report.part('text encoders').weights == 2 * 8_000_000_000
    assert report.part('text encoders').note == 'Acme-7B 7.00 B, Acme-1B 1.00 B'
    vae = AcmeAutoencoder(**AcmeCountedBackbone.published_vae)
    assert report.part('VAE').parameters == sum(p.numel() for p in vae.parameters())
    network = AcmeNetwork(**TINY_SD3)
    assert report.part('student').parameters == sum(p.numel() for p in network.parameters())
    assert {'VAE, 1 image', 'student, 4 with gradient'} <= set(report.activations)
    assert report.phases and report.calls.equivalents > 0 and len(report.sharing) == 6
    assert 'AcmeCountedBackbone' in format_report(report)


def test_codec_of_an_architecture_from_outside_is_counted():
    backbone = dict(type='AcmeCountedBackbone', pretrained='acme/acme-1', config=dict(TINY_SD3),
                    codec=dict(type='AcmeCodec', pretrained='acme/acme-1'))
    report = diagnose(config(backbone, image_size=16))
    assert report.problems == [] and report.part('VAE').parameters > 0


def test_a_lazy_autoencoder_is_there_only_while_something_is_decoded():
    reports = [diagnose(config(dict(type='AcmeCountedBackbone', pretrained='acme/acme-1', config=dict(TINY_SD3),
                                    codec=dict(lazy=lazy)), image_size=16)) for lazy in (False, True)]
    assert [any(part.name == 'VAE' for part in report.parts) for report in reports] == [True, False]
    one, lazy = (report.activations['VAE, 1 image'] for report in reports)
    assert lazy == one + reports[0].part('VAE').weights


def test_repeated_blocks_are_diffusers_own():
    assert MODELS.build(dict(tiny_backbone(), type='AcmeCountedBackbone')).repeated_blocks == ('JointTransformerBlock',)


@MODELS.register_module()
class AcmeHeavyConditioner(Conditioner):

    def __init__(self):
        raise AssertionError('this may load anything')


@MODELS.register_module()
class AcmeLabelConditioner(conditioners.ClassConditioner):
    """Reads no weights, so it is built."""


@MODELS.register_module()
class AcmeHeavyCodec(codecs.Codec):
    scale = 2

    def __init__(self):
        raise AssertionError('this may load anything')


def test_parts_from_outside_are_examined_as_far_as_possible(monkeypatch):
    backbone = dict(tiny_backbone(), type='AcmeCountedBackbone', conditioner=dict(type='AcmeHeavyConditioner'))
    report = diagnose(config(backbone))
    assert report.problems == [] and 'AcmeHeavyConditioner is not counted' in report.warnings[0]
    assert report.phases and report.part('student').parameters == sum(
        p.numel() for p in SD3Transformer2DModel(**TINY_SD3).parameters())

    def needs_values(self, network, x, sigma, fields):
        return x * float(x.mean())

    monkeypatch.setattr(AcmeCountedBackbone, 'call', needs_values)
    report = diagnose(config(backbone))
    assert report.problems == [] and any('activations could not be estimated' in w for w in report.warnings)


def test_light_parts_from_outside_are_built_and_heavy_codecs_are_not():
    light = dict(tiny_backbone(), conditioner=dict(type='AcmeLabelConditioner', num_classes=3, num_tokens=2))
    report = diagnose(config(light))
    assert report.problems == [] and not any('not counted' in note for note in report.warnings)
    assert report.recipe['image'].endswith('2 of text')
    heavy = diagnose(config(dict(tiny_backbone(), codec=dict(type='AcmeHeavyCodec'))))
    assert heavy.problems == [] and 'AcmeHeavyCodec is not counted' in heavy.warnings[0]
    assert heavy.recipe['image'].startswith('8x8 pixels, 4 tokens')
