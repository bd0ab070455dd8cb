"""One picture of each kind that makes trouble, and what must be read of it."""
import io
import os

import numpy as np
from PIL import Image, PngImagePlugin

RAMP = np.tile(np.linspace(0, 65535, 16).astype(np.uint16), (16, 1))
NOISE = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
WHITE, RED, BLUE, GRAY = (255, 255, 255), (255, 0, 0), (0, 0, 255), (200, 200, 200)
# Decoders refuse them, each in its own way.
BROKEN = ('bad_crc.png', 'bad_ihdr_crc.png', 'big_text.png', 'cut.jpg', 'empty.png', 'float.tif', 'html.jpg',
          'huge.png', 'int32.tif', 'lost.png', 'svg.png')


def square(colour, around=WHITE, size=16):
    """A square of 8 pixels, all else of another colour: (16, 16, 3)."""
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = around
    pixels[4:12, 4:12] = colour
    return pixels


def halves(first, second, horizontal):
    pixels = np.empty((8, 16, 3), np.uint8)
    pixels[:, :8], pixels[:, 8:] = first, second
    return pixels if horizontal else pixels.transpose(1, 0, 2)


def good_pictures(folder):
    """Writes them; returns by name the pixels (H, W, 3) in 0..255, and how far a lossy format may be off."""
    def save(name, image, pixels, off=0, **options):
        (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(folder / name, **options)
        expected[name] = np.asarray(pixels, np.float64), off

    expected, junk = {}, np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    upright = Image.Exif()
    upright[0x0112] = 6  # stored on its side: the left is the top
    save('exif6.jpg', halves(RED, BLUE, True), halves(RED, BLUE, False), 3, exif=upright, quality=95, subsampling=0)
    junk[..., 3], junk[4:12, 4:12] = 0, (*RED, 255)
    save('rgba_cutout.png', junk, square(RED))
    black = np.where(junk[..., 3:] == 255, junk, 0).astype(np.uint8)
    save('rgba_black.png', black, square(RED))
    palette = Image.fromarray(black[..., :3]).quantize(4)
    save('palette_trns.png', palette, square(RED), transparency=palette.getpixel((0, 0)))
    save('colour_key.png', Image.fromarray(square(RED, BLUE)), square(RED), transparency=BLUE)
    alpha = black[..., 3]
    save('la.png', np.dstack([alpha // 255 * 200, alpha]), square(GRAY))
    half = np.full((16, 16, 4), (100, 0, 200, 128), np.uint8)  # 128 / 255 of it over white
    save('half.png', half, np.full((16, 16, 3), [255 + (c - 255) * 128 / 255 for c in (100, 0, 200)]), 0.51)
    sixteen = RAMP[..., None].repeat(3, 2) / 257
    save('gray16.png', RAMP, sixteen)
    save('gray16.tif', RAMP, sixteen)
    save('gray.jpg', np.full((16, 16), 77, np.uint8), np.full((16, 16, 3), 77), 1)
    save('bilevel.png', square(WHITE, (0, 0, 0))[..., 0] > 127, square(WHITE, (0, 0, 0)))
    save('cmyk.jpg', Image.fromarray(square(RED)).convert('CMYK'), square(RED), 3, quality=100)
    for name in ('ok.png', 'ok.bmp', 'ok.tif'):
        save(name, NOISE, NOISE)
    save('ok.webp', NOISE, NOISE, lossless=True)
    workflow = PngImagePlugin.PngInfo()
    workflow.add_text('workflow', 'x' * 2_000_000)
    save('big_text_plain.png', NOISE, NOISE, pnginfo=workflow)
    frames = [Image.fromarray(square(c)) for c in (RED, BLUE)]
    for name in ('anim.gif', 'anim.webp'):
        save(name, frames[0], square(RED), save_all=True, append_images=frames[1:], lossless=True)
    return expected


def broken_pictures(folder):
    """Writes all of BROKEN but lost.png, which is not there."""
    def encoded(kind):
        buffer = io.BytesIO()
        Image.fromarray(NOISE).save(buffer, kind)
        return bytearray(buffer.getvalue())

    for name, chunk, place in (('bad_crc.png', b'IDAT', 40), ('bad_ihdr_crc.png', b'IHDR', 17)):
        data = encoded('PNG')
        data[data.index(chunk) + place] ^= 0xff
        (folder / name).write_bytes(data)
    workflow = PngImagePlugin.PngInfo()
    workflow.add_text('workflow', 'x' * 2_000_000, zip=True)  # as ComfyUI may write it
    Image.fromarray(NOISE).save(folder / 'big_text.png', pnginfo=workflow)
    (folder / 'cut.jpg').write_bytes(encoded('JPEG')[:-900])
    (folder / 'empty.png').write_bytes(b'')
    Image.fromarray((RAMP / 65535).astype(np.float32), 'F').save(folder / 'float.tif')
    Image.fromarray(RAMP.astype(np.int32), 'I').save(folder / 'int32.tif')
    (folder / 'html.jpg').write_text('<html>404 not found</html>')
    (folder / 'svg.png').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    Image.new('1', (14000, 14000)).save(folder / 'huge.png')  # 196 million pixels, few bytes
    assert sorted(os.listdir(folder)) == [name for name in BROKEN if name != 'lost.png']
