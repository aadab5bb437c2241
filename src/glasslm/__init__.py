"""glasslm: a glass-box language-model lab."""

__version__ = "0.1.0"
