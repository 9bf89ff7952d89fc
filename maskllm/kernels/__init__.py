"""The masked linear layer of serving (masked_linear.py), and the kernels that compute it."""

DENSE = -1
"""The row slot of a row that uses the base's own weights."""
