"""Triton kernels; import them lazily, for builds of torch for CPUs bring no Triton."""
