"""The emoji bench in short, on pictures and a text encoder made here: data, teacher, judge, rows, resumed."""
import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import save_tiny_bert

EMOJI = Path(__file__).parents[2] / 'benchmarks/emoji'
WORDS = ('red', 'green', 'blue', 'circle', 'square', 'apple', 'dog', 'cat', 'face', 'heart', 'light', 'dark', 'medium',
         'skin', 'tone', 'hand')
# The sample grid's.
PROMPTS = ['red apple', 'dog face', 'smiling face with sunglasses', 'locomotive', 'Brazil', 'cherry blossom',
           'woman astronaut', 'blue heart']


@pytest.fixture(scope='module')
def emoji():
    """Imports a script of benchmarks/emoji/ by name."""
    import importlib
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EMOJI))
        yield importlib.import_module
    for name in ('study', 'judge', 'make_data'):
        sys.modules.pop(name, None)


# The data


def test_variants_of_skin_tone_share_a_name(emoji):
    bare = emoji('make_data').without_skin_tones
    for tone in ('light', 'medium light', 'medium', 'medium dark', 'dark'):
        assert bare(f'waving hand {tone} skin tone') == 'waving hand'
        assert bare(f'kiss woman man {tone} skin tone dark skin tone') == 'kiss woman man'
        assert bare(f'man {tone} skin tone red hair') == 'man red hair'
    for name in ('dark blue heart', 'medium', 'light bulb', 'new moon'):
        assert bare(name) == name


def test_a_tenth_of_the_names_is_held_out_with_all_their_variants(emoji):
    is_held_out = emoji('make_data').is_held_out
    names = [f'thing {i}' for i in range(3000)]
    assert 0.08 < sum(map(is_held_out, names)) / len(names) < 0.12
    for name in names[:200]:
        assert is_held_out(name) == is_held_out(f'{name} medium dark skin tone') == is_held_out(
            f'{name} light skin tone dark skin tone')


def write_npz(file, captions):
    rng, files = np.random.default_rng(0), []
    for _ in captions:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((32, 32)).save(buffer, 'PNG')
        files.append(np.frombuffer(buffer.getvalue(), np.uint8))
    np.savez(file, png=np.concatenate(files), offsets=np.cumsum([0, *map(len, files)]), captions=np.array(captions))


@pytest.fixture(scope='module')
def data(emoji, tmp_path_factory):
    """The folder that make_data.py makes of 40 pictures."""
    folder = tmp_path_factory.mktemp('emoji')
    colours = [f'{a} {b} {c}' for a in WORDS[:3] for b in WORDS[3:8] for c in WORDS[8:11]]
    held_out = [name for name in colours if emoji('make_data').is_held_out(name)][:2]
    assert len(held_out) == 2
    captions = [*PROMPTS, *held_out, f'{held_out[0]} light skin tone',
                *(name for name in colours if name not in held_out)][:40]
    write_npz(folder / 'pictures.npz', captions)
    save_tiny_bert(folder / 'bert', width=384, words=WORDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['make_data.py', '--pictures', str(folder / 'pictures.npz'), '--text-encoder',
                                    str(folder / 'bert'), '--side', '32', '--out', str(folder / 'data')])
        emoji('make_data').main()
    return folder / 'data'


def test_the_split_keeps_pictures_and_captions_together(data, emoji):
    rows = {part: [json.loads(line) for line in (data / f'{part}.jsonl').open()] for part in ('train', 'held_out')}
    assert sum(map(len, rows.values())) == 40 and len(rows['held_out']) >= 3
    with np.load(data.parent / 'pictures.npz') as npz:
        png, starts, captions = npz['png'], npz['offsets'], npz['captions']
    given = {str(caption): png[a:b].tobytes() for caption, a, b in zip(captions, starts, starts[1:])}
    for part, entries in rows.items():
        for entry in entries:
            assert emoji('make_data').is_held_out(entry['caption']) == (part == 'held_out')
            ours = np.asarray(Image.open(data / 'images' / entry['image']))
            assert np.array_equal(ours, np.asarray(Image.open(io.BytesIO(given[entry['caption']]))))


def test_the_font_s_pictures(emoji):
    """Debian's font, where it is installed, and PyPI's `emoji`."""
    pytest.importorskip('emoji.unicode_codes')  # benchmarks/emoji may be importable under the name too
    font = Path('/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf')
    if not font.is_file():
        pytest.skip('fonts-noto-color-emoji is not installed')
    pictures = dict(emoji('make_data').draw_pictures(font))
    assert len(pictures) > 3500 and {'red apple', 'woman astronaut', 'waving hand dark skin tone'} <= pictures.keys()
    apple = np.asarray(pictures['red apple'], float)
    assert apple.shape[0] == apple.shape[1] >= 109 and (apple[0, 0] == 255).all()
    assert apple[64, 64, 0] > apple[64, 64, 1] + 50  # it is red


# The judge


def test_retrieval_by_hand(emoji):
    """Two captions along the axes of the space, and four pictures: three nearer to the first one."""
    judge = emoji('judge').Judge(text_width=64).eval()
    with torch.no_grad():
        judge.text.weight.copy_(torch.eye(64))
        judge.text.bias.zero_()
    texts, features = torch.eye(64)[:3], torch.zeros(4, 64)
    features[:, :2] = torch.tensor([[2.0, 1.0], [5.0, 0.0], [1.0, 0.9], [0.1, 3.0]])
    assert judge.retrieval(features, texts, [0, 0, 0, 0]) == 0.75
    assert judge.retrieval(features, texts, [0, 1, 1, 1]) == 0.5
    assert judge.retrieval(features, texts, [1, 1, 1, 0], k=2) == 1.0
    assert judge.retrieval(features, texts, [2, 2, 2, 2], k=2) == 0.0 and judge.retrieval(
        features, texts, [2, 2, 2, 2], k=5) == 1.0


