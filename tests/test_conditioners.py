"""Conditioners, and a whole SD3 model against diffusers' StableDiffusion3Pipeline."""
import os

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from mmengine.registry import MODELS
from tests_support import tiny_backbone
from tiny_pipelines import save_tiny_bert, save_tiny_sd3
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoTokenizer, BertModel

from cdm_plugin.backbones import SD3Backbone, SD3TextConditioner
from cdm_plugin.conditioners import ClassConditioner, Conditioner, TextEncoderConditioner
from cdm_plugin.conditioners.base import TextConditioner, visiting
from cdm_plugin.data.embeddings.files import write_embeddings
from cdm_plugin.export import export
from cdm_plugin.inference import load_method, sample_prompts

PROMPTS = ['a cat', 'dogs and birds']


# Class labels


def test_labels_become_unit_vectors():
    """Token i of class k is the unit vector i (num_classes + 1) + k; the null condition is one more class."""
    conditioner = ClassConditioner(num_classes=3, num_tokens=2)
    condition = conditioner.encode(torch.tensor([2, 0]))
    assert condition.fields['encoder_hidden_states'].argmax(-1).tolist() == [[2, 6], [0, 4]]
    assert condition.fields['pooled_projections'].tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert condition.fields['encoder_hidden_states'].shape == (2, 2, 8)
    assert (condition.fields['encoder_hidden_states'].sum(-1) == 1).all()
    null = conditioner.null()
    assert len(null) == 1 and null.fields['encoder_hidden_states'].argmax(-1).tolist() == [[3, 7]]
    assert null.fields['pooled_projections'].tolist() == [[0, 0, 0, 1]]


def test_every_token_of_every_class_differs():
    conditioner = ClassConditioner(num_classes=4, num_tokens=3)
    tokens = torch.cat([conditioner.encode([0, 1, 2, 3]).fields['encoder_hidden_states'],
                        conditioner.null().fields['encoder_hidden_states']]).flatten(0, 1)
    assert len(tokens.unique(dim=0)) == 15


@pytest.mark.parametrize('prompts', [['2', '0', '1'], [2, 0, 1], torch.tensor([2, 0, 1]), (2, '0', 1),
                                     torch.tensor([2, 0, 1], dtype=torch.int32)], ids=repr)
def test_labels_may_be_texts_numbers_or_tensors(prompts):
    condition = ClassConditioner(num_classes=3).encode(prompts)
    assert condition.fields['pooled_projections'].argmax(-1).tolist() == [2, 0, 1]


@pytest.mark.parametrize('prompts', [['a cat'], ['1.5'], ['']], ids=repr)
def test_texts_that_are_no_labels_are_refused(prompts):
    with pytest.raises(ValueError, match='ClassConditioner takes class labels .* check data.prompt or '
                                         'model.backbone.conditioner'):
        ClassConditioner(num_classes=3).encode(prompts)


@pytest.mark.parametrize('prompts', [[1.5], torch.tensor([0.25, 1.0])], ids=repr)
def test_fractions_are_refused(prompts):
    with pytest.raises(ValueError, match='class labels'):
        ClassConditioner(num_classes=3).encode(prompts)


@pytest.mark.parametrize('label', [3, -1, 100])
def test_labels_out_of_range_are_refused(label):
    """3 would be the null condition, -1 too through negative indexing."""
    with pytest.raises(ValueError, match=rf'0\.\.2 \(model\.backbone\.conditioner\.num_classes=3\), but got .*{label}'):
        ClassConditioner(num_classes=3).encode(torch.tensor([0, label]))


@pytest.mark.parametrize('kwargs', [dict(num_classes=0), dict(num_classes=3, num_tokens=0)], ids=str)
def test_bad_numbers_are_refused(kwargs):
    with pytest.raises(ValueError, match=r'conditioner\.num_(classes|tokens) must be .* 1 or more, but is 0'):
        ClassConditioner(**kwargs)


def test_class_conditioner_has_no_state_and_is_rebuilt_from_its_config():
    conditioner = ClassConditioner(num_classes=5, num_tokens=3)
    assert list(conditioner.parameters()) == [] and conditioner.state_dict() == {}
    again = MODELS.build(conditioner.to_config())
    for ours, theirs in zip(again.encode([4]).fields.values(), conditioner.encode([4]).fields.values()):
        assert torch.equal(ours, theirs)


