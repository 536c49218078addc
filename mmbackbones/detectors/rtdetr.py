"""The dialects as mmdet detectors: data samples in, data samples out.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069; D-FINE,
arXiv 2410.13842.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/{dfine,postprocessor}.py
(Apache-2.0).
Departs from the source:
- channels and strides travel from the backbone to the encoder to the decoder;
- boxes are normalised by the network's input, whatever its shape, so padded and
  rectangular batches are right.
"""

import torch
from mmdet.models.detectors import BaseDetector
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmbackbones.ops.boxes import cxcywh_to_xyxy, scale_boxes, xyxy_to_cxcywh
from mmbackbones.ops.predictions import BoxTargets, DecoderOutput
from mmbackbones.registry import MODELS

__all__ = ['RTDETR']


def _build_after(
    name: str, cfg: dict, source_name: str, source: nn.Module
) -> nn.Module:
    """Build a module whose inputs are the outputs of `source`.

    Channels and strides that the config leaves out are taken from `source`;
    those that it states must agree.

    Raises:
        ValueError: the config states other channels or strides.
    """
    cfg = ConfigDict(cfg)
    for key in ('channels', 'strides'):
        offered = tuple(getattr(source, f'out_{key}'))
        stated = cfg.setdefault(f'in_{key}', offered)
        if tuple(stated) != offered:
            raise ValueError(
                f'{name}.in_{key} is {tuple(stated)} but {source_name} '
                f'{type(source).__name__} gives {offered}; leave it out to follow '
                f'the {source_name}, or change its out_indices'
            )
    return MODELS.build(cfg)


@MODELS.register_module()
class RTDETR(BaseDetector):
    """Backbone, encoder, decoder and criterion, assembled.

    RT-DETR, RT-DETRv2, D-FINE, DEIM and DEIMv2 differ in these parts, not in how
    they are put together.

    The attributes `backbone`, `encoder` and `decoder` carry the official names,
    so released checkpoints load as they are. `neck` and `decoder` need no
    `in_channels`: they follow the backbone.

    Args:
        backbone: config of a backbone with `out_channels` and `out_strides`.
        neck: config of the encoder.
        decoder: config of the decoder; holds `num_classes`.
        criterion: config of the training loss; None for a model that only
            predicts.
        test_cfg: `max_per_img`, the number of detections kept per image (300).
        data_preprocessor: mmdet's, with `mean` 0 and `std` 255 as published.
        init_cfg: mmengine's.

    Raises:
        ValueError: a stated channel or stride list does not fit what comes
            before it, or `decoder.num_classes` is not set.
    """

    def __init__(
        self,
        *,
        backbone: dict,
        neck: dict,
        decoder: dict,
        criterion: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        if decoder.get('num_classes') is None:
            raise ValueError(
                'decoder.num_classes is not set; tools/train.py reads it from the '
                'annotation file and states it in the config that it writes into the '
                'work dir: take that one'
            )
        self.backbone = MODELS.build(backbone)
        self.encoder = _build_after('neck', neck, 'backbone', self.backbone)
        self.decoder = _build_after('decoder', decoder, 'neck', self.encoder)
        self.criterion = None if criterion is None else MODELS.build(criterion)
        self.max_per_img = (test_cfg or {}).get('max_per_img', 300)

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Maps `(N, hidden_dim, H / s, W / s)` of the encoder, fine to coarse.

        Args:
            batch_inputs: `(N, 3, H, W)` RGB in [0, 1].
        """
        return self.encoder(self.backbone(batch_inputs))

    def _forward(
        self,
        batch_inputs: Tensor,
        batch_data_samples: list[DetDataSample] | None = None,
    ) -> DecoderOutput:
        """Raw decoder output; with ground truth also the denoising queries."""
        targets = None
        if batch_data_samples is not None and self.training:
            targets = self._targets(batch_inputs, batch_data_samples)
        return self.decoder(self.extract_feat(batch_inputs), targets)

    def loss(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]
    ) -> dict[str, Tensor]:
        """Weighted loss terms of a batch; images without boxes are allowed.

        Args:
            batch_inputs: `(N, 3, H, W)` RGB in [0, 1].
            batch_data_samples: `gt_instances.bboxes` in pixels of the input, xyxy.
        """
        targets = self._targets(batch_inputs, batch_data_samples)
        # Convolutions hand the order on; a step of D-FINE-N is 15 % shorter on a CPU.
        batch_inputs = batch_inputs.contiguous(memory_format=torch.channels_last)
        output = self.decoder(self.extract_feat(batch_inputs), targets)
        return self.criterion(output, targets)

    def predict(
        self,
        batch_inputs: Tensor,
        batch_data_samples: list[DetDataSample],
        rescale: bool = True,
    ) -> list[DetDataSample]:
        """Fill `pred_instances` of each data sample, best detections first.

        Args:
            batch_inputs: `(N, 3, H, W)` RGB in [0, 1].
            batch_data_samples: their `scale_factor` (w, h) leads back to the
                original image.
            rescale: boxes in pixels of the original image (True) or of the input.

        Returns:
            The same samples; `bboxes` `(K, 4)` xyxy, not clipped to the image,
            `scores` `(K,)` in (0, 1), `labels` `(K,)`, K = `max_per_img`. There is
            no threshold and no suppression.
        """
        output = self.decoder(self.extract_feat(batch_inputs))
        height, width = batch_inputs.shape[-2:]
        scores, labels, boxes = self.select(output, height, width)
        results = []
        for i, sample in enumerate(batch_data_samples):
            bboxes = boxes[i]
            if rescale:
                scale_x, scale_y = sample.scale_factor
                bboxes = scale_boxes(bboxes, 1 / scale_x, 1 / scale_y)
            results.append(
                InstanceData(bboxes=bboxes, scores=scores[i], labels=labels[i])
            )
        return self.add_pred_to_datasample(batch_data_samples, results)

    def select(
        self, output: DecoderOutput, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Best pairs of a query and a class.

        Args:
            output: of the decoder in evaluation.
            height: of the network's input in pixels.
            width: likewise.

        Returns:
            Scores `(N, K)`, labels `(N, K)` and boxes `(N, K, 4)` xyxy in pixels
            of the input, by falling score.
        """
        logits = output.queries.logits[-1].float()
        num_classes = logits.shape[-1]
        scores, index = torch.topk(
            logits.sigmoid().flatten(1),
            min(self.max_per_img, logits[0].numel()),
        )
        boxes = cxcywh_to_xyxy(output.queries.boxes[-1].float())
        boxes = scale_boxes(boxes, width, height)
        query = (index // num_classes)[..., None].expand(-1, -1, 4)
        return scores, index % num_classes, boxes.gather(1, query)

    def switch_to_deploy(self) -> None:
        """Re-parameterise for inference, in place; training is over after it."""
        self.eval()
        self.encoder.switch_to_deploy()
        self.decoder.switch_to_deploy()

    @staticmethod
    def _targets(
        batch_inputs: Tensor, batch_data_samples: list[DetDataSample]
    ) -> BoxTargets:
        height, width = batch_inputs.shape[-2:]
        instances = [sample.gt_instances for sample in batch_data_samples]
        targets = BoxTargets.from_lists(
            [inst.labels for inst in instances], [inst.bboxes for inst in instances]
        )
        boxes = scale_boxes(targets.boxes, 1 / width, 1 / height)
        return BoxTargets(targets.labels, xyxy_to_cxcywh(boxes), targets.sizes)
