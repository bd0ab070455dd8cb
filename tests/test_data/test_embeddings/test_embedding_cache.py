"""`cache_embeddings` on a whole SD3 pipeline of tiny text encoders."""
import json
import multiprocessing
import os
import random
import shutil
import signal

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from cache_support import LENGTH, PROMPTS, CacheTestConditioner, read_index, toy_cfg
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, TRANSFORMS
from ragged_support import WIDTH
from safetensors.torch import load_file
from tests_support import recording_optimizers
from type_styles import STYLES, restyled

import cdm_plugin  # noqa: F401  registers everything
from cdm_plugin.condition import Condition
from cdm_plugin.conditioners import EmbeddingConditioner
from cdm_plugin.data import EmbeddingDataset, cache_embeddings, write_embeddings
from cdm_plugin.data.embeddings import cache
from cdm_plugin.data.embeddings import files as embedding_files
from cdm_plugin.inference import _give_encoders


@DATASETS.register_module()
class CacheTestStream:
    """A stream has no length."""

    def __iter__(self):
        yield dict(prompt='a cat')


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob('*.safetensors')}


def count_encoded(monkeypatch, cls):
    """Prompts that pass through `encode` from now on, one list a call."""
    calls, encode = [], cls.encode
    monkeypatch.setattr(cls, 'encode', lambda self, prompts: calls.append(list(prompts)) or encode(self, prompts))
    return calls


# What is written


def test_rows_are_the_conditioners_embeddings(make_cfg, model, tmp_path):
    cfg, out = make_cfg(negative_prompt='blurry'), tmp_path / 'out'
    report = cache_embeddings(cfg, str(out), batch_size=3, shard_size=4, dtype='float32', device='cpu')
    conditioner = MODELS.build(dict(type='SD3TextConditioner', pretrained=model, max_sequence_length=LENGTH,
                                    negative_prompt='blurry'))
    shards = ['00000.safetensors', '00001.safetensors', '00002.safetensors']
    assert sorted(p.name for p in out.iterdir()) == [*shards, 'index.json', 'null.safetensors']
    # Shards of 4 in batches of 3 and 1.
    batches = [PROMPTS[0:3], PROMPTS[3:4], PROMPTS[4:7], PROMPTS[7:8], PROMPTS[8:10]]
    conditions = [conditioner.encode(batch) for batch in batches]
    expected, alone = Condition.cat(conditions).fields, conditioner.encode(PROMPTS).fields
    dataset = EmbeddingDataset(data_root=str(out))
    assert [dataset[i]['prompt'] for i in range(len(dataset))] == PROMPTS
    for i in range(len(dataset)):
        for name, value in dataset[i]['condition'].items():
            assert torch.equal(value, expected[name][i])
            assert torch.allclose(value, alone[name][i], rtol=0, atol=1e-6)
    for name, value in dataset.null_condition().items():
        assert torch.equal(value, conditioner.null().fields[name][0])
    null = MODELS.build(dict(type='EmbeddingConditioner', folder=str(out))).null()
    assert {name: t.shape for name, t in null.fields.items()} == {
        'encoder_hidden_states': (1, 77 + LENGTH, 40), 'pooled_projections': (1, 32)}
    assert (report.folder, report.prompts, report.shards, report.reused_shards) == (str(out), 10, 3, 0)
    assert report.bytes == sum((out / name).stat().st_size for name in shards)
    assert report.truncated and max(report.truncated.values()) <= len(PROMPTS)


