"""The inferencers of mmdet and mmseg on our configs and checkpoints."""

from pathlib import Path

import numpy as np
from export_helpers import random_checkpoint, segmentor_config, smooth_image
from inference_helpers import toy_detector
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
