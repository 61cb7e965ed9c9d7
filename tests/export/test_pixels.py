"""Pictures are prepared number for number as timm's evaluation transform does it."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from patchrank.export.pixels import CROPS, FILTERS, to_input, to_pixels
from patchrank.utils.errors import UserError

PICTURES = [(64, 64), (63, 65), (200, 37), (37, 200), (7, 5), (1, 1), (1, 90), (331, 2), (128, 128), (641, 427)]
SIDES = [(64, 64), (32, 48), (57, 31)]


def picture(width, height):
    noise = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def settings(size=(64, 64), **changes):
    usual = {"size": list(size), "crop_pct": 1.0, "crop_mode": "center", "interpolation": "bicubic"}
    usual |= {"dtype": "float32", "mean": [0.48, 0.45, 0.4], "std": [0.26, 0.25, 0.27]}
    return usual | changes


def by_timm(image, settings):
    keys = ("crop_pct", "crop_mode", "interpolation", "mean", "std")
    size = (3, *settings["size"])
    return create_transform(size, **{key: settings[key] for key in keys}, is_training=False)(image)


def assert_as_timm(image, settings):
    expected = by_timm(image, settings)[None]
    found = torch.from_numpy(to_input(image, settings))
    assert found.dtype == torch.float32 and torch.equal(found, expected)


@pytest.mark.parametrize("size", SIDES)
@pytest.mark.parametrize("crop_mode", CROPS)
@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.875])
def test_pictures_of_any_shape_come_out_as_timms(size, crop_mode, crop_pct):
    for shape in PICTURES:
        assert_as_timm(picture(*shape), settings(size, crop_mode=crop_mode, crop_pct=crop_pct))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("crop_mode", CROPS)
def test_every_way_to_resize_is_timms(interpolation, crop_mode):
    for shape in [(200, 37), (37, 200), (7, 5)]:
        assert_as_timm(picture(*shape), settings(interpolation=interpolation, crop_mode=crop_mode))


@pytest.mark.parametrize("shape", [(64, 64), (80, 70), (33, 97)])
def test_a_pairs_own_transform_is_reproduced(clip, shape):
    stated = clip.transform_settings() | {"size": [64, 64], "dtype": "float32"}
    found = to_input(picture(*shape), stated)
    assert torch.equal(torch.from_numpy(found)[0], clip.transform()(picture(*shape)))


def test_uint8_images_are_the_pixels_themselves():
    image = picture(80, 70)
    pixels = to_pixels(image, settings((32, 48)))
    found = to_input(image, settings((32, 48), dtype="uint8"))
    assert found.dtype == np.uint8 and found.shape == (1, 32, 48, 3) and np.array_equal(found[0], pixels)
    exact = picture(48, 32)
    assert np.array_equal(to_pixels(exact, settings((32, 48))), np.asarray(exact))


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"crop_mode": "border"}, "prepared with crop_mode 'border', which a file cannot be given here; try"),
        ({"interpolation": "random"}, "prepared with interpolation 'random', which a file cannot be given here; try"),
        ({"interpolation": "BICUBIC"}, "interpolation 'BICUBIC'"),
    ],
)
def test_other_ways_are_refused_in_one_line(changes, told):
    with pytest.raises(UserError, match=told) as caught:
        to_input(picture(8, 8), settings(**changes))
    assert "\n" not in str(caught.value)
