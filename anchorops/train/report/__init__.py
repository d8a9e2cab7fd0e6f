"""What is measured, drawn and printed of a run."""
