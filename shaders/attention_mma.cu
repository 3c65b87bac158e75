// Attention on the matrix units of NVIDIA GPUs from compute capability 8.0 on, as FlashAttention-2 (arXiv:2307.08691) cuts it: scores
// and sums stay in registers, in the layout in which `mma` leaves and takes them.
//
// A workgroup owns OWNED lines, 16 a warp, and walks over WALKED others at a time: queries over keys forward and for dQ, keys over
// queries for dK and dV. So every sum has one owner and one order, or one for each of the splits whose sums are added up in their
// order. Lines of queries are those of HEADS query heads that share a key head, token by token; the mask's table is that of `mask.rs`.
// Walked lines are copied a step ahead.
//
// Or else the four warps of a workgroup have their products together (`wgmma`, of compute capability 9.0, as in FlashAttention-3,
// arXiv:2407.08608): what is staged goes into these as it lies, once for all four, where for `mma` each loads it into registers.
//
// Set by `kernel/cuda/mma.rs`: OWNED, 64, and WALKED, a multiple of 16; HEAD_DIM, 64 or 128; HEADS, a power of two up to 8; BF16
// or else f16; one of FORWARD, QUERIES and KEYS; IN_SPLITS, whether the keys' gradients are those of splits, in f32; WARPGROUP, whether
// warps multiply as one, and for these SCORES_… and SUMS_…, which name the operands of their two products; WORKGROUPS, how many are to
// fit a processor.
//
// Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". A thread has rows `lane / 4` and 8 below it, of
// each 8 columns those of `lane % 4 * 2` and the next. Those of `wgmma` are the same in each of its warps; what it reads of workgroup
// memory has the 128-byte swizzle of "Asynchronous Warpgroup Level Matrix Instructions".

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define THREADS (OWNED / 16 * 32)
// Of a line: bytes, pieces of 16 bytes, and products along it.
#define LINE_BYTES (HEAD_DIM * 2)
#define PIECES (HEAD_DIM / 8)
#define DEPTH_STEPS (HEAD_DIM / 16)
#define STRIP 8
#define MASKED -1e30f
#define LOG2_E 1.4426950408889634f

#if BF16
#define TYPE "bf16"
#else
#define TYPE "f16"
#endif

// first, prefix_end, own_start, end.
typedef uint4 Visible;

struct Sizes {
    u32 n_queries, n_keys, n_seen, heads, kv_heads;
    float scale;
};

// Rows and 8 columns each of `mma`'s result.
template <int N> struct Sums {
    float at[N][4];

    __device__ void clear() {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) at[n][i] = 0.0f;
        }
    }
};

__device__ u32 shared_address(const void *at) { return (u32)__cvta_generic_to_shared(at); }

// Where the first room begins: at a multiple of the swizzle's pattern, where that is the hardware's.
__device__ u32 aligned(const void *at) { return WARPGROUP ? (shared_address(at) + 1023) & ~1023u : shared_address(at); }

__device__ void load_matrices(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

__device__ void load_turned(u32 (&to)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

__device__ void multiply(float (&sums)[4], const u32 (&left)[4], u32 right_0, u32 right_1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right_0), "r"(right_1));
}

