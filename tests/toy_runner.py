"""A Runner that trains in milliseconds, for tests of hooks.

The model has two weights and a batch-norm; it learns the mean of its input, whose
value is the number that the pipeline stamps on a sample. The metric returns the
scores that the test scripts, one per validation.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.dataset import BaseDataset, DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from torch import nn

METRIC = 'coco/bbox_mAP'


@TRANSFORMS.register_module()
class Stamp:
    """Makes a sample whose value is `value`."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, results: dict) -> dict:
        x = torch.full((3,), float(self.value)) + 0.1 * results['sample_idx']
        return dict(inputs=x)


class StampedDataset(BaseDataset):
    METAINFO = dict(classes=('a', 'b'))

    def load_data_list(self) -> list[dict]:
        return [dict() for _ in range(4)]


class FakeMultiScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enabled = True


class ToyPreprocessor(BaseDataPreprocessor):
    def __init__(self) -> None:
        super().__init__()
        self.batch_augments = nn.ModuleList([FakeMultiScale(), nn.Identity()])

    def forward(self, data: dict, training: bool = False) -> dict:
        return dict(inputs=torch.stack(self.cast_data(data)['inputs']))


class ToyModel(BaseModel):
    def __init__(self) -> None:
        super().__init__(data_preprocessor=ToyPreprocessor())
        self.weight = nn.Parameter(torch.tensor([1.0, -1.0]))
        self.norm = nn.BatchNorm1d(3)
        self.seen: list[float] = []  # rounded input of every training step

    def forward(self, inputs: torch.Tensor, mode: str = 'tensor') -> object:
        if mode == 'loss':
            self.seen.append(round(float(inputs.mean()) - 0.15))
            noise = 0.01 * self.norm(inputs).sum()
            return dict(loss=(self.weight - inputs.mean()).square().sum() + noise)
        return [self.weight.detach().clone() for _ in inputs]


class ScriptedMetric(BaseMetric):
    """Scores by the number of validations so far, and the weights seen there."""

    default_prefix = 'coco'

    def __init__(self, scores: Sequence[float]) -> None:
        super().__init__()
        self.scores = list(scores)
        self.weights: list[torch.Tensor] = []

    def process(self, data_batch: dict, data_samples: Sequence) -> None:
        self.results.append(data_samples[0])

    def compute_metrics(self, results: list) -> dict[str, float]:
        self.weights.append(results[0])
        return dict(bbox_mAP=self.scores.pop(0), bbox_mAP_50=0.5)


def toy_runner(
    work_dir: Path,
    hooks: dict,
    *,
    max_epochs: int,
    scores: Sequence[float] | None = None,
    num_workers: int = 0,
    runner_class: type[Runner] = Runner,
    **overrides: object,
) -> Runner:
    """Runner over two steps an epoch, samples stamped 1.

    Args:
        work_dir: of the runner.
        hooks: into `default_hooks`, by key.
        max_epochs: of the loop.
        scores: what the metric gives after each epoch; None for no validation.
        num_workers: of the training loader, persistent.
        runner_class: of mmengine, or derived from it.
        overrides: further arguments of the Runner.
    """
    loader = dict(
        batch_size=2,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        sampler=dict(type=DefaultSampler, shuffle=False),
        collate_fn=dict(type='pseudo_collate'),
        dataset=dict(type=StampedDataset, pipeline=[dict(type=Stamp, value=1)]),
    )
    validation = {}
    if scores is not None:
        validation = dict(
            val_dataloader=dict(loader, num_workers=0, persistent_workers=False),
            val_evaluator=dict(type=ScriptedMetric, scores=scores),
            val_cfg=dict(),
        )
    arguments = dict(
        model=ToyModel(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=max_epochs),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=30)
        ],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), **hooks),
        experiment_name=f'toy_{DefaultScope.get_current_instance() is None}_'
        f'{id(hooks)}_{torch.randint(1 << 40, ()).item()}',
        randomness=dict(seed=0),
        log_level='WARNING',
        **validation,
    )
    return runner_class(**{**arguments, **overrides})
