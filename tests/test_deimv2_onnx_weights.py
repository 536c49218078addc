"""Trained weights in upstream's ONNX files give their AP here, and their numbers.

MMB_DEIMV2_ONNX=deimv2_hgnetv2_atto_coco.onnx MMB_COCO_DIR=data/coco \
    python -m pytest -m parity tests/test_deimv2_onnx_weights.py

`MMB_DEIMV2_CONFIG` names our config if the file is not of Atto. Of a COCO folder only
the validation images count. Files of random weights are exported by the official code.
"""

import json
import os
import subprocess
import sys
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from deimv2_helpers import (
    CONFIGS,
    build_official,
    build_ours,
    load_model_config,
    official_config,
    official_modules,
)
from dfine_helpers import calibrate, randomise
from PIL import Image
from torch import nn

onnx = pytest.importorskip('onnx', reason='needs onnx')
onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnxruntime')
import onnx_weights  # noqa: E402  (reads ONNX)

pytestmark = pytest.mark.parity

ROOT = CONFIGS.parent
FILE = os.environ.get('MMB_DEIMV2_ONNX')
CONFIG = os.environ.get('MMB_DEIMV2_CONFIG', 'deimv2_hgnetv2_atto_coco')
COCO = os.environ.get('MMB_COCO_DIR')
trained = pytest.mark.skipif(
    not FILE, reason='MMB_DEIMV2_ONNX does not name a file of trained weights'
)
on_coco = pytest.mark.skipif(
    not COCO, reason='MMB_COCO_DIR does not name a COCO folder'
)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """Ours of the trained weights."""
    path = tmp_path_factory.mktemp('trained') / 'checkpoint.pth'
    _run('tests/onnx_weights.py', FILE, f'configs/{CONFIG}.py', path)
    return path


