from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, features

from cdm_plugin import labels
from cdm_plugin.labels import draw_label, label_width
from cdm_plugin.sheets import labelled_grid

DEJAVU = Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf')


def square_font(path, characters):
    """A font in which every character is a black square, as wide and as high as the font's size."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 1000), (1000, 1000), (1000, 0)):
        pen.lineTo(corner)
    pen.closePath()
    square = pen.glyph()
    builder = FontBuilder(1000)
    builder.setupGlyphOrder(['.notdef', 'square'])
    builder.setupCharacterMap({ord(c): 'square' for c in characters})
    builder.setupGlyf({'.notdef': TTGlyphPen(None).glyph(), 'square': square})
    builder.setupHorizontalMetrics({'.notdef': (1000, 0), 'square': (1000, 0)})
    builder.setupHorizontalHeader(ascent=1000, descent=0)
    builder.setupNameTable({})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


@pytest.fixture
def installed(monkeypatch):
    """Sets what fonts the machine has: installed(path, ...)."""

    def clear():
        for cached in (labels._fonts, labels._font_with, labels._characters, labels._say_what_to_install):
            cached.cache_clear()

    def set_fonts(*paths):
        clear()
        monkeypatch.setattr(font_manager, 'findSystemFonts', lambda: list(paths))

    yield set_fonts
    clear()


def drawn(text, size=20):
    image = Image.new('RGB', (300, 40), 'white')
    draw_label(image, 5, 20, text, size)
    return np.asarray(image)


def black(pixels):
    """Box of the black pixels: left, top, right, bottom."""
    rows, columns = np.nonzero(pixels.max(-1) < 64)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize('text, font', [
    ('student, 4 steps', ImageFont.load_default(20)), ('красная лиса, 4', ImageFont.truetype(DEJAVU, 20)),
    ('Füchse', ImageFont.truetype(DEJAVU, 20)), ('αλεπού 😀', ImageFont.truetype(DEJAVU, 20)),
    pytest.param('ثعلب أحمر', ImageFont.truetype(DEJAVU, 20), marks=pytest.mark.skipif(
        not features.check('raqm'), reason='Pillow without raqm'))
], ids=['ascii', 'Cyrillic', 'Latin', 'Greek', 'Arabic'])
def test_scripts_that_come_with_mmengine_look_as_pillow_draws_them(text, font, installed):
    installed()
    image = Image.new('RGB', (300, 40), 'white')
    ImageDraw.Draw(image).text((5, 20), text, fill='black', font=font, anchor='lm')
    assert np.array_equal(drawn(text), np.asarray(image))
    assert label_width(text, 20) == pytest.approx(font.getlength(text), abs=1)


def test_another_script_is_drawn_by_the_font_that_has_it(installed, tmp_path):
    bold = square_font(tmp_path / 'ABold.ttf', '狐')
    plain = square_font(tmp_path / 'B.ttf', '狐狸')
    (tmp_path / 'broken.ttf').write_bytes(b'no font')
    installed(str(tmp_path / 'broken.ttf'), bold, plain)
    assert labels._font_with('狐') == plain
    pixels = drawn('狐狸')
    left, top, right, bottom = black(pixels)
    assert (left, right) == (5, 45) and bottom - top == 20 and (pixels[top:bottom, left:right] == 0).all()
    both = drawn('a狐b')  # the Latin letters stay DejaVu's
    dejavu = ImageFont.truetype(DEJAVU, 20).getlength('a')
    assert label_width('a狐b', 20) == pytest.approx(20 + dejavu + ImageFont.truetype(DEJAVU, 20).getlength('b'), abs=1)
    assert (both[10:30, 5 + round(dejavu) + 1:5 + round(dejavu) + 19] == 0).all()


def test_marks_and_joiners_stay_with_the_character_before_them(installed, tmp_path):
    """A woman, a joiner and a rocket are one emoji: an astronaut."""
    installed(square_font(tmp_path / 'emoji.ttf', '👩🚀'))
    assert [part for part, _ in labels._parts('a 👩\u200d🚀\ufe0f b', 20)] == ['a ', '👩\u200d🚀\ufe0f', ' b']


def test_bitmaps_of_one_size_are_scaled_to_the_labels(installed, tmp_path, monkeypatch):
    """As colour emoji are."""
    path = square_font(tmp_path / 'emoji.ttf', '🦊')
    installed(path)
    truetype = ImageFont.truetype

    def of_one_size(font, size, *args):
        if font == path and size != 109:
            raise OSError('invalid pixel size')
        return truetype(font, size, *args)

    monkeypatch.setattr(ImageFont, 'truetype', of_one_size)
    assert label_width('🦊', 20) == 20
    left, top, right, bottom = black(drawn('🦊'))
    assert (left, right) == (5, 25) and bottom - top == 20 and (top + bottom) / 2 == 20


def test_a_script_that_no_font_has_is_said_once(installed, monkeypatch):
    said = []
    monkeypatch.setattr(labels, 'print_log', lambda text, *args, **kwargs: said.append(text))
    installed()
    grid = labelled_grid({'一只红色的狐狸': torch.zeros(1, 3, 64, 64), '🦊': torch.ones(1, 3, 64, 64)})
    assert len(said) == 1 and 'fonts-noto-cjk' in said[0] and 'fonts-noto-color-emoji' in said[0]
    assert grid[:, :-66].min() == 0  # boxes