def test_widths_must_be_the_networks():
    """The tiny network takes tokens of width 8 and pooled vectors of width 4: three classes."""
    for num_classes, refused in ((3, False), (5, True)):
        backbone = MODELS.build(dict(
            tiny_backbone(), conditioner=dict(type='ClassConditioner', num_classes=num_classes)))
        if refused:
            with pytest.raises(ValueError, match="embeddings 'encoder_hidden_states' have width 12, .* expects 8"):
                backbone.condition(dict(prompt=['1']))
        else:
            assert len(backbone.condition(dict(prompt=['1', '2']))) == 2


def test_base_class_states_what_is_missing():
    conditioner = Conditioner()
    assert conditioner.to_config() is None
    for call in (lambda: conditioner.encode(['a']), conditioner.null):
        with pytest.raises(NotImplementedError):
            call()


# Cached embeddings


def test_embedding_conditioner_holds_the_null_condition_of_the_folder(tmp_path):
    tokens, pooled = torch.randn(3, 4, 8), torch.randn(3, 4)
    write_embeddings(str(tmp_path / 'a.safetensors'), dict(
        encoder_hidden_states=tokens[:2], pooled_projections=pooled[:2]))
    write_embeddings(str(tmp_path / 'null.safetensors'), dict(
        encoder_hidden_states=tokens[2:], pooled_projections=pooled[2:]))
    conditioner = MODELS.build(dict(type='EmbeddingConditioner', folder=str(tmp_path)))
    fields = conditioner.null().fields
    assert fields.keys() == {'encoder_hidden_states', 'pooled_projections'}
    assert torch.equal(fields['encoder_hidden_states'], tokens[2:])
    assert torch.equal(fields['pooled_projections'], pooled[2:])
    assert conditioner.state_dict() == {}
    with pytest.raises(ValueError, match='model.backbone.conditioner.folder=.* does not say what prompts it holds'):
        conditioner.encode(['a cat'])


def test_embedding_conditioner_looks_prompts_up(tmp_path):
    """In any order and number, from any shard, and by value: text that is not there is named."""
    tokens, pooled = torch.randn(4, 4, 8), torch.randn(4, 4)
    for name, rows, prompts in (('a', slice(0, 2), ['a cat', 'a dog']), ('b', slice(2, 3), ['a bird']),
                                ('null', slice(3, 4), None)):
        write_embeddings(str(tmp_path / f'{name}.safetensors'), dict(
            encoder_hidden_states=tokens[rows], pooled_projections=pooled[rows]), prompts)
    conditioner = MODELS.build(dict(type='EmbeddingConditioner', folder=str(tmp_path)))
    fields = conditioner.encode(['a bird', 'a cat', 'a bird']).fields
    assert torch.equal(fields['encoder_hidden_states'], tokens[[2, 0, 2]])
    assert torch.equal(fields['pooled_projections'], pooled[[2, 0, 2]])
    with pytest.raises(ValueError, match="no embedding of 1 of 2 prompts, such as 'a fish': run `cdm cache`"):
        conditioner.encode(['a cat', 'a fish'])
    with pytest.raises(ValueError, match='no embedding of 2 of 2 prompts'):
        conditioner.encode(torch.tensor([0, 1]))


# A text encoder of transformers


@pytest.fixture(scope='module')
def text_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bert')
    save_tiny_bert(folder)
    return str(folder)


def test_a_text_encoder_s_states_and_their_mean(text_encoder):
    """Each text by itself, unpadded: padding changes nothing, and is zero."""
    conditioner = TextEncoderConditioner(text_encoder, max_length=12)
    fields = conditioner.encode(PROMPTS).fields
    assert fields['encoder_hidden_states'].shape == (2, 12, 16) and fields['pooled_projections'].shape == (2, 16)
    tokenizer, encoder = AutoTokenizer.from_pretrained(text_encoder), BertModel.from_pretrained(text_encoder).eval()
    lengths = []
    for i, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            states = encoder(**tokenizer(prompt, return_tensors='pt')).last_hidden_state[0]
        lengths.append(len(states))
        assert torch.allclose(fields['encoder_hidden_states'][i, :len(states)], states, rtol=0, atol=1e-5)
        assert (fields['encoder_hidden_states'][i, len(states):] == 0).all()
        assert torch.allclose(fields['pooled_projections'][i], states.mean(0), rtol=0, atol=1e-5)
    assert lengths[0] != lengths[1] and max(lengths) < 12
    assert len(conditioner.null()) == 1 and not any(p.requires_grad for p in conditioner.parameters())


