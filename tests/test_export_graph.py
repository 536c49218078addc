"""Graphs take RGB in [0, 1] and give what the models give; metadata read back."""

import numpy as np
import pytest
import torch
from helpers import toy_detector_cfg
from mmdet.models import DetDataPreprocessor
from mmengine.registry import MODELS
from mmseg.models import SegDataPreProcessor
from test_segmentation import BACKBONES
from test_segmentation import build as build_segmentor

import mmbackbones.detectors  # noqa: F401
from mmbackbones.export.description import describe, resize_mode
from mmbackbones.export.graph import Normalise, SegmentorGraph, build_graph
from mmbackbones.export.programs import export_program
from mmbackbones.inference.metadata import metadata_json, parse_metadata

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@pytest.mark.parametrize('kind', [DetDataPreprocessor, SegDataPreProcessor])
@pytest.mark.parametrize('flip', [False, True])
@pytest.mark.parametrize(
    'statistics', [dict(mean=MEAN, std=STD), dict(mean=(0,) * 3, std=(255,) * 3), {}]
)
def test_normalisation_is_that_of_the_preprocessor(
    kind: type, flip: bool, statistics: dict
) -> None:
    preprocessor = kind(bgr_to_rgb=flip, **statistics)
    bgr = torch.randint(256, (3, 6, 7), dtype=torch.uint8)
    data = dict(inputs=[bgr], data_samples=None)
    wanted = preprocessor(data, False)['inputs']
    normalise = Normalise.of(preprocessor)
    found = normalise(bgr.flip(0)[None].float() / 255)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)
    if statistics:  # metadata speak of R, G, B
        wanted_mean = statistics['mean'] if flip else statistics['mean'][::-1]
        assert normalise.mean_rgb == pytest.approx(wanted_mean)


def test_detector_graph_is_the_prediction() -> None:
    torch.manual_seed(0)
    model = MODELS.build(toy_detector_cfg()).eval()
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        boxes, scores, labels = build_graph(model)(images)
        output = model(images, mode='tensor')
        wanted = model.select(output, 64, 96)
    for found, value in zip((scores, labels, boxes), wanted, strict=True):
        torch.testing.assert_close(found, value)


def test_segmentor_graph_labels_every_pixel_of_the_input() -> None:
    model = build_segmentor(backbone=BACKBONES['HGNetV2'][0]).eval()
    graph = build_graph(model)
    assert isinstance(graph, SegmentorGraph)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        (labels,) = graph(images)
        logits = model.encode_decode(
            graph.normalise(images), [dict(img_shape=(64, 96), pad_shape=(64, 96))]
        )
    assert labels.shape == (2, 64, 96)
    assert (labels == logits.argmax(1)).all()


def test_what_cannot_be_exported_says_so() -> None:
    with pytest.raises(ValueError, match='Linear cannot be exported; detectors'):
        build_graph(torch.nn.Linear(1, 1))
    graph = build_graph(MODELS.build(toy_detector_cfg()).eval())
    with pytest.raises(ValueError, match="sampling is 'nearest'; choose from"):
        export_program(graph, size_hw=(64, 64), sampling='nearest')
    with pytest.raises(ValueError, match='give positive numbers'):
        export_program(graph, size_hw=(64, 0))


def test_metadata_are_read_back() -> None:
    info = describe(
        'segmentation',
        input_size_hw=(64, 96),
        dynamic_batch=True,
        mean=MEAN,
        std=STD,
        licence='MIT',
        dataset_meta=dict(
            classes=['sky', 'Straße'],
            category_ids=[3, 7],
            palette=np.array([[0, 1, 2], [3, 4, 5]]).tolist(),
        ),
        resize='keep_ratio_pad',
    )
    assert parse_metadata(metadata_json(info), 'x') == info


def test_resize_follows_the_pipeline() -> None:
    assert resize_mode([dict(type='mmdet.Resize', keep_ratio=True)]) == 'keep_ratio_pad'
    assert resize_mode([dict(type='Resize', scale=(1, 1))]) == 'stretch'
    assert resize_mode([]) == 'stretch'