def _run(*command: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


class ByOnnxRuntime:
    """Detections as the file's makers get them: stretched to the input, over 255."""

    def __init__(self, path: str | Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path))
        self.size_hw = onnx_weights.input_size(onnx.load(str(path)).graph)

    def tensor(self, image: Image.Image) -> torch.Tensor:
        resized = image.convert('RGB').resize(self.size_hw[::-1], Image.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 255

    def __call__(self, image: torch.Tensor, width: int, height: int) -> list:
        """Labels, boxes in pixels of the original and scores, best first."""
        size = np.array([[width, height]], np.int64)
        inputs = {'images': image.numpy(), 'orig_target_sizes': size}
        return [out[0] for out in self.session.run(None, inputs)]


def _average_precision(ann_file: Path, detections: list[dict]) -> float:
    coco = pytest.importorskip('faster_coco_eval')
    truth = coco.COCO(str(ann_file))
    evaluation = coco.COCOeval_faster(truth, truth.loadRes(detections), 'bbox')
    evaluation.params.imgIds = sorted({d['image_id'] for d in detections})
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def _detections(file: ByOnnxRuntime, folder: Path, truth: dict) -> list[dict]:
    category_ids = sorted(c['id'] for c in truth['categories'])
    found = []
    for entry in truth['images']:
        image = Image.open(folder / entry['file_name'])
        labels, boxes, scores = file(file.tensor(image), *image.size)
        boxes[:, 2:] -= boxes[:, :2]
        found += [
            dict(image_id=entry['id'], category_id=category_ids[label],
                 bbox=box.tolist(), score=float(score))
            for label, box, score in zip(labels, boxes, scores, strict=True)
        ]  # fmt: skip
    return found


@trained
@on_coco
def test_trained_weights_give_their_ap_through_our_tools(checkpoint, tmp_path):
    output = _run(
        'tools/test.py', f'configs/{CONFIG}.py', checkpoint, '--data-root', COCO,
        '--work-dir', tmp_path, '--out', tmp_path / 'ours', '--cfg-options',
        'test_dataloader.num_workers=0', 'test_dataloader.persistent_workers=False',
    )  # fmt: skip
    assert 'missing, stay as initialised' in output  # heads of training, said
    ours = json.loads((tmp_path / 'ours.bbox.json').read_text())
    ann_file = Path(COCO, 'annotations', 'instances_val2017.json')
    truth = json.loads(ann_file.read_text())
    theirs = _detections(ByOnnxRuntime(FILE), Path(COCO, 'val2017'), truth)
    found, expected = (_average_precision(ann_file, d) for d in (ours, theirs))
    print(f'AP {found:.4f}, by onnxruntime {expected:.4f}')
    assert abs(found - expected) < 0.002


@trained
@on_coco
@pytest.mark.parametrize('deployed', [False, True])
def test_top_detections_of_trained_weights_are_those_of_the_file(checkpoint, deployed):
    model = build_ours(onnx_weights.Config.fromfile(CONFIGS / f'{CONFIG}.py'))
    state = torch.load(checkpoint)['state_dict']
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    if deployed:
        model.switch_to_deploy()
    file = ByOnnxRuntime(FILE)
    errors = []
    for path in sorted(Path(COCO, 'val2017').iterdir())[:20]:
        image = Image.open(path)
        errors.append(_compare(model, file, file.tensor(image), *image.size, top=50))
    score, box = np.max(errors, 0)
    print(f'largest difference of scores {score:.1e}, of boxes {box:.1e} image sides')
    assert max(score, box) < 1e-3


def _compare(
    model: nn.Module,
    file: ByOnnxRuntime,
    image: torch.Tensor,
    width: int,
    height: int,
    top: int,
) -> tuple[float, float]:
    """Largest differences of scores, and of boxes in units of the image's sides."""
    with torch.no_grad():
        output = model.eval()._forward(image)
        scores, labels, boxes = model.select(output, height, width)
    their_labels, their_boxes, their_scores = file(image, width, height)
    assert len(scores[0]) == len(their_scores)
    scores, labels, boxes = (x[0][:top].numpy() for x in (scores, labels, boxes))
    sides = np.array([width, height, width, height])
    # Scores that are almost equal may have changed places.
    near = np.abs(scores[:, None] - their_scores[None]) < 1e-3
    same = near & (labels[:, None] == their_labels[None])
    distance = (np.abs(boxes[:, None] - their_boxes[None]) / sides).max(-1)
    return (
        float(np.abs(scores - their_scores[:top]).max()),
        float(np.where(same, distance, np.inf).min(1).max()),
    )


class Exported(nn.Module):
    """What upstream's tools/deployment/export_onnx.py exports."""

    def __init__(self, model: nn.Module, postprocessor: nn.Module) -> None:
        super().__init__()
        self.model, self.postprocessor = model.deploy(), postprocessor.deploy()

    def forward(self, images, orig_target_sizes):
        return self.postprocessor(self.model(images), orig_target_sizes)


def _export_official(size: str, path: Path, config: dict) -> None:
    """A file of random weights whose norms have seen a batch."""
    with official_modules() as official, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = randomise(build_official(official, config), seed=len(size))
        height, width = config['eval_spatial_size']
        images = torch.rand(2, 3, height, width)
        model.decoder.num_denoising = 0
        for module in model.modules():
            if type(module).__name__ == 'FrozenBatchNorm2d':
                for name in ('weight', 'bias', 'running_mean', 'running_var'):
                    getattr(module, name).add_(torch.rand(module.num_features) * 0.3)
        calibrate(model, images)
        model = Exported(model, official.postprocessor.PostProcessor())
        sizes = torch.tensor([[width, height]] * 2)
        model(images, sizes)
        torch.onnx.export(
            model, (images, sizes), str(path),
            input_names=['images', 'orig_target_sizes'],
            output_names=['labels', 'boxes', 'scores'], opset_version=17, dynamo=False,
            dynamic_axes={'images': {0: 'N'}, 'orig_target_sizes': {0: 'N'}},
        )  # fmt: skip


def _small(size: str) -> tuple[dict, object]:
    """Official configuration and ours, at 160 px where that changes nothing."""
    config, ours = official_config(size), load_model_config(size)
    side = 320 if size in 'nlx' else 160
    config['eval_spatial_size'] = [side, side]
    queries = 40
    config['DEIMTransformer']['num_queries'] = queries
    config.setdefault('PostProcessor', {})
    ours.model.decoder.update(eval_size_hw=(side, side), num_queries=queries)
    return config, ours


@pytest.mark.parametrize('size', ['atto', 'femto', 'pico', 'n', 's', 'm', 'l', 'x'])
def test_any_size_exported_by_the_official_code_loads(size, tmp_path):
    config, ours = _small(size)
    path = tmp_path / 'random.onnx'
    _export_official(size, path, config)
    model = build_ours(ours)
    left = onnx_weights.load(path, model)
    assert all(
        name.startswith(('decoder.dec_score_head', 'decoder.decoder.lqe_layers'))
        or name == 'decoder.denoising_class_embed.weight'
        for name in left
    )
    file = ByOnnxRuntime(path)
    generator = torch.Generator().manual_seed(7)
    image = torch.rand(1, 3, *file.size_hw, generator=generator)
    deployed = deepcopy(model)
    deployed.switch_to_deploy()
    noise = _float32_noise(model, image)
    for network in (model, deployed):
        errors = _compare(network, file, image, 640, 480, top=100)
        print(f'{size}: scores {errors[0]:.1e}, boxes {errors[1]:.1e} image sides')
        assert max(errors) < max(1e-4, 3 * noise)


def _float32_noise(model: nn.Module, image: torch.Tensor) -> float:
    """What float32 changes of scores; deep random networks amplify it."""
    with torch.no_grad():
        exact = deepcopy(model).eval().double()
        exact = exact.select(exact._forward(image.double()), 1, 1)[0]
        scores = model.select(model.eval()._forward(image), 1, 1)[0]
    noise = float((scores - exact).abs().max())
    print(f'float32 costs {noise:.1e}')
    return noise


def test_a_file_of_another_size_is_refused(tmp_path):
    path = tmp_path / 'atto.onnx'
    config, _ = _small('atto')
    _export_official('atto', path, config)
    for other in ('femto', 'n'):
        with pytest.raises(ValueError, match=r'the file has .* where the model has'):
            onnx_weights.load(path, build_ours(_small(other)[1]))


def test_a_tensor_without_a_place_is_refused(tmp_path):
    path = tmp_path / 'atto.onnx'
    config, ours = _small('atto')
    _export_official('atto', path, config)
    file = onnx.load(str(path))
    extra = np.ones((3, 5), np.float32)
    file.graph.initializer.append(onnx.numpy_helper.from_array(extra, 'extra'))
    onnx.save(file, str(path))
    with pytest.raises(ValueError, match=r'extra \(3, 5\) of the file has no place'):
        onnx_weights.load(path, build_ours(ours))
