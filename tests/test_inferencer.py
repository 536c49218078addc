"""Predicting with a checkpoint, through the one object."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from inference_helpers import stub_inferencer, toy_detector
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS
from PIL import Image
from test_sources import write_video

from mmbackbones.apis.detection import build_detector
from mmbackbones.apis.inferencer import Inferencer
from mmbackbones.apis.named_files import find_config
from mmbackbones.data.synthetic import draw_detection_set
from mmbackbones.inference.backends import TorchBackend
from mmbackbones.inference.metadata import Slide

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drawn set; one image is turned by EXIF, others are grey, CMYK and 16 bits."""
    root = tmp_path_factory.mktemp('inferencer')
    draw_detection_set(root, num_train=1, num_val=6, image_size=80)
    files = sorted((root / 'val').iterdir())
    images = [Image.open(path).convert('RGB') for path in files]
    exif = Image.Exif()
    exif[0x0112] = 6
    images[0].crop((0, 0, 80, 50)).save(files[0], exif=exif)
    images[1].convert('L').save(files[1])
    images[2].convert('CMYK').save(files[2])
    deep = np.asarray(images[3].convert('L')).astype(np.uint16) * 250
    Image.fromarray(deep).save(files[3], format='PNG')
    annotations = root / 'annotations' / 'instances_val.json'
    content = json.loads(annotations.read_text())
    content['images'][0].update(width=50, height=80)  # boxes are on the upright image
    annotations.write_text(json.dumps(content))
    return root


@pytest.fixture(scope='module')
def model(folder: Path) -> Inferencer:
    cfg, checkpoint = toy_detector(folder)
    return Inferencer(cfg, checkpoint, 'cpu')


def as_rows(result: object) -> np.ndarray:
    return np.c_[result.xyxy, result.scores, result.labels]


def test_predictions_equal_those_of_the_test_loop(
    folder: Path, model: Inferencer
) -> None:
    """Bit by bit: the data set of tools/test.py and its batches of one."""
    cfg, _ = toy_detector(folder)
    dataset_cfg = cfg.test_dataloader.dataset
    dataset_cfg.data_root = str(folder)
    dataset = DATASETS.build(dataset_cfg)
    found = model.predict(folder / 'val', conf=0.0)
    assert len(found) == len(dataset) == 6
    for i, result in enumerate(found):
        with torch.no_grad():
            (sample,) = model.backend.model.test_step(pseudo_collate([dataset[i]]))
        assert sample.img_path == result.path
        assert (sample.pred_instances.bboxes.numpy() == result.xyxy).all()
        assert (sample.pred_instances.scores.numpy() == result.scores).all()
        assert (sample.pred_instances.labels.numpy() == result.labels).all()


def test_names_and_ids_are_those_of_the_checkpoint(
    folder: Path, model: Inferencer
) -> None:
    (result,) = model.predict(folder / 'val' / '000004.jpg', conf=0.0)
    assert {d['category_id'] for d in result.to_coco()} <= {16, 17, 18}
    assert {*result.names} <= {'cat', 'dog', 'bird'}


def test_sources_of_one_image_agree(folder: Path, model: Inferencer) -> None:
    path = folder / 'val' / '000000.jpg'
    with Image.open(path) as image:
        (from_file,), (from_pillow,) = (
            model.predict(source, conf=0.0) for source in (path, image)
        )
    (from_array,) = model.predict(from_file.image, conf=0.0)
    assert from_file.shape_hw == (80, 50)  # upright
    assert (as_rows(from_file) == as_rows(from_pillow)).all()
    assert (as_rows(from_file) == as_rows(from_array)).all()
    assert from_file.held_image is None and from_file.image.shape == (80, 50, 3)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_and_threads_change_nothing(
    folder: Path, model: Inferencer, num_workers: int
) -> None:
    one_by_one = model.predict(folder / 'val', conf=0.0, num_workers=0)
    results = model.predict(
        folder / 'val', conf=0.0, batch_size=4, num_workers=num_workers, stream=True
    )
    assert iter(results) is results
    for i, (alone, other) in enumerate(zip(one_by_one, results, strict=True)):
        assert alone.index == other.index == i and alone.path == other.path
        # Order among equal scores may differ with the size of the batch.
        np.testing.assert_allclose(alone.scores, other.scores, atol=1e-5)


def test_a_choice_of_classes_and_scores(folder: Path, model: Inferencer) -> None:
    path = folder / 'val' / '000004.jpg'
    (everything,) = model.predict(path, conf=0.0)
    (some,) = model.predict(path, conf=0.0, classes=['bird', 'cat'])
    wanted = np.isin(everything.labels, (0, 2))
    assert 0 < wanted.sum() < len(everything)
    assert (as_rows(some) == as_rows(everything)[wanted]).all()
    limit = float(np.median(everything.scores))
    (best,) = model.predict(path, conf=limit)
    assert len(best) == (everything.scores >= limit).sum()


