from .detr_criterion import DETRCriterion
from .dfine_criterion import DFINECriterion

__all__ = ['DETRCriterion', 'DFINECriterion']
