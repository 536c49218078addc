"""The inferencers of mmdet and mmseg on our configs and checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from export_helpers import random_checkpoint, segmentor_config, smooth_image
from inference_helpers import toy_detector
from mmengine.registry import MODELS
from PIL import Image

from mmbackbones.apis.inferencer import Inferencer


def test_det_inferencer(tmp_path: Path) -> None:
    from mmdet.apis import DetInferencer

    cfg, checkpoint = toy_detector(tmp_path)
    image = smooth_image(60, 90)
    (wanted,) = Inferencer(cfg, checkpoint, 'cpu').predict(image, conf=0.0)
    cfg, _ = toy_detector(tmp_path)
    cfg.model.decoder.num_classes = 3
    cfg.dump(tmp_path / 'toy.py')
    theirs = DetInferencer(str(tmp_path / 'toy.py'), checkpoint, device='cpu')
    (found,) = theirs(image, no_save_vis=True)['predictions']
    assert theirs.model.dataset_meta['classes'] == ('cat', 'dog', 'bird')
    np.testing.assert_allclose(found['scores'], wanted.scores, atol=1e-5)


def test_mmseg_inferencer(tmp_path: Path) -> None:
    from mmseg.apis import MMSegInferencer

    cfg = segmentor_config(tmp_path, 'HGNetV2')
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    cfg.dump(tmp_path / 'toy.py')
    picture = tmp_path / 'picture.png'
    Image.fromarray(smooth_image(90, 120)).save(picture)
    (wanted,) = Inferencer(cfg, checkpoint, 'cpu').predict(picture)
    theirs = MMSegInferencer(
        str(tmp_path / 'toy.py'),
        checkpoint,
        classes=list('abcde'),
        palette=np.arange(15).reshape(5, 3).tolist(),
        device='cpu',
    )
    for source in (str(picture), np.asarray(Image.open(picture))[..., ::-1].copy()):
        found = theirs(source, show=False)['predictions']
        assert len(np.unique(found)) > 1
        assert (found != wanted.labels).mean() < 1e-3


def test_mmseg_init_model(tmp_path: Path) -> None:
    from mmseg.apis import inference_model, init_model

    cfg = segmentor_config(tmp_path, 'HGNetV2')
    checkpoint = random_checkpoint(cfg, tmp_path / 'model.pth')
    state = torch.load(checkpoint, weights_only=True)
    meta = dict(classes=list('abcde'), palette=[[i, i, i] for i in range(5)])
    torch.save(dict(state, meta=dict(dataset_meta=meta)), checkpoint)
    image = smooth_image(90, 120)
    (wanted,) = Inferencer(cfg, checkpoint, 'cpu').predict(image)
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline  # as in our configs
    cfg.dump(tmp_path / 'toy.py')
    model = init_model(str(tmp_path / 'toy.py'), checkpoint, device='cpu')
    found = inference_model(model, image).pred_sem_seg.data[0].numpy()
    assert (found != wanted.labels).mean() < 1e-3
    model_cfg = dict(model.cfg.model, pretrained='weights/x.pth')
    with pytest.raises(ValueError, match=r"pretrained is 'weights/x.pth'; .*init_cfg"):
        MODELS.build(model_cfg)
