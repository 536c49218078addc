"""Before any test imports mmdet: without a compiled mmcv it needs our stand-in."""

import mmbackbones  # noqa: F401
