import copy
import json
import pickle

import pytest
import torch
from mmengine.registry import DATASETS
from safetensors.torch import load_file, save_file

from cdm_plugin.data import EmbeddingDataset, write_embeddings
from cdm_plugin.data.sample import SampleError

PROMPTS = ['一只猫 🐈', 'a "dog"', 'чай\n☕', 'd', 'e']


def make_fields(rows, width=8, length=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return dict(encoder_hidden_states=torch.randn(rows, length, width, generator=generator).bfloat16(),
                pooled_projections=torch.randn(rows, 6, generator=generator))


@pytest.fixture
def folder(tmp_path):
    """Five samples in two shards, and a null condition."""
    fields = make_fields(5)
    write_embeddings(tmp_path / 'b.safetensors', {k: v[3:] for k, v in fields.items()}, PROMPTS[3:])
    write_embeddings(tmp_path / 'a.safetensors', {k: v[:3] for k, v in fields.items()}, PROMPTS[:3])
    write_embeddings(tmp_path / 'null.safetensors', make_fields(1, seed=7), [''])
    return tmp_path


def refused(path, message, error=ValueError):
    with pytest.raises(error, match=message) as info:
        EmbeddingDataset(data_root=str(path))
    assert '\n' not in str(info.value)
    return str(info.value)


def same(condition, fields, row):
    return condition.keys() == fields.keys() and all(
        torch.equal(condition[name], fields[name][row]) and condition[name].dtype == fields[name].dtype
        for name in fields)


def test_reads_back_what_was_written_in_the_order_of_names(folder):
    dataset = DATASETS.build(dict(type='EmbeddingDataset', data_root=str(folder)))
    assert len(dataset) == 5 and [dataset[i]['prompt'] for i in range(5)] == PROMPTS
    assert set(dataset[0]) == {'prompt', 'condition'}
    assert all(same(dataset[i]['condition'], make_fields(5), i) for i in range(5))


def test_one_file(folder):
    dataset = EmbeddingDataset(data_root=str(folder / 'b.safetensors'))
    assert [dataset[i]['prompt'] for i in range(len(dataset))] == PROMPTS[3:]
    assert same(dataset[1]['condition'], make_fields(5), 4)


def test_without_prompts(tmp_path):
    write_embeddings(tmp_path / 'x.safetensors', make_fields(2))
    dataset = EmbeddingDataset(data_root=str(tmp_path))
    assert set(dataset[1]) == {'condition'} and same(dataset[1]['condition'], make_fields(2), 1)


def test_samples_own_their_memory(folder):
    condition = EmbeddingDataset(data_root=str(folder))[0]['condition']
    assert condition['pooled_projections'].untyped_storage().nbytes() == 6 * 4
    before = load_file(folder / 'a.safetensors')['pooled_projections']
    condition['pooled_projections'].zero_()
    assert torch.equal(EmbeddingDataset(data_root=str(folder))[0]['condition']['pooled_projections'], before[0])


def test_copies_open_their_own_files(folder):
    dataset = EmbeddingDataset(data_root=str(folder), indices=[4, 0])
    dataset[0]
    for twin in (pickle.loads(pickle.dumps(dataset)), copy.deepcopy(dataset), dataset.get_subset([0, 1])):
        assert [twin[i]['prompt'] for i in range(2)] == ['e', PROMPTS[0]]
        assert same(twin[0]['condition'], make_fields(5), 4)


def test_null_condition(folder):
    null = EmbeddingDataset(data_root=str(folder)).null_condition()
    assert same(null, make_fields(1, seed=7), 0) and null['encoder_hidden_states'].shape == (3, 8)
    assert same(EmbeddingDataset(data_root=str(folder / 'a.safetensors')).null_condition(), make_fields(1, seed=7), 0)


def test_absent_null_condition_matters_only_when_asked_for(folder):
    (folder / 'null.safetensors').unlink()
    dataset = EmbeddingDataset(data_root=str(folder))
    with pytest.raises(FileNotFoundError, match='no null condition: write .*null.safetensors'):
        dataset.null_condition()


@pytest.mark.parametrize('fields, message', [
    (make_fields(2), 'null.safetensors must hold one sample, .* but holds 2'),
    (make_fields(1, length=4), r'encoder_hidden_states is BF16 \(4, 8\) in .*null.*, but BF16 \(3, 8\) in .*a.safet'),
])
def test_bad_null_condition(folder, fields, message):
    write_embeddings(folder / 'null.safetensors', fields)
    with pytest.raises(ValueError, match=message):
        EmbeddingDataset(data_root=str(folder)).null_condition()


def test_missing_and_empty_folders(tmp_path):
    refused(tmp_path / 'no', '`data_root` .*no does not exist', FileNotFoundError)
    refused(tmp_path, '`data_root` .* holds no embeddings', FileNotFoundError)
    write_embeddings(tmp_path / 'null.safetensors', make_fields(1))
    refused(tmp_path, '`data_root` .* holds no embeddings', FileNotFoundError)


@pytest.mark.parametrize('keep', [0, 5, 60, -1])
def test_truncated_shard_is_named(folder, keep):
    path = folder / 'b.safetensors'
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, r'shard .*b\.safetensors is truncated')


