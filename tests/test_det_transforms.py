"""Image kinds, and augmentations against the definitions that were published."""

import io
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.datasets.transforms import PackDetInputs, RandomFlip, Resize
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from PIL import Image, ImageOps

from mmbackbones.data.det_transforms import (
    DropSmallBoxes,
    LoadImage,
    PhotometricDistort,
    RandomIoUCrop,
    RandomZoomOut,
)

WIDTH, HEIGHT = 40, 24


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (mmdet's transforms draw from it)


def smooth_rgb(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A picture whose rows, columns and channels all differ."""
    y, x = np.mgrid[:height, :width]
    channels = (x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height))
    return np.stack(channels, axis=-1).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encode_16_bit(image: np.ndarray) -> bytes:
    """PNG whose 8-bit version is `image`: the low byte is set, too."""
    return cv2.imencode('.png', image.astype(np.uint16) * 256 + 255)[1].tobytes()


def load(folder: Path, data: bytes, **annotated: int) -> np.ndarray:
    path = folder / 'image'
    path.write_bytes(data)
    results = LoadImage()(dict(img_path=str(path), **annotated))
    assert results['img'].dtype == np.uint8
    assert results['img_shape'] == results['ori_shape'] == results['img'].shape[:2]
    return results['img'][..., ::-1]  # RGB


def image_kinds() -> dict[str, tuple[bytes, np.ndarray, float]]:
    """Name to file content, expected RGB and greatest error allowed."""
    rgb = smooth_rgb()
    colour = Image.fromarray(rgb)
    grey = colour.convert('L')
    as_rgb = np.asarray(grey.convert('RGB'))
    bits = colour.convert('1')
    palette = colour.convert('P')
    translucent = colour.copy()
    translucent.putalpha(7)
    # A JPEG of quality 95 without chroma subsampling is a few grey levels off.
    jpeg = dict(quality=95, subsampling=0)
    return {
        'rgb jpeg': (encode(colour, 'JPEG', **jpeg), rgb, 6),
        'rgb png': (encode(colour, 'PNG'), rgb, 0),
        'grey jpeg': (encode(grey, 'JPEG', **jpeg), as_rgb, 6),
        'grey png': (encode(grey, 'PNG'), as_rgb, 0),
        'grey alpha png': (encode(grey.convert('LA'), 'PNG'), as_rgb, 0),
        'alpha png': (encode(translucent, 'PNG'), rgb, 0),
        'palette png': (encode(palette, 'PNG'), np.asarray(palette.convert('RGB')), 0),
        '1-bit png': (encode(bits, 'PNG'), np.asarray(bits.convert('RGB')), 0),
        'cmyk jpeg': (encode(colour.convert('CMYK'), 'JPEG', **jpeg), rgb, 8),
        '16-bit grey png': (encode_16_bit(np.asarray(grey)), as_rgb, 0),
        '16-bit rgb png': (encode_16_bit(rgb[..., ::-1]), rgb, 0),
    }


@pytest.mark.parametrize('kind', image_kinds())
def test_every_kind_of_image_becomes_8_bit_colour(kind: str, tmp_path: Path) -> None:
    data, expected, tolerance = image_kinds()[kind]
    found = load(tmp_path, data, width=WIDTH, height=HEIGHT)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= tolerance


def turned(orientation: int) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A file with an EXIF orientation, its stored and its upright pixels."""
    image = Image.fromarray(smooth_rgb())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, 'PNG', exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return data, np.asarray(image), np.asarray(upright)


@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_the_annotated_size_decides_about_exif_rotation(
    orientation: int, tmp_path: Path
) -> None:
    data, stored, upright = turned(orientation)
    assert (stored.shape == upright.shape) == (orientation in (1, 3))
    as_stored = load(tmp_path, data, width=WIDTH, height=HEIGHT)
    np.testing.assert_array_equal(as_stored, stored)
    if orientation in (6, 8):
        as_upright = load(tmp_path, data, width=HEIGHT, height=WIDTH)
        np.testing.assert_array_equal(as_upright, upright)
    np.testing.assert_array_equal(load(tmp_path, data), upright)


def test_an_image_of_another_size_than_annotated_is_refused(tmp_path: Path) -> None:
    data = encode(Image.fromarray(smooth_rgb()), 'PNG')
    with pytest.raises(ValueError, match=r'40 x 24 pixels, but .* says 30 x 24'):
        load(tmp_path, data, width=30, height=24)


def noise_file(kind: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return encode(Image.fromarray(pixels), kind, **options)


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'no image at all',
        noise_file('JPEG')[:1500],
        noise_file('JPEG', progressive=True)[:1500],
        noise_file('PNG')[:1500],
    ],
    ids=['empty', 'text', 'jpeg cut', 'progressive cut', 'png cut'],
)
def test_an_unreadable_image_is_an_error_that_names_it(
    data: bytes, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"image '.*image' cannot be read"):
        load(tmp_path, data)


def test_a_missing_image_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"image 'gone\.jpg' cannot be read"):
        LoadImage()(dict(img_path='gone.jpg'))


