"""Sizes of pictures, as configs give them."""
import math
from collections.abc import Sequence

Pair = tuple[int, int]
Size = int | Sequence[int]


def image_sizes(given: Size | Sequence[Size], key: str) -> list[Pair]:
    """Sizes as pairs (height, width).

    Args:
        given (int, tuple or list): Pixels, one number or (height, width), or a list of such sizes; two numbers are
            (height, width).
        key (str): Their config key, for the message.

    Raises:
        ValueError: If they are anything else.
    """
    many = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(many) == 2 and all(isinstance(side, int) for side in many):
        many = [many]
    found = [tuple(size) if isinstance(size, (list, tuple)) else (size, size) for size in many]
    if not found or not all(len(pair) == 2 and all(isinstance(side, int) and side > 0 for side in pair)
                            for pair in found):
        raise ValueError(f'{key} must be a number or (height, width) in pixels, or a list of such sizes, but is '
                         f'{given!r}')
    return found


def nearest_size(height: int, width: int, sizes: Sequence[Pair]) -> Pair:
    """Of these sizes the one of the nearest aspect ratio and, among several of one ratio, of the nearest area."""
    def distance(size: Pair) -> tuple[float, float]:
        ratio, area = math.log(height / width * size[1] / size[0]), math.log(height * width / (size[0] * size[1]))
        return round(abs(ratio), 6), abs(area)
    return min(sizes, key=distance)
