"""Hugging Face datasets, tars and folders of pictures, each with the same pictures and captions."""
import builtins
import json
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mmengine.registry import DATASETS
from source_support import content, number, picture, write_rows, write_tar, write_tars
from torch.utils.data import DataLoader

from cdm_plugin.data.sample import SampleError

LENGTHS = (3, 1, 2)
TOTAL = sum(LENGTHS)
NESTED = [dict(type='PackInputs', prompt='meta.captions.1', image='image')]
LABELS = [dict(type='PackInputs', prompt='label_name', image='image', template='a photo of a {}')]
PAIRS = [(f'picture {i}', i) for i in range(TOTAL)]


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    """Folder with the rows as parquet files, saved to the disk, with and without splits, and as jsonl."""
    import datasets
    folder = tmp_path_factory.mktemp('rows')
    whole = write_rows(folder, LENGTHS)
    whole.save_to_disk(str(folder / 'saved'))
    datasets.DatasetDict(test=whole).save_to_disk(str(folder / 'splits'))
    (folder / 'rows.jsonl').write_text(''.join(json.dumps(dict(prompt=f'picture {i}')) + '\n' for i in range(TOTAL)))
    (folder / 'files/train').mkdir(parents=True)
    with (folder / 'files/train/metadata.jsonl').open('w') as file:
        for i in range(TOTAL):
            picture(i).save(folder / f'files/train/{i}.png')
            file.write(json.dumps(dict(file_name=f'{i}.png', prompt=f'picture {i}')) + '\n')
    return folder


@pytest.fixture(scope='module')
def tars(tmp_path_factory):
    return write_tars(tmp_path_factory.mktemp('tars'), LENGTHS)


@pytest.fixture
def pictures(tmp_path):
    for i in range(TOTAL):
        file = tmp_path / ('a' if i < 4 else 'b/c') / f'{i}.PNG'
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(file)
        file.with_suffix('.txt').write_text(f' picture {i}\n')
    return tmp_path


def samples(dataset):
    """All samples of a dataset, or of one pass of a stream."""
    return list(dataset.once()) if hasattr(dataset, 'once') else [dataset[i] for i in range(len(dataset))]


def pairs(dataset):
    return [(sample['prompt'], number(sample['image'])) for sample in samples(dataset)]


def hf(kind, rows, **kwargs):
    return DATASETS.build({**dict(type=kind, path='parquet', options=dict(
        data_files=str(rows / '*.parquet'), cache_dir=str(rows / 'cache'))), **kwargs})


HF = pytest.mark.parametrize('kind', ['HFDataset', 'HFStream'])


# Hugging Face


@HF
def test_pictures_of_a_parquet_file_without_the_librarys_features(kind, tmp_path):
    contents = []
    for i in range(3):
        picture(i).save(tmp_path / 'a.png')
        contents.append(dict(prompt=f'picture {i}', image=dict(bytes=(tmp_path / 'a.png').read_bytes(), path=None)))
    pq.write_table(pa.Table.from_pylist(contents), tmp_path / 'a.parquet')
    pipeline = [dict(type='PackInputs', image='image')]
    assert pairs(hf(kind, tmp_path, pipeline=pipeline)) == [(f'picture {i}', i) for i in range(3)]


@HF
def test_every_way_to_name_a_hugging_face_dataset(kind, rows):
    cache = dict(cache_dir=str(rows / 'cache'))
    assert pairs(hf(kind, rows)) == PAIRS
    assert pairs(hf(kind, rows, path=str(rows / 'saved'), options={})) == PAIRS
    assert pairs(hf(kind, rows, path=str(rows / 'splits'), split='test', options={})) == PAIRS
    assert sorted(pairs(hf(kind, rows, path=str(rows / 'files'), options=cache))) == PAIRS
    plain = hf(kind, rows, path='json', options=dict(cache, data_files=str(rows / 'rows.jsonl')))
    assert [sample['prompt'] for sample in samples(plain)] == [prompt for prompt, _ in PAIRS]


@HF
def test_nested_columns_and_names_of_classes(kind, rows):
    assert pairs(hf(kind, rows, pipeline=NESTED)) == [(f'b{i}', i) for i in range(TOTAL)]
    assert pairs(hf(kind, rows, pipeline=LABELS)) == [
        (f'a photo of a {"dog" if i % 2 else "cat"}', i) for i in range(TOTAL)]


