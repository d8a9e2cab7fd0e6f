"""Networks, their heads, and the losses that train them."""
