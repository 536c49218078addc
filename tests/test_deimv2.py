"""DEIMv2's parts: sizes, names, image sizes, empty batch, deploy, partial weights.

The golden file holds a digest of all state-dict names and shapes, as the official
models have them; it is rewritten with `ACCEPT_GOLDEN=1`.
"""

import pytest
import torch
from deimv2_helpers import SIZES, build_ours, load_model_config
from dfine_helpers import features, named_tensors, randomise, targets
from golden_helpers import assert_golden_names
from torch import nn
from torch.testing import assert_close

from mmbackbones.backbones import HGNetV2, HGNetV2Lite
from mmbackbones.decoders import DEIMv2Decoder, DEIMv2LiteDecoder
from mmbackbones.engine.pretrained import load_backbone
from mmbackbones.layers.mlp import SwiGLU
from mmbackbones.layers.norm import RMSNorm
from mmbackbones.losses import DETRCriterion, DFINECriterion
from mmbackbones.losses.classification import MatchabilityTerm
from mmbackbones.necks import DEIMv2ConvEncoder, DEIMv2HybridEncoder, LiteEncoder

# Parameters in training and in deploy form, of the official models.
COUNTS = dict(
    atto=(508_985, 494_159),
    femto=(983_945, 962_311),
    pico=(1_539_539, 1_514_285),
    n=(3_600_421, 3_571_527),
    s=(10_451_413, 10_367_027),
    m=(18_866_352, 18_525_501),
    l=(31_090_936, 30_572_003),
    x=(60_291_704, 59_273_315),
)

TOYS = dict(
    lite=dict(in_channels=(12,), in_strides=(16,), encoder=LiteEncoder),
    conv=dict(in_channels=(12, 20), in_strides=(16, 32), encoder=DEIMv2ConvEncoder),
    plain=dict(
        in_channels=(12, 32, 28), in_strides=(8, 16, 32), encoder=DEIMv2HybridEncoder
    ),
)
toys = pytest.mark.parametrize('kind', TOYS)


class Network(nn.Module):
    """Encoder and decoder in a row."""

    def __init__(self, kind: str, **changes: object) -> None:
        super().__init__()
        toy = TOYS[kind]
        options = dict(hidden_dim=32, expansion=0.34, depth_mult=0.5)
        if kind != 'lite':
            last = len(toy['in_channels']) - 1
            options.update(use_encoder_idx=(last,), feedforward_channels=40)
        self.encoder = toy['encoder'](toy['in_channels'], toy['in_strides'], **options)
        cls = DEIMv2LiteDecoder if kind == 'lite' else DEIMv2Decoder
        self.decoder = cls(
            5,
            self.encoder.out_channels,
            self.encoder.out_strides,
            **{
                **dict(
                    hidden_dim=32,
                    num_queries=15,
                    num_layers=3,
                    num_points=(4, 2, 2)[: len(self.encoder.out_channels)],
                    feedforward_channels=40,
                    num_denoising=10,
                    eval_size_hw=(128, 128),
                ),
                **changes,
            },
        )

    def forward(self, maps, truth=None):
        return self.decoder(self.encoder(maps), truth)


def toy(kind: str, **changes: object) -> Network:
    return randomise(Network(kind, **changes)).eval()


def num_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# Published sizes


@pytest.mark.parametrize('size', SIZES)
def test_names_and_counts_are_the_official_ones(size):
    with torch.device('meta'):
        model = build_ours(load_model_config(size))
    assert_golden_names('deimv2_state_dict.json', size, model)
    assert num_parameters(model) == COUNTS[size][0]
    model.switch_to_deploy()
    assert num_parameters(model) == COUNTS[size][1]