def test_index(make_cfg, model, tmp_path):
    out = tmp_path / 'out'
    cache_embeddings(make_cfg(t5=False), str(out), shard_size=8, device='cpu')
    index = read_index(out)
    assert index['version'] == 1 and index['dtype'] == 'bfloat16' and index['shard_size'] == 8
    assert index['prompts'] == dict(count=10, sha256=embedding_files.hash_prompts(PROMPTS))
    assert index['encoder'].items() >= dict(
        type='SD3TextConditioner', pretrained=os.path.realpath(model), t5=False, max_sequence_length=LENGTH,
        dtype='float32', negative_prompt='').items()
    assert index['source']['commit'] is None
    assert {'text_encoder/config.json', 'text_encoder_2/model.safetensors',
            'tokenizer_3/tokenizer.json'} <= set(index['source']['files'])
    assert not [name for name in index['source']['files'] if name.startswith(('transformer', 'vae', 'scheduler'))]
    assert index['fields'] == dict(
        encoder_hidden_states=dict(shape=[77 + LENGTH, 40], dtype='bfloat16'),
        pooled_projections=dict(shape=[32], dtype='bfloat16'))
    assert {'cdm_plugin', 'diffusers', 'transformers', 'torch'} <= set(index['libraries'])
    assert [{k: v for k, v in entry.items() if k not in ('truncated', 'content')} for entry in index['shards']] == [
        dict(name=f'0000{i}.safetensors', rows=len(part), sha256=embedding_files.hash_prompts(part),
             bytes=(out / f'0000{i}.safetensors').stat().st_size) for i, part in enumerate([PROMPTS[:8], PROMPTS[8:]])]
    assert EmbeddingDataset(data_root=str(out))[0]['condition']['pooled_projections'].dtype == torch.bfloat16


def test_duplicates_of_concatenated_and_repeated_datasets_are_encoded_once(tmp_path, monkeypatch):
    own = dict(type='CacheTestCaptions', captions=['b', '', 'a', 'b'], pipeline=[
        dict(type='PackInputs', prompt='caption')])
    dataset = dict(type='RepeatDataset', times=100, dataset=dict(type='ConcatDataset', datasets=[
        own, dict(own, captions=['c', 'a']), dict(type='RepeatDataset', times=2, dataset=own)]))
    calls = count_encoded(monkeypatch, CacheTestConditioner)
    report = cache_embeddings(toy_cfg(dataset=dataset), str(tmp_path / 'out'), dtype='float32', device='cpu')
    assert report.prompts == 4 and calls == [[''], ['b', '', 'a', 'c']]
    dataset = EmbeddingDataset(data_root=str(tmp_path / 'out'))
    assert [dataset[i]['prompt'] for i in range(4)] == ['b', '', 'a', 'c']
    assert dataset[1]['condition']['mask'].dtype == torch.bool


def test_empty_and_long_prompts_of_a_dataset_of_ones_own(make_cfg, tmp_path):
    cfg = make_cfg()
    cfg.train_dataloader.dataset = dict(type='CacheTestCaptions', captions=['', '🐈' * 500, '\n'], field='prompt')
    report = cache_embeddings(cfg, str(tmp_path / 'out'), dtype='float32', device='cpu')
    dataset = EmbeddingDataset(data_root=str(tmp_path / 'out'))
    assert report.prompts == 3 and dataset[1]['prompt'] == '🐈' * 500
    null = dataset.null_condition()
    assert all(torch.allclose(null[k], v, atol=1e-6) for k, v in dataset[0]['condition'].items())


@TRANSFORMS.register_module()
class CacheTestDraw:
    """Draws one of a sample's captions, or leaves it out now and then."""

    def __init__(self, drop=0.0):
        self.drop, self.random = drop, random.Random(0)

    def __call__(self, sample):
        prompt = self.random.choice(sample['prompt']) if isinstance(sample['prompt'], list) else sample['prompt']
        return dict(prompt='' if self.random.random() < self.drop else prompt)


@pytest.mark.parametrize('captions, drop', [
    ([['a fox', 'a red fox']] * 30, 0), (['a fox', 'a cat'] * 30, 0.1), (['a'] * 150 + [['b', 'c', 'd']], 0)])
