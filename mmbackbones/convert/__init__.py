from .keymap import ConversionReport, KeyMap, Rule, Transform

__all__ = ['ConversionReport', 'KeyMap', 'Rule', 'Transform']