@pytest.mark.parametrize('fields, message', [
    (make_fields(2, width=9), r'encoder_hidden_states is BF16 \(3, 9\) in .*b.safet.*, but BF16 \(3, 8\) in .*a.saf'),
    (make_fields(2, length=4), r'encoder_hidden_states is BF16 \(4, 8\) in .*b.safet.*, but BF16 \(3, 8\) in .*a.saf'),
    ({k: v.float() for k, v in make_fields(2).items()}, r'is F32 \(3, 8\) in .*b.safet.*, but BF16'),
    (dict(encoder_hidden_states=make_fields(2)['encoder_hidden_states']),
     r'pooled_projections is absent in .*b.safet.*, but F32 \(6,\) in .*a.safet'),
    (dict(make_fields(2), mask=torch.ones(2, 3)), r'mask is F32 \(3,\) in .*b.safet.*, but absent in .*a.safet'),
])
def test_shards_that_differ_are_both_named(folder, fields, message):
    write_embeddings(folder / 'b.safetensors', fields, ['x', 'y'])
    refused(folder, message)


def test_prompts_in_some_shards_only(folder):
    write_embeddings(folder / 'b.safetensors', make_fields(2))
    refused(folder, r'.*a.safetensors holds prompts, but .*b.safetensors does not')


@pytest.mark.parametrize('tensors, prompts, message', [
    (dict(a=torch.ones(2, 3), b=torch.ones(3, 3)), None, "one row a sample, .*'a': 2, 'b': 3"),
    (dict(a=torch.ones(2, 3)), json.dumps(['x']), "'a': 2, 'prompts': 1"),
    (dict(a=torch.ones(2, 3)), 'x, y', 'not a JSON list of texts'),
    (dict(a=torch.ones(2, 3)), '[1, 2]', 'not a JSON list of texts'),
    (dict(a=torch.tensor(1.)), None, 'needs a first dimension'),
    (dict(), None, 'needs fields'),
    (dict(a=torch.ones(0, 3)), None, 'hold no samples'),
])
def test_inconsistent_shards(tmp_path, tensors, prompts, message):
    save_file(tensors, tmp_path / 'x.safetensors', metadata=None if prompts is None else dict(prompts=prompts))
    refused(tmp_path, message)


def test_writing_leaves_nothing_half_done(tmp_path):
    path = tmp_path / 'new' / 'x.safetensors'
    both = make_fields(4)['pooled_projections']
    write_embeddings(str(path), dict(even=both[:, ::2], odd=both[:, 1::2]))
    assert [file.name for file in path.parent.iterdir()] == ['x.safetensors']
    assert torch.equal(load_file(path)['odd'], both[:, 1::2])


def test_writing_one_tensor_under_two_names(tmp_path):
    both = make_fields(4)['pooled_projections']
    write_embeddings(tmp_path / 'x.safetensors', dict(a=both, b=both, c=both.T.contiguous().T, d=both[:1].expand(4, 6)))
    written = load_file(tmp_path / 'x.safetensors')
    assert all(torch.equal(written[name], both) for name in 'abc') and torch.equal(written['d'][3], both[0])


@pytest.mark.parametrize('name, fields, prompts, message', [
    ('x.pt', make_fields(2), None, 'must end in .safetensors'),
    ('x.safetensors', dict(), None, 'need fields'),
    ('x.safetensors', make_fields(2), ['x'], "'prompts': 1"),
    ('x.safetensors', dict(a=torch.ones(2), b=torch.ones(3)), None, "'a': 2, 'b': 3"),
])
def test_writing_checks_its_arguments(tmp_path, name, fields, prompts, message):
    with pytest.raises(ValueError, match=message):
        write_embeddings(tmp_path / name, fields, prompts)
    assert not list(tmp_path.iterdir())


# Texts of different lengths


def make_rows(*lengths, width=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator).bfloat16() for length in lengths]


