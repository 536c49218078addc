"""Distortion of colours: each step as Pillow's, all drawn as published."""

import random

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from test_det_transforms import smooth_rgb

from mmbackbones.data.det_transforms import PhotometricDistort


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (mmdet's transforms draw from it)


def test_distortions_equal_those_of_pil() -> None:
    """One grey level apart: PIL cuts fractions off, we round."""
    distort = PhotometricDistort()
    rgb = smooth_rgb()
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    pairs = [
        (distort._scale_brightness, ImageEnhance.Brightness),
        (distort._scale_contrast, ImageEnhance.Contrast),
        (distort._scale_saturation, ImageEnhance.Color),
    ]
    for ours, theirs in pairs:
        for factor in (0.5, 0.9, 1.0, 1.2, 1.5):
            expected = np.asarray(theirs(Image.fromarray(rgb)).enhance(factor))
            found = ours(bgr, factor)[..., ::-1].astype(int)
            # Contrast: the two means may round apart, half a level of the factor.
            assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize('turns', [-0.05, 0.0, 0.05, 1 / 3])
def test_hue_turns_the_colour_circle(turns: float) -> None:
    """Against PIL's conversion; both hues have 256 steps, each rounds its own way."""
    bgr = np.ascontiguousarray(smooth_rgb()[..., ::-1])
    found = PhotometricDistort._shift_hue(bgr, turns)[..., ::-1].astype(int)
    hsv = np.array(Image.fromarray(smooth_rgb()).convert('HSV'))
    hsv[..., 0] += np.uint8(round(turns * 256) % 256)
    expected = np.asarray(Image.fromarray(hsv, 'HSV').convert('RGB'))
    assert np.abs(found - expected).max() <= 255 * 6 / 256 + 2  # one step of the hue
    red = np.array([[[0, 0, 255]]], np.uint8)
    if turns == 1 / 3:
        assert PhotometricDistort._shift_hue(red, turns)[0, 0].argmax() == 1  # green


def uniform_share_and_mean(values: np.ndarray, low: float, high: float) -> None:
    """Half of the values are 1, the others uniform in the range: within 5 sigma.

    Values come back through 8 bits; the tolerance of 0.01 is that rounding.
    """
    num = len(values)
    drawn = values[np.abs(values - 1) > 0.003]
    assert len(drawn) / num == pytest.approx(0.5, abs=5 * 0.5 / num**0.5 + 0.02)
    assert drawn.min() >= low - 0.01 and drawn.max() <= high + 0.01
    sigma = (high - low) / 12**0.5
    mean_error = 5 * sigma / len(drawn) ** 0.5
    assert drawn.mean() == pytest.approx((low + high) / 2, abs=mean_error + 0.005)
    assert drawn.std() == pytest.approx(sigma, rel=0.1)


def test_brightness_is_drawn_as_published() -> None:
    """A grey image shows nothing but brightness."""
    grey = np.full((2, 2, 3), 200, np.uint8)
    distort = PhotometricDistort()
    values = [distort(dict(img=grey))['img'][0, 0, 0] / 200 for _ in range(2000)]
    uniform_share_and_mean(np.array(values), 0.875, 1.125)


def test_contrast_and_saturation_are_drawn_as_published() -> None:
    distort = PhotometricDistort(brightness=(1, 1), hue=(0, 0))
    halves = np.full((1, 2, 3), 64, np.uint8)
    halves[:, 1] = 192
    spread = [
        np.ptp(distort(dict(img=halves))['img'].astype(int)) / 128 for _ in range(2000)
    ]
    uniform_share_and_mean(np.array(spread), 0.5, 1.5)
    # Without contrast, the spread of the channels is that of the saturation.
    distort = PhotometricDistort(brightness=(1, 1), contrast=(1, 1), hue=(0, 0))
    colour = np.array([[[90, 128, 166]]], np.uint8)
    spread = [
        np.ptp(distort(dict(img=colour))['img'].astype(int)) / 76 for _ in range(2000)
    ]
    uniform_share_and_mean(np.array(spread), 0.5, 1.5)


def test_channels_are_permuted_evenly() -> None:
    """The identity has 1/2 + 1/2 * 1/6, each other order 1/12."""
    distort = PhotometricDistort((1, 1), (1, 1), (1, 1), (0, 0))
    colour = np.array([[[0, 128, 255]]], np.uint8)
    counts: dict[tuple, int] = {}
    for _ in range(3000):
        # Sorted, as the way to hue and back shifts values by a level or two.
        order = tuple(distort(dict(img=colour))['img'][0, 0].argsort().tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    for order, count in counts.items():
        share = 7 / 12 if order == (0, 1, 2) else 1 / 12
        sigma = (share * (1 - share) / 3000) ** 0.5
        assert count / 3000 == pytest.approx(share, abs=5 * sigma)


def test_contrast_comes_first_half_of_the_time() -> None:
    """Saturation 0 and contrast 0 in either order give grey; the mean differs."""
    distort = PhotometricDistort((1, 1), (2, 2), (2, 2), (0, 0), prob=1)
    image = np.array([[[0, 0, 200], [40, 90, 10]]], np.uint8)
    seen = {
        tuple(np.sort(distort(dict(img=image))['img'].ravel()).tolist())
        for _ in range(50)
    }
    assert len(seen) == 2


def test_distortion_refuses_float_images() -> None:
    with pytest.raises(ValueError, match='8-bit images, not float32'):
        PhotometricDistort()(dict(img=np.zeros((2, 2, 3), np.float32)))