def sample(image: np.ndarray, boxes: list) -> dict:
    """What the loading transforms leave behind."""
    return dict(
        img=image,
        img_shape=image.shape[:2],
        ori_shape=image.shape[:2],
        gt_bboxes=HorizontalBoxes(np.array(boxes, np.float32).reshape(-1, 4)),
        gt_bboxes_labels=np.arange(len(boxes)),
        gt_ignore_flags=np.zeros(len(boxes), bool),
    )


def test_zoom_out_is_drawn_as_published() -> None:
    """Ratio uniform in 1 to 4, place uniform in what is free, half of the time."""
    zoom = RandomZoomOut()
    ratios, places = [], []
    num = 2000
    for _ in range(num):
        results = zoom(sample(np.ones((40, 60, 1), np.uint8), [[0, 0, 60, 40]]))
        height, width = results['img_shape']
        assert results['img'].shape[:2] == (height, width)
        if width > 60:
            ratios.append(width / 60)
            left, top = results['gt_bboxes'].tensor[0, :2].tolist()
            if width > 120:
                places.append((left / (width - 60), top / (height - 40)))
    # A ratio below 61 / 60 cannot be told from no zoom: 0.6 % of the draws.
    assert len(ratios) / num == pytest.approx(0.5, abs=5 * 0.5 / num**0.5 + 0.003)
    assert np.mean(ratios) == pytest.approx(2.5, abs=5 * 0.87 / len(ratios) ** 0.5)
    assert max(ratios) <= 4
    # Whole pixels out of 60 or more: half a pixel of bias at most.
    sigma = 0.29 / len(places) ** 0.5
    np.testing.assert_allclose(np.mean(places, axis=0), 0.5, atol=5 * sigma + 0.01)
    assert abs(np.corrcoef(np.transpose(places))[0, 1]) < 5 / len(places) ** 0.5


@pytest.mark.parametrize('side_range', [(0.5, 2), (3, 2)])
def test_zoom_out_refuses_a_wrong_range(side_range: tuple) -> None:
    with pytest.raises(ValueError, match='side_range'):
        RandomZoomOut(side_range=side_range)


def crop_by_definition(
    boxes: np.ndarray, width: int, height: int
) -> tuple[int, int, int, int]:
    """The published crop, one draw after the other: left, top, width, height."""
    while True:
        least = random.choice((0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0))
        if least >= 1:
            return 0, 0, width, height
        for _ in range(40):
            w = int(width * random.uniform(0.3, 1))
            h = int(height * random.uniform(0.3, 1))
            if not 0.5 <= w / h <= 2:
                continue
            left = int((width - w) * random.random())
            top = int((height - h) * random.random())
            best = -1.0
            for x1, y1, x2, y2 in boxes:
                x, y = (x1 + x2) / 2, (y1 + y2) / 2
                if left < x < left + w and top < y < top + h:
                    shared = max(min(x2, left + w) - max(x1, left), 0) * max(
                        min(y2, top + h) - max(y1, top), 0
                    )
                    union = w * h + (x2 - x1) * (y2 - y1) - shared
                    best = max(best, shared / union)
            if best >= least:
                return left, top, w, h


BOXES = [[5, 10, 45, 60], [50, 5, 95, 30], [60, 40, 70, 52]]


def test_iou_crop_draws_as_the_definition_does() -> None:
    """Shares of whole images and means of the crops agree within 5 sigma."""
    num = 1500
    y, x = np.mgrid[:80, :100].astype(np.uint8)
    image = np.stack((x, y, x), axis=-1)  # pixels tell where they come from
    crop = RandomIoUCrop(prob=1)
    ours = []
    for _ in range(num):
        results = crop(sample(image, BOXES))
        left, top, _ = results['img'][0, 0].tolist()
        height, width = results['img_shape']
        ours.append((left, top, width, height))
    theirs = [crop_by_definition(np.array(BOXES), 100, 80) for _ in range(num)]
    ours, theirs = np.array(ours), np.array(theirs)
    whole = [(crops[:, 2:] == (100, 80)).all(1).mean() for crops in (ours, theirs)]
    assert whole[0] == pytest.approx(whole[1], abs=5 * (0.5 / num) ** 0.5)
    sigma = (ours.var(0) / num + theirs.var(0) / num) ** 0.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < 5 * sigma).all()
    np.testing.assert_allclose(ours.std(0), theirs.std(0), rtol=0.1)


