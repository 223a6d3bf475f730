"""Flags of XLA for tests' programs, which run for milliseconds; to be set before jax is imported."""

from importlib.metadata import version

# XLA's newer way to make kernels takes three times as long to compile. Later versions know no other, nor the flag.
QUICK = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
