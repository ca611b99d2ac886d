"""y = x · Wᵀ for up to 16 rows of x and q4 weights on NVIDIA's chips, in Gluon: each thread's own words are matrix operands.

An mma of 16 output features, 16 input features and 8 tokens takes both operands from registers. Which input features it calls
its first and which its last is free, as long as both operands agree, and so is the order of output features. So of 32 input
features of a tile, four chunks, thread 4 g + t of a warp has the words of chunk t of the rows 2 g and 2 g + 1, 8 bytes that lie
side by side, and the same 8 input features of token g. Two mma want exactly these of it: nothing changes threads or passes
through shared memory but the sums of the warps, which share the input features, at the end.

Levels and x are exact; the scale multiplies the sum of a group.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import CachePolicy

from llmpack_kernels.decode import KEPT, LEVELS_0, LEVELS_4, LEVELS_8, LEVELS_12
from llmpack_kernels.matmul import saturate
from llmpack_kernels.overlap import begin

STREAM = gl.constexpr(CachePolicy(l1="no_allocate"))  # words are read once: the first-level cache is for x
# For `kept`, with two of the table's words: four times 0x64; 1; what picks the upper half.
EXPONENTS, ONE, UPPER = (gl.constexpr(v) for v in (0x64646464, 1, 0x0100))


@gluon.constexpr_function
def multiply(outputs, inputs):
    """PTX that adds one unit, 32 or 64 input features of a tile, to a thread's sums, 4 for each 8 tokens.

    In: the sums; what `kept` gives of its five constants; the scales of the two rows; for each 32 input features the two words;
    for each of those and each 8 tokens 8 input features of x.

    Bytes are picked as in decode.py. Where the pipe of additions and logic would limit, it is the one of multiplications that
    shifts (dp2a) and joins (mad).
    """
    (sums,) = outputs
    (_, (low,), (high,), (exponents,), (one,), (upper,), (scale,), *operands) = inputs
    parts = len(sums) // 4
    steps = len(operands) // (1 + parts)
    words, x = operands[:steps], operands[steps:]
    text = [
        "{ .reg .b32 w<2>, f, l, h, z, a<8>, b<4>; .reg .f32 s<2>, c<8>; .reg .b16 t<2>;",
        f"mov.b32 z, 0x64406440; mov.b32 {{t0, t1}}, {scale}; cvt.f32.f16 s0, t0; cvt.f32.f16 s1, t1;",
    ]
    for step in range(steps):
        text.append(f"mov.b64 {{w0, w1}}, {words[step][0]};")
        for row in range(2):
            w = f"w{row}"
            text.append(f"xor.b32 f, {w}, 0x88888888;")
            for half in range(2):
                if half:
                    text.append(f"dp2a.lo.u32.u32 {w}, {w}, {upper}, 0; dp2a.lo.u32.u32 f, f, {upper}, 0;")
                # A table gives 0 for the nibbles of the other.
                text.append(f"prmt.b32 l, {low}, {LEVELS_4.value}, {w}; prmt.b32 h, {high}, {LEVELS_12.value}, f;")
                text.append(f"mad.lo.u32 l, l, {one}, h;")
                # Input features 0 1 and 4 5, then 2 3 and 6 7: a byte below 0x64 is the float16 1088 + level.
                for odd in range(2):
                    a = f"a{4 * odd + 2 * half + row}"
                    text.append(f"prmt.b32 {a}, l, {exponents}, {0x4341 if odd else 0x4240}; sub.f16x2 {a}, {a}, z;")
        for part in range(parts):
            first, second = x[step * parts + part]
            text.append(f"mov.b64 {{b0, b1}}, {first}; mov.b64 {{b2, b3}}, {second};")
            c = [f"c{4 * part + i}" for i in range(4)]
            for odd in range(2):
                a = ", ".join(f"a{4 * odd + i}" for i in range(4))
                before = c if step or odd else ["0f00000000"] * 4
                text.append(
                    f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{', '.join(c)}}}, {{{a}}},"
                    f" {{b{2 * odd}, b{2 * odd + 1}}}, {{{', '.join(before)}}};"
                )
    text.extend(f"fma.rn.f32 {total}, c{i}, s{i % 4 // 2}, {total};" for i, total in enumerate(sums))
    return "\n".join([*text, "}"])


@gluon.constexpr_function
def _kinds(num_sums, num_words_and_x):
    """Constraints of `multiply`."""
    return ",".join([*["=f"] * num_sums, *map(str, range(num_sums)), *["r"] * 6, *["l"] * num_words_and_x])


@gluon.jit
def kept(num_rows, zero, value: gl.constexpr):
    """Return a 32-bit pattern by KEPT, in the layout of `zero`."""
    return gl.inline_asm_elementwise(
        KEPT, "=r,r,r", [zero + num_rows, zero + value], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unit_of(warp, turn, IS_LAST: gl.constexpr, COUNT: gl.constexpr):
    """Return the unit of each warp at a turn; at one beyond the end any that is there."""
    unit = warp + turn * gl.num_warps()
    if IS_LAST:
        unit = gl.minimum(unit, COUNT - 1)
    return unit


@gluon.jit
def _words(words, scales, unit, K: gl.constexpr, GROUP: gl.constexpr, UNIT: gl.constexpr, TILES: gl.constexpr):
    """Ask for a thread's scales and words of a unit, for each tile."""
    found = ()
    for t in gl.static_range(TILES):
        found = found + (gl.load(scales + (t * (K // GROUP) + unit * UNIT // GROUP) * 8),)
        for step in gl.static_range(UNIT // 32):
            found = found + (gl.load(words + (t * K + unit * UNIT + step * 32), cache_policy=STREAM),)
    return found


@gluon.jit
def _tokens(quads, unit, UNIT: gl.constexpr, PARTS: gl.constexpr):
    """Ask for a thread's x of a unit."""
    found = ()
    for step in gl.static_range(UNIT // 32):
        for part in gl.static_range(PARTS):
            found = found + (gl.load(quads[part] + (unit * (UNIT // 4) + step * 8)[:, None]),)
    return found


@gluon.jit
def _add(sums, lasting, stages, first: gl.constexpr, is_there, tokens, STEPS: gl.constexpr, PARTS: gl.constexpr,
         TILES: gl.constexpr):  # fmt: skip
    """Add a unit, stages[first:], to the sums; is_there None: it is."""
    KINDS: gl.constexpr = _kinds(4 * PARTS, STEPS * (1 + 2 * PARTS))
    result = ()
    for t in gl.static_range(TILES):
        scale = stages[first + t * (1 + STEPS)]
        if is_there is not None:
            scale = gl.where(is_there, scale, 0)
        inputs = (sums[t],) + lasting + (scale,)
        for step in gl.static_range(STEPS):
            inputs = inputs + (stages[first + t * (1 + STEPS) + 1 + step],)
        result = result + (gl.inline_asm(multiply, KINDS, inputs + tokens, sums[t].type, is_pure=True),)
    return result


@gluon.jit
def matmul_q4(
    x,
    weight,
    scales,
    y,
    num_rows,
    K: gl.constexpr,
    N: gl.constexpr,
    GROUP: gl.constexpr,
    TOKENS: gl.constexpr,
    TILES: gl.constexpr,
    DEPTH: gl.constexpr,
):
    """Like `matmul.matmul_rows` for at most TOKENS rows, 8 or 16. A program per TILES tiles, of which there are as many.

    A warp's units, of at most a group, are DEPTH turns ahead in its registers, x one.
    """
    WARPS: gl.constexpr = gl.num_warps()
    PARTS: gl.constexpr = TOKENS // 8
    SUMS: gl.constexpr = 4 * PARTS
    UNIT: gl.constexpr = min(GROUP, 64)
    STEPS: gl.constexpr = UNIT // 32
    COUNT: gl.constexpr = K // UNIT
    TURNS: gl.constexpr = (COUNT + WARPS - 1) // WARPS
    LOOPS: gl.constexpr = (TURNS + DEPTH - 1) // DEPTH - 1
    STAGE: gl.constexpr = TILES * (1 + STEPS)
    X: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    S: gl.constexpr = gl.BlockedLayout([1, SUMS], [32, 1], [WARPS, 1], [1, 0])
    begin()
    thread = gl.arange(0, 32 * WARPS, gl.SliceLayout(1, X))
    g, t, warp = thread % 32 // 4, thread % 4, thread // 32
    # The last program's tiles are the last ones, some of them another's, too.
    tile = gl.minimum(gl.program_id(0) * TILES, (N + 15) // 16 - TILES)
    words = weight.to(gl.pointer_type(gl.int64), bitcast=True) + tile.to(gl.int64) * K + (t * 8 + g)
    pairs = scales.to(gl.pointer_type(gl.int32), bitcast=True) + tile * (K // GROUP * 8) + g
    quad = (t * 2)[:, None] + gl.arange(0, 2, gl.SliceLayout(0, X))[None, :]
    quads = ()
    for part in gl.static_range(PARTS):
        # For tokens that are not there the first one, once more: nobody reads their sums.
        token = gl.where(g + 8 * part < num_rows, g + 8 * part, 0)
        quads = quads + (x.to(gl.pointer_type(gl.int64), bitcast=True) + quad + (token * (K // 4))[:, None],)
    zero = gl.full([32 * WARPS], 0, gl.int32, gl.SliceLayout(1, X))
    lasting = (kept(num_rows, zero, LEVELS_0), kept(num_rows, zero, LEVELS_8), kept(num_rows, zero, EXPONENTS))
    lasting = lasting + (kept(num_rows, zero, ONE), kept(num_rows, zero, UPPER))
    sums = ()
    for _ in gl.static_range(TILES):
        sums = sums + (gl.zeros([32 * WARPS, SUMS], gl.float32, S),)
    stages = ()
    for j in gl.static_range(DEPTH):
        stages = stages + _words(words, pairs, _unit_of(warp, j, j + 1 >= TURNS, COUNT), K, GROUP, UNIT, TILES)
    tokens = _tokens(quads, _unit_of(warp, 0, TURNS == 1, COUNT), UNIT, PARTS)
    for i in range(0, LOOPS):
        for j in gl.static_range(DEPTH):
            turn = i * DEPTH + j
            unit = _unit_of(warp, turn + 1, LOOPS * DEPTH + 1 == TURNS, COUNT)
            following = _tokens(quads, unit, UNIT, PARTS)
            sums = _add(sums, lasting, stages, 0, None, tokens, STEPS, PARTS, TILES)
            tokens = following
            rest = ()
            for k in gl.static_range(STAGE, DEPTH * STAGE):
                rest = rest + (stages[k],)
            unit = _unit_of(warp, turn + DEPTH, (LOOPS + 1) * DEPTH * WARPS > COUNT, COUNT)
            stages = rest + _words(words, pairs, unit, K, GROUP, UNIT, TILES)
    for j in gl.static_range(TURNS - LOOPS * DEPTH):
        following = tokens
        if LOOPS * DEPTH + j + 1 < TURNS:
            unit = _unit_of(warp, LOOPS * DEPTH + j + 1, LOOPS * DEPTH + j + 2 == TURNS, COUNT)
            following = _tokens(quads, unit, UNIT, PARTS)
        is_there = None
        if (LOOPS * DEPTH + j + 1) * WARPS > COUNT:
            is_there = warp < COUNT - (LOOPS * DEPTH + j) * WARPS
        sums = _add(sums, lasting, stages, j * STAGE, is_there, tokens, STEPS, PARTS, TILES)
        tokens = following
    WIDTH: gl.constexpr = TILES * 16
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    buffer = gl.allocate_shared_memory(gl.float32, [WARPS, TOKENS, WIDTH], plain)
    for n in gl.static_range(TILES):
        of_warps = sums[n].reshape([WARPS, 8, 4, PARTS, 2, 2])  # g, t, 8 tokens, feature of two, token of two
        of_warps = of_warps.permute([0, 3, 2, 5, 1, 4]).reshape([WARPS, TOKENS, 16])
        buffer.slice(n * 16, 16, dim=2).store(of_warps)
    Y: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
    total = gl.sum(buffer.reshape((WARPS, TOKENS * WIDTH)).load(Y), 0)
    place = gl.arange(0, TOKENS * WIDTH, gl.SliceLayout(0, Y))
    token, feature = place // WIDTH, tile * 16 + place % WIDTH
    gl.store(y + token * N + feature, saturate(total, y), mask=(token < num_rows) & (feature < N))
