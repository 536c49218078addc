"""UPerNet: mmseg's heads on any of our backbones.

Unified Perceptual Parsing for Scene Understanding, arXiv 1807.10221.
Upstream: https://github.com/open-mmlab/mmsegmentation
mmseg/models/segmentors/encoder_decoder.py, decode_heads/uper_head.py (Apache-2.0).
Departs from the source:
- heads follow the backbone: maps are chosen by their stride, channels are read;
- the number of classes is stated once.
"""

from collections.abc import Mapping

from mmengine.config import ConfigDict
from mmseg.models import EncoderDecoder

from mmbackbones.registry import MODELS

__all__ = ['UPerNet']

_ALL_STAGES = (0, 1, 2, 3)


@MODELS.register_module()
class UPerNet(EncoderDecoder):
    """A backbone, a head of mmseg and an auxiliary one, assembled.

    Heads need no `in_channels`, `in_index` or `num_classes`. A head may state
    `in_strides`, the stride of the map it takes, or several; without, it takes all
    maps of the backbone.

    Args:
        backbone: config of a backbone with `out_channels` and `out_strides`. Its
            `out_indices` are all four stages unless it states others.
        decode_head: config of the head that predicts.
        num_classes: of both heads.
        auxiliary_head: config of a head that only learns, or None.
        train_cfg: mmseg's.
        test_cfg: mmseg's: `mode` is 'whole', or 'slide' with `crop_size` and `stride`
            (H, W) in pixels.
        data_preprocessor: mmseg's.
        init_cfg: mmengine's.

    Raises:
        ValueError: `num_classes` is not set; a head states strides, channels or a
            number of classes that do not fit.
    """

    def __init__(
        self,
        *,
        backbone: dict,
        decode_head: dict,
        num_classes: int,
        auxiliary_head: dict | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if num_classes is None:
            raise ValueError(
                'model.num_classes is not set; tools/train.py reads it from the data '
                'set, other callers state it'
            )
        self._given_classes = num_classes  # the heads are built within the next call
        backbone, test_cfg = ConfigDict(backbone), ConfigDict(test_cfg or {})
        backbone.setdefault('out_indices', _ALL_STAGES)
        test_cfg.setdefault('mode', 'whole')
        super().__init__(
            backbone=backbone,
            decode_head=decode_head,
            auxiliary_head=auxiliary_head,
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )

    def _init_decode_head(self, decode_head: dict) -> None:
        super()._init_decode_head(self._follow('decode_head', decode_head))

    def _init_auxiliary_head(self, auxiliary_head: dict | None) -> None:
        if auxiliary_head is not None:
            auxiliary_head = self._follow('auxiliary_head', auxiliary_head)
        super()._init_auxiliary_head(auxiliary_head)

    def _follow(self, name: str, head: Mapping) -> ConfigDict:
        """A head's config with everything that it reads from the backbone."""
        head = ConfigDict(head)
        strides = tuple(self.backbone.out_strides)
        channels = tuple(self.backbone.out_channels)
        wanted = head.pop('in_strides', strides)
        taken = (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if not taken or not set(taken) <= set(strides):
            raise ValueError(
                f'{name}.in_strides is {taken}, but backbone '
                f'{type(self.backbone).__name__} gives maps of the strides {strides}; '
                'change in_strides, or backbone.out_indices'
            )
        index = tuple(strides.index(stride) for stride in taken)
        found = dict(
            in_index=index,
            in_channels=tuple(channels[i] for i in index),
            num_classes=self._given_classes,
        )
        if isinstance(wanted, int):
            found.update(in_index=index[0], in_channels=channels[index[0]])
        for key, value in found.items():
            stated = head.get(key, value)
            if (tuple(stated) if isinstance(stated, list) else stated) != value:
                raise ValueError(
                    f'{name}.{key} is {stated}, but it has to be {value}: backbone '
                    f'{type(self.backbone).__name__} gives the channels {channels} '
                    f'at the strides {strides}, and num_classes is '
                    f'{self._given_classes}; leave {key} out to follow'
                )
            head[key] = value
        return head