def test_a_text_encoder_is_rebuilt_from_its_config_and_cuts_long_prompts(text_encoder):
    conditioner = TextEncoderConditioner(text_encoder, max_length=4, negative_prompt='dogs')
    again = MODELS.build(conditioner.to_config())
    assert again.to_config() == conditioner.to_config()
    for method in ('null', 'encode'):
        ours, theirs = (getattr(c, method)(*[['a cat and dogs and birds']] * (method == 'encode')).fields
                        for c in (conditioner, again))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert conditioner.truncated == {'BertModel': 1}


@pytest.mark.parametrize('arguments, error, words', [
    (dict(pretrained='./no/encoder'), FileNotFoundError, "conditioner.pretrained='./no/encoder' is no folder"),
    (dict(pretrained=os.path.dirname(__file__)), FileNotFoundError, 'is no text encoder of transformers'),
    (dict(max_length=65), ValueError, r'max_length must be a whole number in 1\.\.64, .* but is 65'),
    (dict(max_length=0), ValueError, r'max_length must be a whole number'),
    (dict(max_lenght=8), ValueError, "did you mean 'max_length'"),
    (dict(dtype='float16'), ValueError, 'float16 overflows'),
], ids=str)
def test_bad_arguments_of_a_text_encoder(arguments, error, words, text_encoder):
    with pytest.raises(error, match=words):
        TextEncoderConditioner(**{'pretrained': text_encoder, **arguments})


# SD3's text encoders and the whole model, against diffusers


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sd3')
    save_tiny_sd3(folder)
    return str(folder)


