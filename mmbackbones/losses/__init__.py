from .detr_criterion import DETRCriterion
from .dfine_criterion import DFINECriterion
from .rtdetr_criterion import RTDETRCriterion

__all__ = ['DETRCriterion', 'DFINECriterion', 'RTDETRCriterion']
