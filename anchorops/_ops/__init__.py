"""Operators: schema, autograd, dispatch to a backend, public functions."""

from . import volumes as volumes  # nobody calls its operators by their functions
