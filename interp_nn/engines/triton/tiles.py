"""Loads and stores of tiles of the operands, and the products that the forward and the losses begin with."""

import triton
import triton.language as tl


@triton.jit
def to_tf32(x):
    """Round fp32 to the nearest tf32, ties away from zero; keep NaN and every other dtype."""
    if x.dtype == tl.float32:
        rounded = tl.add(x.to(tl.int32, bitcast=True), 0x1000, sanitize_overflow=False) & -0x2000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b in fp32; a b where acc is None.

    "tf32" rounds fp32 operands here, because the matrix units cut their last 13 bits off, which would shrink every product.
    "tf32 cut" lets them.
    """
    if PRECISION == "tf32":
        a, b = to_tf32(a), to_tf32(b)
    return tl.dot(a, b, acc, input_precision="tf32" if PRECISION == "tf32 cut" else PRECISION)


@triton.jit
def inside(row, rn, n):
    """Return row + rn < n. `row` and n may be 64-bit; the elements are compared in 32 bits."""
    return rn < tl.cast(tl.minimum(n - row, 65536), tl.int32)


@triton.jit
def load_x(X, row, rn, rd, n, d, EVEN_D: tl.constexpr):
    """Load X[row + rn, rd], zeros outside. `row` is 64-bit."""
    at = X + row * d + rn[:, None] * d + rd[None, :]
    mask = inside(row, rn, n)[:, None]
    if not EVEN_D:
        mask = mask & (rd[None, :] < d)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_x(X, value, row, rn, rd, n, d, EVEN_D: tl.constexpr):
    """Store X[row + rn, rd] = value in X's dtype, where inside."""
    at = X + row * d + rn[:, None] * d + rd[None, :]
    mask = inside(row, rn, n)[:, None]
    if not EVEN_D:
        mask = mask & (rd[None, :] < d)
    tl.store(at, value.to(X.dtype.element_ty), mask=mask)


@triton.jit
def at_b(B, rd, rk, d, K: tl.constexpr, B_T: tl.constexpr):
    """Return the addresses of b[rd, rk]."""
    if B_T:
        return B + rk[None, :] * d + rd[:, None]
    return B + rd[:, None] * K + rk[None, :]


@triton.jit
def load_b(B, rd, rk, d, K: tl.constexpr, B_T: tl.constexpr, EVEN_D: tl.constexpr):
    """Load b[rd, rk], zeros outside."""
    at = at_b(B, rd, rk, d, K, B_T)
    if EVEN_D:
        return tl.load(at, mask=rk[None, :] < K, other=0.0)
    return tl.load(at, mask=(rk[None, :] < K) & (rd[:, None] < d), other=0.0)


