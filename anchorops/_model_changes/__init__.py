"""Models whose forward runs differently, with the same parameters."""
