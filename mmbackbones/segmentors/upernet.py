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


def _check_test_cfg(test_cfg: Mapping) -> None:
    """What mmseg would find at the first validation, hours later."""
    if test_cfg['mode'] not in ('whole', 'slide'):
        raise ValueError(
            f"test_cfg.mode is {test_cfg['mode']!r}; it is 'whole' or 'slide'"
        )
    for key in ('crop_size', 'stride') if test_cfg['mode'] == 'slide' else ():
        pair = test_cfg.get(key)
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError(
                f"test_cfg.{key} is {pair}; mode 'slide' needs (height, width)"
            )


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
        auxiliary_head: config of a head that only learns, a list of some, or None.
        train_cfg: mmseg's.
        test_cfg: mmseg's: `mode` is 'whole', or 'slide' with `crop_size` and `stride`
            (H, W) in pixels.
        data_preprocessor: mmseg's.
        pretrained: None; `mmseg.apis.init_model` passes it.
        init_cfg: mmengine's.

    Raises:
        ValueError: `num_classes` is not set; a head states strides, channels or a
            number of classes that do not fit; the backbone does not tell its
            strides; `test_cfg` has another mode, or no windows to slide.
    """

    def __init__(
        self,
        *,
        backbone: dict,
        decode_head: dict,
        num_classes: int,
        auxiliary_head: dict | list[dict] | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        pretrained: None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if pretrained is not None:
            raise ValueError(
                f'pretrained is {pretrained!r}; state the weights of a backbone as '
                'backbone.init_cfg, those of the whole model as load_from'
            )
        if num_classes is None:
            raise ValueError(
                'model.num_classes is not set; tools/train.py reads it from the data '
                'set and states it in the config that it writes into the work dir: '
                'take that one'
            )
        if not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(
                f'model.num_classes is {num_classes!r}; give a number of at least 1'
            )
        self._given_classes = num_classes  # the heads are built within the next call
        backbone, test_cfg = ConfigDict(backbone), ConfigDict(test_cfg or {})
        backbone.setdefault('out_indices', _ALL_STAGES)
        test_cfg.setdefault('mode', 'whole')
        _check_test_cfg(test_cfg)
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

    def _init_auxiliary_head(self, auxiliary_head: dict | list[dict] | None) -> None:
        if isinstance(auxiliary_head, list):
            auxiliary_head = [
                self._follow(f'auxiliary_head[{i}]', head)
                for i, head in enumerate(auxiliary_head)
            ]
        elif auxiliary_head is not None:
            auxiliary_head = self._follow('auxiliary_head', auxiliary_head)
        super()._init_auxiliary_head(auxiliary_head)

    def _follow(self, name: str, head: Mapping) -> ConfigDict:
        """A head's config with everything that it reads from the backbone."""
        head = ConfigDict(head)
        if not hasattr(self.backbone, 'out_strides'):
            raise ValueError(
                f'backbone {type(self.backbone).__name__} has no out_strides, which '
                'heads follow; take one of mmbackbones.backbones'
            )
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