def test_a_video(tmp_path: Path, model: Inferencer) -> None:
    path = write_video(tmp_path / 'clip.avi', 5)
    results = model.predict(path, conf=0.0, batch_size=2)
    assert [r.name for r in results] == [f'clip_{i:06d}.jpg' for i in range(5)]
    assert results[4].plot().shape == (24, 32, 3)


def test_folding_changes_nothing_but_rounding(folder: Path, model: Inferencer) -> None:
    cfg, checkpoint = toy_detector(folder)
    pipeline = cfg.test_dataloader.dataset.pipeline
    plain = Inferencer.__new__(Inferencer)
    unfolded = build_detector(cfg, checkpoint, 'cpu')
    plain.backend = TorchBackend(unfolded, pipeline, model.info)

    def num_norms(module: torch.nn.Module) -> int:
        return sum(isinstance(m, torch.nn.BatchNorm2d) for m in module.modules())

    assert num_norms(unfolded) > 10 and num_norms(model.backend.model) == 0
    for one, other in zip(
        plain.predict(folder / 'val', conf=0.0),
        model.predict(folder / 'val', conf=0.0),
        strict=True,
    ):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_a_list_of_everything(folder: Path, model: Inferencer) -> None:
    """Files (turned by EXIF, grey, CMYK, 16 bits), arrays, Pillow images in RGBA."""
    files = sorted((folder / 'val').iterdir())
    array = np.full((40, 60, 3), 90, np.uint8)
    mixed = [str(files[0]), array, files[1], array[..., 0], files[3]]
    mixed += [np.dstack((array, array[..., 0])), Image.new('RGBA', (30, 20), 'red')]
    results = model.predict(mixed, conf=0.0, batch_size=3)
    assert [result.index for result in results] == list(range(7))
    shapes = [result.shape_hw for result in results]
    assert shapes[0] == (80, 50) and shapes[6] == (20, 30)
    assert {shapes[i] for i in (1, 3, 5)} == {(40, 60)}
    assert [result.path is None for result in results] == [0, 1, 0, 1, 0, 1, 1]
    # Grey, and transparent, of one value are the same picture.
    for i in (3, 5):
        np.testing.assert_allclose(results[1].scores, results[i].scores, atol=1e-5)


def test_no_detections_have_every_form(folder: Path, model: Inferencer) -> None:
    (result,) = model.predict(folder / 'val' / '000004.jpg', conf=1.0)
    assert len(result) == 0 and result.names == []
    assert result.to_coco() == [] and result.to_yolo() == ''
    assert result.to_labelme()['shapes'] == []
    assert (result.plot() == result.image).all()
    pytest.importorskip('pandas', reason='pandas is not installed')
    assert len(result.to_dataframe()) == 0
    pytest.importorskip('supervision', reason='supervision is not installed')
    assert len(result.to_supervision()) == 0


def test_an_empty_folder(tmp_path: Path, model: Inferencer) -> None:
    with pytest.raises(ValueError, match='no images in'):
        model.predict(tmp_path)


def test_half_precision_stays_close(folder: Path, model: Inferencer) -> None:
    path = folder / 'val' / '000005.jpg'
    (full,) = model.predict(path, conf=0.0)
    (half,) = model.predict(path, conf=0.0, half=True)
    assert (full.scores != half.scores).any()
    np.testing.assert_allclose(full.scores, half.scores, atol=0.02)
    (again,) = model.predict(path, conf=0.0)
    assert (as_rows(again) == as_rows(full)).all()


@pytest.mark.slow
def test_compiled(folder: Path) -> None:
    model = Inferencer(*toy_detector(folder), 'cpu')
    (plain,) = model.predict(folder / 'val' / '000005.jpg', conf=0.0)
    (compiled,) = model.predict(folder / 'val' / '000005.jpg', conf=0.0, compile=True)
    np.testing.assert_allclose(plain.scores, compiled.scores, atol=1e-4)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(conf=1.5), 'conf is 1.5'),
        (dict(conf='a'), "conf is 'a'; give a score"),
        (dict(classes=['cat', 'cow']), "names 'cow'.* are cat, dog, bird"),
        (dict(classes='cat'), 'give a list of names'),
        (dict(classes=[]), 'give a list of names'),
        (dict(batch_size=0), 'batch_size is 0'),
        (dict(tile=0), r'tile is \(0, 0\)'),
        (dict(tile=True), 'tile is True; give a side in pixels'),
        (dict(tile=64.0), 'tile is 64.0; give a side in pixels'),
        (dict(tile=16), 'sides of 32 pixels or more'),
        (dict(tile=(1, 2, 3)), r'tile is \(1, 2, 3\)'),
        (dict(tile=64, overlap=1.0), 'overlap is 1.0'),
        (dict(source='none.jpg'), "no images in 'none.jpg'"),
    ],
)
def test_wrong_options_show_at_once(
    options: dict, message: str, folder: Path, model: Inferencer
) -> None:
    with pytest.raises(ValueError, match=message):
        model.predict(**{'source': folder / 'val', **options}, stream=True)


