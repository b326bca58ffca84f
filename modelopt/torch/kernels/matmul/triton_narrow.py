"""y = x W^T for a packed W and few rows of x: each weight is read from memory once, straight into tensor-core registers.

    legend  M rows of x, N rows of W, K columns; a word is 32 bits of codes; G columns share a scale

A quad of threads reads 4 x 16 bytes of a row of W: thread t has words 4t ... 4t+3 of 16. Unpacked as pairs (code i, code i + half
of the word), these are exactly the fragments of the A operand (m16n8k16) once the columns of a step are renumbered; x, the B
operand, is read with the same renumbering, so nothing moves between threads. The warps of a program share its rows and deal K
among them; K may be split over programs too, and then the last one to arrive at a tile adds the partial sums. Both add in a
fixed order, so results do not vary from run to run.
Source: the register-level layout of Frantar et al., MARLIN (2408.11743), here without repacking the weights.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, no-any-return, no-redef"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from modelopt.torch.kernels.matmul.triton_unpack import assembly, constraints, halves


@gluon.constexpr_function
def word_layout(parts: int, rows: int, warps: int, halves: bool = False) -> gl.DistributedLinearLayout:
    """Return the layout of words [parts, rows, 4 threads of a quad, 4], or with `halves` [parts, rows, 4, 2, 2].

    Warps stand first along the parts of K, then along tiles of 16 rows.
    """
    end = [0, 0, 0] if halves else [0, 0]
    word = [[0, 0, 0, 0, 1], [0, 0, 0, 1, 0]] if halves else [[0, 0, 0, 1], [0, 0, 0, 2]]
    beside = warps // parts
    far = [[0, 16 * beside * 2**i, *end] for i in range((rows // (16 * beside)).bit_length() - 1)]
    across = [[2**i, 0, *end] for i in range(parts.bit_length() - 1)]
    across += [[0, 16 * 2**i, *end] for i in range(beside.bit_length() - 1)]
    lanes = [[0, 0, 1, *end[1:]], [0, 0, 2, *end[1:]], [0, 1, *end], [0, 2, *end], [0, 4, *end]]
    shape = [parts, rows, 4, 2, 2] if halves else [parts, rows, 4, 4]
    return gl.DistributedLinearLayout([*word, [0, 8, *end], *far], lanes, across, [], shape)


@gluon.constexpr_function
def where_scaled(scale: str, group: int, each: int) -> str:
    """Return where scales are applied: to the "sums" of a step if one group spans it, else to the "weights"."""
    if scale == "none":
        return "none"
    return "sums" if scale == "f32" and group % (4 * each) == 0 else "weights"


@gluon.constexpr_function
def x_layout(parts: int, rows: int, each: int, warps: int) -> gl.DistributedLinearLayout:
    """Return the layout of x [parts, rows, 4 threads of a quad, `each` columns]: a part to a warp, or warps share rows."""
    registers = [[0, 0, 0, 2**i] for i in range(each.bit_length() - 1)]
    far = [[0, 8 * 2**i, 0, 0] for i in range((rows // 8).bit_length() - 1)]
    across = [[2**i, 0, 0, 0] for i in range(parts.bit_length() - 1)]
    if parts == 1:
        across = far[: warps.bit_length() - 1]
        far = far[len(across) :]
    across += [[0, 0, 0, 0]] * (warps.bit_length() - 1 - len(across))
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(registers + far, lanes, across, [], [parts, rows, 4, each])


@gluon.jit
def twice(v):
    """Return float32 values as two registers of two equal bf16 each: the rounded value, and the rest."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 a; .reg .b32 b; cvt.rn.bf16x2.f32 $0, $2, $2; and.b32 b, $0, 0xFFFF0000; mov.b32 a, b;"
        "sub.f32 a, $2, a; cvt.rn.bf16x2.f32 $1, a, a; }",
        "=&r,=&r,f",
        [v],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def scale_operands(s, SCALE: gl.constexpr):
    """Return what `unpack` multiplies with: two registers for float32 scales, else the exact bf16 scale twice in the first."""
    if SCALE == "f32":
        first, second = twice(s.to(gl.float32))
    elif SCALE == "e8m0":
        code = s.to(gl.int32)
        bits = gl.where(code == 0, 0x0040, code << 7)
        bits = gl.where(code == 255, 0x7FC0, bits)
        first = bits | (bits << 16)
        second = first
    else:  # e4m3, times 2^119
        code = s.to(gl.int32)
        bits = (code & 0x7F) << 4
        scaled = ((bits << 16).to(gl.float32, bitcast=True) * 6.646139978924579e35).to(gl.float32)  # 2^119
        first = gl.inline_asm_elementwise(
            "{ .reg .f32 a; mul.f32 a, $1, 0f7B800000; cvt.rn.bf16x2.f32 $0, a, a; }",
            "=r,f",
            [scaled],
            dtype=gl.int32,
            is_pure=True,
            pack=1,
        )
        second = first
    return first, second


