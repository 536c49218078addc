"""Query selection: the best tokens of the encoder become the decoder's queries.

RT-DETR: DETRs Beat YOLOs on Real-time Object Detection, arXiv 2304.08069.
Upstream: https://github.com/Peterande/D-FINE src/zoo/dfine/dfine_decoder.py
(Apache-2.0).
Departs from the source:
- anchors follow the maps that come in, on their device; the buffers for the
  published size serve as a cache. A checkpoint's are taken where they are the same
  but for rounding: upstream averages them like weights, which costs digits that its
  published numbers were measured with;
- an anchor too close to the border has a large logit instead of infinity: its box
  is the same, and averaging of buffers (EMA by interpolation) stays free of NaN;
- images with fewer tokens than `num_queries` use all their tokens.

Legend: N images, L tokens, Q queries, D width, C classes.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmbackbones.layers.mlp import MLP
from mmbackbones.layers.reparam import conv_norm

__all__ = ['QuerySelection', 'SelectedQueries', 'generate_anchors', 'prior_bias']

# A logit that the sigmoid takes to 1 whatever a head adds, representable in float16.
BORDER_LOGIT = 1e4


def prior_bias(prob: float) -> float:
    """Logit of a probability, to start classifiers at (focal loss, 1708.02002)."""
    return math.log(prob / (1 - prob))


def generate_anchors(
    sizes_hw: Sequence[tuple[int, int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """One anchor box for each position of each map.

    Centred on the position, with sides of 0.05 on the first map, twice that on the
    next, and so on.

    Args:
        sizes_hw: height and width of each map.
        dtype: of the anchors.
        device: of both results.

    Returns:
        Logits of the boxes, cxcywh, `(1, L, 4)`; and `(1, L, 1)` bool, whether all
        four lie in (0.01, 0.99). The logits of other anchors are 1e4.
    """
    anchors = []
    for level, (height, width) in enumerate(sizes_hw):
        y = (torch.arange(height, device=device) + 0.5) / height
        x = (torch.arange(width, device=device) + 0.5) / width
        centre = torch.stack(torch.meshgrid(x, y, indexing='xy'), -1)  # (h, w, 2)
        side = torch.full_like(centre, 0.05 * 2**level)
        anchors.append(torch.cat((centre, side), -1).flatten(0, 1))
    anchors = torch.cat(anchors)[None]
    valid = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)
    logits = torch.where(valid, anchors.logit(), BORDER_LOGIT)
    return logits.to(dtype), valid


class SelectedQueries(NamedTuple):
    """Tokens chosen as queries, by falling score.

    Attributes:
        content: `(N, Q, D)`.
        box_logits: `(N, Q, 4)` cxcywh before the sigmoid.
        logits: `(N, Q, C)`.
    """

    content: Tensor
    box_logits: Tensor
    logits: Tensor


class QuerySelection(nn.Module):
    """Base of the decoders: input projections, encoder heads and anchors.

    A base class rather than a member, because released checkpoints keep these
    parameters at the top of the decoder. A dialect overrides what it does
    differently.

    Args:
        num_classes: C.
        in_channels: channels of the incoming maps, fine to coarse.
        in_strides: their strides in pixels.
        hidden_dim: D. A map of that width is not projected.
        num_queries: Q.
        eval_size_hw: image size in pixels whose anchors are kept.

    Raises:
        ValueError: `in_strides` does not fit `in_channels`.

    Attributes:
        activation: class of the activation in all heads and layers.
    """

    activation: type[nn.Module] = nn.ReLU

    def __init__(
        self,
        num_classes: int,
        in_channels: tuple[int, ...],
        in_strides: tuple[int, ...],
        hidden_dim: int,
        num_queries: int,
        eval_size_hw: tuple[int, int],
    ) -> None:
        super().__init__()
        if len(in_strides) != len(in_channels):
            raise ValueError(
                f'in_strides is {tuple(in_strides)} but in_channels is '
                f'{tuple(in_channels)}; give one stride per map'
            )
        self.num_classes, self.num_queries = num_classes, num_queries
        self.hidden_dim = hidden_dim
        self.input_proj = nn.ModuleList(self._input_proj(c) for c in in_channels)
        self.enc_output = self._enc_output()
        self.enc_score_head = nn.Linear(hidden_dim, num_classes)
        self.enc_bbox_head = MLP(hidden_dim, hidden_dim, 4, 3, self.activation)

        height, width = eval_size_hw
        self.anchor_sizes_hw = [
            (math.ceil(height / stride), math.ceil(width / stride))
            for stride in in_strides
        ]
        anchors, valid_mask = generate_anchors(self.anchor_sizes_hw)
        self.register_buffer('anchors', anchors)
        self.register_buffer('valid_mask', valid_mask)
        self._init_selection()

    def _input_proj(self, in_channels: int) -> nn.Module:
        if in_channels == self.hidden_dim:
            return nn.Identity()
        return conv_norm(in_channels, self.hidden_dim)

    def _enc_output(self) -> nn.Module:
        """Projects tokens `(N, L, D)` for the encoder heads and as content."""
        return nn.Sequential(
            OrderedDict(
                proj=nn.Linear(self.hidden_dim, self.hidden_dim),
                norm=nn.LayerNorm(self.hidden_dim),
            )
        )

    def _init_selection(self) -> None:
        for proj in self.input_proj:
            if not isinstance(proj, nn.Identity):
                nn.init.xavier_uniform_(proj.conv.weight)
        if not isinstance(self.enc_output, nn.Identity):
            nn.init.xavier_uniform_(self.enc_output.proj.weight)
        nn.init.constant_(self.enc_score_head.bias, prior_bias(0.01))
        nn.init.zeros_(self.enc_bbox_head.layers[-1].weight)
        nn.init.zeros_(self.enc_bbox_head.layers[-1].bias)

    def select_queries(self, maps: Sequence[Tensor]) -> SelectedQueries:
        """Score every position of every map and take the best.

        Args:
            maps: `(N, D, h, w)` each, after `input_proj`.

        Returns:
            `num_queries` queries of each image, or all L where there are fewer.
        """
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        anchors, valid_mask = self._anchors_for([tuple(x.shape[-2:]) for x in maps])
        # Not a product: NaN times 0 is NaN.
        tokens = self.enc_output(memory.masked_fill(~valid_mask, 0))  # (N, L, D)
        logits = self.enc_score_head(tokens)
        num_queries = min(self.num_queries, tokens.shape[1])
        index = self._best_tokens(logits, num_queries)[..., None]  # (N, Q, 1)
        content = tokens.gather(1, index.expand(-1, -1, tokens.shape[-1]))
        anchors = anchors.expand(len(index), -1, -1)
        return SelectedQueries(
            content,
            self.enc_bbox_head(content) + anchors.gather(1, index.expand(-1, -1, 4)),
            logits.gather(1, index.expand(-1, -1, logits.shape[-1])),
        )

    def _best_tokens(self, logits: Tensor, num_queries: int) -> Tensor:
        """Indices `(N, Q)` of tokens `(N, L, C)`, by default of the highest logits."""
        return logits.amax(-1).topk(num_queries).indices

    def _anchors_for(self, sizes_hw: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        if sizes_hw == self.anchor_sizes_hw:
            return self.anchors, self.valid_mask
        return generate_anchors(sizes_hw, self.anchors.dtype, self.anchors.device)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        # Both follow from eval_size_hw. Those of a checkpoint may be of another size
        # and hold infinities.
        saved = state_dict.get(prefix + 'anchors')
        for name in ('anchors', 'valid_mask'):
            if prefix + name in state_dict:
                state_dict[prefix + name] = getattr(self, name)
        if saved is not None and self._are_rounded(saved):
            state_dict[prefix + 'anchors'] = torch.where(
                self.valid_mask, saved.to(self.anchors), self.anchors
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _are_rounded(self, anchors: Tensor) -> bool:
        """Whether these are ours, but for rounding and for the border."""
        own = self.anchors
        if anchors.shape != own.shape or anchors.is_meta or own.is_meta:
            return False
        difference = (anchors.to(own) - own).abs()
        return bool((difference.masked_fill(~self.valid_mask, 0) < 0.01).all())