__device__ u32 pair(float first, float second) {
    u32 both;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// Where a piece of one of LINES staged lines lies: neighbours of a column are in banks of their own. For whole warpgroups rows are of 64
// entries, those of all lines behind each other. PITCH is from a piece to that of the next line, but for the bank.
#if WARPGROUP
#define PITCH 128
template <u32 LINES> __device__ u32 piece(u32 line, u32 i) {
    return (i / 8 * LINES + line) * PITCH + ((i % 8 ^ (line & 7)) << 4);
}
#else
#define PITCH LINE_BYTES
template <u32 LINES> __device__ u32 piece(u32 line, u32 i) { return line * PITCH + ((i ^ (line & 7)) << 4); }
#endif

// Lines of one tensor: of `per_token` heads from one on, token by token.
struct Lines {
    const u16 *first;
    u32 token, per_token, n_lines;

    __device__ u32 start(u32 line) const { return line / per_token * token + line % per_token * HEAD_DIM; }
};

// The lines of HEADS query heads from `head` on.
__device__ Lines query_lines(const u16 *tensor, const Sizes &sizes, u32 head) {
    return {tensor + head * HEAD_DIM, sizes.heads * HEAD_DIM, HEADS, sizes.n_queries * HEADS};
}

// The lines of one key head.
__device__ Lines key_lines(const u16 *tensor, const Sizes &sizes, u32 kv_head) {
    return {tensor + kv_head * HEAD_DIM, sizes.kv_heads * HEAD_DIM, 1, sizes.n_keys};
}

// Begins to copy lines; those past the end are the last one. A thread's pieces lie in one column of the lines, as many lines apart as the
// swizzle's pattern has, or a multiple.
template <u32 N> __device__ void copy(u32 to, const Lines &lines, u32 first) {
    const u32 line = threadIdx.x / PIECES, i = threadIdx.x % PIECES;
    const u32 own = to + piece<N>(line, i);
#pragma unroll
    for (u32 apart = 0; apart < N; apart += THREADS / PIECES) {
        const u16 *from = lines.first + lines.start(min(first + line + apart, lines.n_lines - 1)) + i * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(own + apart * PITCH), "l"(from) : "memory");
    }
}

__device__ void copied() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING> __device__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#if WARPGROUP
    // What threads wrote, for products that read past them.
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Of weights as a product's sums have them, those of 16 walked lines as a left operand.
__device__ void pack(u32 (&to)[4], const Sums<WALKED / 8> &weights, u32 k) {
    const float(&a)[4] = weights.at[2 * k], (&b)[4] = weights.at[2 * k + 1];
    to[0] = pair(a[0], a[1]), to[1] = pair(a[2], a[3]), to[2] = pair(b[0], b[1]), to[3] = pair(b[2], b[3]);
}

#if WARPGROUP
// Of a matrix of 64 lines or entries in rows of 128 bytes: where it begins, and bytes between its neighbours of 8 rows (`stride`) and of 64
// entries (`leading`).
__device__ u64 descriptor(u32 address, u64 leading, u64 stride) {
    const u64 swizzle_128 = 1ull << 62;
    return swizzle_128 | (stride >> 4) << 32 | (leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// sums = left · rightᵀ, 64 lines and WALKED along 16 entries, added to what they are where `adds`.
__device__ void multiply_lines(Sums<WALKED / 8> &sums, u64 left, u64 right, u32 adds) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, " SCORES_ADDS ", 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" SCORES_COLUMNS "k16.f32." TYPE "." TYPE " " SCORES_REGISTERS ", " SCORES_LEFT ", " SCORES_RIGHT
        ", adds, 1, 1, 0, 0;\n"
        "}\n" : SCORES_OPERANDS : "l"(left), "l"(right), "r"(adds));
}

// sums += left · right, 64 lines of 16 weights and HEAD_DIM entries of 16 lines.
__device__ void multiply_weights(Sums<HEAD_DIM / 8> &sums, const u32 (&left)[4], u64 right) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.eq.b32 adds, 0, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" SUMS_COLUMNS "k16.f32." TYPE "." TYPE " " SUMS_REGISTERS ", " SUMS_LEFT ", " SUMS_RIGHT
        ", adds, 1, 1, 1;\n"
        "}\n" : SUMS_OPERANDS : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));
}

// No compiler may move what writes or reads the sums across this.
template <int N> __device__ void pin(Sums<N> &sums) {
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : "+f"(sums.at[n][i])::"memory");
    }
}

// Before products of registers that were written meanwhile, and behind the last of them.
__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits for all that was begun, but for the last PENDING, these sums among it.
template <int PENDING, int N> __device__ void finish(Sums<N> &sums) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
    pin(sums);
}