@pytest.mark.parametrize(
    ('size', 'side', 'epochs', 'lr', 'backbone_lr', 'matcher', 'batch'),
    [
        ('atto', 320, (500, 4, 250, 400, 468), 2e-3, 1e-3, 450, 128),
        ('femto', 416, (500, 4, 250, 400, 468), 1.6e-3, 8e-4, 450, 128),
        ('pico', 640, (500, 4, 250, 400, 468), 1.6e-3, 8e-4, 450, 128),
        ('n', 640, (160, 4, 78, 148), 8e-4, 4e-4, 136, 32),
        ('s', 640, (132, 4, 64, 120), 4e-4, 2e-4, 100, 32),
        ('m', 640, (102, 4, 49, 90), 4e-4, 4e-5, 80, 32),
        ('l', 640, (58, 4, 29, 50), 5e-4, 2.5e-5, 45, 32),
        ('x', 640, (58, 4, 29, 50), 5e-4, 5e-6, 45, 32),
    ],
)
def test_configs_state_the_published_recipe(
    size, side, epochs, lr, backbone_lr, matcher, batch
):
    cfg = load_model_config(size)
    hook = cfg.default_hooks.stage_switch
    assert (cfg.train_cfg.max_epochs, *hook.ends) == epochs
    assert len(hook.phases) == len(hook.ends)
    schedule = cfg.param_scheduler[0]
    assert hook.of_epochs == schedule.of_epochs == epochs[0]
    assert schedule.constant_from == epochs[-1]
    assert cfg.default_hooks.matcher_switch.start == matcher
    assert cfg.default_hooks.matcher_switch.of_epochs == epochs[0]
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr == lr
    groups = cfg.optim_wrapper.paramwise_cfg.groups
    assert lr * groups[0].lr_mult == pytest.approx(backbone_lr)
    assert cfg.train_dataloader.batch_size * 4 == batch
    assert cfg.auto_scale_lr.base_batch_size == batch
    pipelines = [
        hook.pipeline,
        *(phase.pipeline for phase in hook.phases),
        cfg.train_dataloader.dataset.pipeline,
        cfg.val_dataloader.dataset.pipeline,
        cfg.test_dataloader.dataset.pipeline,
    ]
    for pipeline in pipelines:
        (resize,) = [t for t in pipeline if 'scale' in t]
        assert resize.scale == (side, side)
    least = {t.min_size for t in hook.phases[1].pipeline if 'min_size' in t}
    assert least == dict(atto={12}, femto={10}, pico={8}).get(size, set())
    mosaic = hook.phases[1].pipeline[2].transforms[0][0]
    assert mosaic.size == side // 2
    assert mosaic.cache_size == 50


def test_criteria_are_those_of_the_sizes():
    for size in SIZES:
        with torch.device('meta'):
            criterion = build_ours(load_model_config(size)).criterion
        lite = size in ('atto', 'femto', 'pico')
        assert type(criterion) is (DETRCriterion if lite else DFINECriterion)
        assert isinstance(criterion.classification, MatchabilityTerm)
    assert criterion.reg_scale == 8  # X, as its decoder


# Any image


@toys
@pytest.mark.parametrize('size_hw', [(128, 128), (64, 160), (97, 131)])
def test_any_image_size_runs_and_deploys_to_the_same(kind, size_hw):
    network = toy(kind)
    maps = features(TOYS[kind], *size_hw)
    with torch.no_grad():
        before = named_tensors(network(maps))
        names = set(network.decoder.state_dict())
        network.encoder.switch_to_deploy()
        network.decoder.switch_to_deploy()
        after = named_tensors(network(maps))
    assert set(network.decoder.state_dict()) <= names
    assert before['queries.logits'].shape == (1, 2, 15, 5)
    assert_close(after, before, atol=1e-5, rtol=1e-4)


@toys
@pytest.mark.parametrize('sizes', [(0, 0), (0, 3)])
def test_every_parameter_gets_a_gradient_with_or_without_boxes(kind, sizes):
    network = toy(kind).train()
    output = network(features(TOYS[kind], 128, 128), targets(*sizes, num_classes=5))
    criterion = DETRCriterion if kind == 'lite' else DFINECriterion
    criterion = criterion(classification=dict(type=MatchabilityTerm)).train()
    losses = criterion(output, targets(*sizes, num_classes=5))
    assert all(loss.isfinite() for loss in losses.values())
    raw = sum(t.sum() for t in named_tensors(output).values())
    (raw + sum(losses.values())).backward()
    missing = {n for n, p in network.named_parameters() if p.grad is None}
    assert missing == {'decoder.up', 'decoder.reg_scale'}


