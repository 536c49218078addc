from .upernet import UPerNet

__all__ = ['UPerNet']