// Begins products[64, WALKED] = owned · walkedᵀ, of which a warp has its 16 owned lines.
__device__ void products(Sums<WALKED / 8> &sums, u32 owned, u32, u32 walked) {
    begin_products();
#pragma unroll
    for (u32 step = 0; step < DEPTH_STEPS; step++) {
        const u32 row = step / 4, entry = step % 4 * 32;
        multiply_lines(sums, descriptor(owned + row * OWNED * 128 + entry, 16, 1024),
                       descriptor(walked + row * WALKED * 128 + entry, 16, 1024), step);
    }
    end_products();
}

// Begins sums[64, HEAD_DIM] += weights[64, WALKED] · walked.
__device__ void accumulate(Sums<HEAD_DIM / 8> &sums, const Sums<WALKED / 8> &weights, u32 walked) {
    u32 left[WALKED / 16][4];
#pragma unroll
    for (u32 k = 0; k < WALKED / 16; k++) {
        pack(left[k], weights, k);
#pragma unroll
        for (u32 i = 0; i < 4; i++) asm volatile("" : "+r"(left[k][i])::"memory");
    }
    pin(sums);
    begin_products();
#pragma unroll
    for (u32 k = 0; k < WALKED / 16; k++) {
        multiply_weights(sums, left[k], descriptor(walked + k * 16 * 128, WALKED * 128, 1024));
    }
    end_products();
}
#else
template <int, int N> __device__ void finish(Sums<N> &) {}

// The part of a left operand of 16 lines from `line` on and 16 entries.
__device__ void load_left(u32 (&to)[4], u32 lines, u32 line, u32 step) {
    const u32 lane = threadIdx.x % 32;
    load_matrices(to, lines + piece<OWNED>(line + lane % 16, 2 * step + lane / 16));
}

// Of 16 lines from `line` on, as columns of a right operand: entries along the depth.
__device__ void load_right(u32 (&to)[4], u32 lines, u32 line, u32 step) {
    const u32 lane = threadIdx.x % 32;
    load_matrices(to, lines + piece<WALKED>(line + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
}

// Of 16 lines from `line` on, as the depth of a right operand: 16 of their entries as columns.
__device__ void load_right_turned(u32 (&to)[4], u32 lines, u32 line, u32 step) {
    const u32 lane = threadIdx.x % 32;
    load_turned(to, lines + piece<WALKED>(line + lane % 16, 2 * step + lane / 16));
}

// products[16, WALKED] = owned · walkedᵀ, of the warp's 16 owned lines.
__device__ void products(Sums<WALKED / 8> &sums, u32 owned, u32 owned_line, u32 walked) {
    sums.clear();
#pragma unroll
    for (u32 step = 0; step < DEPTH_STEPS; step++) {
        u32 left[4];
        load_left(left, owned, owned_line, step);
#pragma unroll
        for (u32 n = 0; n < WALKED / 16; n++) {
            u32 right[4];
            load_right(right, walked, 16 * n, step);
            multiply(sums.at[2 * n], left, right[0], right[1]);
            multiply(sums.at[2 * n + 1], left, right[2], right[3]);
        }
    }
}

// sums[16, HEAD_DIM] += weights[16, WALKED] · walked
__device__ void accumulate(Sums<HEAD_DIM / 8> &sums, const Sums<WALKED / 8> &weights, u32 walked) {
#pragma unroll
    for (u32 k = 0; k < WALKED / 16; k++) {
        u32 left[4];
        pack(left, weights, k);
#pragma unroll
        for (u32 n = 0; n < DEPTH_STEPS; n++) {
            u32 right[4];
            load_right_turned(right, walked, 16 * k, n);
            multiply(sums.at[2 * n], left, right[0], right[1]);
            multiply(sums.at[2 * n + 1], left, right[2], right[3]);
        }
    }
}
#endif

// The keys that any and that all of some neighbouring queries see; `bounds.rs`.
struct Bounds {
    Visible any, all;

    __device__ Bounds(const Visible *mask, u32 n_queries, u32 first, u32 last) {
        const Visible *strips = mask + n_queries;
        any = strips[first / STRIP * 2], all = strips[first / STRIP * 2 + 1];
        for (u32 i = first / STRIP + 1; i <= last / STRIP; i++) {
            const Visible more = strips[2 * i], less = strips[2 * i + 1];
            any = {min(any.x, more.x), max(any.y, more.y), min(any.z, more.z), max(any.w, more.w)};
            all = {max(all.x, less.x), min(all.y, less.y), max(all.z, less.z), min(all.w, less.w)};
        }
    }

    // The first key from `key` on that any of the queries may see.
    __device__ u32 next(u32 key) const { return key >= any.y && key < any.z ? any.z : key; }

    __device__ bool any_sees(u32 first, u32 end) const {
        return !(end <= any.x || first >= any.w || (first >= any.y && end <= any.z));
    }

    __device__ bool all_see(u32 first, u32 end) const {
        return (first >= all.x && end <= all.y) || (first >= all.z && end <= all.w);
    }
};

// Without a branch: it is asked for each of a thread's scores.
__device__ bool sees(const Visible &visible, u32 key) {
    return (key - visible.x < visible.y - visible.x) | (key - visible.z < visible.w - visible.z);
}

// 2 to this, and 0 where that is less than any normal number, for which a compiler would look.
__device__ float exp2_of(float exponent) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
    return power;
}

__device__ void write_pair(u16 *to, float first, float second) { *(u32 *)to = pair(first, second); }

__device__ void write_pair(float *to, float first, float second) { *(float2 *)to = make_float2(first, second); }

// Writes the warp's 16 lines, each times its factor.
template <class Out>
__device__ void store(const Sums<HEAD_DIM / 8> &sums, const float (&factors)[2], Out *out, const Lines &lines, u32 first) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 line = first + lane / 4 + 8 * half;
        if (line < lines.n_lines) {
            Out *to = out + lines.start(line) + lane % 4 * 2;
#pragma unroll
            for (u32 n = 0; n < HEAD_DIM / 8; n++) {
                write_pair(to + 8 * n, sums.at[n][2 * half] * factors[half], sums.at[n][2 * half + 1] * factors[half]);
            }
        }
    }
}

