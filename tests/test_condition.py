"""Texts of different lengths: padding, masks, and that they change nothing."""
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS
from ragged_support import WIDTH
from tests_support import perturb, recording_optimizers, tiny_backbone

from cdm_plugin.condition import Condition
from cdm_plugin.data import write_embeddings

PROMPTS = ['a red fox', 'cat', 'ship', 'a']


def ragged_method(type='CDM', dtype=torch.float64, conditioner=None, **kwargs):
    torch.manual_seed(0)
    method = MODELS.build(dict(type=type, backbone=dict(
        type='RaggedBackbone', config={}, scheduler=dict(shift=3.0), codec=dict(type='PixelCodec'),
        conditioner=conditioner or dict(type='RaggedConditioner')), **kwargs))
    for role in ('student', 'fake', 'teacher'):
        if hasattr(method, role):
            perturb(getattr(method, role), 0.3)
    method = method.to(dtype).train()
    method.seed, method.iteration = 5, 0
    return method


def rows(*lengths, dtype=torch.float32):
    return [torch.full((n, 2), float(n), dtype=dtype) for n in lengths]


def same(a, b):
    assert a.fields.keys() == b.fields.keys()
    assert all(torch.equal(t, b.fields[name]) and t.dtype == b.fields[name].dtype for name, t in a.fields.items())


# Padding


def test_rows_are_padded_to_the_longest():
    """By hand."""
    condition = Condition.of_rows(dict(a=rows(1, 3, 2), ids=[torch.arange(n)[:, None] for n in (1, 3, 2)],
                                       pooled=torch.ones(3, 4)))
    assert condition.fields['a'][..., 0].tolist() == [[1, 0, 0], [3, 3, 3], [2, 2, 0]]
    assert condition.fields['a_mask'].tolist() == [[True, False, False], [True] * 3, [True, True, False]]
    assert condition.fields['ids'][..., 0].tolist() == [[0, 0, 0], [0, 1, 2], [0, 1, 0]]
    assert {name: t.dtype for name, t in condition.fields.items()} == dict(
        a=torch.float32, ids=torch.int64, pooled=torch.float32, a_mask=torch.bool, ids_mask=torch.bool)


def test_rows_of_one_length_have_no_mask():
    same(Condition.of_rows(dict(a=rows(2, 2), p=torch.ones(2, 3))), Condition(dict(a=torch.full((2, 2, 2), 2.),
                                                                                 p=torch.ones(2, 3))))


def test_a_mask_of_integers_becomes_bool_and_is_trimmed():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    condition = Condition.of_rows(dict(a=torch.ones(2, 4, 2), a_mask=mask))
    assert condition.fields['a'].shape == (2, 2, 2)
    assert condition.fields['a_mask'].tolist() == [[True, True], [True, False]]
    assert set(Condition.of_rows(dict(a=torch.ones(1, 4, 2), a_mask=mask[:1])).fields) == {'a'}


@pytest.mark.parametrize('lengths', [((1, 3), (2, 2), (4,)), ((2,), (1,)), ((3, 3), (3,))], ids=str)
def test_cat_is_the_same_as_padding_all_rows_at_once(lengths):
    parts = [Condition.of_rows(dict(a=rows(*part), p=torch.ones(len(part), 3))) for part in lengths]
    together = sum(lengths, ())
    same(Condition.cat(parts), Condition.of_rows(dict(a=rows(*together), p=torch.ones(len(together), 3))))


@pytest.mark.parametrize('lengths, others', [((1, 3, 2), (2, 2, 2)), ((2, 2, 2), (5, 1, 1)), ((2, 2, 2), (2, 2, 2))])
def test_where_picks_whole_rows(lengths, others):
    own, other = (Condition.of_rows(dict(a=rows(*part))) for part in (lengths, others))
    picked = own.where(torch.tensor([False, True, False]), other)
    expected = Condition.of_rows(dict(a=rows(lengths[0], others[1], lengths[2])))
    length = expected.fields['a'].shape[1]
    assert torch.equal(picked.fields['a'][:, :length], expected.fields['a'])
    assert not picked.fields['a'][:, length:].any()
    mask = picked.fields.get('a_mask', torch.ones(picked.fields['a'].shape[:2]))
    assert mask.sum(1).tolist() == [lengths[0], others[1], lengths[2]]


def test_every_way_keeps_dtypes():
    ids = [torch.ones(n, 1).int() for n in (1, 2)]
    condition = Condition.of_rows(dict(a=rows(1, 2, dtype=torch.bfloat16), ids=ids))
    dtypes = dict(a=torch.bfloat16, ids=torch.int32, a_mask=torch.bool, ids_mask=torch.bool)
    one = condition[:1]
    for changed in (condition[[1, 0]], condition.to('cpu'), one.expand(3), Condition.cat([condition, one]),
                    condition.where(torch.tensor([True, False]), one.expand(2))):
        assert {name: t.dtype for name, t in changed.fields.items()} == dtypes


