"""PyTorch code that the operators and the reference have in common."""