__device__ float largest_of_row(float value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}

__device__ float sum_of_row(float value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

#if FORWARD
extern "C" __global__ void __launch_bounds__(THREADS, WORKGROUPS) attention_mma(
    const u16 *q, const u16 *k, const u16 *v, const Visible *mask, u16 *out, float *lse,
    const __grid_constant__ Sizes sizes) {
    extern __shared__ __align__(16) char memory[];
    const u32 owned = aligned(memory), walked = owned + OWNED * LINE_BYTES;
    const u32 head = blockIdx.x * HEADS, kv_head = head * sizes.kv_heads / sizes.heads;
    const Lines queries = query_lines(q, sizes, head);
    const Lines keys = key_lines(k, sizes, kv_head);
    const Lines values = key_lines(v, sizes, kv_head);
    // Later queries see more keys. Workgroups start in the order of x, then of y: the longest walks first, those of all heads.
    const u32 first = (gridDim.y - 1 - blockIdx.y) * OWNED, last = min(first + OWNED, queries.n_lines) - 1;
    const Bounds bounds(mask, sizes.n_queries, first / HEADS, last / HEADS);
    const u32 lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    const float scale = sizes.scale * LOG2_E;

    Visible visible[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        visible[half] = mask[min(first + own + lane / 4 + 8 * half, queries.n_lines - 1) / HEADS];
    }
    Sums<HEAD_DIM / 8> sums;
    sums.clear();
    float maxima[2] = {MASKED, MASKED}, totals[2] = {0.0f, 0.0f};

    // A ring of three rooms, for keys and values in turns: the next keys are copied while scores are made, over the last values, and
    // the next values while these are summed, over the keys.
    const auto room = [&](u32 turn) { return walked + turn % 3 * WALKED * LINE_BYTES; };
    u32 key = bounds.any.x, turn = 0;
    copy<OWNED>(owned, queries, first);
    copy<WALKED>(room(0), keys, key);
    copied();
    copy<WALKED>(room(1), values, key);
    copied();
    while (key < bounds.any.w) {
        const u32 next = bounds.next(key + WALKED);
        wait_for_copies<1>();
        __syncthreads();
        if (next < bounds.any.w) copy<WALKED>(room(turn + 2), keys, next);
        copied();
        Sums<WALKED / 8> scores;
        products(scores, owned, own, room(turn));
        finish<0>(scores);
        if (!bounds.all_see(key, key + WALKED)) {
#pragma unroll
            for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    if (!sees(visible[i / 2], key + 8 * n + lane % 4 * 2 + i % 2)) scores.at[n][i] = MASKED;
                }
            }
        }
        float factors[2];
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            float largest = maxima[half];
#pragma unroll
            for (u32 n = 0; n < WALKED / 8; n++) {
                largest = fmaxf(largest, fmaxf(scores.at[n][2 * half], scores.at[n][2 * half + 1]));
            }
            largest = largest_of_row(largest);
            factors[half] = exp2_of((maxima[half] - largest) * scale);
            maxima[half] = largest;
            // A row that has seen nothing yet has no largest score, and no weights.
            const float base = largest == MASKED ? 0.0f : largest * scale;
            float total = 0.0f;
#pragma unroll
            for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    float &score = scores.at[n][2 * half + c];
                    score = exp2_of(fmaf(score, scale, -base));
                    total += score;
                }
            }
            totals[half] = totals[half] * factors[half] + total;
        }
        // Most steps have no larger score than those before.
        if (__any_sync(~0u, factors[0] != 1.0f || factors[1] != 1.0f)) {
#pragma unroll
            for (u32 n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums.at[n][i] *= factors[i / 2];
            }
        }
        wait_for_copies<1>();
        __syncthreads();
        if (next < bounds.any.w) copy<WALKED>(room(turn), values, next);
        copied();
        accumulate(sums, scores, room(turn + 1));
        finish<0>(sums);
        key = next;
        turn += 2;
    }

    float factors[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const float total = sum_of_row(totals[half]);
        factors[half] = 1.0f / total;
        const u32 line = first + own + lane / 4 + 8 * half;
        if (lane % 4 == 0 && line < queries.n_lines) {
            lse[line / HEADS * sizes.heads + head + line % HEADS] = maxima[half] * sizes.scale + logf(total);
        }
    }
    store(sums, factors, out + head * HEAD_DIM, queries, first + own);
}
#endif