def test_texts_keep_their_own_lengths(tmp_path):
    """Nothing of the padding is on the disk: 2 bytes a number, 8 a checksum, and the header."""
    rows, pooled = make_rows(3, 1, 40, 2), torch.randn(4, 6)
    write_embeddings(tmp_path / 'x.safetensors', dict(a=rows, pooled=pooled), list('abcd'))
    raw = load_file(tmp_path / 'x.safetensors')
    assert raw['a'].shape == (46, 8) and raw['a.starts'].tolist() == [0, 3, 4, 44, 46]
    assert (tmp_path / 'x.safetensors').stat().st_size < 46 * 8 * 2 + 4 * 6 * 4 + 5 * 8 + 2 * 4 * 8 + 550
    dataset = EmbeddingDataset(data_root=str(tmp_path))
    assert len(dataset) == 4 and [dataset[i]['prompt'] for i in range(4)] == list('abcd')
    for twin in (dataset, pickle.loads(pickle.dumps(dataset))):
        for i in (2, 0, 3, 1):
            condition = twin[i]['condition']
            assert set(condition) == {'a', 'pooled'} and torch.equal(condition['a'], rows[i])
            assert condition['a'].dtype == torch.bfloat16 and torch.equal(condition['pooled'], pooled[i])
            assert condition['a'].untyped_storage().nbytes() == rows[i].nbytes


def test_shards_with_and_without_padding_go_together(tmp_path):
    """By chance all texts of a shard have one length, and the null condition has its own."""
    write_embeddings(tmp_path / 'a.safetensors', dict(a=torch.ones(2, 3, 8).bfloat16()))
    write_embeddings(tmp_path / 'b.safetensors', dict(a=make_rows(4, 2)))
    write_embeddings(tmp_path / 'null.safetensors', dict(a=make_rows(1)))
    dataset = EmbeddingDataset(data_root=str(tmp_path))
    assert [len(dataset[i]['condition']['a']) for i in range(4)] == [3, 3, 4, 2]
    assert torch.equal(dataset.null_condition()['a'], make_rows(1)[0])
    write_embeddings(tmp_path / 'b.safetensors', dict(a=make_rows(4, 2, width=9)))
    refused(tmp_path, r'a is BF16 \(None, 9\) in .*b.safet.*, but BF16 \(3, 8\) in .*a.safet')


@pytest.mark.parametrize('starts', [[0, 2], [0, 3, 5, 6], [1, 3, 6], [0, 4, 3, 6], []], ids=str)
def test_starts_that_cut_no_rows(tmp_path, starts):
    tensors = {'a': torch.ones(6, 2), 'a.starts': torch.tensor(starts, dtype=torch.long), 'b': torch.ones(2, 2)}
    save_file(tensors, tmp_path / 'x.safetensors')
    refused(tmp_path, 'shard .*x.safetensors')


def test_starts_without_their_field(tmp_path):
    save_file({'a.starts': torch.tensor([0, 1]), 'b': torch.ones(1, 2)}, tmp_path / 'x.safetensors')
    refused(tmp_path, r'shard .*x.safetensors: a.starts does not cut a into rows')


@pytest.mark.parametrize('ragged', [False, True])
def test_a_flipped_bit_is_named_with_its_row(tmp_path, ragged):
    """A flipped bit gives another number, which is finite and floating like any."""
    fields = make_fields(4)
    if ragged:
        fields['encoder_hidden_states'] = [torch.randn(n, 8) for n in (2, 5, 1, 3)]
    path = tmp_path / 'a.safetensors'
    write_embeddings(path, fields, list('abcd'))
    data = bytearray(path.read_bytes())
    place = data.index(fields['encoder_hidden_states'][2].contiguous().view(torch.uint8).numpy().tobytes())
    data[place + 1] ^= 1
    path.write_bytes(data)
    dataset = EmbeddingDataset(data_root=str(tmp_path))
    for row in (0, 1, 3):
        assert torch.equal(dataset[row]['condition']['encoder_hidden_states'], fields['encoder_hidden_states'][row])
    with pytest.raises(SampleError, match=r'^row 2 of shard .*a\.safetensors is damaged: encoder_hidden_states differs '
                                          'from its checksum; copy the file again, or delete it') as caught:
        dataset[2]
    assert '\n' not in str(caught.value)


def test_shards_of_other_programs_have_no_checksums(tmp_path):
    fields = make_fields(2)
    save_file(fields, tmp_path / 'a.safetensors')
    dataset = EmbeddingDataset(data_root=str(tmp_path))
    assert all(same(dataset[i]['condition'], fields, i) for i in range(2))
