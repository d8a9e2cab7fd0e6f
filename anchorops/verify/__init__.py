"""anchorops-doctor --verify: does each backend compute, on this device, what the package promises?

Each case of the catalogue compares calls of public functions with torch's formulas on each backend
(run.py). It belongs to the one operator that it calls, or is a composition.
"""
