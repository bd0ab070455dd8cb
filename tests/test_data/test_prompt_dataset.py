import json

import pytest
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from cdm_plugin.data import PromptDataset

CAT, TEA = '一只猫 🐈‍⬛ on a mat', 'чай, "горячий" ☕'


def write(path, text, encoding='utf-8'):
    path.write_bytes(text.encode(encoding))
    return str(path)


def prompts(dataset):
    return [dataset[i]['prompt'] for i in range(len(dataset))]


def refused(path, message, error=ValueError, **kwargs):
    """Builds a dataset that must be refused in one line that names the key, and returns the line."""
    with pytest.raises(error, match=message) as info:
        PromptDataset(ann_file=str(path), **kwargs)
    text = str(info.value)
    assert '\n' not in text and '`ann_file`' in text and str(path) in text
    return text


def test_txt_holds_one_prompt_a_line(tmp_path):
    dataset = PromptDataset(ann_file=write(tmp_path / 'p.txt', f'{CAT}\r\n\n   \n  {TEA} \nlast'))
    assert isinstance(dataset, BaseDataset)
    assert prompts(dataset) == [CAT, TEA, 'last']
    assert dataset[0] == {'prompt': CAT}


def test_txt_is_cut_at_line_ends_only(tmp_path):
    text = 'a\x0bb\x0cc\x85d\u2028e'
    assert prompts(PromptDataset(ann_file=write(tmp_path / 'p.txt', text + '\n' + 'f'))) == [text, 'f']


@pytest.mark.parametrize('suffix', ['txt', 'csv', 'jsonl'])
def test_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path, suffix):
    text = dict(txt='cat\n', csv='prompt\ncat\n', jsonl='{"prompt": "cat"}\n')[suffix]
    assert prompts(PromptDataset(ann_file=write(tmp_path / f'p.{suffix}', text, 'utf-8-sig'))) == ['cat']


@pytest.mark.parametrize('ascii_only', [True, False])
def test_jsonl_column(tmp_path, ascii_only):
    rows = [dict(caption=CAT, score=0.5, tags=['a']), dict(caption=TEA, other=None)]
    text = '\n\n'.join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    dataset = PromptDataset(ann_file=write(tmp_path / 'p.jsonl', text), column='caption')
    assert prompts(dataset) == [CAT, TEA]
    assert dataset.get_data_info(0) == dict(rows[0], prompt=CAT, sample_idx=0)


def test_csv_column_with_quotes_commas_and_line_breaks(tmp_path):
    text = 'id,text\r\n1,"one, two\r\nthree ""four"""\r\n2,' + CAT + '\r\n'
    dataset = PromptDataset(ann_file=write(tmp_path / 'p.CSV', text), column='text')
    assert prompts(dataset) == ['one, two\r\nthree "four"', CAT]
    assert dataset.get_data_info(1)['id'] == '2'


def test_pipeline_sees_the_other_columns(tmp_path):
    path = write(tmp_path / 'p.csv', 'prompt,style\na cat,oil\n')
    dataset = PromptDataset(path, pipeline=[lambda sample: {'prompt': f"{sample['prompt']}, {sample['style']}"}])
    assert dataset[0] == {'prompt': 'a cat, oil'}


def test_data_root_prefix_and_indices(tmp_path):
    write(tmp_path / 'p.csv', 'prompt,img\na,1.png\nb,2.png\nc,3.png\n')
    dataset = PromptDataset(ann_file='p.csv', data_root=str(tmp_path), data_prefix=dict(img='images'), indices=2)
    assert prompts(dataset) == ['a', 'b']
    assert dataset.get_data_info(1)['img'] == str(tmp_path / 'images' / '2.png')
    assert prompts(dataset.get_subset([1])) == ['b']


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write(tmp_path / 'p.txt', 'a cat')
    assert prompts(PromptDataset(ann_file='~/p.txt')) == ['a cat']
    assert prompts(PromptDataset(ann_file='p.txt', data_root='~')) == ['a cat']


def test_lazy_init_reads_later(tmp_path):
    dataset = DATASETS.build(dict(type='PromptDataset', ann_file=str(tmp_path / 'p.txt'), lazy_init=True))
    write(tmp_path / 'p.txt', 'a cat')
    assert prompts(dataset) == ['a cat']


