from .dfine_criterion import DFINECriterion

__all__ = ['DFINECriterion']