@gluon.jit
def unpack(w, first, second, zero, KIND: gl.constexpr, SCALE: gl.constexpr):
    """Turn words [parts, rows, 4, 4] into bf16 values [parts, rows, columns of a step], columns renumbered (see the module)."""
    PARTS: gl.constexpr = w.shape[0]
    ROWS: gl.constexpr = w.shape[1]
    asm: gl.constexpr = assembly(KIND, SCALE)
    operands: gl.constexpr = constraints(KIND, SCALE)
    types: gl.constexpr = halves(KIND)
    if KIND == "u4" and SCALE == "none":
        out = gl.inline_asm_elementwise(asm, operands, [w, zero], dtype=types, is_pure=True, pack=1)
    elif KIND == "u4":
        out = gl.inline_asm_elementwise(asm, operands, [w, first, second, zero], dtype=types, is_pure=True, pack=1)
    elif SCALE == "none":
        out = gl.inline_asm_elementwise(asm, operands, [w], dtype=types, is_pure=True, pack=1)
    elif SCALE == "f32":
        out = gl.inline_asm_elementwise(asm, operands, [w, first, second], dtype=types, is_pure=True, pack=1)
    else:
        out = gl.inline_asm_elementwise(asm, operands, [w, first], dtype=types, is_pure=True, pack=1)
    if KIND == "i8" or KIND == "e4m3":
        pairs = gl.join(gl.join(out[0], out[1]), gl.join(out[2], out[3]))
        tile = pairs.permute((0, 1, 3, 5, 2, 4)).reshape([PARTS, ROWS, 64])
    else:
        p01 = gl.join(gl.join(out[0], out[1]), gl.join(out[2], out[3]))
        p23 = gl.join(gl.join(out[4], out[5]), gl.join(out[6], out[7]))
        tile = gl.join(p01, p23).permute((0, 1, 3, 6, 5, 2, 4)).reshape([PARTS, ROWS, 128])
    return tile.to(gl.bfloat16, bitcast=True)


@gluon.jit
def renumber(x, EACH: gl.constexpr):
    """Bring x [parts, rows, 4, EACH] into the column order of `unpack`: [parts, rows, 4 EACH]."""
    PARTS: gl.constexpr = x.shape[0]
    ROWS: gl.constexpr = x.shape[1]
    if EACH == 32:
        y = x.reshape([PARTS, ROWS, 4, 4, 2, 2, 2]).permute((0, 1, 3, 5, 6, 2, 4))
    else:
        y = x.reshape([PARTS, ROWS, 4, 4, 2, 2]).permute((0, 1, 3, 5, 2, 4))
    return y.reshape([PARTS, ROWS, 4 * EACH])


@gluon.jit
def _scales(s_ptr, rows, step, live, S_ROW, L: gl.constexpr, H: gl.constexpr, G: gl.constexpr, EACH: gl.constexpr):
    """Load the scales of one step for `rows`: [parts, rows, 4, 2] where two groups fall to a thread, else [parts, rows, 4]."""
    if G < EACH:
        L4: gl.constexpr = gl.SliceLayout(4, H)
        L3: gl.constexpr = gl.SliceLayout(3, L4)
    else:
        L3: gl.constexpr = gl.SliceLayout(3, L)
    part = gl.arange(0, L.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None, None]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, None, :]
    row = gl.convert_layout(rows, gl.SliceLayout(0, gl.SliceLayout(2, L3)), assert_trivial=True)[None, :, None]
    offsets = row.to(gl.int64) * S_ROW + ((step + part) * (4 * EACH) + t * EACH) // G
    if G < EACH:
        h = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L4))))[None, None, None, :]
        s = gl.load(s_ptr + (offsets[:, :, :, None] + h), mask=(offsets[:, :, :, None] >= 0) & live, other=0)
    else:
        s = gl.load(s_ptr + offsets, mask=(offsets >= 0) & live, other=0)
    return s


@gluon.jit
def _spread(s, L: gl.constexpr, H: gl.constexpr):
    """Repeat values of groups for the words [parts, rows, 4, 4] of a step."""
    if len(s.shape) == 4:
        zeros = gl.zeros([s.shape[0], s.shape[1], 4, 2, 2], s.dtype, layout=H)
        wide = (s[:, :, :, :, None] + zeros).reshape([s.shape[0], s.shape[1], 4, 4])
        wide = gl.convert_layout(wide, L, assert_trivial=True)
    else:
        wide = s[:, :, :, None]
    return wide


