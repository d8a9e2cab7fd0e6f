"""Every operator and loss with torch's formula, sample inputs and an error budget: what
`anchorops-doctor` and the tests go through."""

from . import batches, features, masks, pixels
from .entry import Case, Entry, Inputs, Sample

__all__ = ["ENTRIES", "Case", "Entry", "Inputs", "Sample", "cases"]

MODULES = features, pixels, masks, batches
ENTRIES = {entry.name: entry for module in MODULES for entry in module.ENTRIES}


def cases(*tags: str) -> list[Case]:
    """Those of samples that have all of these tags."""
    return [
        Case(entry, sample)
        for entry in ENTRIES.values()
        for sample in entry.samples
        if {*tags} <= {*sample.tags}
    ]