def test_prompts_that_are_drawn_are_refused(captions, drop, tmp_path):
    cfg = toy_cfg(dataset=dict(type='CacheTestCaptions', captions=captions, field='prompt', pipeline=[
        dict(type='CacheTestDraw', drop=drop), dict(type='PackInputs')]))
    with pytest.raises(ValueError, match='train_dataloader.dataset draws its prompts: sample'):
        cache_embeddings(cfg, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_another_key_of_the_config(tmp_path):
    cfg = toy_cfg()
    cfg.val_dataloader = dict(dataset=dict(cfg.train_dataloader.dataset, captions=['q']))
    assert cache_embeddings(cfg, str(tmp_path), device='cpu', dataset='val_dataloader.dataset').prompts == 1


def test_truncated_prompts_are_counted_over_runs(tmp_path):
    cfg = toy_cfg(['a', 'cut', 'b', 'c'])
    assert cache_embeddings(cfg, str(tmp_path), shard_size=2, device='cpu').truncated == {'clip': 1}
    assert [entry.get('truncated') for entry in read_index(tmp_path)['shards']] == [{'clip': 1}, None]
    report = cache_embeddings(cfg, str(tmp_path), shard_size=2, device='cpu')
    assert report.truncated == {'clip': 1} and report.reused_shards == 2


# A kill, and what comes after it


def killed_in_the_third_shard(cfg, out):
    """Dies half-way through writing it, as no exception handler would see."""
    written, save_file = [], safetensors.torch.save_file

    def save(tensors, path, **kwargs):
        save_file(tensors, path, **kwargs)
        written.append(path)
        if len(written) == 4:  # the null condition is the first
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    embedding_files.save_file = save
    cache_embeddings(cfg, out, shard_size=2, device='cpu')


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_killed_run_is_refused_for_training_and_goes_on(make_cfg, tmp_path, monkeypatch):
    cfg, out = make_cfg(t5=False), tmp_path / 'out'
    process = multiprocessing.get_context('fork').Process(target=killed_in_the_third_shard, args=(cfg, str(out)))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in out.iterdir()) == [
        '.cdm_lock', '00000.safetensors', '00001.safetensors', '00002.safetensors.part', 'index.json',
        'null.safetensors']
    with pytest.raises(ValueError, match='is unfinished: 6 of 10 prompts are missing; run `cdm cache` again'):
        EmbeddingDataset(data_root=str(out))
    before, calls = stamps(out), count_encoded(monkeypatch, type(MODELS.build(cfg.model.backbone).conditioner))

    report = cache_embeddings(cfg, str(out), shard_size=2, device='cpu')
    assert report.reused_shards == 2 and report.shards == 5
    assert calls == [[''], PROMPTS[4:6], PROMPTS[6:8], PROMPTS[8:]]
    assert {name: stamp for name, stamp in stamps(out).items() if name in before} == before
    assert not list(out.glob('*.part'))
    whole = cache_embeddings(cfg, str(tmp_path / 'whole'), shard_size=2, device='cpu')
    assert whole.truncated == report.truncated
    for path in (tmp_path / 'whole').glob('*.safetensors'):
        assert path.read_bytes() == (out / path.name).read_bytes()


def test_an_error_between_two_shards(tmp_path, monkeypatch):
    """Here the index does not know the last shard yet: it is made again."""
    cfg = toy_cfg(list('abcdef'))
    with monkeypatch.context() as patch:
        def fail(path, prompts):
            if path.name == '00001.safetensors':
                raise KeyboardInterrupt
            return embedding_files.describe_shard(path, prompts)
        patch.setattr('cdm_plugin.data.embeddings.cache.describe_shard', fail)
        with pytest.raises(KeyboardInterrupt):
            cache_embeddings(cfg, str(tmp_path), shard_size=2, device='cpu')
    assert len(list(tmp_path.glob('0*.safetensors'))) == 2
    with pytest.raises(ValueError, match='4 of 6 prompts are missing'):
        EmbeddingDataset(data_root=str(tmp_path))
    assert cache_embeddings(cfg, str(tmp_path), shard_size=2, device='cpu').reused_shards == 1
    assert len(EmbeddingDataset(data_root=str(tmp_path))) == 6


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    def save_file(tensors, path, **kwargs):
        path.write_bytes(b'half')
        raise OSError('No space left on device')
    monkeypatch.setattr(embedding_files, 'save_file', save_file)
    with pytest.raises(OSError, match='No space'):
        write_embeddings(tmp_path / 'x.safetensors', dict(a=torch.ones(2)))
    assert not list(tmp_path.iterdir())


