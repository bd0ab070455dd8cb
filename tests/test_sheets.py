import torch

from cdm_plugin.sheets import labelled_grid


def test_small_images_are_enlarged_and_large_ones_shrunk_in_proportion():
    small = labelled_grid(dict(a=torch.zeros(2, 1, 16, 16)))
    assert small.shape[0] == 48 + 2
    large = labelled_grid(dict(a=torch.zeros(3, 3, 512, 1024)))
    assert large.shape[0] == 128 + 2
    assert large.shape[1] - 3 * (256 + 2) < 60  # the label


def test_pixels_keep_their_colour():
    image = torch.stack([torch.ones(600, 600), -torch.ones(600, 600), torch.zeros(600, 600)])[None]
    assert labelled_grid(dict(a=image))[100, -100].tolist() == [255, 0, 128]
