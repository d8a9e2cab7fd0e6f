"""Triton kernels, one module per operator; import them lazily, builds of torch for CPU have no Triton."""
