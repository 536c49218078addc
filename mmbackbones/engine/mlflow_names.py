"""MLflow for metrics whose names it refuses."""

from mmengine.registry import VISBACKENDS
from mmengine.visualization import MLflowVisBackend

__all__ = ['MLflowNamesBackend']


@VISBACKENDS.register_module()
class MLflowNamesBackend(MLflowVisBackend):
    """mmengine's backend; `coco/bbox_AR@100` is called `coco/bbox_AR_at_100`.

    MLflow ends a run over a name with '@'.
    """

    def add_scalar(
        self, name: str, value: float, *args: object, **more: object
    ) -> None:
        """Record one value."""
        super().add_scalar(_allowed(name), *args, **more)

    def add_scalars(self, scalar_dict: dict, *args: object, **more: object) -> None:
        """Record values by name."""
        scalars = {_allowed(name): value for name, value in scalar_dict.items()}
        super().add_scalars(scalars, *args, **more)


def _allowed(name: str) -> str:
    return name.replace('@', '_at_')
