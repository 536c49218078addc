"""WholeMosaic and the affine transform after it: geometry, where images come from."""

import copy
import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mmcv.transforms import RandomChoice
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, RandomFlip
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.dataset import Compose, DefaultSampler
from torch.utils.data import DataLoader

from mmbackbones.data import CentredAffine, CocoDetection, LoadImage, WholeMosaic
from mmbackbones.data.synthetic import draw_detection_set
from mmbackbones.engine.batch_order import DrawnIndex, make_resumable
from mmbackbones.registry import TRANSFORMS


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (RandomChoice draws from it)


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_detection_set(
        tmp_path_factory.mktemp('set'), num_train=40, num_val=1, image_size=64
    )


class Sizes:
    """Stands for a data set: images of one grey each, of the given sizes (H, W)."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = sizes
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def get_data_info(self, index: int) -> dict:
        self.drawn.append(index)
        return sample(*self.sizes[index], index)


def sample(height: int, width: int, index: int, boxes: list | None = None) -> dict:
    if boxes is None:
        boxes = [[0, 0, width, height]]
    return dict(
        img=np.full((height, width, 3), index + 1, np.uint8),
        img_shape=(height, width),
        gt_bboxes=HorizontalBoxes(np.array(boxes, np.float32).reshape(-1, 4)),
        gt_bboxes_labels=np.full(len(boxes), index),
        gt_ignore_flags=np.zeros(len(boxes), bool),
    )


def test_tiles_stand_at_the_upper_left_of_quarters_as_large_as_the_largest() -> None:
    data_set = Sizes((20, 40), (40, 20), (30, 30))
    mosaic = WholeMosaic(size=10)
    mosaic.draw_from(data_set, [])
    for _ in range(20):
        data_set.drawn.clear()
        results = mosaic(sample(20, 40, 7))
        indices = [7, *data_set.drawn]
        sizes = {7: (10, 20), 0: (10, 20), 1: (20, 10), 2: (10, 10)}
        tiles = [sizes[index] for index in indices]
        height, width = (max(side) for side in zip(*tiles, strict=True))
        expected = np.zeros((2 * height, 2 * width), np.uint8)
        boxes = []
        corners = [(0, 0), (0, width), (height, 0), (height, width)]
        for index, (top, left), (rows, columns) in zip(
            indices, corners, tiles, strict=True
        ):
            expected[top : top + rows, left : left + columns] = index + 1
            boxes.append([left, top, left + columns, top + rows])
        np.testing.assert_array_equal(results['img'], expected[..., None].repeat(3, -1))
        assert results['img_shape'] == results['img'].shape[:2]
        np.testing.assert_array_equal(results['gt_bboxes'].numpy(), boxes)
        np.testing.assert_array_equal(results['gt_bboxes_labels'], indices)
        assert len(results['gt_ignore_flags']) == 4


def test_images_without_boxes_add_none() -> None:
    data_set = Sizes((8, 8))
    data_set.get_data_info = lambda index: sample(8, 8, index, [])
    mosaic = WholeMosaic(size=8)
    mosaic.draw_from(data_set, [])
    assert len(mosaic(sample(8, 8, 3))['gt_bboxes']) == 1
    assert len(mosaic(sample(8, 8, 3, []))['gt_bboxes']) == 0


def placed(number: int, *before: list[int]) -> DrawnIndex:
    index = DrawnIndex(number)
    index.before = before
    return index


def test_a_cache_draws_among_the_last_samples_of_every_eighth_batch() -> None:
    data_set = Sizes(*[(8, 8)] * 60)
    mosaic = WholeMosaic(size=8, cache_size=4)
    mosaic.draw_from(data_set, [])
    batches = [[2 * i, 2 * i + 1] for i in range(16)]
    # The 17th batch: 0 and 8 precede it on its row.
    index = placed(33, *batches, [32])
    labels = []
    for _ in range(60):
        results = mosaic(dict(sample(8, 8, 33), sample_idx=index))
        assert results['gt_bboxes_labels'][0] == 33
        labels += results['gt_bboxes_labels'][1:].tolist()
    counts = Counter(labels)
    assert set(counts) == {33, 32, 17, 16}
    assert min(counts.values()) > 25  # of 180, evenly: 45
    assert sorted(data_set.drawn) == [16, 17, 32]  # each is read once


def test_what_no_sample_precedes_is_drawn_from_the_data_set() -> None:
    data_set = Sizes(*[(8, 8)] * 60)
    mosaic = WholeMosaic(size=8, cache_size=4)
    mosaic.draw_from(data_set, [])
    labels: list[int] = []
    for _ in range(40):
        results = mosaic(dict(sample(8, 8, 5), sample_idx=placed(5, [])))
        labels += results['gt_bboxes_labels'][1:].tolist()
        assert len(mosaic._cache) <= 8 * 4
    assert len(set(labels)) > 30 and labels.count(5) > 15


def pipeline(*steps: dict) -> list[dict]:
    return [
        dict(type=LoadImage),
        dict(type=LoadAnnotations, with_bbox=True),
        *steps,
        dict(type=PackDetInputs, meta_keys=('img_path',)),
    ]


def coco(folder: Path, *steps: dict, **options: object) -> CocoDetection:
    return CocoDetection(
        data_root=str(folder),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        pipeline=pipeline(*steps),
        **options,
    )


CHOICE = dict(
    type=RandomChoice,
    transforms=[[dict(type=WholeMosaic, size=32), dict(type=CentredAffine)], []],
    prob=[0.5, 0.5],
)


def test_a_data_set_gives_itself_to_nested_mosaics(folder: Path) -> None:
    data_set = coco(folder, CHOICE)
    # Pairs of tiles with a shorter side of 32 px, or the image itself.
    alone = [tuple(coco(folder)[i]['inputs'].shape) for i in range(6)]
    mixed = [tuple(data_set[i % 6]['inputs'].shape) != alone[i % 6] for i in range(18)]
    assert 3 < sum(mixed) < 15
    own = [len(data_set.get_data_info(i)['instances']) for i in range(40)]
    drawn = coco(folder, dict(type=WholeMosaic, size=32))
    counts = [len(drawn[i]['data_samples'].gt_instances) for i in range(6)]
    assert all(own[i] + 3 * min(own) <= counts[i] <= 4 * max(own) for i in range(6))
    assert sum(counts) > 2 * sum(own[:6])


def batches_of(
    folder: Path, cache_size: int, *, start: int = 0, num_workers: int = 0
) -> list:
    """Those of an epoch from `start` on: images, boxes and classes."""
    (mosaics, plain) = CHOICE['transforms']
    mosaics = [dict(mosaics[0], cache_size=cache_size), mosaics[1]]
    data_set = coco(folder, dict(CHOICE, transforms=[mosaics, plain]))
    loader = DataLoader(
        data_set,
        batch_size=2,
        sampler=DefaultSampler(data_set, shuffle=True, seed=3),
        num_workers=num_workers,
        collate_fn=list,
    )
    make_resumable(loader, seed=7)
    loader.batch_sampler.start = start
    return [
        [
            (
                each['inputs'].numpy().tobytes(),
                each['data_samples'].gt_instances.bboxes.numpy().tolist(),
                each['data_samples'].gt_instances.labels.tolist(),
            )
            for each in batch
        ]
        for batch in loader
    ]


@pytest.mark.parametrize('cache_size', [0, 6])
def test_a_batch_does_not_depend_on_what_the_process_has_read(
    folder: Path, cache_size: int
) -> None:
    whole = batches_of(folder, cache_size)
    assert len(whole) == 20
    for start in (5, 19):
        assert batches_of(folder, cache_size, start=start) == whole[start:]
    assert batches_of(folder, cache_size, num_workers=2) == whole
    assert batches_of(folder, cache_size, start=3, num_workers=1) == whole[3:]


def test_samples_of_a_loader_know_those_before_them(folder: Path) -> None:
    data_set = coco(folder, dict(type=WholeMosaic, size=32, cache_size=6))
    mosaic = data_set.pipeline.transforms[2]
    recent, known = mosaic._recent, []
    mosaic._recent = lambda index: known.append(recent(index)) or known[-1]
    order = list(range(40))
    loader = DataLoader(data_set, batch_size=2, sampler=order, collate_fn=list)
    make_resumable(loader, seed=7)
    assert len(list(loader)) == 20
    assert [known[0], known[1], known[17]] == [[], [0], [0, 1, 16]]
    assert known[39] == [6, 7, 22, 23, 38]


def test_images_that_are_held_stay_as_they_were_read(folder: Path) -> None:
    data_set = coco(folder, dict(type=WholeMosaic, size=32, cache_size=50))
    for index in range(40):
        data_set[index]
    held = data_set.pipeline.transforms[2]._cache
    assert len(held) == 40
    data_set.pipeline = Compose(pipeline(dict(type=WholeMosaic, size=32)))
    for index, tile in held.items():
        read = data_set.pipeline.transforms[2]._read(index)
        np.testing.assert_array_equal(tile['img'], read['img'])
        np.testing.assert_array_equal(
            tile['gt_bboxes'].numpy(), read['gt_bboxes'].numpy()
        )
        for key in ('gt_bboxes_labels', 'gt_ignore_flags'):
            np.testing.assert_array_equal(tile[key], read[key])


def test_a_copy_holds_no_images(folder: Path) -> None:
    """A subset has other ones under the same indices."""
    data_set = coco(folder, dict(type=WholeMosaic, size=32, cache_size=5))
    data_set[3]
    assert data_set.pipeline.transforms[2]._cache
    assert not data_set.get_subset([7, 8]).pipeline.transforms[2]._cache


def test_what_would_be_read_otherwise_again_is_not_held(folder: Path) -> None:
    flip = dict(type=RandomFlip, prob=0.5)
    data_set = coco(folder, flip, dict(type=WholeMosaic, size=32, cache_size=5))
    with pytest.raises(ValueError, match=r'before it is random.*cache_size=0'):
        data_set[0]
    assert coco(folder, flip, dict(type=WholeMosaic, size=32))[0]


@pytest.mark.parametrize('copied', ['pickle', 'deepcopy', 'subset', 'new pipeline'])
def test_it_draws_from_the_copy_that_it_is_in(folder: Path, copied: str) -> None:
    data_set = coco(folder, dict(type=WholeMosaic, size=32))
    if copied == 'pickle':
        data_set = pickle.loads(pickle.dumps(data_set))
    elif copied == 'deepcopy':
        data_set = copy.deepcopy(data_set)
    elif copied == 'subset':
        data_set = data_set.get_subset([0])
    else:
        steps = pipeline(dict(type=WholeMosaic, size=32))
        data_set.pipeline = Compose(steps)
    mosaic = data_set.pipeline.transforms[2]
    assert mosaic._data_set is data_set
    if copied == 'subset':
        own = len(data_set.get_data_info(0)['instances'])
        assert len(data_set[0]['data_samples'].gt_instances) == 4 * own


def test_workers_draw_as_the_main_process(folder: Path) -> None:
    loader = DataLoader(
        coco(folder, CHOICE), batch_size=2, num_workers=2, collate_fn=list
    )
    assert sum(len(batch) for batch in loader) == 40


@pytest.mark.parametrize('cache_size', [0, 5])
def test_an_unreadable_partner_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_size: int
) -> None:
    from mmbackbones.data import read_faults

    monkeypatch.setattr(read_faults, '_WAITS', (0, 0))
    root = draw_detection_set(tmp_path, num_train=4, num_val=1, image_size=64)
    mosaic = dict(type=WholeMosaic, size=32, cache_size=cache_size)
    data_set = coco(root, mosaic)
    broken = Path(data_set.get_data_info(3)['img_path'])
    broken.write_bytes(broken.read_bytes()[:200])
    for _ in range(6):
        for index in range(4):
            results = data_set[index]
            assert min(results['inputs'].shape[1:]) >= 64
            # The fault is not laid to those that are shown with it.
            faults = results['data_samples'].metainfo.get('read_faults', [])
            assert [name for name, _ in faults] == [str(broken)] * (index == 3)


def test_without_a_data_set_it_says_so() -> None:
    mosaic = TRANSFORMS.build(dict(type='WholeMosaic', size=8))
    with pytest.raises(ValueError, match='knows no data set'):
        mosaic(sample(8, 8, 0))


def test_bad_values_are_named() -> None:
    with pytest.raises(ValueError, match='size is 0'):
        WholeMosaic(size=0)
    with pytest.raises(ValueError, match='cache_size -1'):
        WholeMosaic(cache_size=-1)
    for key, message in [('gt_masks', 'masks'), ('window', 'before what moves')]:
        with pytest.raises(ValueError, match=message):
            WholeMosaic()(dict(sample(8, 8, 0), **{key: []}))


def affine(**ranges: object) -> CentredAffine:
    still = dict(
        max_rotate_degree=0.0, max_translate_ratio=0.0, scaling_ratio_range=(1.0, 1.0)
    )
    return CentredAffine(**{**still, **ranges})


def test_scaling_keeps_the_centre() -> None:
    # Half the size about (20, 10): x -> 20 + (x - 20) / 2, y -> 10 + (y - 10) / 2.
    results = sample(20, 40, 99, [[0, 0, 40, 20], [10, 4, 30, 12]])
    results = affine(scaling_ratio_range=(0.5, 0.5))(results)
    np.testing.assert_allclose(
        results['gt_bboxes'].numpy(), [[10, 5, 30, 15], [15, 7, 25, 11]], atol=1e-4
    )
    assert results['img'][10, 20, 0] == 100  # inside
    assert results['img'][2, 2, 0] == 0  # black around it
    assert results['img'].shape == (20, 40, 3)


def test_turning_keeps_the_centre_and_boxes_bound_the_turned_corners() -> None:
    transform = affine(max_rotate_degree=90.0)
    transform._get_rotation_matrix = lambda degrees: np.array(
        [[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32
    )
    # A quarter turn about (20, 20): (x, y) -> (20 - (y - 20), 20 + (x - 20)).
    results = transform(sample(40, 40, 0, [[10, 18, 20, 22]]))
    np.testing.assert_allclose(
        results['gt_bboxes'].numpy(), [[18, 10, 22, 20]], atol=1e-4
    )


def test_what_is_moved_out_is_dropped_and_the_rest_clipped() -> None:
    transform = affine(max_translate_ratio=0.5)
    transform._get_translation_matrix = _shift_right_by_30(
        transform._get_translation_matrix
    )
    boxes = [[0, 0, 5, 5], [5, 0, 20, 5], [30, 0, 40, 5]]
    results = transform(sample(40, 40, 4, boxes))
    np.testing.assert_allclose(
        results['gt_bboxes'].numpy(), [[30, 0, 35, 5], [35, 0, 40, 5]], atol=1e-4
    )
    assert len(results['gt_bboxes_labels']) == len(results['gt_ignore_flags']) == 2


def _shift_right_by_30(plain):
    calls = iter([plain(30, 0)])
    return lambda x, y: next(calls, plain(x, y))


def test_ranges_are_those_that_were_published() -> None:
    transform = CentredAffine()
    scales, angles, shifts = [], [], []
    for _ in range(2000):
        matrix = transform._get_random_homography_matrix(100, 200)
        scale = np.hypot(matrix[0, 0], matrix[1, 0])
        np.testing.assert_allclose(  # no shear
            matrix[:2, :2] @ matrix[:2, :2].T, scale**2 * np.eye(2), atol=1e-5
        )
        scales.append(scale)
        angles.append(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
        shifts.append((matrix @ [100, 50, 1])[:2] - [100, 50])
    for values, low, high in [
        (scales, 0.5, 1.5),
        (angles, -10, 10),
        (np.array(shifts)[:, 0], -20, 20),
        (np.array(shifts)[:, 1], -10, 10),
    ]:
        margin = 0.02 * (high - low)
        assert low - 1e-3 <= min(values) < low + margin
        assert high - margin < max(values) <= high + 1e-3
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=2 * margin)