@HF
@pytest.mark.parametrize('changes, message', [
    (dict(options=dict(data_files='/nowhere/*.parquet')), 'cannot open path=.parquet., split=.train., data_files='),
    (dict(path='saved', split='test'), r"split='test' \(it was saved without splits: leave `split` out\)"),
    (dict(path='splits'), "split='train' .*there is no split 'train', only test"),
    (dict(split=['train']), '`split` of HF.* must be a text|split must be'),
    (dict(options=dict(data_files='x', token='hf_' + 'a1' * 12)), 'cannot open')])
def test_what_cannot_be_opened_is_one_line(kind, changes, message, rows):
    if 'options' not in changes and 'path' in changes:
        changes = dict(changes, options={}, path=str(rows / changes['path']))
    with pytest.raises(ValueError, match=message) as error:
        hf(kind, rows, **changes)
    assert '\n' not in str(error.value) and 'a1a1' not in str(error.value)


def test_subsets_of_rows(rows):
    assert pairs(hf('HFDataset', rows, indices=2)) == PAIRS[:2]
    assert pairs(hf('HFDataset', rows, indices=-2)) == PAIRS[-2:]
    assert pairs(hf('HFDataset', rows).get_subset([4, 0])) == [PAIRS[4], PAIRS[0]]
    assert pairs(hf('HFDataset', rows, split='train[1:3]')) == PAIRS[1:3]
    assert hf('HFDataset', rows).get_data_info(-1)['sample_idx'] == TOTAL - 1
    repeated = DATASETS.build(dict(type='RepeatDataset', times=2, dataset=hf('HFDataset', rows)))
    assert pairs(repeated) == 2 * PAIRS


def test_bad_rows_are_named(tmp_path):
    import datasets
    features = datasets.Features(dict(prompt=datasets.Value('string'), image=datasets.Image()))
    datasets.Dataset.from_dict(dict(prompt=['a', None], image=[dict(bytes=b'<html>', path=None)] * 2),
                               features=features).save_to_disk(str(tmp_path / 'bad'))
    for kind, place in (('HFDataset', 'row'), ('HFStream', 'shard 0 of 1, row')):
        dataset = hf(kind, tmp_path, path=str(tmp_path / 'bad'), options={})
        with pytest.raises(SampleError, match=f"{kind} path=.*bad', split='train', {place} 0.*no readable image"):
            samples(dataset)
    only_text = hf('HFDataset', tmp_path, path=str(tmp_path / 'bad'), options={}, pipeline=[
        lambda sample: dict(prompt=sample['prompt']), dict(type='PackInputs')])
    with pytest.raises(SampleError, match='row 0: .*no readable image'):
        only_text[0]


# Tars


def web(tars, urls='*.tar', **kwargs):
    return DATASETS.build(dict(type='WebDataset', urls=urls, data_root=str(tars), **kwargs))


def test_tars(tars):
    assert pairs(web(tars)) == pairs(web(tars, ['{000..002}.tar'])) == PAIRS
    assert pairs(web(tars, str(tars / '002.tar'))) == PAIRS[4:]
    assert pairs(web(tars, f'file:{tars}/001.tar')) == PAIRS[3:4]
    assert pairs(web(tars, [f'pipe:cat {tars}/00{i}.tar' for i in range(2)])) == PAIRS[:4]
    nested = [dict(type='PackInputs', prompt='json.meta.captions.0', image='png', meta=['__key__'])]
    assert [(s['prompt'], s['meta']['__key__']) for s in samples(web(tars, pipeline=nested))] == [
        (f'a{i}', f'{i:04d}') for i in range(TOTAL)]


def test_what_is_in_a_tar(tmp_path):
    write_tar(tmp_path / 'x.tar', {
        'a/1.JPG': content(2), 'a/1.cls': b'7', 'a/1.caption': '\ufeffein Füchslein '.encode(), 'a/1.npy': b'raw',
        'a/2.seg.png': content(1), 'a/2.prompt': b'p', 'a/2.txt': b't'})
    raw = [web(tmp_path, pipeline=[]).decode(record) for _, record in web(tmp_path).read(0)]
    assert [row['__key__'] for row in raw] == ['a/1', 'a/2'] and raw[0]['__url__'] == str(tmp_path / 'x.tar')
    assert (raw[0]['cls'], raw[0]['caption'], raw[0]['npy'], raw[0]['prompt']) == (
        7, 'ein Füchslein', b'raw', 'ein Füchslein')
    assert raw[0]['image'] is raw[0]['jpg'] and raw[1]['image'] is raw[1]['seg.png'] and raw[1]['prompt'] == 'p'