@triton.jit
def load_rows(T, row, rn, rc, n, WIDTH: tl.constexpr):
    """Load T[row + rn, rc] of a matrix with n rows of WIDTH, zeros outside."""
    mask = inside(row, rn, n)[:, None] & (rc[None, :] < WIDTH)
    return tl.load(T + row * WIDTH + rn[:, None] * WIDTH + rc[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(T, value, row, rn, rc, n, WIDTH: tl.constexpr):
    """Store T[row + rn, rc] = value in T's dtype, inside n rows of WIDTH."""
    mask = inside(row, rn, n)[:, None] & (rc[None, :] < WIDTH)
    at = T + row * WIDTH + rn[:, None] * WIDTH + rc[None, :]
    tl.store(at, value.to(T.dtype.element_ty), mask=mask)


@triton.jit
def load_square(T, r, WIDTH: tl.constexpr):
    """Load T[r, r] of a (WIDTH, WIDTH) matrix, zeros outside."""
    mask = (r[:, None] < WIDTH) & (r[None, :] < WIDTH)
    return tl.load(T + r[:, None] * WIDTH + r[None, :], mask=mask, other=0.0)


@triton.jit
def store_square(T, value, r, WIDTH: tl.constexpr):
    """Store T[r, r] = value of a (WIDTH, WIDTH) matrix in its dtype."""
    mask = (r[:, None] < WIDTH) & (r[None, :] < WIDTH)
    tl.store(T + r[:, None] * WIDTH + r[None, :], value.to(T.dtype.element_ty), mask=mask)


@triton.jit
def store_b(B, value, rd, rk, d, K: tl.constexpr, B_T: tl.constexpr):
    """Store b[rd, rk] = value in b's dtype and memory order."""
    mask = (rd[:, None] < d) & (rk[None, :] < K)
    tl.store(at_b(B, rd, rk, d, K, B_T), value.to(B.dtype.element_ty), mask=mask)


@triton.jit
def scaled(value, SCALE):
    """Return the scale times a value; the value itself without a scale."""
    if SCALE is not None:
        value = value * tl.load(SCALE)
    return value


@triton.jit
def horner(h, v, g, C_Q, FIRST: tl.constexpr, PRECISION: tl.constexpr):
    """Return h g^(FIRST + 1) + v (c_0 I + ... + c_FIRST g^FIRST) in fp32, for fp32 h and v.

    So v q(g) is that of h = c_n v and FIRST = n - 1. Products take h in g's dtype.
    """
    for i in tl.range(FIRST, -1, -1, num_stages=1):
        h = dot(h.to(g.dtype), g, None, PRECISION) + v * tl.load(C_Q + i)
    return h


@triton.jit
def rows_times_q(v, g, C_Q, DEGREE: tl.constexpr, PRECISION: tl.constexpr):
    """Return v q(g) in fp32, of fp32 rows v."""
    return horner(v * tl.load(C_Q + DEGREE), v, g, C_Q, DEGREE - 1, PRECISION)


@triton.jit
def evaluate(g, C_Q, DTYPE: tl.constexpr, BK: tl.constexpr, DEGREE: tl.constexpr, PRECISION: tl.constexpr):
    """Return q(g) (BK, BK) in fp32, of g in fp32, by DEGREE - 1 products of operands in DTYPE."""
    rk = tl.arange(0, BK)
    one = tl.where(rk[:, None] == rk[None, :], 1.0, 0.0)
    h = g * tl.load(C_Q + DEGREE) + one * tl.load(C_Q + DEGREE - 1)
    if DEGREE > 1:
        h = horner(h, one, g.to(DTYPE), C_Q, DEGREE - 2, PRECISION)
    return h


@triton.jit
def load_a(A, rm, rk, M: tl.constexpr, K: tl.constexpr):
    """Load A[rm, rk] of an output layer, zeros outside."""
    mask = (rm[:, None] < M) & (rk[None, :] < K)
    return tl.load(A + rm[:, None] * K + rk[None, :], mask=mask, other=0.0)


@triton.jit
def gram(
    B,
    d,
    K: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return G = bᵀb (BK, BK) in fp32."""
    rk = tl.arange(0, BK)
    g = tl.zeros((BK, BK), tl.float32)
    for j in range(0, d, BD):
        b = load_b(B, j + tl.arange(0, BD), rk, d, K, B_T, EVEN_D)
        g = dot(tl.trans(b), b, g, PRECISION)
    return g


@triton.jit
def project(
    X,
    B,
    row,
    n,
    d,
    K: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    B_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr = None,
):
    """Return P = X b for the BN rows from `row` on, in fp32. STAGES None: those of the kernel."""
    rn, rk = tl.arange(0, BN), tl.arange(0, BK)
    p = tl.zeros((BN, BK), tl.float32)
    for j in tl.range(0, d, BD, num_stages=STAGES):
        rd = j + tl.arange(0, BD)
        x = load_x(X, row, rn, rd, n, d, EVEN_D)
        b = load_b(B, rd, rk, d, K, B_T, EVEN_D)
        p = dot(x, b, p, PRECISION)
    return p
