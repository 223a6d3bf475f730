"""Surgery-R1 in JAX."""

__version__ = "0.1.0"
