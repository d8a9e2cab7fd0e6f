"""Operators: schema, autograd, dispatch to a backend, public functions."""