def test_terms_are_the_same_for_a_batch_without_boxes():
    network = toy('lite').train()
    maps = features(TOYS['lite'], 128, 128)
    criterion = DETRCriterion(classification=dict(type=MatchabilityTerm)).train()
    found = []
    for sizes in ((0, 0), (2, 1)):
        truth = targets(*sizes, num_classes=5)
        found.append(set(criterion(network(maps, truth), truth)))
    assert found[0] == found[1]
    assert not any('fgl' in name or 'ddf' in name for name in found[0])
    assert 'loss_mal_dn_pre' in found[0]


def test_positions_are_those_of_the_selected_boxes_in_all_layers():
    network = toy('conv')
    calls = []
    network.decoder.query_pos_head.register_forward_hook(lambda *_: calls.append(1))
    network.train()(features(TOYS['conv'], 128, 128), targets(1, 2, num_classes=5))
    assert len(calls) == 1


def test_a_shared_head_is_one():
    decoder = Network('lite').decoder
    assert len(set(map(id, decoder.dec_bbox_head))) == 1
    assert 'dec_bbox_head.2.layers.0.weight' in decoder.state_dict()
    assert len(set(map(id, Network('conv').decoder.dec_bbox_head))) == 3


def test_a_map_of_the_right_width_is_not_projected():
    encoder = Network('plain').encoder
    kinds = [isinstance(proj, nn.Identity) for proj in encoder.input_proj]
    assert kinds == [False, True, False]


def test_the_lite_encoder_takes_one_map():
    with pytest.raises(ValueError, match=r'in_channels is \(8, 16\).*takes one map'):
        LiteEncoder((8, 16), (8, 16))


def test_anchors_of_a_checkpoint_are_kept_where_rounding_alone_tells_them():
    network, other = toy('conv'), toy('conv')
    state = other.decoder.state_dict()
    drifted = state['anchors'] = state['anchors'] + 1e-4
    network.decoder.load_state_dict(state)
    assert_close(network.decoder.anchors, drifted)
    own = Network('conv').decoder
    before = own.anchors.clone()
    state['anchors'] = drifted.flip(-1)  # of another layout
    own.load_state_dict(state)
    assert torch.equal(own.anchors, before)


# Small parts


def test_rms_norm_by_hand():
    norm = RMSNorm(2)
    with torch.no_grad():
        norm.scale.copy_(torch.tensor([1.0, 2.0]))
    # mean square of (3, 4) is 12.5
    expected = torch.tensor([[3.0, 8.0]]) / 12.5**0.5
    assert_close(norm(torch.tensor([[3.0, 4.0]])), expected)
    half = norm(torch.full((1, 2), 60000.0, dtype=torch.float16))  # 3.6e9 squared
    assert half.isfinite().all()


def test_swiglu_by_hand():
    block = SwiGLU(1, 1)
    with torch.no_grad():
        block.w12.weight.copy_(torch.tensor([[1.0], [3.0]]))
        block.w3.weight.fill_(2.0)
    silu = 2 / (1 + torch.tensor(-2.0).exp())
    assert_close(block(torch.tensor([[2.0]])), (2 * silu * 6).reshape(1, 1))


# The backbone


@pytest.mark.parametrize(
    ('arch', 'channels', 'num_left', 'num_missing'),
    # Left: stage 4 (64 tensors), the second block of stage 3 (58), 13 other shapes.
    [('atto', 256, 135, 13), ('femto', 512, 122, 0), ('pico', 512, 64, 0)],
)
def test_weights_of_b0_load_as_far_as_they_fit(arch, channels, num_left, num_missing):
    backbone = HGNetV2Lite(arch)
    assert backbone.out_channels == (channels,)
    assert backbone.out_strides == (16,)
    weights = HGNetV2('b0').state_dict()
    report = load_backbone(backbone, weights)
    assert len(report.loaded) + len(report.dropped) == len(weights)
    own = backbone.state_dict()
    for name in report.loaded:
        assert torch.equal(own[name], weights[name])
    assert set(report.missing) == set(own) - set(report.loaded)
    assert (len(report.dropped), len(report.missing)) == (num_left, num_missing)
    assert f'{len(report.loaded)} of {len(own)} tensors loaded' in str(report)


def test_weights_of_another_size_do_not_load_into_a_part():
    with pytest.raises(ValueError, match='are not those of this HGNetV2Lite'):
        load_backbone(HGNetV2Lite('atto'), HGNetV2('b1').state_dict())