#if QUERIES
// `stats` has (lse, D) of every query's head.
extern "C" __global__ void __launch_bounds__(THREADS, WORKGROUPS) attention_mma(
    const u16 *dout, const u16 *q, const u16 *k, const u16 *v, const float2 *stats, const Visible *mask, u16 *dq,
    const __grid_constant__ Sizes sizes) {
    extern __shared__ __align__(16) char memory[];
    const u32 owned_q = aligned(memory), owned_dout = owned_q + OWNED * LINE_BYTES;
    const u32 walked = owned_dout + OWNED * LINE_BYTES;
    const u32 head = blockIdx.x * HEADS, kv_head = head * sizes.kv_heads / sizes.heads;
    const Lines queries = query_lines(q, sizes, head);
    const Lines douts = query_lines(dout, sizes, head);
    const Lines keys = key_lines(k, sizes, kv_head);
    const Lines values = key_lines(v, sizes, kv_head);
    const u32 first = (gridDim.y - 1 - blockIdx.y) * OWNED, last = min(first + OWNED, queries.n_lines) - 1;
    const Bounds bounds(mask, sizes.n_queries, first / HEADS, last / HEADS);
    const u32 lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    const float scale = sizes.scale * LOG2_E;

    Visible visible[2];
    float2 own_stats[2];
#pragma unroll
    for (u32 half = 0; half < 2; half++) {
        const u32 line = min(first + own + lane / 4 + 8 * half, queries.n_lines - 1);
        visible[half] = mask[line / HEADS];
        own_stats[half] = stats[line / HEADS * sizes.heads + head + line % HEADS];
    }
    Sums<HEAD_DIM / 8> sums;
    sums.clear();

    u32 key = bounds.any.x, turn = 0;
    copy<OWNED>(owned_q, queries, first);
    copy<OWNED>(owned_dout, douts, first);
    copy<WALKED>(walked, keys, key);
    copy<WALKED>(walked + 2 * WALKED * LINE_BYTES, values, key);
    copied();
    while (key < bounds.any.w) {
        const u32 k_room = walked + turn * WALKED * LINE_BYTES, v_room = k_room + 2 * WALKED * LINE_BYTES;
        const u32 next = bounds.next(key + WALKED);
        wait_for_copies<0>();
        __syncthreads();
        if (next < bounds.any.w) {
            copy<WALKED>(walked + (turn ^ 1) * WALKED * LINE_BYTES, keys, next);
            copy<WALKED>(walked + (2 + (turn ^ 1)) * WALKED * LINE_BYTES, values, next);
        }
        copied();
        Sums<WALKED / 8> scores, dweights;
        products(scores, owned_q, own, k_room);
        products(dweights, owned_dout, own, v_room);
        finish<1>(scores);
#pragma unroll
        for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                scores.at[n][i] = exp2_of(fmaf(scores.at[n][i], scale, -own_stats[i / 2].x * LOG2_E));
            }
        }
        if (!bounds.all_see(key, key + WALKED)) {
#pragma unroll
            for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    if (!sees(visible[i / 2], key + 8 * n + lane % 4 * 2 + i % 2)) scores.at[n][i] = 0.0f;
                }
            }
        }
        finish<0>(dweights);