@pytest.fixture(scope='module')
def pipeline(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def encode_prompt(pipeline, prompts, **kwargs):
    with torch.no_grad():
        return pipeline.encode_prompt(prompt=prompts, prompt_2=None, prompt_3=None, **kwargs)


@pytest.mark.parametrize('length', [16, 256])
def test_text_conditioner_equals_encode_prompt(folder, pipeline, length):
    conditioner = SD3TextConditioner(folder, max_sequence_length=length, negative_prompt='blurry')
    tokens, null_tokens, pooled, null_pooled = encode_prompt(
        pipeline, PROMPTS, negative_prompt='blurry', max_sequence_length=length)
    condition, null = conditioner.encode(PROMPTS), conditioner.null().expand(2)
    assert tokens.shape == (2, 77 + length, 40)
    for ours, theirs in ((condition.fields['encoder_hidden_states'], tokens),
                         (condition.fields['pooled_projections'], pooled),
                         (null.fields['encoder_hidden_states'], null_tokens),
                         (null.fields['pooled_projections'], null_pooled)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5) and not ours.requires_grad
    # The encoders' three parts all matter in this test: CLIP's two halves of the width, and T5's tokens.
    for part in (tokens[:, :77, :16], tokens[:, :77, 16:32], tokens[:, 77:]):
        assert (part[0] - part[1]).abs().max() > 1e-2


def test_empty_text_is_the_default_null_condition(folder, pipeline):
    tokens, _, pooled, _ = encode_prompt(pipeline, [''], do_classifier_free_guidance=False)
    null = SD3TextConditioner(folder).null()
    assert len(null) == 1
    assert torch.allclose(null.fields['encoder_hidden_states'], tokens, rtol=0, atol=1e-5)
    assert torch.allclose(null.fields['pooled_projections'], pooled, rtol=0, atol=1e-5)


def test_text_conditioner_is_frozen_and_takes_texts_only(folder):
    conditioner = SD3TextConditioner(folder)
    assert sum(1 for _ in conditioner.parameters()) > 50  # the encoders move with the model
    assert not any(p.requires_grad for p in conditioner.parameters())
    assert not any(m.training for m in conditioner.encoders.modules())
    assert conditioner.to_config()['type'] == 'SD3TextConditioner'
    for prompts in (torch.tensor([1, 2]), [1, 2]):
        with pytest.raises(ValueError, match='takes texts as prompts.*model.backbone.conditioner for class labels'):
            conditioner.encode(prompts)


def test_text_conditioner_in_bfloat16(folder, pipeline):
    conditioner = SD3TextConditioner(folder, dtype='bfloat16')
    assert {p.dtype for p in conditioner.parameters()} == {torch.bfloat16}
    tokens = encode_prompt(pipeline, PROMPTS)[0]
    assert (conditioner.encode(PROMPTS).fields['encoder_hidden_states'] - tokens).abs().max() < 0.1


# Offloaded encoders


def weights_of(modules):
    return [*modules.parameters(), *modules.buffers()]


@pytest.fixture
def copies(monkeypatch):
    """A second device in the CPU's memory: whatever is sent somewhere is copied. Keeps where the copies came from."""
    sources, send = [], torch.Tensor.to

    def to(tensor, *args, **kwargs):
        sources.append(tensor.data_ptr())
        return send(tensor, *args, **kwargs).clone()

    monkeypatch.setattr(torch.Tensor, 'to', to)
    return sources


def test_offloaded_weights_never_leave_their_place_in_memory(folder, copies, monkeypatch):
    expected = SD3TextConditioner(folder).encode(PROMPTS).fields
    conditioner = SD3TextConditioner(folder, offload=True)
    weights, places = weights_of(conditioner.encoders), [w.data_ptr() for w in weights_of(conditioner.encoders)]
    encode_texts, on_device = conditioner.encode_texts, []

    def encode(prompts):
        on_device.extend(StorageWeakRef(w.untyped_storage()) for w in weights)
        assert not {w.data_ptr() for w in weights} & set(places)  # on the device
        return encode_texts(prompts)

    monkeypatch.setattr(conditioner, 'encode_texts', encode)
    for _ in range(2):
        copies.clear()
        found = conditioner.encode(PROMPTS).fields
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        # Once to the device (weights that two modules share too), and nothing back.
        assert sorted(source for source in copies if source in places) == sorted(places) and len(places) > 50
        assert [w.data_ptr() for w in weights] == places
    monkeypatch.setattr(conditioner, 'encode_texts', lambda prompts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conditioner.encode(PROMPTS)
    assert [w.data_ptr() for w in weights] == places and all(copy.expired() for copy in on_device)


def test_offloaded_weights_are_page_locked_once_on_the_way_to_a_gpu(monkeypatch):
    locked = []

    def pin_memory(tensor):
        copy = tensor.clone()
        locked.append(copy.data_ptr())
        return copy

    monkeypatch.setattr(torch.Tensor, 'pin_memory', pin_memory)
    monkeypatch.setattr(torch.Tensor, 'is_pinned', lambda tensor: tensor.data_ptr() in locked)
    monkeypatch.setattr(torch.Tensor, 'to', lambda tensor, device, non_blocking: tensor.clone())  # there is no GPU
    module = torch.nn.BatchNorm1d(3)
    weights, values = weights_of(module), [w.clone() for w in weights_of(module)]
    for _ in range(2):
        with visiting(module, torch.device('cuda')):
            assert all(torch.equal(w, value) for w, value in zip(weights, values))
            assert not {w.data_ptr() for w in weights} & set(locked)
        assert [w.data_ptr() for w in weights] == locked and len(locked) == 5
        assert all(torch.equal(w, value) for w, value in zip(weights, values))


@pytest.mark.gpu
def test_offloaded_encoders_on_a_gpu(folder):
    """The same kernels on the same weights: the same bits."""
    here, there = (SD3TextConditioner(folder, offload=offload).to('cuda') for offload in (False, True))
    for _ in range(2):
        found, expected = there.encode(PROMPTS).fields, here.encode(PROMPTS).fields
        assert all(torch.equal(found[name], expected[name]) and found[name].is_cuda for name in expected)
        assert all(w.device.type == 'cpu' and w.is_pinned() for w in weights_of(there.encoders))


def test_quantised_encoders_cannot_be_offloaded():
    encoder = torch.nn.Module()
    encoder.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert TextConditioner([encoder]).encoders[0] is encoder
    with pytest.raises(ValueError, match='conditioner.offload=True does not go with quantised text encoders: leave '):
        TextConditioner([encoder], offload=True)


@pytest.mark.parametrize('has_t5', [True, False], ids=['left out', 'not in the pipeline'])
def test_text_conditioner_without_t5_equals_encode_prompt_without_t5(has_t5, tmp_path):
    save_tiny_sd3(tmp_path, t5=has_t5)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    tokens, _, pooled, _ = encode_prompt(pipeline, PROMPTS, max_sequence_length=16)
    fields = SD3TextConditioner(str(tmp_path), t5=False, max_sequence_length=16).encode(PROMPTS).fields
    assert torch.allclose(fields['encoder_hidden_states'], tokens, rtol=0, atol=1e-5)
    assert torch.allclose(fields['pooled_projections'], pooled, rtol=0, atol=1e-5)
    assert (fields['encoder_hidden_states'][:, 77:] == 0).all()


@pytest.mark.parametrize('guidance_scale', [1.0, 5.0])
@pytest.mark.parametrize('sigmas', [[1.0, 0.75, 0.5, 0.25], [1.0], [1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1]], ids=len)
def test_sampling_equals_the_pipeline(folder, pipeline, guidance_scale, sigmas, monkeypatch):
    method = MODELS.build(dict(type='FlowMatching', backbone=dict(type='SD3Backbone', pretrained=folder),
                               sample_sigmas=sigmas))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    assert method.latent_shape(2) == noise.shape
    arguments = dict(prompt=PROMPTS, height=16, width=16, num_inference_steps=len(sigmas), sigmas=sigmas,
                     guidance_scale=guidance_scale, latents=noise)
    latents = pipeline(**arguments, output_type='latent').images
    images = pipeline(**arguments, output_type='pt').images  # in [0, 1]
    condition = method.backbone.condition(dict(prompt=PROMPTS))

    ours = method.sample(condition, noise, guidance_scale=guidance_scale)
    assert ours.shape == (2, 3, 16, 16)
    assert torch.allclose((ours + 1) / 2, images, rtol=0, atol=1e-5)
    monkeypatch.setattr(method.backbone.codec, 'decode', lambda latents: latents)
    ours = method.sample(condition, noise, guidance_scale=guidance_scale)
    assert torch.allclose(ours, latents, rtol=0, atol=1e-5)
    # The prompts matter: the first image with the second prompt is another one.
    swapped = method.sample(condition[torch.tensor([1, 0])], noise, guidance_scale=guidance_scale)
    assert (swapped - latents).abs().max() > 1e-3


def test_every_role_of_a_distillation_samples_as_the_pipeline(folder, pipeline):
    """Before the first step, student, fake score and teacher are the pretrained model."""
    method = MODELS.build(dict(type='CDM', backbone=dict(type='SD3Backbone', pretrained=folder)))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    images = pipeline(prompt=PROMPTS, height=16, width=16, num_inference_steps=4, sigmas=[1.0, 0.75, 0.5, 0.25],
                      guidance_scale=5.0, latents=noise, output_type='pt').images
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    for role in ('student', 'fake', 'teacher'):
        ours = method.sample(condition, noise, role=role, guidance_scale=5.0)
        assert torch.allclose((ours + 1) / 2, images, rtol=0, atol=1e-5)


def test_a_pipeline_without_t5_says_which_key_to_set_and_the_key_works(tmp_path):
    save_tiny_sd3(tmp_path, t5=False)
    with pytest.raises(ValueError, match='conditioner.t5=False'):
        SD3Backbone(pretrained=str(tmp_path))
    backbone = SD3Backbone(pretrained=str(tmp_path), conditioner=dict(t5=False))
    assert backbone.condition(dict(prompt=PROMPTS)).fields['encoder_hidden_states'].shape[0] == len(PROMPTS)


def test_an_exported_text_model_samples_by_itself(folder, tmp_path):
    method = MODELS.build(dict(type='FlowMatching', backbone=dict(type='SD3Backbone', pretrained=folder)))
    exported = load_method(str(export(method, tmp_path / 'out')), device='cpu')
    noise = torch.randn(method.latent_shape(2), generator=torch.Generator().manual_seed(0))
    images = [sample_prompts(m, PROMPTS, noise, sigmas=method.sample_sigmas) for m in (method.eval(), exported)]
    assert torch.equal(*images)