def test_iou_crop_keeps_the_boxes_whose_centre_stays() -> None:
    crop = RandomIoUCrop(prob=1)
    cropped = 0
    for _ in range(200):
        y, x = np.mgrid[:80, :100].astype(np.uint8)
        results = crop(sample(np.stack((x, y, x), axis=-1), BOXES))
        height, width = results['img_shape']
        left, top, _ = results['img'][0, 0].tolist()
        labels = results['gt_bboxes_labels'].tolist()
        expected = []
        for label, (x1, y1, x2, y2) in enumerate(BOXES):
            inside = left < (x1 + x2) / 2 < left + width
            if inside and top < (y1 + y2) / 2 < top + height:
                expected.append(label)
        assert labels == expected != []
        assert len(results['gt_ignore_flags']) == len(labels)
        for label, box in zip(
            labels, results['gt_bboxes'].tensor.tolist(), strict=True
        ):
            x1, y1, x2, y2 = BOXES[label]
            assert box == [
                max(x1 - left, 0),
                max(y1 - top, 0),
                min(x2 - left, width),
                min(y2 - top, height),
            ]
        assert 0.5 <= width / height <= 2
        cropped += (width, height) != (100, 80)
    assert cropped > 100


def test_iou_crop_is_skipped_one_time_in_five() -> None:
    crop = RandomIoUCrop(options=(0.0, 1.0), prob=0.8)  # half of what is left: whole
    image = np.zeros((80, 100, 3), np.uint8)
    num = 1000
    shapes = [crop(sample(image, BOXES))['img'].shape for _ in range(num)]
    whole = shapes.count((80, 100, 3))
    assert whole / num == pytest.approx(0.6, abs=5 * (0.24 / num) ** 0.5)


def test_iou_crop_leaves_an_image_without_boxes_whole() -> None:
    image = smooth_rgb()
    results = RandomIoUCrop(prob=1)(sample(image, []))
    np.testing.assert_array_equal(results['img'], image)


@pytest.mark.parametrize('side', [1, 2, 3])
def test_iou_crop_ends_on_tiny_images(side: int) -> None:
    for _ in range(20):
        results = RandomIoUCrop(prob=1)(
            sample(np.zeros((side, 1, 3), np.uint8), [[0, 0, 1, side]])
        )
        assert min(results['img'].shape) > 0


def test_iou_crop_needs_an_end() -> None:
    with pytest.raises(ValueError, match='one entry must be 1'):
        RandomIoUCrop(options=(0.3, 0.5))


@pytest.mark.parametrize(
    ('boxes', 'kept'),
    [
        ([], []),
        ([[0, 0, 0.99, 5]], []),
        ([[0, 0, 5, 0.99], [0, 0, 1, 1], [2, 2, 9, 9]], [1, 2]),
    ],
)
def test_small_boxes_are_dropped_and_the_image_stays(boxes: list, kept: list) -> None:
    results = DropSmallBoxes()(sample(smooth_rgb(), boxes))
    assert results['gt_bboxes_labels'].tolist() == kept
    assert results['gt_bboxes'].tensor.shape == (len(kept), 4)
    assert len(results['gt_ignore_flags']) == len(kept)
    assert results['img'].shape == (HEIGHT, WIDTH, 3)


def find_rectangle(image: np.ndarray) -> list[float]:
    """Extent of the bright pixels."""
    rows, columns = np.nonzero(image.mean(-1) > 190)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_boxes_stay_on_their_pixels_through_the_whole_pipeline() -> None:
    """A bright rectangle is found again where its box is, to a pixel and a half."""
    steps = [
        RandomZoomOut(),
        RandomIoUCrop(),
        DropSmallBoxes(),
        RandomFlip(prob=0.5),
        Resize(scale=(96, 96), keep_ratio=False, backend='pillow'),
        DropSmallBoxes(),
    ]
    checked = 0
    for _ in range(150):
        image = np.full((60, 80, 3), 128, np.uint8)
        image[14:41, 23:61] = 255
        results = sample(image, [[23, 14, 61, 41]])
        for step in steps:
            results = step(results)
        assert results['img'].shape == (96, 96, 3)
        if len(results['gt_bboxes']):
            found = find_rectangle(results['img'])
            expected = results['gt_bboxes'].tensor[0].numpy()
            np.testing.assert_allclose(found, expected, atol=1.5)
            checked += 1
    assert checked == 150  # its centre stays, so the box does


def test_masks_follow_their_boxes() -> None:
    for _ in range(50):
        image = np.full((60, 80, 3), 128, np.uint8)
        image[14:41, 23:61] = 255
        results = sample(image, [[23, 14, 61, 41]])
        mask = (image[..., 0] == 255).astype(np.uint8)
        results['gt_masks'] = BitmapMasks([mask], 60, 80)
        results = RandomIoUCrop(prob=1)(RandomZoomOut(prob=1)(results))
        np.testing.assert_array_equal(
            results['gt_masks'].masks[0], results['img'][..., 0] == 255
        )


def test_a_batch_sample_without_boxes_comes_through() -> None:
    results = sample(smooth_rgb(), [])
    steps = (PhotometricDistort(), RandomZoomOut(prob=1), RandomIoUCrop(prob=1))
    for step in (*steps, DropSmallBoxes(), PackDetInputs(meta_keys=('img_shape',))):
        results = step(results)
    assert results['data_samples'].gt_instances.bboxes.tensor.shape == (0, 4)
    assert results['inputs'].shape[1:] == results['data_samples'].img_shape
