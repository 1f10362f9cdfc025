"""Triton kernels, one launch each. Only the `triton` engine imports them, and only they import Triton.

========  =============  ===============================================================================
symbol    shape          meaning
========  =============  ===============================================================================
X         (n, d)         input, row-major
B         (d, K)         b; its memory is that of bᵀ (K, d) where B_T
P         (n, K)         projection X b
G         (K, K)         Gram matrix bᵀb
Y         (n, K)         summary P G
W         (d, K)         effective weight b G
Q         (K, K)         q(G) of a polynomial, in the place of G in Y and W; P = a X b and G = a² bᵀb then
C_Q       (DEGREE + 1,)  coefficients of q, in fp32; DQ their gradient
SCALE     ()             the scale a, in fp32; None for 1
DX, ...                  D before a name: the gradient of the loss with respect to it
D         (n, K)         gradient of the projection through both outputs, dP + dY G
S         (d, K)         Xᵀ dY
T         (K, K)         Pᵀ dY = bᵀ S
WORK                     fp32 workspace; `*_workspace` beside each kernel lists the arrays in it
COUNTER   (1,)           int32 counter of the grid barrier
K, BK                    columns, and the power of two that holds them: at least 16, at most 128
BN, BD                   rows and features of a tile; BN_A and BD_A in a kernel's first phase
BC                       features of a tile in the phase that stores db
EVEN_D                   every tile of features is full, so no mask is needed
PRECISION                how products round fp32 operands: "tf32" or "tf32x3"
DEGREE                   degree of q, 1 to 4; None for the summary
========  =============  ===============================================================================

Operands keep the inputs' dtype. Products and sums accumulate in fp32. Row offsets are 64-bit. Padded rows and columns load as
zeros, so products leave them zero. Pointers may be None: the kernel then leaves out what they stand for.

A kernel with several phases runs them in one launch, with a grid barrier between two phases. PHASES is a bit mask of the phases
to run: all of them on a GPU. A test or a timing may run one at a time. Phases exchange data only through workspaces. Each
program stores its part of a sum, and the parts are added in a fixed order. No float atomics: every run gives the same bits.
"""
