import json
import time

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
    assert dataset.get_data_info(0) == dict(rows[0], prompt=CAT, ann_line=1, sample_idx=0)


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


# What else lies in such files


@pytest.mark.parametrize('suffix', ['txt', 'csv', 'jsonl'])
@pytest.mark.parametrize('encoding', ['utf-16', 'utf-16-le', 'utf-16-be'])
def test_utf16_is_named(tmp_path, suffix, encoding):
    text = dict(txt='a red fox\nblue sky\n', csv='prompt\na red fox\n', jsonl='{"prompt": "a red fox"}\n')[suffix]
    refused(write(tmp_path / f'p.{suffix}', text, encoding), 'line 1: the file is UTF-16; save it as UTF-8')


@pytest.mark.parametrize('name, text', [('p.txt', 'ok\na red\0 fox\n'), ('p.csv', 'prompt\n"a red\0 fox"\n'),
                                        ('p.jsonl', '{"prompt": "ok"}\n{"prompt": "a red\0 fox"}\n')])
def test_nul_is_refused_by_line(tmp_path, name, text):
    refused(write(tmp_path / name, text), 'line 2: a NUL character')


def test_an_escaped_nul_is_refused_by_line(tmp_path):
    refused(write(tmp_path / 'p.jsonl', '{"prompt": "ok"}\n{"prompt": "a\\u0000"}'), 'line 2: the prompt holds a NUL')


@pytest.mark.parametrize('name, text', [
    ('p.txt', '\ufeffa\n\ufeffb\n'), ('p.csv', '\ufeffprompt\na\n\ufeffb\n'),
    ('p.jsonl', '\ufeff{"prompt": "a"}\n\ufeff{"prompt": "b"}\n')])
def test_marks_of_joined_files_are_removed(tmp_path, name, text):
    assert prompts(PromptDataset(ann_file=write(tmp_path / name, text))) == ['a', 'b']


@pytest.mark.parametrize('blank', ['\u200b', '\u200d\u2060', ' \u00ad\u3000'])
def test_what_shows_nothing_is_empty(tmp_path, blank):
    assert prompts(PromptDataset(ann_file=write(tmp_path / 'p.txt', f'a\n{blank}\nb'))) == ['a', 'b']
    refused(write(tmp_path / 'p.csv', f'id,prompt\n1,{blank}\n'), 'line 2: the prompt is empty')
    refused(write(tmp_path / 'p.jsonl', json.dumps(dict(prompt=blank))), 'line 1: the prompt is empty')


def test_joiners_inside_a_prompt_stay(tmp_path):
    family = '👩\u200d👩\u200d👧'
    assert prompts(PromptDataset(ann_file=write(tmp_path / 'p.txt', f'{family}\n'))) == [family]


@pytest.mark.parametrize('suffix', ['txt', 'csv', 'jsonl'])
@pytest.mark.parametrize('text, message', [
    ('version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n', 'a pointer of Git LFS.*git lfs pull'),
    ('\n <!DOCTYPE html>\n<html></html>', 'a web page'), ('<html>404</html>', 'a web page'),
])
def test_files_that_are_no_prompts(tmp_path, suffix, text, message):
    refused(write(tmp_path / f'p.{suffix}', text), f'line 1: the file is {message}')


@pytest.mark.parametrize('text, message', [
    ('prompt,score,prompt\na,5,b\n', "line 1: the columns 1 and 3 are both called 'prompt'"),
    ('id,prompt, prompt\n1,a,b\n', "line 1: the columns 2 and 3 are both called 'prompt'"),
])
def test_columns_of_one_name(tmp_path, text, message):
    refused(write(tmp_path / 'p.csv', text), message)


@pytest.mark.parametrize('depth', [98, 101, 400, 900, 3000, 100_000])
@pytest.mark.parametrize('opening, closing', [('[', ']'), ('{"a": ', '}')])
def test_deep_json(tmp_path, depth, opening, closing):
    """With the row itself, 98 levels are 99 and the value inside is the hundredth."""
    line = '{"prompt": "a", "x": ' + opening * depth + '1' + closing * depth + '}'
    path = write(tmp_path / 'p.jsonl', '{"prompt": "ok"}\n' + line)
    if depth == 98:
        assert prompts(PromptDataset(ann_file=path)) == ['ok', 'a']
    else:
        refused(path, 'line 2: JSON of more than 100 levels')


def test_big_numbers(tmp_path):
    refused(write(tmp_path / 'p.jsonl', '{"prompt": "a", "id": 1' + '0' * 5000 + '}'), 'line 1: not readable .*digits')


