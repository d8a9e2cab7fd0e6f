"""A training run: its files, processes, state and steps."""
