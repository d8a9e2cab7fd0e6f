"""Triton kernels. Import them lazily, because CPU builds of torch do not include Triton."""
