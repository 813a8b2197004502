"""The package's version, a literal that packaging reads from the source text."""

__version__ = "0.1.0"