@gluon.jit
def finish(acc, n, m, post_ptr, bias_ptr, y_ptr, M, N, POST: gl.constexpr, FACTOR: gl.constexpr, BIAS: gl.constexpr):
    """Scale acc [N tile, M tile], add the bias and store it transposed. `n` [tile, 1], `m` [1, tile]."""
    if POST == "one":
        acc = acc * (gl.load(post_ptr).to(gl.float32) * FACTOR)
    if POST == "rows":
        acc = acc * gl.load(post_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    if BIAS:
        acc = acc + gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
    gl.store(y_ptr + (m.to(gl.int64) * N + n), acc.to(gl.bfloat16), mask=(n < N) & (m < M))


@gluon.jit
def combine(
    acc,
    tile,
    slot,
    split,
    post_ptr,
    bias_ptr,
    y_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    POST: gl.constexpr,
    FACTOR: gl.constexpr,
    BIAS: gl.constexpr,
    SPLITS: gl.constexpr,
):
    """Finish a tile; where K is split, only the program that arrives last does, after adding all parts in order.

    `slot` numbers the tiles of a launch: its sums and its lock.
    """
    MMA: gl.constexpr = acc.type.layout
    BN: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    inner = gl.arange(0, BN, layout=gl.SliceLayout(1, MMA))[:, None]
    m = gl.arange(0, BM, layout=gl.SliceLayout(0, MMA))[None, :]
    n = tile * BN + inner
    if SPLITS == 1:
        finish(acc, n, m, post_ptr, bias_ptr, y_ptr, M, N, POST, FACTOR, BIAS)
    else:
        cell = inner * BM + m
        base = part_ptr + slot.to(gl.int64) * (SPLITS * BN * BM)
        gl.store(base + split * (BN * BM) + cell, acc)
        gl.thread_barrier()
        arrived = gl.atomic_add(lock_ptr + slot, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            total = gl.zeros([BN, BM], gl.float32, layout=MMA)
            for i in gl.static_range(SPLITS):
                total += gl.load(base + i * (BN * BM) + cell, cache_modifier=".cg")
            gl.store(lock_ptr + slot, 0)
            finish(total, n, m, post_ptr, bias_ptr, y_ptr, M, N, POST, FACTOR, BIAS)


@gluon.jit
def _words(w_ptr, rows, step, live, W_ROW, L: gl.constexpr):
    L3: gl.constexpr = gl.SliceLayout(3, L)
    part = gl.arange(0, L.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None, None, None]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, None, :, None]
    i = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    row = rows[None, :, None, None].to(gl.int64)
    offsets = row * W_ROW + (part * 16 + t * 4 + i)
    return gl.load((w_ptr + step * 16) + offsets, mask=(row >= 0) & live, other=0, eviction_policy="evict_first")


@gluon.jit
def inputs(x_ptr, step, live, M, K, L: gl.constexpr):
    """Start the load of one step of x: [parts, rows, 4, columns of a thread]."""
    L3: gl.constexpr = gl.SliceLayout(3, L)
    EACH: gl.constexpr = L.shape[3]
    part = gl.arange(0, L.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None, None, None]
    m = gl.arange(0, L.shape[1], layout=gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :, None, None]
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, None, :, None]
    e = gl.arange(0, EACH, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    offsets = m.to(gl.int64) * K + (part * (4 * EACH) + t * EACH + e)
    return gl.load((x_ptr + step * (4 * EACH)) + offsets, mask=(m < M) & live, other=0.0)


@gluon.jit
def fetch(
    w_ptr,
    s_ptr,
    z_ptr,
    rows,
    s_rows,
    acc_rows,
    step,
    last,
    W_ROW,
    S_ROW,
    L: gl.constexpr,
    H: gl.constexpr,
    KIND: gl.constexpr,
    WHERE: gl.constexpr,
    G: gl.constexpr,
    EACH: gl.constexpr,
    MMA: gl.constexpr,
):
    """Start the loads of one step: (words, scales, zero points); what the format has not is the words again."""
    live = step < last
    w = _words(w_ptr, rows, step, live, W_ROW, L)
    s, z = w, w
    if WHERE == "weights":
        s = _scales(s_ptr, s_rows, step, live, S_ROW, L, H, G, EACH)
    if WHERE == "sums":
        part = gl.arange(0, L.shape[0], layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None]
        row = acc_rows[None, :]
        s = gl.load(s_ptr + (row * S_ROW + (step + part) // (G // (4 * EACH))), mask=(row >= 0) & live, other=0)
    if KIND == "u4":
        z = _scales(z_ptr, s_rows, step, live, S_ROW, L, H, G, EACH)
    return w, s, z


@gluon.jit
def operand(
    fetched,
    MMA: gl.constexpr,
    L: gl.constexpr,
    H: gl.constexpr,
    KIND: gl.constexpr,
    SCALE: gl.constexpr,
    WHERE: gl.constexpr,
):
    """Return the A operand of one step: the fetched words as bf16 values."""
    w, s, z = fetched
    one, two, zero = w, w, w
    if WHERE == "weights":
        one, two = scale_operands(s, SCALE)
        one, two = _spread(one, L, H), _spread(two, L, H)
    if KIND == "u4":
        bits = z.to(gl.int32)
        zero = _spread((bits | (bits << 16)) | 0x43004300, L, H)
    a = unpack(w, one, two, zero, KIND, SCALE if WHERE == "weights" else "none")
    if len(MMA.warps_per_cta) == 2:
        a = a.reshape([a.shape[1], a.shape[2]])
    return gl.convert_layout(a, gl.DotOperandLayout(0, MMA, 2), assert_trivial=True)


@gluon.jit
def _multiply(
    fetched, x, acc, L: gl.constexpr, H: gl.constexpr, KIND: gl.constexpr, SCALE: gl.constexpr, WHERE: gl.constexpr,
    EACH: gl.constexpr,
):  # fmt: skip
    """Add one step to the sums: the fetched words times x."""
    MMA: gl.constexpr = acc.type.layout
    a = operand(fetched, MMA, L, H, KIND, SCALE, WHERE)
    x = renumber(x, EACH).permute((0, 2, 1))
    b = gl.convert_layout(x, gl.DotOperandLayout(1, MMA, 2), assert_trivial=True)
    if WHERE == "sums":
        part = mma_v2(a, b, gl.zeros(acc.shape, gl.float32, layout=MMA))
        acc = acc + part * fetched[1].to(gl.float32)[:, :, None]
    else:
        acc = mma_v2(a, b, acc)
    return acc


@gluon.jit(do_not_specialize=["M", "steps"])
def narrow(
    x_ptr,
    w_ptr,
    s_ptr,
    z_ptr,
    post_ptr,
    bias_ptr,
    y_ptr,
    part_ptr,
    lock_ptr,
    M,
    N,
    K,
    W_ROW,
    S_ROW,
    steps,
    KIND: gl.constexpr,
    SCALE: gl.constexpr,
    G: gl.constexpr,
    S_ROWS: gl.constexpr,
    EACH: gl.constexpr,
    POST: gl.constexpr,
    FACTOR: gl.constexpr,
    BIAS: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    SPLITS: gl.constexpr,
    PARTS: gl.constexpr,
    WARPS: gl.constexpr,
):
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [PARTS, WARPS // PARTS, 1], [1, 16, 8])
    L: gl.constexpr = word_layout(PARTS, BN, WARPS)
    H: gl.constexpr = word_layout(PARTS, BN, WARPS, True)
    X: gl.constexpr = x_layout(PARTS, BM, EACH, WARPS)
    WHERE: gl.constexpr = where_scaled(SCALE, G, EACH)
    tile, split = gl.program_id(0), gl.program_id(1)
    rows = tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    rows = gl.minimum(rows, N - 1)
    s_rows = rows // S_ROWS
    acc_rows = tile * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))
    acc_rows = (gl.minimum(acc_rows, N - 1) // S_ROWS).to(gl.int64)
    first = split * (steps // PARTS) // SPLITS * PARTS
    last = (split + 1) * (steps // PARTS) // SPLITS * PARTS
    acc = gl.zeros([PARTS, BN, BM], gl.float32, layout=MMA)
    b0 = fetch(w_ptr, s_ptr, z_ptr, rows, s_rows, acc_rows, first, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA)
    b1 = fetch(w_ptr, s_ptr, z_ptr, rows, s_rows, acc_rows, first + PARTS, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA)
    x0 = inputs(x_ptr, first, first < last, M, K, X)
    for step in range(first, last, 2 * PARTS):  # unrolled, so that no register is moved while its load is under way
        x1 = inputs(x_ptr, step + PARTS, step + PARTS < last, M, K, X)
        acc = _multiply(b0, x0, acc, L, H, KIND, SCALE, WHERE, EACH)
        b0 = fetch(
            w_ptr, s_ptr, z_ptr, rows, s_rows, acc_rows, step + 2 * PARTS, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA
        )
        x0 = inputs(x_ptr, step + 2 * PARTS, step + 2 * PARTS < last, M, K, X)
        acc = _multiply(b1, x1, acc, L, H, KIND, SCALE, WHERE, EACH)
        b1 = fetch(
            w_ptr, s_ptr, z_ptr, rows, s_rows, acc_rows, step + 3 * PARTS, last, W_ROW, S_ROW, L, H, KIND, WHERE, G, EACH, MMA
        )
    total = gl.sum(acc, axis=0)
    combine(total, tile, tile, split, post_ptr, bias_ptr, y_ptr, part_ptr, lock_ptr, M, N, POST, FACTOR, BIAS, SPLITS)