@pytest.mark.parametrize('name, text, message', [
    ('p.txt', '{}\n', 'line 1: the prompt has 8000000 characters'),
    ('p.jsonl', '{{"prompt": "{}"}}', 'line 1: the prompt has 8000000 characters'),
    ('p.csv', 'prompt\n"{}"\n', 'row from line 2: malformed csv'),
])
def test_a_line_of_eight_megabytes(tmp_path, name, text, message):
    path, start = write(tmp_path / name, text.format('word,lo,' * 1_000_000)), time.process_time()
    refused(path, message)
    assert time.process_time() - start < 5
    limit = 'x' * 2**17
    assert prompts(PromptDataset(ann_file=write(tmp_path / 'q.txt', limit))) == [limit]


def test_lone_surrogates_of_a_broken_writer(tmp_path):
    """UTF-8 has no bytes for half of a pair."""
    (tmp_path / 'p.txt').write_bytes('ok\na \ud83d'.encode('utf-8', 'surrogatepass'))
    refused(tmp_path / 'p.txt', 'line 2: byte 0xed is not UTF-8')


def test_columns_inside_a_json_object(tmp_path):
    row = dict(meta=dict(caption=CAT, kinds=['a', 'b']), captions=[TEA, 'a fox'], **{'x.y': 'with a dot'})
    path = write(tmp_path / 'p.jsonl', json.dumps(row))
    for column, prompt in (('meta.caption', CAT), ('captions.0', TEA), ('captions.1', 'a fox'), ('x.y', 'with a dot')):
        dataset = PromptDataset(ann_file=path, column=column, category_column='meta.kinds')
        assert prompts(dataset) == [prompt] and dataset.categories == ['a', 'b'] and dataset.get_cat_ids(0) == [0, 1]
    for column in ('meta.text', 'captions.2', 'captions.first', 'meta.caption.0.1', 'nothing.at.all'):
        refused(path, f"line 1: no column '{column}'", column=column)
    assert {PromptDataset(ann_file=path, column='captions')[0]['prompt'] for _ in range(40)} == {TEA, 'a fox'}


@pytest.mark.parametrize('captions, message', [
    ([], "line 1: 'prompt' is an empty list"), (['a', ''], 'line 1: the prompt is empty'),
    (['a', 3], "line 1: 'prompt.1' is a int"), ([['a']], 'line 1: prompt.0 is a list'),
    ({'en': 'a'}, "line 1: 'prompt' is a dict, but a prompt is a text; set `column`")])
def test_each_of_several_captions_is_checked(captions, message, tmp_path):
    refused(write(tmp_path / 'p.jsonl', json.dumps(dict(prompt=captions))), message)


@pytest.mark.parametrize('name, text, expected', [
    ('p.txt', '# my prompts\na red fox\n', ['# my prompts', 'a red fox']),
    ('p.txt', 'a red fox\rblue sky\r', ['a red fox', 'blue sky']),
    ('p.txt', '\u00a0\na red fox --w 512\n', ['a red fox --w 512']),
    ('P.TXT', 'a red fox', ['a red fox']),
    ('p.csv', 'id,prompt\r1,a red fox\r2,blue sky\r', ['a red fox', 'blue sky']),
    ('p.csv', 'prompt\nNaN\nNone\nnull\n', ['NaN', 'None', 'null']),
    ('p.csv', ',prompt\n0,a red fox\n', ['a red fox']),
    ('p.csv', 'id,prompt\n1,a 6" ruler\n', ['a 6" ruler']),
    ('p.jsonl', '{"prompt": "a", "score": NaN}\r\n{"prompt": "b"}\r\n', ['a', 'b']),
    ('p.jsonl', '{"prompt": "  a red fox\\n "}', ['  a red fox\n ']),
    ('p.csv', 'id,prompt\n1,"a sign saying \\"hi\\" on it"\n', 'row from line 2: malformed'),
    ('p.csv', '\nprompt\na red fox\n', 'line 2: not as many cells'),
    ('p.csv', 'id, prompt\n1, a red fox\n', "line 2: no column 'prompt', there are .*' prompt'"),
    ('p.csv', 'id;prompt\n1;a red fox\n', "no column 'prompt', there are .*'id;prompt'"),
    ('p.jsonl', '[{"prompt": "a red fox"}]', 'line 1: a list'),
    ('p.jsonl', 'null', 'line 1: a NoneType'),
    ('p.jsonl', '{"prompt": "a\tb"}', 'line 1: not JSON'),
    ('p.jsonl', '{\n  "prompt": "a"\n}', 'line 1: not JSON'),
    ('p.jsonl', "{'prompt': 'a'}", 'line 1: not JSON'),
    ('p.jsonl', '{"prompt": "a"},\n', 'line 1: not JSON'),
    ('p.txt.gz', '', 'unknown suffix'), ('p.tsv', 'prompt\na', 'unknown suffix'), ('p.ndjson', '{}', 'unknown suffix'),
])
def test_other_files_are_read_or_refused_in_one_line(tmp_path, name, text, expected):
    path = write(tmp_path / name, text)
    if isinstance(expected, str):
        refused(path, expected)
    else:
        assert prompts(PromptDataset(ann_file=path)) == expected
