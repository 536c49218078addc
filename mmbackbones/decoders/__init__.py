from .dfine_decoder import DFINEDecoder

__all__ = ['DFINEDecoder']
