from .classifier import classifier_to_ours
from .keymap import ConversionReport, KeyMap, Rule, Transform
from .source import Source
from .sources import SOURCES, Conversion, from_ours, recognise, to_ours

__all__ = [
    'SOURCES',
    'Conversion',
    'ConversionReport',
    'KeyMap',
    'Rule',
    'Source',
    'Transform',
    'classifier_to_ours',
    'from_ours',
    'recognise',
    'to_ours',
]