@pytest.mark.parametrize('files, message', [
    ({'1.png': b'<html>', '1.txt': b'a'}, r"x.tar, 1: '.*x.tar, 1.png' is no readable image \(of no known format"),
    ({'1.png': content(1)[:50], '1.txt': b'a'}, "x.tar, 1: .*'.*x.tar, 1.png' is no readable image"),
    ({'1.txt': b'caf\xe9'}, 'x.tar, 1: .*x.tar, 1.txt is no UTF-8'),
    ({'1.json': b'{'}, 'x.tar, 1: .*x.tar, 1.json is no json'),
    ({'1.cls': b'one', '1.txt': b'a'}, '1.cls is no cls'),
    ({'1.png': content(1)}, "x.tar, 1: a sample has no field 'prompt'"),
    ({'1.txt': b'a', '2.txt': b'b', '1.png': b''}, None)])
def test_bad_files_in_a_tar_are_named(files, message, tmp_path):
    write_tar(tmp_path / 'x.tar', files)
    stream = web(tmp_path).once()
    if message is None:
        assert [next(stream)['prompt'] for _ in range(2)] == ['a', 'b']
        message = "x.tar, 1: '.*1.png' is no readable image"
    with pytest.raises(SampleError, match=message):
        next(stream)


def test_bad_tars_are_named(tars, tmp_path):
    whole = (tars / '000.tar').read_bytes()
    (tmp_path / 'cut.tar').write_bytes(whole[:len(whole) // 2 + 700])
    with pytest.raises(SampleError, match='cut.tar, behind 0.*: cannot be read further'):
        samples(web(tmp_path))
    rest = (tmp_path / 'more.tar')
    shutil.copy(tars / '002.tar', rest)
    assert pairs(web(tmp_path, max_bad=2)) == [PAIRS[0], *PAIRS[4:]]
    rest.unlink()
    (tmp_path / 'cut.tar').write_text('<html>')
    with pytest.raises(SampleError, match='cut.tar: cannot be read further .ReadError'):
        samples(web(tmp_path))
    for urls, message in (('no.tar', 'no.tar does not exist: check it, and `data_root`'), ('x*.tar', 'does not exist'),
                          (['cut.tar', 'no.tar'], 'no.tar does not exist'), ([], 'names no tar file')):
        with pytest.raises(FileNotFoundError, match=f'`urls` of WebDataset.*{message}'):
            web(tmp_path, urls)
    with pytest.raises(SampleError, match='ftp://host/a.tar: cannot be read further'):
        samples(web(tmp_path, 'ftp://host/a.tar'))


def test_secrets_of_urls_are_in_no_message_and_no_matter_of_a_resume(tmp_path, monkeypatch):
    def fail(sources):
        raise OSError(f'no access to {sources[0]["url"]}')
        yield

    def url(number, count=1):
        return f'https://me:pass{number}@host/{{0..{count}}}.tar?token=a1b2c3d4e5f6g7h{number}x'

    one = web(tmp_path, url(1))
    assert one.fingerprint == web(tmp_path, url(2)).fingerprint != web(tmp_path, url(1, 2)).fingerprint
    monkeypatch.setattr('webdataset.tariterators.tarfile_samples', fail)
    with pytest.raises(SampleError, match='host/0.tar.*: cannot be read further .OSError: no access to ') as error:
        samples(one)
    for text in (one.fingerprint, str(error.value)):
        assert 'host/0.tar' in text and 'pass1' not in text and 'a1b2c3' not in text


# Both streams in workers


@pytest.mark.parametrize('kind', ['HFStream', 'WebDataset'])
def test_two_ranks_of_two_workers_share_uneven_shards(kind, rows, tars):
    """4 readers of 3 shards share by samples: after 3 samples of each, every one of the 6 has come twice."""
    found = []
    for rank in range(2):
        stream = hf(kind, rows) if kind == 'HFStream' else web(tars)
        stream.rank, stream.world_size = rank, 2
        batches = iter(DataLoader(stream, batch_size=3, num_workers=2, collate_fn=list))
        found += [sample['prompt'] for _ in range(2) for sample in next(batches)]
    assert sorted(found) == sorted(2 * [prompt for prompt, _ in PAIRS])


@pytest.mark.parametrize('kind', ['HFStream', 'WebDataset'])
def test_streams_can_be_pickled(kind, rows, tars):
    stream = hf(kind, rows) if kind == 'HFStream' else web(tars)
    assert pairs(pickle.loads(pickle.dumps(stream))) == PAIRS


@pytest.mark.parametrize('kind, package', [('HFDataset', 'datasets'), ('HFStream', 'datasets'),
                                           ('WebDataset', 'webdataset')])
def test_a_missing_package_is_named_with_its_extra(kind, package, monkeypatch):
    real = builtins.__import__
    monkeypatch.setattr('importlib.import_module', lambda name, *args: real('no_' + name))
    arguments = dict(urls='x.tar') if kind == 'WebDataset' else dict(path='x')
    with pytest.raises(ImportError, match=rf"{kind} needs the package {package} .*pip install 'cdm_plugin\[data\]'"):
        DATASETS.module_dict[kind](**arguments)


# Folders


def folder(root, **kwargs):
    return DATASETS.build(dict(type='ImageCaptionFolder', data_root=str(root), **kwargs))


def test_pictures_with_captions_beside_them(pictures):
    assert pairs(folder(pictures)) == PAIRS
    assert pairs(folder(pictures, indices=[5])) == PAIRS[5:]
    (pictures / '.thumbnails').mkdir()
    picture(0).save(pictures / '.thumbnails/x.png')
    picture(0).save(pictures / '.hidden.png')
    (pictures / 'b/back').symlink_to(pictures)  # leads to itself
    assert pairs(folder(pictures)) == PAIRS
    assert folder(pictures).get_data_info(5)['image'] == str(pictures / 'b/c/5.PNG')


@pytest.mark.parametrize('text, column, captions', [
    ('"a fox"', 'caption', {'a fox'}), ('["a fox", "a red fox"]', 'caption', {'a fox', 'a red fox'}),
    ('{"caption": "a fox", "id": 3}', 'caption', {'a fox'}),
    ('{"meta": {"texts": ["a", "b"]}}', 'meta.texts', {'a', 'b'}),
    ('{"meta": {"texts": ["a", "b"]}}', 'meta.texts.1', {'b'})])
def test_captions_in_json(text, column, captions, tmp_path):
    picture(3).save(tmp_path / '1.png')
    (tmp_path / '1.json').write_text(text)
    dataset = folder(tmp_path, caption_suffix='.json', column=column)
    assert {dataset[0]['prompt'] for _ in range(40)} == captions and number(dataset[0]['image']) == 3


@pytest.mark.parametrize('suffix, text, message', [
    ('.txt', None, r'1.png has no caption beside it: write 1.txt, or set `caption_suffix`'),
    ('.txt', b' \n', '1.txt: the prompt is empty'), ('.txt', b'caf\xe9', '1.txt cannot be read .*UTF-8'),
    ('.json', b'{"a"', '1.json is not JSON'), ('.json', b'{"text": "x"}', r"1.json has no 'caption', only \['text'\]"),
    ('.json', b'{}', "1.json: 'caption' is a dict"), ('.json', b'[]', 'is an empty list'),
    ('.json', b'{"caption": ["a", ""]}', '1.json: the prompt is empty'),
    ('.json', b'{"caption": ["a", 3]}', "1.json: 'caption.1' is a int")])
def test_bad_captions_are_named_by_file(suffix, text, message, tmp_path):
    picture(0).save(tmp_path / '1.png')
    if text is not None:
        (tmp_path / '1').with_suffix(suffix).write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        folder(tmp_path, caption_suffix=suffix)
    assert '\n' not in str(error.value)


def test_pictures_without_captions_are_left_out_up_to_a_limit(pictures):
    (pictures / 'a/2.txt').unlink()
    (pictures / 'a/3.txt').write_text(' ')
    inner = dict(type='ImageCaptionFolder', data_root=str(pictures))
    assert pairs(DATASETS.build(dict(type='SkipBadRecords', limit=2, dataset=inner))) == [*PAIRS[:2], *PAIRS[4:]]
    with pytest.raises(SampleError, match=r'2 bad records are more .*2\.PNG has no caption beside it.*3\.txt: the pro'):
        DATASETS.build(dict(type='SkipBadRecords', limit=1, dataset=inner))


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match="`caption_suffix` begins with a dot, '.txt', but is 'txt'"):
        folder(tmp_path, caption_suffix='txt')
    with pytest.raises(FileNotFoundError, match='has no pictures with captions'):
        folder(tmp_path)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match='is no folder'):
        folder(tmp_path)
