"""One resampling: the same boxes as the plain pipeline, and nearly the same pixels."""

import io
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets.transforms import PackDetInputs, RandomFlip, Resize
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import DefaultScope
from PIL import Image
from test_det_transforms import encode, image_kinds, noise_file, smooth_rgb, turned

from mmbackbones.data import fast_transforms
from mmbackbones.data.coco import CocoDetection
from mmbackbones.data.det_transforms import (
    DropSmallBoxes,
    LoadImage,
    PhotometricDistort,
    RandomIoUCrop,
    RandomZoomOut,
)
from mmbackbones.data.fast_transforms import (
    FastLoadImage,
    PackPlanes,
    WindowDistort,
    WindowFlip,
    WindowIoUCrop,
    WindowResize,
    WindowZoomOut,
    check_windows,
)
from mmbackbones.data.synthetic import draw_detection_set
from mmbackbones.data.window import Window

CONFIGS = Path(__file__).parent.parent / 'configs'
META_KEYS = ('ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
DIRECTIONS = ['horizontal', 'vertical', 'diagonal']
BOXES = [[5, 10, 45, 60], [50, 5, 95, 30], [60, 40, 70, 52], [90, 70, 91, 71]]


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 (mmdet's flip draws from it)


def photo(width: int, height: int) -> np.ndarray:
    """Smooth shapes with detail, `(H, W, 3)` uint8."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.GaussianBlur(image, (3, 3), 0)


def sample(image: np.ndarray, boxes: list) -> dict:
    return dict(
        img=image.copy(),
        img_shape=image.shape[:2],
        ori_shape=image.shape[:2],
        gt_bboxes=HorizontalBoxes(np.array(boxes, np.float32).reshape(-1, 4)),
        gt_bboxes_labels=np.arange(len(boxes)),
        gt_ignore_flags=np.zeros(len(boxes), bool),
    )


def plain_steps(scale: tuple[int, int]) -> list:
    return [
        RandomZoomOut(),
        RandomIoUCrop(),
        DropSmallBoxes(),
        RandomFlip(prob=[0.3, 0.2, 0.2], direction=DIRECTIONS),
        Resize(
            scale=scale, keep_ratio=False, backend='pillow', interpolation='bilinear'
        ),
        DropSmallBoxes(),
        PackDetInputs(meta_keys=META_KEYS),
    ]


def window_steps(scale: tuple[int, int]) -> list:
    return [
        WindowZoomOut(),
        WindowIoUCrop(),
        DropSmallBoxes(),
        WindowFlip(prob=[0.3, 0.2, 0.2], direction=DIRECTIONS),
        WindowResize(scale=scale),
        DropSmallBoxes(),
        PackPlanes(meta_keys=META_KEYS),
    ]


def run(steps: list, results: dict, drawn: int) -> dict:
    seed(drawn)
    for step in steps:
        results = step(results)
    return results


@pytest.mark.parametrize('scale', [(96, 96), (256, 192), (41, 150)])
def test_same_seed_same_boxes_and_pixels_as_the_plain_pipeline(
    scale: tuple[int, int],
) -> None:
    """All that is drawn agrees, therefore every statistic of it does.

    Pixels: 2 grey levels in the mean of the worst image; a shift by one pixel would be
    3 to 15 in the mean of all.
    """
    image = photo(100, 80)
    plain, windowed = plain_steps(scale), window_steps(scale)
    differences, shifted = [], []
    for drawn in range(120):
        boxes = BOXES if drawn % 10 else []
        theirs = run(plain, sample(image, boxes), drawn)
        ours = run(windowed, sample(image, boxes), drawn)
        expected = theirs['data_samples'].gt_instances
        found = ours['data_samples'].gt_instances
        assert torch.equal(found.bboxes.tensor, expected.bboxes.tensor)
        assert torch.equal(found.labels, expected.labels)
        assert ours['data_samples'].metainfo == theirs['data_samples'].metainfo
        assert ours['inputs'].shape == theirs['inputs'].shape == (3, *scale[::-1])
        pixels, reference = ours['inputs'].float(), theirs['inputs'].float()
        differences.append((pixels - reference).abs().mean().item())
        shifted.append((pixels.roll(1, -1) - reference).abs().mean().item())
    assert np.mean(differences) < 0.1 * np.mean(shifted)
    assert np.max(differences) < 2


def test_whole_pixels_are_copied() -> None:
    """At the same resolution nothing is interpolated, at any place and mirrored."""
    image = photo(20, 16)
    canvas = np.zeros((40, 50, 3), np.uint8)
    canvas[7:23, 11:31] = image
    window = Window(image, (0, 20), (0, 16)).part(-11, -7, 39, 33)
    np.testing.assert_array_equal(window.render(50, 40), canvas)
    cut = window.part(5, 9, 25, 39)
    np.testing.assert_array_equal(cut.render(20, 30), canvas[9:39, 5:25])
    flipped = cut.mirrored('diagonal').part(2, 1, 12, 21)
    expected = canvas[9:39, 5:25][::-1, ::-1][1:21, 2:12]
    np.testing.assert_array_equal(flipped.render(10, 20), expected)


@pytest.mark.parametrize('settings', [{}, dict(contrast=(1, 1))])
def test_colours_of_what_is_seen_are_those_of_the_whole_image(settings: dict) -> None:
    """Equal without contrast, whose mean grey is that of a sample of the pixels."""
    image = photo(160, 120)
    plain, windowed = PhotometricDistort(**settings), WindowDistort(**settings)
    changed, means = 0, []
    for drawn in range(60):
        expected = run([plain], sample(image, BOXES), drawn)['img'][30:90, 40:120]
        results = run([windowed], sample(image, BOXES), drawn)
        found = results['window'].part(40, 30, 120, 90).render(80, 60)
        changed += (found != image[30:90, 40:120]).any()
        means.append(np.abs(found.astype(int) - expected).mean())
    assert changed > 40
    assert max(means) <= (0 if settings else 1.5), max(means)


def test_distortion_of_a_window_refuses_float_images() -> None:
    with pytest.raises(ValueError, match='8-bit images, not float32'):
        WindowDistort()(sample(np.zeros((4, 4, 3), np.float32), []))


def test_a_window_beside_the_image_is_black() -> None:
    window = Window(np.full((4, 6, 3), 200, np.uint8), (0, 6), (0, 4))
    assert not window.part(8, 0, 12, 4).render(32, 32).any()
    assert not window.part(-90, -90, -60, -60).render(32, 32).any()


@pytest.mark.parametrize('window', [(0, 128, 0, 128), (-64, 192, -32, 224)])
def test_reducing_does_not_alias(window: tuple[int, int, int, int]) -> None:
    """Stripes finer than the output become grey, where linear alone leaves stripes."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::3] = 240
    left, right, top, bottom = window
    pixels = Window(stripes, (left, right), (top, bottom)).render(40, 40)
    scale = 40 / (right - left)
    inside = slice(int(-left * scale) + 2, int((128 - left) * scale) - 2)
    rows = slice(int(-top * scale) + 2, int((128 - top) * scale) - 2)
    linear = cv2.resize(stripes, (40, 40))
    assert pixels[rows, inside].std() < 25 < linear.std()
    assert pixels[rows, inside].mean() == pytest.approx(80, abs=6)


def test_a_cut_edge_does_not_darken() -> None:
    """Beyond the edge of a crop there is image, not the black of a zoom-out."""
    white = np.full((40, 40, 3), 255, np.uint8)
    for right in (30, 50):  # within the image, and beyond it
        pixels = Window(white, (0, 40), (0, 40)).part(7, 9, right, 29).render(160, 160)
        assert (pixels[:, :90] == 255).all()


def test_masks_follow_their_boxes() -> None:
    steps = window_steps((120, 90))[:-1]
    checked = 0
    for drawn in range(40):
        image = np.full((60, 80, 3), 60, np.uint8)
        image[14:41, 23:61] = 255
        results = sample(image, [[23, 14, 61, 41]])
        results['gt_masks'] = BitmapMasks([(image[..., 0] == 255).astype('u1')], 60, 80)
        results = run(steps, results, drawn)
        for mask in results['gt_masks'].masks:
            bright = results['img'][..., 0] > 158
            assert (mask != bright).mean() < 0.03  # the border, nearest or linear
            checked += bright.any()
    assert checked > 30


def test_what_wants_pixels_under_a_moved_window_fails() -> None:
    results = WindowFlip(prob=1.0)(sample(photo(20, 16), BOXES[:1]))
    with pytest.raises(KeyError, match='img'):
        RandomFlip(prob=1.0)(results)
    with pytest.raises(ValueError, match='WindowResize before PackPlanes'):
        PackPlanes()(results)


def test_a_window_that_no_resize_ends_is_named(tmp_path: Path) -> None:
    """mmdet's `Resize` would find no image, and say nothing."""
    plain = Resize(scale=(32, 32), keep_ratio=False)
    with pytest.raises(
        ValueError, match=r'WindowFlip.*no WindowResize.*\(RandomFlip\)'
    ):
        check_windows([WindowZoomOut(), WindowFlip(prob=0.5), plain])
    check_windows([WindowZoomOut(), WindowResize(scale=(32, 32)), PackPlanes()])
    folder = draw_detection_set(tmp_path, num_train=1, num_val=1, image_size=64)
    with DefaultScope.overwrite_default_scope('mmdet'):
        data_set = CocoDetection(
            data_root=str(folder),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
        )
        with pytest.raises(ValueError, match='no WindowResize follows'):
            data_set.pipeline = Compose([dict(type='WindowZoomOut'), plain])


def test_keep_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match='keep_ratio'):
        WindowResize(scale=(32, 32), keep_ratio=True)


def load(step: LoadImage, folder: Path, data: bytes, **annotated: int) -> np.ndarray:
    path = folder / 'image'
    path.write_bytes(data)
    return step(dict(img_path=str(path), **annotated))['img']


@pytest.mark.parametrize('kind', image_kinds())
def test_every_kind_of_image_is_read_as_by_load_image(
    kind: str, tmp_path: Path
) -> None:
    data = image_kinds()[kind][0]
    for annotated in (dict(width=40, height=24), {}):
        np.testing.assert_array_equal(
            load(FastLoadImage(), tmp_path, data, **annotated),
            load(LoadImage(), tmp_path, data, **annotated),
        )


def test_ordinary_jpegs_take_the_short_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError('the long way')

    monkeypatch.setattr(LoadImage, 'transform', refuse)
    colour = encode(Image.fromarray(smooth_rgb()), 'JPEG')
    assert load(FastLoadImage(), tmp_path, colour, width=40, height=24).any()
    with pytest.raises(AssertionError, match='long way'):
        load(FastLoadImage(), tmp_path, colour)


@pytest.mark.parametrize('orientation', [3, 6])
def test_exif_is_treated_as_by_load_image(orientation: int, tmp_path: Path) -> None:
    image = Image.open(io.BytesIO(turned(orientation)[0]))
    data = encode(image.convert('RGB'), 'JPEG', exif=image.getexif())
    for width, height in ((40, 24), (24, 40)):
        if orientation == 3 and width == 24:
            continue
        np.testing.assert_array_equal(
            load(FastLoadImage(), tmp_path, data, width=width, height=height),
            load(LoadImage(), tmp_path, data, width=width, height=height),
        )


@pytest.mark.parametrize('progressive', [False, True])
def test_a_truncated_jpeg_is_an_error(progressive: bool, tmp_path: Path) -> None:
    data = noise_file('JPEG', progressive=progressive)
    assert load(FastLoadImage(), tmp_path, data, width=64, height=64).any()
    with pytest.raises(ValueError, match=r"image '.*image' cannot be read"):
        load(FastLoadImage(), tmp_path, data[: len(data) // 2], width=64, height=64)
    with pytest.raises(ValueError, match='but the annotation file says 30 x 64'):
        load(FastLoadImage(), tmp_path, data, width=30, height=64)


def test_all_of_the_module_is_registered() -> None:
    from mmbackbones.registry import TRANSFORMS

    for name in fast_transforms.__all__:
        assert name in TRANSFORMS or not name[0].isupper()


@pytest.mark.parametrize('kind', ['train_pipeline', 'final_pipeline'])
def test_the_shipped_pipelines_draw_alike(kind: str, tmp_path: Path) -> None:
    """From files to packed samples, colours included; see the plain ones' own tests."""
    folder = draw_detection_set(tmp_path, num_train=4, num_val=1, image_size=96)
    cfg = Config.fromfile(CONFIGS / 'dfine_hgnetv2_b4_coco.py')
    with DefaultScope.overwrite_default_scope('mmdet'):
        data_set = CocoDetection(
            data_root=str(folder),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
            pipeline=[],
        )
        fast, plain = Compose(cfg[kind]), Compose(cfg[f'plain_{kind}'])
    differences = []
    for drawn in range(16):
        packed = []
        for pipeline in (fast, plain):
            seed(drawn)
            packed.append(pipeline(data_set.get_data_info(drawn % 4)))
        ours, theirs = (p['data_samples'].gt_instances for p in packed)
        assert torch.equal(ours.bboxes.tensor, theirs.bboxes.tensor)
        assert torch.equal(ours.labels, theirs.labels)
        assert packed[0]['data_samples'].metainfo == packed[1]['data_samples'].metainfo
        pixels, reference = (p['inputs'].float() for p in packed)
        differences.append((pixels - reference).abs().mean().item())
    assert np.mean(differences) < 0.5
