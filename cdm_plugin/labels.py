"""Text on pictures, in every script that an installed font has."""
import functools
import logging
import unicodedata
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from PIL import Image, ImageDraw, ImageFont

# Colour emoji are bitmaps of one size: of Noto's font, of Apple's.
BITMAP_SIZES = (109, 160)
# Words in the name of a font's file that is not the plain one of its family.
STYLES = ('Black', 'Bold', 'Condensed', 'Italic', 'Light', 'Mono', 'Oblique', 'Serif', 'Thin')


def label_width(text: str, size: int) -> int:
    """Pixels that a label of this font size takes."""
    return int(sum(_length(part, font, size) for part, font in _parts(text, size)))


def draw_label(image: Image.Image, x: float, y: float, text: str, size: int) -> None:
    """Writes black text, from x on and centred at the height y."""
    for part, font in _parts(text, size):
        if font.size == size:
            ImageDraw.Draw(image).text((x, y), part, fill='black', font=font, anchor='lm')
        else:
            left, top, right, bottom = font.getbbox(part)
            tile = Image.new('RGBA', (int(right - left), int(bottom - top)))
            ImageDraw.Draw(tile).text((-left, -top), part, fill='black', font=font, embedded_color=True)
            tile = tile.resize([max(1, round(side * size / font.size)) for side in tile.size])
            image.paste(tile, (round(x), round(y - tile.height / 2)), tile)
        x += _length(part, font, size)


def _length(part: str, font: ImageFont.FreeTypeFont, size: int) -> float:
    return font.getlength(part) * size / font.size


def _parts(text: str, size: int) -> list[tuple[str, Any]]:
    """The text, cut where another font has to go on."""
    if text.isascii():
        return [(text, ImageFont.load_default(size))]
    parts: list[list[str]] = []
    for character in text:
        # Marks and joiners stay with what they follow.
        if not parts or unicodedata.category(character)[0] not in 'CM':
            path = _font_with(character)
            if not parts or parts[-1][0] != path:
                parts.append([path, ''])
        parts[-1][1] += character
    return [(part, _open(path, size)) for path, part in parts]


@functools.cache
def _font_with(character: str) -> str:
    """Path of the first font that has a character; of the first one of all, which draws a box, if there is none."""
    for path in _fonts():
        if ord(character) in _characters(path):
            return path
    _say_what_to_install()
    return _fonts()[0]


@functools.cache
def _say_what_to_install() -> None:
    print_log('no installed font has some characters of the labels on pictures, which are drawn as boxes: install one, '
              'such as fonts-noto-cjk and fonts-noto-color-emoji of Debian and Ubuntu', 'current',
              level=logging.WARNING)


@functools.cache
def _fonts() -> list[str]:
    """The font files of this machine, the plain ones first; before them DejaVu Sans, which comes with MMEngine's
    Matplotlib and has Latin, Cyrillic, Greek, Arabic and Hebrew."""
    import matplotlib
    from matplotlib.font_manager import findSystemFonts
    dejavu = Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf')
    return [str(dejavu), *sorted(findSystemFonts(), key=lambda p: (any(s in Path(p).name for s in STYLES), p))]


@functools.cache
def _characters(path: str) -> frozenset[int]:
    """What a font can draw; nothing of a file that Pillow cannot open."""
    from fontTools.ttLib import TTFont
    try:
        _open(path, 12)
        font = TTFont(path, fontNumber=0, lazy=True)
        if 'COLR' in font and font['COLR'].version > 0:
            return frozenset()  # drawn by gradients, which Pillow leaves blank
        return frozenset(font.getBestCmap() or ())
    except Exception:  # fontTools raises anything on a broken font
        return frozenset()


def _open(path: str, size: int) -> ImageFont.FreeTypeFont:
    for possible in (size, *BITMAP_SIZES):
        try:
            return ImageFont.truetype(path, possible)
        except OSError:
            continue
    raise OSError(f'{path} has no size that Pillow can open')