def test_unreadable_images(
    tmp_path: Path, model: Inferencer, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ('a.png', 'c.png'):
        Image.new('RGB', (32, 32)).save(tmp_path / name)
    (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:50])
    with pytest.raises(ValueError, match=r"b.png' cannot be read"):
        model.predict(tmp_path, batch_size=2)
    results = model.predict(tmp_path, batch_size=2, skip_unreadable=True)
    (tmp_path / 'd.png').write_text('no image')
    with pytest.raises(ValueError, match=r"d.png' cannot be read: no known image for"):
        model.predict(tmp_path / 'd.png')
    assert [(r.name, r.index) for r in results] == [('a.png', 0), ('c.png', 2)]


def test_images_too_thin_for_the_model_are_named() -> None:
    """Within 64 x 256 pixels, 3 of 4000 are none."""
    slide = Slide(stride_hw=(64, 64), scale_wh=(256, 64), align_corners=False)
    model = stub_inferencer(
        task='segmentation', input_size_hw=(64, 64), resize='keep_ratio', slide=slide
    )
    model.backend.predict = lambda inputs: [np.zeros((9, 9), int) for _ in inputs]
    thin, fine = np.zeros((3, 4000, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ValueError, match=r"image_000000.*' of 4000 x 3 pixels"):
        model.predict([thin, fine])
    (result,) = model.predict([thin, fine], skip_unreadable=True)
    assert result.index == 1


def test_a_segmentor_keeps_chosen_classes() -> None:
    class Session:
        name, fixed_batch = 'stub', None

        def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return dict(labels=(images[:, 0] > 0.5).astype(np.int64))

    model = stub_inferencer(task='segmentation', input_size_hw=(8, 8))
    model.backend._session = Session()
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:4, :, 2] = 255
    (result,) = model.predict(image, classes=['bright'])
    assert (result.id_map()[2:4] == 9).all() and (result.id_map()[4:] == 0).all()
    with pytest.raises(ValueError, match='it is for detection'):
        model.predict(image, conf=0.5)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('dfine_hgnet_b4_coco', 'x.pth'), 'similar ones are dfine_hgnetv2_b4_coco'),
        (('none.py', 'x.pth'), "config file 'none.py' does not exist"),
        (('dfine_demo',), 'a config needs weights'),
        (('toy.pth',), "'toy.pth' is a checkpoint, which comes second, after its con"),
        (('dfine_demo', 'toy.onnx'), 'exported file.* stands alone, as first argum'),
        (('dfine_demo', 'x.pth', 'gpu0'), "device is 'gpu0'; this PyTorch offers cpu"),
        (('model.tflite',), "'model.tflite' is no config file .*no exported file"),
        (('none.onnx', 'x.pth'), "leave out 'x.pth'"),
        (('none.onnx',), "model file 'none.onnx' does not exist"),
        (('dfine_demo', 'x.pth', None, 'tflite'), "backend is 'tflite'; choose"),
        (('dfine_demo', 'x.pth', None, 'openvino'), "'openvino' does not read 'dfine"),
        (('none.engine', None, None, 'onnxruntime'), "does not read 'none.engine'"),
        (('none.onnx', None, None, 'pytorch'), 'pytorch takes a config'),
    ],
)
def test_what_is_no_model(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Inferencer(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is there')
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="device is 'cuda'; this PyTorch offers cpu"):
        Inferencer('dfine_demo', 'x.pth', 'cuda')


def test_a_picture_is_no_checkpoint(tmp_path: Path) -> None:
    """Nothing of torch's advice to run what the file holds is passed on."""
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (8, 8)).save(path)
    with pytest.raises(ValueError, match=r'cannot be read, .*a checkpoint holds') as e:
        Inferencer('dfine_demo', path)
    assert 'weights_only' not in str(e.value) and 'trusted' not in str(e.value)


def test_configs_by_name() -> None:
    assert find_config('dfine_demo') == str(ROOT / 'configs' / 'dfine_demo.py')
    assert find_config(str(ROOT / 'configs' / 'dfine_demo.py')).endswith('.py')


def test_the_tool_takes_options_between_its_arguments(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, checkpoint = toy_detector(folder)
    cfg.work_dir = str(tmp_path / 'work')
    cfg.dump(tmp_path / 'toy.py')
    arguments = ['infer.py', tmp_path / 'toy.py', checkpoint]
    arguments += ['--conf', 0.0, '--classes', 'dog', '--format', 'yolo', 'labelme']
    arguments += ['--out-dir', tmp_path / 'out', '--no-pictures', '--tile', 64]
    arguments += [folder / 'val' / '000005.jpg']
    monkeypatch.setattr('sys.argv', list(map(str, arguments)))
    runpy.run_path(str(ROOT / 'tools' / 'infer.py'))['main']()
    written = {str(p.relative_to(tmp_path / 'out')) for p in tmp_path.glob('out/*/*')}
    assert written == {'yolo/000005.txt', 'labelme/000005.json'}
    lines = (tmp_path / 'out' / 'yolo' / '000005.txt').read_text().splitlines()
    assert lines and all(line.startswith('1 ') for line in lines)
