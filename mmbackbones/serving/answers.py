"""Predictions as JSON for people and pages, as tensors for the protocol."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmbackbones.inference.metadata import ModelInfo
from mmbackbones.inference.results import Detections
from mmbackbones.inference.tiling import Boxes
from mmbackbones.serving.limits import RequestError

__all__ = ['as_json', 'as_tensors']


def as_json(
    info: ModelInfo,
    palette: Sequence[Sequence[int]],
    shape_hw: tuple[int, int],
    found: Boxes | np.ndarray,
    conf: float,
) -> dict:
    """The answer of `/predict`.

    Args:
        info: of the model.
        palette: RGB by label.
        shape_hw: of the image in pixels.
        found: in it.
        conf: lowest score of a detection.
    """
    height, width = shape_hw
    answer: dict[str, Any] = dict(width=width, height=height)
    if info.task == 'segmentation':
        picture = Image.fromarray(found.astype(np.uint8), 'P')
        picture.putpalette([part for colour in palette for part in colour])
        file = io.BytesIO()
        picture.save(file, 'PNG')
        labels, pixels = np.unique(found, return_counts=True)
        return answer | dict(
            classes=[
                dict(
                    category_id=info.category_ids[label],
                    category_name=info.classes[label],
                    share=count / found.size,
                    colour=palette[label],
                )
                for label, count in zip(labels.tolist(), pixels.tolist(), strict=True)
            ],
            label_map=base64.b64encode(file.getvalue()).decode(),
        )
    kept = found.pick(found.scores >= conf)
    result = Detections(
        **kept._asdict(),
        info=info,
        index=0,
        name='request',
        path=None,
        shape_hw=shape_hw,
        held_image=None,
    )
    entries = result.to_coco()
    colours = [palette[label] for label in result.labels.tolist()]
    keys = ('category_id', 'category_name', 'bbox', 'score')
    return answer | dict(
        detections=[
            {key: entry[key] for key in keys} | dict(colour=colour)
            for entry, colour in zip(entries, colours, strict=True)
        ]
    )


def as_tensors(
    task: str, found: Sequence[Boxes] | Sequence[np.ndarray], conf: float
) -> dict[str, np.ndarray]:
    """Results of a request as tensors; missing detections have score 0, label -1."""
    if task == 'segmentation':
        if len({labels.shape for labels in found}) > 1:
            raise RequestError(
                400, 'maps of images of different sizes are no tensor; send them apart'
            )
        return dict(labels=np.stack(found).astype(np.int32))
    kept = [boxes.pick(boxes.scores >= conf) for boxes in found]
    counts = [len(boxes.scores) for boxes in kept]
    num, room = len(kept), max(counts)
    tensors = dict(
        boxes=np.zeros((num, room, 4), np.float32),
        scores=np.zeros((num, room), np.float32),
        labels=np.full((num, room), -1, np.int64),
        num_detections=np.array(counts, np.int32),
    )
    for i, boxes in enumerate(kept):
        tensors['boxes'][i, : counts[i]] = boxes.xyxy
        tensors['scores'][i, : counts[i]] = boxes.scores
        tensors['labels'][i, : counts[i]] = boxes.labels
    return tensors
