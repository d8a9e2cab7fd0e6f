"""Operators: schema, autograd, dispatch to a backend, public functions.

Each file defines operators, except what they share: registration.py, triton_launch.py, sigmoid.py
and onnx_export.py. What is computed with them and defines none is elsewhere, first of all in
anchorops/losses/: nothing there imports registration.py, which `make lint` checks.
"""

from . import volumes as volumes  # nobody calls its operators by their functions
