"""Triton kernels, each one launch. Nothing outside of the `triton` engine imports them, and only they import Triton.

Names in every kernel: X (n, d), B = b (d, K), P = X b, G = bᵀb, Y = P G; a D before a name is a gradient. K is the number of
columns and BK the power of two that holds it (at least 16, the smallest matrix product); BN, BD are tiles of rows and of
features. Padded rows and columns are loaded as zeros, so every product leaves them zero. Operands keep the inputs' dtype,
every product and sum accumulates in fp32, and row offsets are 64-bit.

A kernel with several phases runs them in one launch, with a barrier over the grid between one and the next. PHASES says
which: all of them on a GPU; one bit at a time takes them apart, for timing or where programs run one after another. What
one phase hands to the next goes through workspaces. Sums over programs are stored as parts and added in a fixed order:
no atomic operation touches a number, so every run gives the same bits.
"""
