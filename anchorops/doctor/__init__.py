"""The program `anchorops-doctor`: what is usable here, whether it is right, and how fast.

`catalogue/` has every operator and loss with torch's formula and sample inputs. `verify.py`
compares the two on each backend, `benchmark.py` times them; tests/ and bench/ read it too.
"""
