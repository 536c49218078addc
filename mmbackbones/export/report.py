"""What an export is worth: differences, accuracy and latency of both sides.

Both sides see the same images: the model as it was loaded, in PyTorch, and the
exported file in its runtime.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS

from mmbackbones.export.comparison import Comparison, compare_outputs
from mmbackbones.inference.backends import Backend
from mmbackbones.inference.exported import ExportedBackend, Session, prepare_image
from mmbackbones.inference.metadata import ExportInfo
from mmbackbones.inference.sources import read_image

__all__ = [
    'Report',
    'compare_sides',
    'evaluate',
    'evaluate_file',
    'load_images',
    'measure_latency',
]


@dataclass
class Report:
    """All that is said after an export.

    Attributes:
        file: that was written.
        format: of the file.
        precision: 'fp32', 'fp16' or 'int8'.
        runtime: that ran it.
        tolerance: of every difference; None where only accuracy counts.
        differences: of `compare_outputs`.
        accuracy: the data set's first number of both sides, by side.
        latency_ms: medians, by side.
        notes: whatever else the user has to know.
    """

    file: str
    format: str
    precision: str
    runtime: str
    tolerance: float | None
    differences: Comparison | None = None
    accuracy: dict[str, Any] = field(default_factory=dict)
    latency_ms: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether nothing differs by more than the tolerance."""
        if self.differences is None or self.tolerance is None:
            return True
        return not self.differences.exceeds(self.tolerance)

    def text(self) -> str:
        """A few lines for a person."""
        lines = [f'{self.file}: {self.format}, {self.precision}, run by {self.runtime}']
        if self.differences is not None:
            lines += _difference_lines(self.differences)
        if self.accuracy:
            both = ', '.join(f'{k} {v}' for k, v in self.accuracy.items())
            lines.append(f'accuracy: {both}')
        if self.latency_ms:
            both = ', '.join(f'{k} {v:.1f} ms' for k, v in self.latency_ms.items())
            lines.append(f'latency, one batch, medians in turns: {both}')
        lines += self.notes
        if self.tolerance is None:
            lines.append('no tolerance was stated for differences')
        else:
            verdict = 'within' if self.passed else 'BEYOND'
            lines.append(f'{verdict} the tolerance of {self.tolerance:g}')
        return '\n'.join(lines)

    def save(self) -> None:
        """Write `<file>.report.json` and `<file>.report.txt`."""
        content = dict(vars(self), passed=self.passed)
        if self.differences is not None:
            content['differences'] = {
                # JSON has no number for NaN.
                key: value if math.isfinite(value) else str(value)
                for key, value in self.differences.to_dict().items()
            }
        text = json.dumps(content, indent=1)
        Path(f'{self.file}.report.json').write_text(text + '\n')
        Path(f'{self.file}.report.txt').write_text(self.text() + '\n')


def _difference_lines(found: Comparison) -> list[str]:
    lines = [f'largest differences on {found.num_images} images:']
    if found.num_detections or found.num_unmatched:
        lines += [
            f'  scores {found.score:.2e}, boxes {found.box_pixels:.3f} px '
            f'({found.box:.2e} of the input) over {found.num_detections} detections',
            f'  {found.num_unmatched} detections on one side only',
        ]
    else:
        if found.features:
            lines.append(
                f'  maps {found.features:.2e}, relative to their largest value'
            )
        if not found.features or found.pixels:
            lines.append(f'  {found.pixels:.4%} of the pixels have another label')
    return lines


def load_images(
    paths: Sequence[str], info: ExportInfo, batch_size: int
) -> Iterator[np.ndarray]:
    """Images of files as the graph takes them.

    Args:
        paths: of the files; without any, one batch of noise.
        info: of the exported file.
        batch_size: of all batches; the last one repeats images to be full.

    Returns:
        `(batch_size, 3, H, W)` float32, RGB in [0, 1].
    """
    if not paths:
        noise = np.random.default_rng(0)
        yield noise.random((batch_size, 3, *info.input_size_hw), dtype=np.float32)
        return
    for start in range(0, len(paths), batch_size):
        group = [paths[(start + i) % len(paths)] for i in range(batch_size)]
        # Of windows that slide the first one stands for the image.
        yield np.stack([prepare_image(read_image(p), info).inputs[0] for p in group])


def compare_sides(
    reference: Session,
    exported: Session,
    batches: Iterator[np.ndarray],
    info: ExportInfo,
) -> Comparison:
    """Run both sides on the same batches."""

    def outputs() -> Iterator[tuple[Mapping, Mapping]]:
        for batch in batches:
            yield reference.run(batch), exported.run(batch)

    return compare_outputs(info.task, outputs(), info.input_size_hw)


def measure_latency(
    sides: Mapping[str, Session], batch: np.ndarray, *, num_runs: int = 10
) -> dict[str, float]:
    """Medians in milliseconds, the sides in turns, two rounds of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(num_runs + 2):
        for name, side in sides.items():
            start = time.perf_counter()
            side.run(batch)
            if i > 1:
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def evaluate(
    cfg: Config, backend: Backend, *, max_images: int | None = None
) -> tuple[str, float]:
    """The first number of the config's test evaluator, and its name.

    Args:
        cfg: prepared, with `test_dataloader` and `test_evaluator`.
        backend: that predicts.
        max_images: stop after so many.
    """
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = dataset.metainfo
    count = len(dataset) if max_images is None else min(max_images, len(dataset))
    for i in range(count):
        found = dataset.get_data_info(i)
        image = backend.read(found['img_path'])
        predicted = backend.predict([backend.prepare(image, found['img_path'])])[0]
        if backend.info.task == 'segmentation':
            truth = dataset[i]['data_samples'].gt_sem_seg.data
            sample = dict(
                pred_sem_seg=dict(data=torch.from_numpy(predicted)[None]),
                gt_sem_seg=dict(data=truth),
            )
        else:
            sample = dict(
                img_id=found['img_id'],
                ori_shape=image.shape[:2],
                pred_instances=dict(
                    bboxes=torch.from_numpy(predicted.xyxy),
                    scores=torch.from_numpy(predicted.scores),
                    labels=torch.from_numpy(predicted.labels),
                ),
            )
        metric.process({}, [sample])
    return next(iter(metric.evaluate(count).items()))


def evaluate_file(
    cfg: Config, session: Session, info: ExportInfo, *, max_images: int | None = None
) -> tuple[str, float]:
    """As `evaluate`, of an exported file."""
    return evaluate(cfg, ExportedBackend(session, info), max_images=max_images)
