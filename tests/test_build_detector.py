"""The classes of a detector that is built for a checkpoint."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmbackbones.apis.detection import build_detector

CONFIG = Path(__file__).parent.parent / 'configs' / 'rtdetrv2_r18vd_coco.py'


def test_classes_are_those_of_the_decoder(tmp_path: Path) -> None:
    """Not those of the encoder, whose tokens may have one score for all."""
    cfg = Config.fromfile(CONFIG)
    init_default_scope('mmdet')
    cfg.model.backbone.init_cfg = None
    cfg.model.neck.hidden_dim = cfg.model.decoder.hidden_dim = 32
    cfg.model.decoder.update(
        num_layers=1, num_classes=3, query_select_method='agnostic'
    )
    model = MODELS.build(cfg.model)
    names = ('a', 'b', 'c')
    content = dict(
        state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=names))
    )
    torch.save(content, tmp_path / 'toy.pth')
    cfg.model.decoder.num_classes = 80
    built = build_detector(cfg, str(tmp_path / 'toy.pth'), 'cpu')
    assert built.dataset_meta['classes'] == names
    for key, value in model.state_dict().items():
        assert torch.equal(built.state_dict()[key], value), key


def test_other_checkpoints_are_named(tmp_path: Path) -> None:
    torch.save(dict(weight=torch.zeros(1)), tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r'not that of a detector.*dec_score_head'):
        build_detector(Config.fromfile(CONFIG), str(tmp_path / 'other.pth'))