#pragma unroll
        for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) scores.at[n][i] *= dweights.at[n][i] - own_stats[i / 2].y;
        }
        accumulate(sums, scores, k_room);
        finish<0>(sums);
        key = next;
        turn ^= 1;
    }
    const float factors[2] = {sizes.scale, sizes.scale};
    store(sums, factors, dq + head * HEAD_DIM, queries, first + own);
}
#endif

#if KEYS
#if IN_SPLITS
typedef float Grad;
#else
typedef u16 Grad;
#endif

// Of a walk: its first query, and whether any of its queries does not see all of the keys.
struct Step {
    u32 query;
    bool is_masked;
};

// The walks over the queries are shared out among splits of the grid, which take their steps in turns; the gradients of each lie behind
// those of the one before.
extern "C" __global__ void __launch_bounds__(THREADS, WORKGROUPS) attention_mma(
    const u16 *dout, const u16 *q, const u16 *k, const u16 *v, const float2 *stats, const Visible *mask, Grad *dk, Grad *dv,
    const __grid_constant__ Sizes sizes) {
    extern __shared__ __align__(16) char memory[];
    const u32 owned_k = aligned(memory), owned_v = owned_k + OWNED * LINE_BYTES;
    const u32 walked = owned_v + OWNED * LINE_BYTES;
    // Behind the rooms, the walked lines' (lse, D).
    const float2 *line_stats = (const float2 *)(memory + (walked - shared_address(memory)) + 4 * WALKED * LINE_BYTES);
    const u32 kv_head = blockIdx.x % sizes.kv_heads, group = sizes.heads / sizes.kv_heads;
    const u32 split = blockIdx.x / sizes.kv_heads, splits = gridDim.x / sizes.kv_heads;
    const Lines keys = key_lines(k, sizes, kv_head);
    const Lines values = key_lines(v, sizes, kv_head);
    // More queries see earlier keys: here too the longest walks start first.
    const u32 first = blockIdx.y * OWNED, end = first + OWNED;
    const u32 lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16;
    const float scale = sizes.scale * LOG2_E;

    // The queries that see one of the keys.
    const Visible *strips = mask + sizes.n_queries + (sizes.n_queries + STRIP - 1) / STRIP * 2;
    u32 start_query = sizes.n_queries, end_query = 0;
    for (u32 i = first / STRIP; i < min(end / STRIP, (sizes.n_seen + STRIP - 1) / STRIP); i++) {
        start_query = min(start_query, strips[i].x);
        end_query = max(end_query, strips[i].y);
    }

    Sums<HEAD_DIM / 8> k_sums, v_sums;
    k_sums.clear();
    v_sums.clear();
    copy<OWNED>(owned_k, keys, first);
    copy<OWNED>(owned_v, values, first);
    copied();
    for (u32 part = 0; part < group / HEADS; part++) {
        const u32 head = kv_head * group + part * HEADS;
        const Lines queries = query_lines(q, sizes, head);
        const Lines douts = query_lines(dout, sizes, head);
        const u32 step = WALKED / HEADS, stride = splits * step;
        // The first step from a query on that has one which sees any of the keys.
        const auto step_from = [&](u32 query) -> Step {
            while (query < end_query) {
                const Bounds bounds(mask, sizes.n_queries, query, min(query + step, sizes.n_queries) - 1);
                const bool is_masked = !bounds.all_see(first, end) || query + step > sizes.n_queries;
                if (bounds.any_sees(first, end)) return {query, is_masked};
                query += stride;
            }
            return {query, false};
        };
        const auto copy_lines = [&](u32 query, u32 turn) {
            if (threadIdx.x < WALKED) {
                const u32 line = min(query * HEADS + threadIdx.x, queries.n_lines - 1);
                const float2 *from = stats + line / HEADS * sizes.heads + head + line % HEADS;
                const u32 to = shared_address(line_stats + turn * WALKED + threadIdx.x);
                asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
            }
            copy<WALKED>(walked + turn * WALKED * LINE_BYTES, queries, query * HEADS);
            copy<WALKED>(walked + (2 + turn) * WALKED * LINE_BYTES, douts, query * HEADS);
        };
        Step now = step_from((start_query / step + split) * step), next = step_from(now.query + stride);
        u32 turn = 0;
        __syncthreads();
        if (now.query < end_query) copy_lines(now.query, 0);
        copied();
        while (now.query < end_query) {
            const u32 q_room = walked + turn * WALKED * LINE_BYTES, dout_room = q_room + 2 * WALKED * LINE_BYTES;
            wait_for_copies<0>();
            __syncthreads();
            if (next.query < end_query) copy_lines(next.query, turn ^ 1);
            copied();
            Sums<WALKED / 8> weights, dweights;
            products(weights, owned_k, own, q_room);
            products(dweights, owned_v, own, dout_room);
            // The table is read while these are made.
            const Step after = step_from(next.query + stride);
            const float2 *of_lines = line_stats + turn * WALKED + lane % 4 * 2;
            finish<1>(weights);
#pragma unroll
            for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    weights.at[n][i] = exp2_of(fmaf(weights.at[n][i], scale, -of_lines[8 * n + i % 2].x * LOG2_E));
                }
            }
            if (now.is_masked) {
#pragma unroll
                for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
                    for (u32 i = 0; i < 4; i++) {
                        // Neighbours are of one query where it has several heads here.
                        const u32 of = now.query + (8 * n + lane % 4 * 2 + (HEADS == 1 ? i % 2 : 0)) / HEADS;
                        const Visible visible = mask[min(of, sizes.n_queries - 1)];
                        const bool is_seen = (of < sizes.n_queries) & sees(visible, first + own + lane / 4 + i / 2 * 8);
                        if (!is_seen) weights.at[n][i] = 0.0f;
                    }
                }
            }
            accumulate(v_sums, weights, dout_room);
            finish<1>(dweights);
#pragma unroll
            for (u32 n = 0; n < WALKED / 8; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    dweights.at[n][i] = weights.at[n][i] * (dweights.at[n][i] - of_lines[8 * n + i % 2].y);
                }
            }
            accumulate(k_sums, dweights, q_room);
            finish<0>(v_sums);
            finish<0>(k_sums);
            now = next;
            next = after;
            turn ^= 1;
        }
    }
    wait_for_copies<0>();
    const float ones[2] = {1.0f, 1.0f}, scales[2] = {sizes.scale, sizes.scale};
    const u32 begin = (split * sizes.n_keys * sizes.kv_heads + kv_head) * HEAD_DIM;
    store(v_sums, ones, dv + begin, values, first + own);
    store(k_sums, scales, dk + begin, keys, first + own);
}
#endif
