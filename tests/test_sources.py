"""What can be predicted on, and how it is read."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mmbackbones.inference.prefetch import map_ahead
from mmbackbones.inference.sources import open_source, read_image

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (12, 20, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ('b.png', 'a.png', 'c.JPG'):
        Image.fromarray(NOISE).save(tmp_path / name)
    (tmp_path / 'notes.txt').write_text('x')
    (tmp_path / 'inner').mkdir()
    return tmp_path


def write_video(path: Path, frames: int) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'MJPG'), 5, (32, 24))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((24, 32, 3), 20 * i, np.uint8))
    writer.release()
    return path


def test_files_in_their_order(folder: Path) -> None:
    names = ['a.png', 'b.png', 'c.JPG']
    assert open_source(folder).names == names
    assert open_source(f'{folder}/*.png').names == names[:2]
    assert open_source(str(folder / 'b.png')).names == ['b.png']
    mixed = open_source([folder / 'b.png', NOISE, Image.fromarray(NOISE), str(folder)])
    assert mixed.names == ['b.png', 'image_000001.jpg', 'image_000002.jpg', *names]
    assert mixed.num_frames == 6


def test_arrays_are_bgr_and_pillow_is_rgb() -> None:
    first, second = open_source([NOISE, Image.fromarray(NOISE)])
    assert (first.image == NOISE).all()
    assert (second.image == NOISE[..., ::-1]).all()


def test_other_kinds_of_pixels(tmp_path: Path) -> None:
    grey, alpha = NOISE[..., 0], np.dstack((NOISE, NOISE[..., 0]))
    frames = list(open_source([grey, grey[..., None], alpha]))
    assert (frames[0].image == grey[..., None]).all()
    assert (frames[1].image == frames[0].image).all()
    assert (frames[2].image == NOISE).all()
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / 'deep.png')
    assert (read_image(str(tmp_path / 'deep.png')) == grey[..., None]).all()


def test_turned_by_exif_as_a_file_and_as_a_pillow_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(NOISE).save(tmp_path / 'turned.png', exif=exif)
    upright = np.rot90(NOISE[..., ::-1], -1)
    assert (read_image(str(tmp_path / 'turned.png')) == upright).all()
    with Image.open(tmp_path / 'turned.png') as image:
        (frame,) = open_source(image)
    assert (frame.image == upright).all()


def test_a_video_gives_its_frames(tmp_path: Path) -> None:
    source = open_source(str(write_video(tmp_path / 'clip.avi', 4)))
    assert source.num_frames == 4 and source.names == []
    frames = list(source)
    assert [f.name for f in frames] == [f'clip_{i:06d}.jpg' for i in range(4)]
    assert [round(f.image.mean() / 20) for f in frames] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ([], 'empty list'),
        ('nowhere/*.jpg', r"no images in 'nowhere/\*.jpg'"),
        (None, "holds 'NoneType'"),
        (True, "holds 'bool'"),
        (NOISE.astype(np.float32), 'type float32'),
        (NOISE[None], r'shape \(1, 12, 20, 3\)'),
        (NOISE[:0], 'without pixels'),
        (977, 'camera 977 cannot be opened'),
    ],
)
def test_what_is_no_source(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(source)


def test_an_empty_folder_and_broken_videos(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='no images in'):
        open_source(tmp_path)
    (tmp_path / 'broken.mp4').write_bytes(b'no video' * 100)
    with pytest.raises(ValueError, match=r"broken.mp4' cannot be opened"):
        open_source(tmp_path / 'broken.mp4')


def test_ahead_in_order_and_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=10)  # passed by three at once only

    def work(item: int) -> int:
        together.wait()
        time.sleep(0.01 * (item % 3))
        return item

    done = list(map_ahead(work, range(9), num_workers=3, num_ahead=3))
    assert done == list(range(9))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_errors_come_in_their_place(num_workers: int) -> None:
    def work(item: int) -> float:
        return 1 / (item - 2)

    results = map_ahead(work, range(9), num_workers=num_workers, num_ahead=4)
    assert [next(results), next(results)] == [-0.5, -1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)

    def items() -> Iterator[int]:
        yield 0
        raise KeyError('end')

    results = map_ahead(work, items(), num_workers=num_workers, num_ahead=4)
    assert next(results) == -0.5
    with pytest.raises(KeyError, match='end'):
        next(results)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_closing_stops_the_threads_and_the_items(num_workers: int) -> None:
    closed, taken = [], []

    def items() -> Iterator[int]:
        try:
            for i in range(10**6):
                taken.append(i)
                yield i
        finally:
            closed.append(True)

    threads = threading.active_count()
    with contextlib.closing(
        map_ahead(abs, items(), num_workers=num_workers, num_ahead=2)
    ) as results:
        next(results)
    assert closed == [True] and len(taken) < 10
    assert threading.active_count() == threads
