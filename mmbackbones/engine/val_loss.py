"""The loss on the validation set, beside its accuracy."""

import torch
from mmengine.dist import all_gather_object, is_distributed
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmbackbones.ops.boxes import scale_boxes, xyxy_to_cxcywh
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput
from mmbackbones.registry import HOOKS

__all__ = ['ValLossHook']


@HOOKS.register_module()
class ValLossHook(Hook):
    """Adds `val_loss` and its terms to the metrics of each validation in training.

    It is the training loss of what is evaluated: of the layer that predicts, with the
    averaged weights where there are such, without denoising or auxiliary terms. So it
    is lower than the training loss, and comparable with itself only. The network runs
    once; what is added is one matching and one criterion a batch.

    The terms are sums over the set, divided by its number of boxes, whatever the
    batch size or number of processes. (Images that fill up the last batches of some
    ranks count twice.)

    Needs the model's `decoder` and `criterion`, and ground truth in the validation
    samples (`LoadAnnotations` in the pipeline, before or after the resizing). Without
    these it says so once, and does nothing.

    Priority NORMAL: before `LoggerHook` (BELOW_NORMAL) and `CheckpointHook`
    (VERY_LOW), whose `save_best` may so be `val_loss`.
    """

    def __init__(self) -> None:
        self._training = False
        self._said = False
        self._captured: torch.utils.hooks.RemovableHandle | None = None

    def before_train(self, runner: Runner) -> None:
        """From here on validations are of interest."""
        self._training = True

    def after_train(self, runner: Runner) -> None:
        """And no longer."""
        self._training = False

    def before_val_epoch(self, runner: Runner) -> None:
        """Begin to listen to the decoder."""
        if not self._training:
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        problem = _what_is_missing(runner, model)
        if problem:
            self._say(runner, problem)
            return
        self._criterion: nn.Module = model.criterion
        self._in_original_pixels = _annotations_follow_resize(runner)
        self._losses: list[dict[str, Tensor]] = []
        self._num_boxes: list[int] = []
        self._output: DecoderOutput | None = None

        def keep(_: nn.Module, __: tuple, output: DecoderOutput) -> None:
            self._output = output

        self._captured = model.decoder.register_forward_hook(keep)

    def after_val_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: list | None = None,
    ) -> None:
        """Evaluate the criterion on what the decoder has just returned."""
        if self._captured is None or self._output is None:
            return
        targets = self._targets(outputs, self._output.queries.boxes.device)
        self._losses.append(self._criterion(self._output, targets))
        self._num_boxes.append(len(targets))
        self._output = None

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Add up, over all ranks, and publish."""
        if self._captured is None:
            return
        self._captured.remove()
        self._captured = None
        if not self._losses:
            return
        for name, value in self._totals().items():
            # Mmengine averages what is called loss over its history; this is no
            # estimate that would need it.
            runner.message_hub.log_scalars.pop(f'val/{name}', None)
            runner.message_hub.update_scalar(f'val/{name}', value)
            if metrics is not None:
                metrics[name] = value

    def _targets(self, samples: list, device: torch.device) -> BoxTargets:
        """Ground truth in shares of the network's input, cxcywh."""
        boxes, labels = [], []
        for sample in samples:
            truth = sample.gt_instances
            box = getattr(truth.bboxes, 'tensor', truth.bboxes).to(device)
            if self._in_original_pixels:
                box = scale_boxes(box, *sample.scale_factor)
            height, width = sample.batch_input_shape
            boxes.append(xyxy_to_cxcywh(scale_boxes(box, 1 / width, 1 / height)))
            labels.append(truth.labels.to(device))
        return BoxTargets.from_lists(labels, boxes)

    def _totals(self) -> dict[str, float]:
        names = list(self._losses[0])
        # (batches, terms); one copy from the device for the whole validation
        values = torch.stack([torch.stack([*d.values()]) for d in self._losses])
        mine = (values.double().cpu(), torch.tensor(self._num_boxes).double())
        shares = all_gather_object(mine) if is_distributed() else [mine]
        losses = torch.stack([loss for loss, _ in shares])  # (ranks, batches, terms)
        boxes = torch.stack([count for _, count in shares])  # (ranks, batches)
        # The criterion has divided by the boxes of a rank on average, at least 1.
        divisor = boxes.mean(0).clamp(min=1)[None, :, None]
        terms = (losses * divisor).sum((0, 1)) / boxes.sum().clamp(min=1)
        totals = {f'val_{name}': float(v) for name, v in zip(names, terms, strict=True)}
        return {'val_loss': sum(totals.values()), **totals}

    def _say(self, runner: Runner, problem: str) -> None:
        if not self._said:
            runner.logger.warning(f'There will be no val_loss: {problem}')
        self._said = True


def _what_is_missing(runner: Runner, model: nn.Module) -> str:
    """Why there can be no validation loss; empty where there can."""
    if getattr(model, 'criterion', None) is None or not hasattr(model, 'decoder'):
        return f'{type(model).__name__} has no decoder with a criterion'
    if 'LoadAnnotations' not in _transforms(runner):
        return 'the validation pipeline has no LoadAnnotations'
    if is_distributed():
        # The criterion waits for all ranks in each batch.
        batches = all_gather_object(len(runner.val_dataloader))
        if len(set(batches)) > 1:
            return f'the ranks have different numbers of batches, {batches}'
    return ''


def _transforms(runner: Runner) -> list[str]:
    pipeline = getattr(runner.val_dataloader.dataset, 'pipeline', None)
    return [type(step).__name__ for step in getattr(pipeline, 'transforms', ())]


def _annotations_follow_resize(runner: Runner) -> bool:
    """Whether boxes are loaded after the image was resized, and so are not scaled."""
    names = _transforms(runner)
    loaded = names.index('LoadAnnotations')
    return any('Resize' in name for name in names[:loaded])