# A network that honours the mask


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_padding_further_changes_nothing(dtype):
    method = ragged_method(dtype=dtype)
    condition = method.backbone.conditioner.encode(PROMPTS)
    x, sigma = torch.randn(4, 2, 2, 2, dtype=dtype), torch.rand(4, dtype=dtype)
    velocity = method.velocity('student', x, sigma, condition)
    longer = Condition.cat([condition, method.backbone.conditioner.encode(['x' * 30])])[:4]
    assert longer.fields['encoder_hidden_states'].shape[1] == 30
    junk = {name: t + ~longer.fields[f'{name}_mask'][..., None] if name in longer.masked else t
            for name, t in longer.fields.items()}
    for padded in (longer, Condition(junk)):
        torch.testing.assert_close(method.velocity('student', x, sigma, padded), velocity)
    for i in range(4):  # and a text alone has no padding at all
        alone = method.backbone.conditioner.encode(PROMPTS[i:i + 1])
        assert alone.masked == []
        torch.testing.assert_close(method.velocity('student', x[i:i + 1], sigma[i:i + 1], alone), velocity[i:i + 1])


@pytest.mark.parametrize('negative_prompt', ['', 'blurry, ugly, of low quality'], ids=['shorter', 'longer'])
@pytest.mark.parametrize('padded', [None, 32])
def test_guided_sampling_of_a_batch_is_that_of_each_prompt_alone(negative_prompt, padded):
    """With a null condition that is shorter than the prompts, or longer. No batch and no mask on the other side."""
    conditioner = dict(type='RaggedConditioner', negative_prompt=negative_prompt or '-')
    method = ragged_method(conditioner=dict(conditioner, padded=padded))
    condition = method.backbone.condition(dict(prompt=PROMPTS))
    assert condition.masked == ['encoder_hidden_states', 'text_ids']
    noise = torch.randn(4, 2, 2, 2, dtype=torch.float64)
    images = method.sample(condition, noise, guidance_scale=3.0, role='teacher')
    null = method.backbone.conditioner.null()
    for i in range(4):
        alone, sigmas = method.backbone.conditioner.encode(PROMPTS[i:i + 1]), method.shift(method.sample_sigmas)
        x = noise[i:i + 1]
        for sigma, following in zip(sigmas, [*sigmas[1:], 0]):
            with torch.no_grad():
                given, without = (method.velocity('teacher', x, sigma.expand(1).double(), c) for c in (alone, null))
            x = x + (following - sigma) * (without + 3 * (given - without))
        torch.testing.assert_close(images[i:i + 1], x.clamp(-1, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize('type, kwargs', [('CDM', dict(alpha=2.0)), ('FlowMatching', dict(drop_rate=0.5))])
def test_training_is_the_same_with_texts_padded_further(type, kwargs, tmp_path):
    """From ragged files through dataset, collation and preprocessor: the same losses and gradients as from files of
    one length with a mask."""
    for part, padded in (('own', None), ('padded', 32)):
        conditioner = MODELS.build(dict(type='RaggedConditioner', padded=padded))
        for name, texts in (('x', PROMPTS), ('null', ['-'])):
            write_embeddings(tmp_path / part / f'{name}.safetensors', conditioner.encode_texts(texts), texts)
    found = []
    for part in ('own', 'padded'):
        dataset = DATASETS.build(dict(type='EmbeddingDataset', data_root=str(tmp_path / part)))
        method = ragged_method(type, conditioner=dict(type='EmbeddingConditioner', folder=str(tmp_path / part)),
                               **kwargs)
        optimizers = recording_optimizers(method)
        data = [dict(dataset[i], image=torch.full((2, 2, 2), i / 4.)) for i in range(4)]
        logs = [method.train_step(pseudo_collate(data), optimizers) for method.iteration in (0, 1)]
        found.append((logs, optimizers['student'].gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


# A network that cannot take a mask


def test_networks_that_attend_to_padding_refuse_it():
    sd3 = MODELS.build(tiny_backbone())
    texts = dict(encoder_hidden_states=[torch.ones(n, 8) for n in (2, 5)], pooled_projections=torch.ones(2, 4))
    ragged = Condition.of_rows(texts)
    words = r"SD3Backbone \(model\.backbone\) attends to all tokens.*'encoder_hidden_states' have \[2, 5\].*" \
            r'model\.backbone\.conditioner'
    for call in (lambda: sd3.condition(dict(condition=ragged.fields)), lambda: sd3.check_condition(ragged),
                 lambda: sd3.velocity(None, torch.ones(2, 4, 4, 4), torch.ones(2), ragged)):
        with pytest.raises(ValueError, match=words) as info:
            call()
        assert '\n' not in str(info.value)
    sd3.check_condition(Condition.of_rows({name: t[1:] for name, t in ragged.fields.items()}))


def test_a_null_condition_of_another_length_is_refused():
    sd3 = MODELS.build(tiny_backbone())
    prompts = sd3.conditioner.encode([0, 1])
    null = Condition({name: t[:, :1] if t.ndim == 3 else t for name, t in sd3.conditioner.null().fields.items()})
    with pytest.raises(ValueError, match=r"rows of 'encoder_hidden_states' have \[1, 2\].*null condition"):
        sd3.check_condition(Condition.cat([prompts, null]))


@pytest.mark.parametrize('mask', [torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)], ids=['float', 'shape'])
def test_what_is_no_mask_is_refused(mask):
    backbone = ragged_method().backbone
    fields = dict(encoder_hidden_states=torch.ones(2, 3, WIDTH), text_ids=torch.ones(2, 3, 1).long())
    with pytest.raises(ValueError, match=r"'encoder_hidden_states_mask' must be bool, \(2, 3\), but is .*of_rows"):
        backbone.check_condition(Condition(dict(fields, encoder_hidden_states_mask=mask)))