def test_categories(tmp_path):
    text = '\n'.join(json.dumps(dict(prompt='x', kind=kind)) for kind in ['dog', ['cat', 'dog'], 'cat', []])
    dataset = PromptDataset(ann_file=write(tmp_path / 'p.jsonl', text), category_column='kind')
    assert dataset.categories == ['cat', 'dog']
    assert [dataset.get_cat_ids(i) for i in range(4)] == [[1], [0, 1], [0], []]


def test_categories_need_their_column(tmp_path):
    dataset = PromptDataset(ann_file=write(tmp_path / 'p.txt', 'x'))
    with pytest.raises(ValueError, match='set `category_column`'):
        dataset.get_cat_ids(0)
    refused(write(tmp_path / 'q.csv', 'prompt,kind\nx,\n'), "line 2: no category in 'kind'", category_column='kind')
    refused(write(tmp_path / 'r.csv', 'prompt,kind\nx,a\n'), "no column 'sort'.*'prompt', 'kind'.*`category_column`",
            category_column='sort')


def test_missing_file(tmp_path):
    assert '`data_root`' in refused(tmp_path / 'no.txt', 'does not exist', FileNotFoundError)


def test_folder_instead_of_a_file(tmp_path):
    (tmp_path / 'p.txt').mkdir()
    refused(tmp_path / 'p.txt', 'cannot be read')


@pytest.mark.parametrize('name', ['p.parquet', 'p.json', 'prompts'])
def test_unknown_suffix(tmp_path, name):
    refused(write(tmp_path / name, 'x'), 'unknown suffix .*jsonl')


@pytest.mark.parametrize('suffix', ['txt', 'csv', 'jsonl'])
def test_other_encodings_are_named_with_their_line(tmp_path, suffix):
    text = dict(txt='ok\ncafé\n', csv='prompt\ncafé\n', jsonl='{"prompt": "ok"}\n{"prompt": "café"}\n')[suffix]
    refused(write(tmp_path / f'p.{suffix}', text, 'latin-1'), 'line 2: byte 0xe9 is not UTF-8')


@pytest.mark.parametrize('text, message', [
    ('{"prompt": "ok"}\n\n{"prompt": "cut\n', 'line 3: not JSON'),
    ('["a cat"]\n', 'line 1: a list; each line'),
    ('{"prompt": "ok"}\n{"text": "x", "id": 2}\n',
     r"line 2: no column 'prompt', there are \['text', 'id'\]; set `column`"),
    ('{"prompt": 3}\n', "line 1: 'prompt' is a int"),
    ('{"prompt": null}\n', "line 1: 'prompt' is a NoneType"),
    ('{"prompt": ""}\n', 'line 1: the prompt is empty'),
    (r'{"prompt": "cut \ud83d"}', 'line 1: .*surrogate'),
])
def test_bad_jsonl_rows(tmp_path, text, message):
    refused(write(tmp_path / 'p.jsonl', text), message)


@pytest.mark.parametrize('text, message', [
    ('id,text\n1,a\n', r"line 2: no column 'prompt', there are \['id', 'text'\]; set `column`"),
    ('id,prompt\n1,a\n2,\n', 'line 3: the prompt is empty'),
    ('id,prompt\n1,a\n2,  \n', 'line 3: the prompt is empty'),
    ('id,prompt\n1,a cat, black\n', 'line 2: not as many cells as the header; .*quotes'),
    ('id,prompt\n1\n', 'line 2: not as many cells'),
    ('id,prompt\n1,"open\n', 'row from line 2: malformed csv'),
])
def test_bad_csv_rows(tmp_path, text, message):
    refused(write(tmp_path / 'p.csv', text), message)


@pytest.mark.parametrize('name, text', [('p.txt', ''), ('p.txt', '\n \n'), ('p.jsonl', '\n'), ('p.csv', ''),
                                        ('p.csv', 'prompt\n')])
def test_no_prompts_at_all(tmp_path, name, text):
    refused(write(tmp_path / name, text), 'holds no prompts')
