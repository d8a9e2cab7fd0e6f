"""anchorops-doctor --verify: does each backend compute, on this device, what the package promises?

Each check (checks.py) names the one operator that it tests, or is of a composition. It compares
calls of public functions with torch's formulas (formulas.py) on each backend (run.py).
"""
