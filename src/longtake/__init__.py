"""Longtake: fine-tune Wan video models on more frames than the memory seems to allow, planned beforehand."""

__version__ = "0.1.0"