def test_the_judge_learns_its_pictures(emoji):
    """Eight colours with eight unrelated texts: the right one is retrieved."""
    generator = torch.Generator().manual_seed(0)
    colours, texts = torch.rand(8, 3, 1, 1, generator=generator) * 2 - 1, torch.randn(8, 16, generator=generator)
    pictures = colours.expand(8, 3, 64, 64).contiguous()
    judge = emoji('judge').train_judge(pictures, texts, steps=60)
    assert not any(p.requires_grad for p in judge.parameters())
    assert judge.retrieval(judge.features(pictures), texts, range(8)) >= 0.75
    scores = emoji('judge').score(judge, pictures, texts, range(8), dict(fd=judge.features(pictures)))
    assert scores['fd'] == 0 and scores['retrieval@1'] >= 0.75
    broken = emoji('judge').score(judge, pictures * float('nan'), texts, range(8), dict(fd=judge.features(pictures)))
    assert set(broken.values()) == {None} and broken.keys() == scores.keys()


def test_augmentation_moves_over_white(emoji):
    pictures = torch.full((16, 3, 64, 64), -1.0)
    moved = emoji('judge').augment(pictures, torch.Generator().manual_seed(0))
    assert moved.shape == pictures.shape and (moved > 0.5).any(dim=(1, 2, 3)).sum() >= 12
    assert moved[:, :, 8:56, 8:56].max() < 0  # no more than 4 pixels


# The study


@pytest.fixture(scope='module')
def bench(emoji, data):
    study = emoji('study')
    form = dataclasses.replace(study.SMALL, teacher_iters=4, iters=2, teacher_batch=8, batch=2, judge_steps=2,
                               samples=4, seeds=1, options={
                                   **study.SMALL.options, 'model.sample_sigmas': [1.0, 0.5],
                                   'custom_hooks.1.steps': [], 'custom_hooks.1.teacher_steps': 2})
    return study.Bench(form, data, data.parent / 'work')


@pytest.fixture(scope='module')
def results(emoji, bench):
    return emoji('study').study(bench, bench.data.parent / 'results.json', ['dmd2', 'cdm-consistent'], 1, pictures=2)


@pytest.mark.slow
def test_every_row_is_judged_at_every_number_of_steps(results):
    assert results['rows'].keys() == {'dmd2', 'cdm-consistent'}
    for runs in results['rows'].values():
        assert [entry['steps'] for entry in runs[0]['final']] == [1, 2, 4, 8]
    for entry in (*results['teacher'], *results['rows']['dmd2'][0]['final']):
        for part in ('held_out', 'train'):
            assert entry[part]['fd'] >= 0 and entry[part]['fd_real'] >= 0 and 0 <= entry[part]['retrieval@1'] <= 1
    # The reference is of other noise: the teacher's own row is the floor, not 0.
    assert results['teacher'][-1]['steps'] == 50 and results['teacher'][-1]['train']['fd'] > 0


@pytest.mark.slow
def test_what_has_run_is_not_run_again(emoji, bench, results):
    out = bench.data.parent / 'results.json'
    before = out.stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji('study').Bench, 'run', lambda *a: pytest.fail('it is run again'))
        patch.setattr('mmengine.runner.Runner.train', lambda *a: pytest.fail('the teacher is trained again'))
        again = emoji('study').study(bench, out, ['dmd2', 'cdm-consistent'], 1)
    assert again == json.loads(out.read_text()) and out.stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_table_has_all_of_it(emoji, results, bench, capsys):
    table = emoji('study').table(results, 'held_out')
    lines = table.splitlines()
    assert [line.split(' | ')[0].strip('| ') for line in lines[2:]] == ['real pictures', 'teacher, guided', 'dmd2',
                                                                        'cdm-consistent']
    assert len({line.count('|') for line in lines}) == 1
    emoji('study').main(['--small', '--report', '--out', str(bench.data.parent / 'results.json')])
    assert table in capsys.readouterr().out


def test_every_row_s_recipe_fits(emoji, bench):
    """In the full form, network and schedule are the shipped recipe's."""
    study = emoji('study')
    full = study.Bench(study.FULL, bench.data, bench.work_dir)
    from cdm_plugin.config import check_config, load_config
    for name, (recipe, _) in study.ROWS.items():
        cfg, shipped = full.row_config(name, 3), load_config(study.RECIPE.format(recipe))
        check_config(cfg)
        assert cfg.randomness.seed == 3 and cfg.model.type == shipped.model.type
        assert cfg.model.backbone.config == shipped.model.backbone.config
        assert cfg.train_cfg.max_iters == shipped.train_cfg.max_iters == study.FULL.iters
        assert cfg.train_dataloader.batch_size == shipped.train_dataloader.batch_size
    assert full.row_config('dmd2-aware', 0).model.anchor_aware_fake
    teacher = full.teacher_config()
    assert (teacher.train_cfg.max_iters, teacher.train_dataloader.batch_size) == (20000, 128)


def test_without_data_it_says_how_to_make_them(emoji, tmp_path):
    with pytest.raises(SystemExit, match='make_data.py'):
        emoji('study').main(['--small', '--data', str(tmp_path)])


def test_the_table_of_the_page_is_what_has_run(emoji):
    """docs/emoji.md shows docs/emoji/small.json."""
    docs = EMOJI.parents[1] / 'docs'
    results = json.loads((docs / 'emoji/small.json').read_text())
    assert emoji('study').table(results, 'held_out') in (docs / 'emoji.md').read_text(encoding='utf-8')