def other_cache(folder):
    """A cache of the same prompts by another encoder."""
    cache_embeddings(toy_cfg(list('abcdef'), scale=2.0), str(folder), shard_size=2, device='cpu')
    return folder


@pytest.mark.parametrize('damage, message', [
    (lambda path: path.unlink(), r'shard .*00001\.safetensors is missing'),
    (lambda path: path.write_bytes(path.read_bytes()[:-10]), r'shard .*00001\.safetensors has \d+ bytes instead of'),
    (lambda path: path.write_bytes(b'\xff' * path.stat().st_size), r'shard .*00001\.safetensors is truncated or not'),
    (lambda path: path.write_bytes(path.with_name('00000.safetensors').read_bytes()),
     r'shard .*00001\.safetensors holds other prompts'),
    (lambda path: shutil.copy(other_cache(path.parent / 'other') / path.name, path),
     r'shard .*00001\.safetensors holds other embeddings'),
])
def test_damaged_shards_are_named_and_made_again(tmp_path, damage, message):
    cfg = toy_cfg(list('abcdef'))
    cache_embeddings(cfg, str(tmp_path), shard_size=2, device='cpu')
    before, content = stamps(tmp_path), (tmp_path / '00001.safetensors').read_bytes()
    damage(tmp_path / '00001.safetensors')
    with pytest.raises(ValueError, match=message + '.*; run `cdm cache` again, it completes the folder') as info:
        EmbeddingDataset(data_root=str(tmp_path))
    assert '\n' not in str(info.value)
    assert cache_embeddings(cfg, str(tmp_path), shard_size=2, device='cpu').reused_shards == 2
    after = stamps(tmp_path)
    assert {name for name in after if after[name] != before[name]} == {'00001.safetensors'}
    assert len(EmbeddingDataset(data_root=str(tmp_path))) == 6
    assert (tmp_path / '00001.safetensors').read_bytes() == content


def test_two_caches_in_one_folder_do_not_mix(tmp_path, monkeypatch):
    """Another process with another encoder starts while this one is between two shards."""
    statuses, write = [], cache.write_index

    def write_index(folder, index):
        write(folder, index)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                cache_embeddings(toy_cfg(list('abcdef'), scale=2.0), str(tmp_path), shard_size=2, device='cpu')
            except ValueError as error:
                status = f'{tmp_path} is in use: cdm cache, process {os.getppid()} on' not in str(error)
            finally:
                os._exit(status)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    monkeypatch.setattr(cache, 'write_index', write_index)
    cache_embeddings(toy_cfg(list('abcdef')), str(tmp_path), shard_size=2, device='cpu')
    assert statuses == [0, 0, 0, 0]
    dataset = EmbeddingDataset(data_root=str(tmp_path))
    assert all(dataset[i]['condition']['encoder_hidden_states'].unique().tolist() == [1.0] for i in range(6))
    assert not (tmp_path / '.cdm_lock').exists()


