"""The stand-in for `mmcv._ext`: how it is found, and models that run on it."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope

from mmbackbones.ops import mmcv_ext

pytest.importorskip('mmcv', reason='mmcv (or mmcv-lite) is not installed')


def run_python(code):
    return subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, check=False
    )


BUILDS_RUNNER = """
import mmbackbones, torch, tempfile
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.utils.dl_utils import mmcv_full_available
assert mmcv_full_available()
class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def forward(self, x, mode):
        return {'loss': self.layer(torch.stack(x)).sum()}
data = [{'x': torch.ones(2)}] * 2
runner = Runner(
    Toy(), tempfile.mkdtemp(),
    train_dataloader=dict(batch_size=1, dataset=data,
                          sampler=dict(type='DefaultSampler')),
    train_cfg=dict(by_epoch=True, max_epochs=1),
    # a paramwise_cfg makes MMEngine compare layers with mmcv.ops classes
    optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
                       paramwise_cfg=dict(norm_decay_mult=0.0)))
runner.train()
"""

WITHOUT_COMPILED = {
    'a real spec, once, and nothing of mmcv read early': """
import mmbackbones, importlib, importlib.util, sys
assert not [name for name in sys.modules if name.partition('.')[0] == 'mmcv']
spec = importlib.util.find_spec('mmcv._ext')
assert spec.loader is not None and spec.name == 'mmcv._ext'
import mmcv._ext
assert importlib.util.find_spec('mmcv._ext') is mmcv._ext.__spec__
from mmbackbones.ops import mmcv_ext
mmcv_ext.install()
importlib.reload(mmcv_ext).install()
importlib.reload(mmbackbones)
found = [f for f in sys.meta_path if getattr(f, 'provides', '') == 'mmcv._ext']
assert len(found) == 1, found
""",
    'mmcv.ops tried before; then all models and the environment report': """
try:
    import mmcv.ops
except ModuleNotFoundError as error:
    assert '_ext' in str(error)
else:
    raise SystemExit('mmcv.ops imported without a stand-in')
import mmbackbones, sys
import mmcv.ops, mmdet.models, mmseg.models
from mmcv.utils import collect_env
assert 'plain torch' in collect_env()['MMCV Compiler']
""",
    'MMEngine builds and runs its Runner': BUILDS_RUNNER,
}


def compiled_spec():
    """Spec of a compiled `mmcv._ext`, None with mmcv-lite."""
    spec = importlib.util.find_spec('mmcv._ext')
    return None if isinstance(spec.loader, mmcv_ext._StandIn) else spec


@pytest.mark.skipif(compiled_spec() is not None, reason='mmcv is compiled here')
@pytest.mark.parametrize('case', WITHOUT_COMPILED)
def test_found_by_the_import_system(case):
    done = run_python(WITHOUT_COMPILED[case])
    assert done.returncode == 0, done.stderr


def test_steps_aside_for_a_compiled_module(tmp_path):
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    (package / '_ext.py').write_text('compiled = True')
    done = run_python(
        f'import sys; sys.path.insert(0, {str(tmp_path)!r})\n'
        'import mmbackbones, mmcv._ext\n'
        'assert mmcv._ext.compiled and not hasattr(mmcv._ext, "nms")'
    )
    assert done.returncode == 0, done.stderr


def test_answers_for_one_module_only():
    finder = mmcv_ext._StandIn()
    assert finder.find_spec('mmcv') is None
    assert finder.find_spec('mmcv._ext.nms') is None
    assert finder.find_spec('other._ext') is None


def test_other_names_raise_one_clear_error():
    spec = mmcv_ext._StandIn().find_spec('mmcv._ext')
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    with pytest.raises(NotImplementedError, match=r"'carafe_forward'.*compiled mmcv"):
        stand_in.carafe_forward(1, mode=2)
    with pytest.raises(AttributeError):
        stand_in.__wrapped__  # noqa: B018
    assert set(mmcv_ext.KERNELS) <= set(vars(stand_in))


# -- models through the stand-in ----------------------------------------------------


def tiny_faster_rcnn():
    """Faster R-CNN on two levels; uses nms, soft-nms, roi_align and DCN v2."""
    anchors = dict(type='AnchorGenerator', scales=[4], ratios=[1.0], strides=[4, 8])
    coder = dict(type='DeltaXYWHBBoxCoder')
    assigner = dict(
        type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3
    )
    sampler = dict(type='RandomSampler', num=16, pos_fraction=0.5)
    return ConfigDict(
        type='FasterRCNN',
        data_preprocessor=dict(type='DetDataPreprocessor', mean=[0] * 3, std=[1] * 3),
        backbone=dict(
            type='ResNet',
            depth=50,  # DCN sits in bottlenecks
            base_channels=2,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(0, 1),
            dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
            stage_with_dcn=(False, True),
        ),
        neck=dict(type='FPN', in_channels=[8, 16], out_channels=8, num_outs=2),
        rpn_head=dict(
            type='RPNHead',
            in_channels=8,
            feat_channels=8,
            anchor_generator=anchors,
            bbox_coder=coder,
        ),
        roi_head=dict(
            type='StandardRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor',
                roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=0),
                out_channels=8,
                featmap_strides=[4, 8],
            ),
            bbox_head=dict(
                type='Shared2FCBBoxHead',
                in_channels=8,
                fc_out_channels=8,
                roi_feat_size=3,
                num_classes=2,
                bbox_coder=coder,
            ),
        ),
        train_cfg=dict(
            rpn=dict(
                assigner=assigner, sampler=sampler, allowed_border=-1, pos_weight=-1
            ),
            rpn_proposal=dict(
                nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7)
            ),
            rcnn=dict(assigner=assigner, sampler=sampler, pos_weight=-1),
        ),
        test_cfg=dict(
            rpn=dict(
                nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7)
            ),
            rcnn=dict(
                score_thr=0.0,
                nms=dict(type='soft_nms', iou_threshold=0.5),
                max_per_img=10,
            ),
        ),
    )


def test_faster_rcnn_with_dcn_trains_a_step_and_predicts():
    pytest.importorskip('mmdet')
    import mmdet.models  # noqa: F401
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(tiny_faster_rcnn())
    model.init_weights()
    samples = []
    for boxes in (torch.tensor([[4.0, 4, 40, 44], [20, 8, 60, 50]]), torch.zeros(0, 4)):
        truth = InstanceData(bboxes=boxes, labels=torch.zeros(len(boxes)).long())
        meta = dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0))
        samples.append(DetDataSample(metainfo=meta, gt_instances=truth))
    data = dict(
        inputs=[torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8)] * 2,
        data_samples=samples,
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    losses = model(**model.data_preprocessor(data, True), mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert loss.isfinite()
    missing = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert not missing
    optimizer.step()
    model.eval()
    with torch.no_grad():
        found = model(**model.data_preprocessor(data), mode='predict')
    assert len(found) == 2 and found[0].pred_instances.bboxes.shape[1] == 4