def test_another_number_of_rows_is_named(tmp_path):
    cache_embeddings(toy_cfg(list('abcd')), str(tmp_path), shard_size=2, device='cpu')
    path = tmp_path / '00000.safetensors'
    fields = {name: field[:1].clone() for name, field in load_file(path).items() if not name.endswith('.crc32')}
    write_embeddings(path, fields, ['a'])
    index = read_index(tmp_path)
    index['shards'][0]['bytes'] = path.stat().st_size
    (tmp_path / 'index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r'00000\.safetensors has 1 rows instead of 2'):
        EmbeddingDataset(data_root=str(tmp_path))


def test_missing_null_condition_is_named_and_made_again(tmp_path):
    cfg = toy_cfg()
    cache_embeddings(cfg, str(tmp_path), device='cpu')
    (tmp_path / 'null.safetensors').unlink()
    with pytest.raises(FileNotFoundError, match='null.safetensors is missing; run `cdm cache` again'):
        EmbeddingDataset(data_root=str(tmp_path)).null_condition()
    assert cache_embeddings(cfg, str(tmp_path), device='cpu').reused_shards == 1
    assert EmbeddingDataset(data_root=str(tmp_path)).null_condition()['encoder_hidden_states'].shape == (2, 4)


# Another cache in the folder


@pytest.mark.parametrize('conditioner, kwargs, message', [
    (dict(t5=False), {}, 't5: True in the cache, False here'),
    (dict(max_sequence_length=16), {}, 'max_sequence_length: 8 in the cache, 16 here'),
    (dict(negative_prompt='ugly'), {}, "negative_prompt: '' in the cache, 'ugly' here"),
    (dict(dtype='bfloat16'), {}, "dtype: 'float32' in the cache, 'bfloat16' here"),
    ({}, dict(dtype='bfloat16'), "dtype: 'float32' in the cache, 'bfloat16' here"),
    ({}, dict(shard_size=3), 'shard_size: 1024 in the cache, 3 here'),
    ({}, dict(prompts=PROMPTS[:4]), r'prompts: 5 \(sha256 \w{12}\) in the cache, 4 \(sha256 \w{12}\) here'),
    ({}, dict(prompts=PROMPTS[4::-1]), r'prompts: 5 \(sha256 \w{12}\) in the cache, 5 \(sha256 \w{12}\) here'),
], ids=['t5', 'length', 'null', 'dtype of the encoders', 'dtype of the files', 'shards', 'fewer', 'reversed'])
def test_a_folder_of_another_cache_is_refused(make_cfg, tmp_path, conditioner, kwargs, message):
    out = tmp_path / 'out'
    cache_embeddings(make_cfg(PROMPTS[:5]), str(out), dtype='float32', device='cpu')
    before = stamps(out), read_index(out)
    cfg = make_cfg(kwargs.pop('prompts', PROMPTS[:5]), **conditioner)
    with pytest.raises(ValueError, match=f'{message}.*: choose another --out or delete it') as info:
        cache_embeddings(cfg, str(out), **dict(dict(dtype='float32', device='cpu'), **kwargs))
    assert '\n' not in str(info.value) and (stamps(out), read_index(out)) == before


def test_a_moved_model_is_the_same_encoder_and_a_changed_one_is_not(make_cfg, model, tmp_path):
    moved = tmp_path / 'moved'
    shutil.copytree(model, moved)
    cfg, out = make_cfg(PROMPTS[:2]), tmp_path / 'out'
    cache_embeddings(cfg, str(out), device='cpu')
    cfg.model.backbone.pretrained = str(moved)
    assert cache_embeddings(cfg, str(out), device='cpu').reused_shards == 1
    weights = load_file(moved / 'text_encoder' / 'model.safetensors')
    safetensors.torch.save_file({name: 1.01 * value for name, value in weights.items()},
                                moved / 'text_encoder' / 'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(ValueError, match="pretrained: '.*' in the cache, '.*moved' here"):
        cache_embeddings(cfg, str(out), device='cpu')
    fine_tuned = tmp_path / 'fine_tuned'
    cache_embeddings(cfg, str(fine_tuned), device='cpu')
    shutil.copytree(model, moved, dirs_exist_ok=True)
    with pytest.raises(ValueError, match='1 files of .*moved have changed, such as text_encoder/model.safetensors'):
        cache_embeddings(cfg, str(fine_tuned), device='cpu')


def test_embeddings_of_unknown_origin_and_files_are_refused(tmp_path):
    write_embeddings(tmp_path / 'a.safetensors', dict(x=torch.ones(2, 3)))
    with pytest.raises(ValueError, match='holds safetensors files, but no index.json .*: choose another --out'):
        cache_embeddings(toy_cfg(), str(tmp_path), device='cpu')
    with pytest.raises(ValueError, match='is a file: choose a folder'):
        cache_embeddings(toy_cfg(), str(tmp_path / 'a.safetensors'), device='cpu')


# What cannot be cached


@pytest.mark.parametrize('dataset, message', [
    (dict(type='EmbeddingDataset', data_root='nowhere'), r'^train_dataloader\.dataset\.type is EmbeddingDataset'),
    (dict(type=EmbeddingDataset, data_root='nowhere'), r'^train_dataloader\.dataset\.type is EmbeddingDataset'),
    (dict(type='ConcatDataset', datasets=[dict(type='cdm_plugin.data.EmbeddingDataset', data_root='nowhere')]),
     r'^train_dataloader\.dataset\.datasets\[0\]\.type is EmbeddingDataset'),
    (dict(type='LabelDataset', num_classes=3), r'train_dataloader\.dataset gives class labels as prompts \(0\)'),
    (dict(type='CacheTestCaptions', captions=['a']), r"no 'prompt', only \['caption'.*PackInputs"),
    (dict(type='CacheTestCaptions', captions=[]), 'train_dataloader.dataset holds no prompts'),
    (dict(type='CacheTestCaptions', captions=['a\ud83d'], field='prompt'), 'half of a surrogate pair'),
    (dict(type='CacheTestStream'), 'train_dataloader.dataset is a stream without a length'),
], ids=str)
def test_datasets_without_texts_are_refused(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message) as info:
        cache_embeddings(toy_cfg(dataset=dataset), str(tmp_path / 'out'), device='cpu')
    assert '\n' not in str(info.value) and not (tmp_path / 'out').exists()


def test_an_empty_prompt_file_is_refused(make_cfg, tmp_path):
    with pytest.raises(ValueError, match='prompts.txt holds no prompts'):
        cache_embeddings(make_cfg([]), str(tmp_path / 'out'), device='cpu')


def test_samples_with_embeddings_are_refused(tmp_path):
    cache_embeddings(toy_cfg(), str(tmp_path / 'in'), device='cpu')
    cfg = toy_cfg()
    cfg.train_dataloader.dataset = EmbeddingDataset(data_root=str(tmp_path / 'in'))
    with pytest.raises(ValueError, match='train_dataloader.dataset gives samples with embeddings'):
        cache_embeddings(cfg, str(tmp_path / 'out'), device='cpu')


def test_conditioners_without_encoders_and_missing_keys_are_refused(tmp_path):
    cfg = toy_cfg()
    for kind in ('EmbeddingConditioner', 'mmengine.EmbeddingConditioner', EmbeddingConditioner):
        cfg.model.backbone.conditioner = dict(type=kind, folder='nowhere')
        with pytest.raises(ValueError, match=r'^model\.backbone\.conditioner\.type is EmbeddingConditioner'):
            cache_embeddings(cfg, str(tmp_path), device='cpu')
    with pytest.raises(ValueError, match="the config has no 'model.backbone'"):
        cache_embeddings(Config(dict(model=dict(type='CDM'))), str(tmp_path), device='cpu')
    with pytest.raises(ValueError, match="the config has no 'test_dataloader.dataset'"):
        cache_embeddings(toy_cfg(), str(tmp_path), device='cpu', dataset='test_dataloader.dataset')


@pytest.mark.parametrize('kwargs, message', [
    (dict(batch_size=0), 'batch_size must be a whole number of 1 or more, but is 0'),
    (dict(shard_size=2.5), 'shard_size must be a whole number'),
    (dict(dtype='int8'), "dtype must be one of bfloat16, float16, float32, but is 'int8'"),
])
def test_bad_arguments(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cache_embeddings(toy_cfg(), str(tmp_path), **kwargs)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_an_encoder_that_overflows_is_an_error(tmp_path, value):
    with pytest.raises(ValueError, match="NaN or infinity in encoder_hidden_states for the prompt 'poison': .* set "
                                         'model.backbone.conditioner.dtype'):
        cache_embeddings(toy_cfg(['a', 'b', 'c', 'poison'], value=value), str(tmp_path), shard_size=2, device='cpu')
    assert [entry['name'] for entry in read_index(tmp_path)['shards']] == ['00000.safetensors']


def test_files_that_overflow_are_an_error(tmp_path):
    cfg = toy_cfg(['a', 'poison'], value=1e5)
    with pytest.raises(ValueError, match="of the prompt 'poison' is too large for the dtype of the files, float16"):
        cache_embeddings(cfg, str(tmp_path / 'half'), dtype='float16', device='cpu')
    assert cache_embeddings(cfg, str(tmp_path / 'brain'), device='cpu').prompts == 2


def test_vectors_that_differ_in_length_are_an_error(tmp_path):
    """The toy's own `mask` belongs to no field, so it is no text that could be padded."""
    with pytest.raises(ValueError, match='gives other fields for the prompts than for the null condition .* only '
                                         'texts, .* may have lengths of their own'):
        cache_embeddings(toy_cfg(['a', 'b'], wide=['b']), str(tmp_path), device='cpu')


# Texts of different lengths


RAGGED_PROMPTS = ['a red fox', 'cat', 'ship', 'a', 'owl', 'bee', 'a lighthouse at night', 'me']


def ragged_cfg(**conditioner):
    return Config(dict(
        model=dict(backbone=dict(type='RaggedBackbone', config={}, codec=dict(type='PixelCodec'),
                                 conditioner=dict(type='RaggedConditioner', **conditioner))),
        train_dataloader=dict(dataset=dict(type='CacheTestCaptions', captions=RAGGED_PROMPTS, field='prompt'))))


@pytest.mark.parametrize('padded', [None, 32], ids=['an encoder of lists', 'an encoder of masks'])
@pytest.mark.parametrize('batch_size, shard_size', [(3, 8), (2, 2), (1, 1), (8, 8)])
def test_texts_keep_their_own_lengths(tmp_path, batch_size, shard_size, padded):
    cfg = ragged_cfg(negative_prompt='bad', padded=padded)
    cache_embeddings(cfg, str(tmp_path), batch_size, shard_size, 'float32', device='cpu')
    conditioner = MODELS.build(dict(type='RaggedConditioner', negative_prompt='bad'))
    dataset = EmbeddingDataset(data_root=str(tmp_path))
    for i, prompt in enumerate(RAGGED_PROMPTS):
        assert dataset[i]['prompt'] == prompt and set(dataset[i]['condition']) == {'encoder_hidden_states', 'text_ids'}
        for name, (row,) in conditioner.encode_texts([prompt]).items():
            assert torch.equal(dataset[i]['condition'][name], row) and dataset[i]['condition'][name].dtype == row.dtype
    on_disk = sum(load_file(path)['encoder_hidden_states'].numel() for path in tmp_path.glob('0*.safetensors'))
    assert on_disk == sum(map(len, RAGGED_PROMPTS)) * WIDTH
    cached = MODELS.build(dict(type='EmbeddingConditioner', folder=str(tmp_path)))
    for own, fresh in ((cached.encode(RAGGED_PROMPTS), conditioner.encode(RAGGED_PROMPTS)),
                       (cached.null(), conditioner.null())):
        assert own.fields.keys() == fresh.fields.keys()
        assert all(torch.equal(t, fresh.fields[name]) for name, t in own.fields.items())


def test_a_cache_of_ragged_texts_goes_on_after_a_kill(tmp_path):
    cfg, whole, cut = ragged_cfg(), tmp_path / 'whole', tmp_path / 'cut'
    for out in (whole, cut):
        cache_embeddings(cfg, str(out), shard_size=3, device='cpu')
    (cut / '00001.safetensors').unlink()
    assert cache_embeddings(cfg, str(cut), shard_size=3, device='cpu').reused_shards == 2
    for path in whole.iterdir():
        assert path.read_bytes() == (cut / path.name).read_bytes()


# The index itself


@pytest.mark.parametrize('content, message', [
    ('{"version": 1, "sh', r'index\.json is damaged'),
    ('[]', r'index\.json is damaged'),
    ('{"version": 1}', r'index\.json is damaged \(it has no prompts\)'),
    ('{"version": 7}', 'has version 7, but this cdm_plugin reads version 1'),
])
def test_bad_index(tmp_path, content, message):
    cache_embeddings(toy_cfg(), str(tmp_path), device='cpu')
    (tmp_path / 'index.json').write_text(content)
    for call in (lambda: EmbeddingDataset(data_root=str(tmp_path)),
                 lambda: cache_embeddings(toy_cfg(), str(tmp_path), device='cpu')):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_shard_that_the_index_does_not_name_is_refused(tmp_path):
    cache_embeddings(toy_cfg(), str(tmp_path), device='cpu')
    shutil.copy(tmp_path / '00000.safetensors', tmp_path / 'more.safetensors')
    with pytest.raises(ValueError, match=r'index.json does not name the shard more\.safetensors'):
        EmbeddingDataset(data_root=str(tmp_path))


# Training


def test_training_loads_no_text_encoder(make_cfg, model, tmp_path, monkeypatch):
    out = str(tmp_path / 'out')
    cache_embeddings(make_cfg(PROMPTS[:4]), out, device='cpu')

    def refuse(*args, **kwargs):
        raise AssertionError('a text encoder was loaded')
    monkeypatch.setattr(diffusers.StableDiffusion3Pipeline, 'from_pretrained', refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, 'from_pretrained', refuse)
    monkeypatch.setattr(transformers.PreTrainedTokenizerBase, 'from_pretrained', refuse)
    dataset = EmbeddingDataset(data_root=out, encoder=dict(pretrained=model, max_sequence_length=LENGTH))
    method = MODELS.build(dict(type='CDM', backbone=dict(
        type='SD3Backbone', pretrained=model, conditioner=dict(type='EmbeddingConditioner', folder=out)))).train()
    method.seed, before = 5, {k: v.clone() for k, v in method.student.state_dict().items()}
    optimizers, batch = recording_optimizers(method), pseudo_collate([dataset[i] for i in range(4)])
    for method.iteration in (0, 1):
        logs = method.train_step(batch, optimizers)
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in logs.values())
    assert any((v != before[k]).any() for k, v in method.student.state_dict().items())


def test_a_cache_does_not_depend_on_how_types_are_written(make_cfg, model, tmp_path):
    out = str(tmp_path / 'out')
    cache_embeddings(make_cfg(PROMPTS[:2]), out, device='cpu')
    index = read_index(tmp_path / 'out')
    cfg = make_cfg(PROMPTS[:2], type='SD3TextConditioner', pretrained=model)
    for style in STYLES:  # another encoder would be refused
        assert cache_embeddings(restyled(cfg, style), out, device='cpu').reused_shards == 1
    assert read_index(tmp_path / 'out') == index


@pytest.mark.parametrize('kind', ['EmbeddingConditioner', 'cdm_plugin.conditioners.EmbeddingConditioner',
                                  EmbeddingConditioner])
def test_sampling_gets_the_text_encoders_that_made_the_cache(make_cfg, tmp_path, kind):
    out = str(tmp_path / 'out')
    cache_embeddings(make_cfg(PROMPTS[:2]), out, device='cpu')
    backbone = dict(conditioner=dict(type=kind, folder=out))
    _give_encoders(backbone)
    assert backbone['conditioner'] == read_index(tmp_path / 'out')['encoder']
    assert backbone['conditioner']['type'] == 'SD3TextConditioner'
