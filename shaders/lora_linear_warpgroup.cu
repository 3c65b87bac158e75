// out = addend + left · right, on the matrix units of NVIDIA's compute capability 9.0.
//
// `left` is [m, depth], `right` [depth, n]; each goes on with a tail, so that the depth is that of both. A workgroup is persistent: it
// takes one output tile of TILE_M x TILE_N after the other; where these are few, a part of the depth's stages each, whose sums are
// `splits` outputs behind one another. Its first warpgroup only has the copy engine fill a ring of stages, each TILE_K of the depth; the
// other two multiply half of the tile's rows each, straight from the stages (`wgmma`), and sum in f32.
//
// Set by `kernel/cuda/warpgroup.rs`: TILE_M, TILE_N and TILE_K, BOX_N, STAGES; BF16 or else f16; RIGHT_ALONG_DEPTH, whether the right
// operand's columns lie along its memory; HAS_TAIL, HAS_ADDEND; OUT_F32 or else the operands' type; SUM_REGISTERS and what else names
// wgmma's operands.
//
// CubeCL passes with each tensor map the memory that it is of, and the operands come once more behind the output and the addend: what
// is read of them is read by the maps alone.
//
// Layouts: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions", with the 128-byte swizzle, which the copy engine writes.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

#define ROW_BYTES (TILE_K * 2)
#define LEFT_BYTES (TILE_M * ROW_BYTES)
#define RIGHT_BYTES (TILE_N * ROW_BYTES)
#define STAGE_BYTES (LEFT_BYTES + RIGHT_BYTES)
#define MULTIPLIERS 2
#define SUMS (TILE_N / 2)
// Of the pairs of columns that a thread has, those that it writes at a time.
#define BATCH 8
static_assert(SUMS / 4 % BATCH == 0, "a tile's columns are whole batches");

#if BF16
#define PAIR_TYPE "bf16x2"
#define MULTIPLY_TYPES "f32.bf16.bf16"
#else
#define PAIR_TYPE "f16x2"
#define MULTIPLY_TYPES "f32.f16.f16"
#endif

#if OUT_F32
typedef float Out;
#else
typedef u16 Out;
#endif

// CUtensorMap.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

struct Extents {
    u64 m, n, depth_stages, tail_stages, splits;
};

// The phase of a ring of stages: which is next, and the parity of the turn.
struct Ring {
    u32 stage = 0, parity = 0;

    __device__ void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

__device__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}\n" ::"r"(barrier), "r"(parity) : "memory");
}

__device__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ void copy_box(u32 to, const TensorMap &from, u32 inner, u32 outer, u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
        ::"r"(to), "l"(&from), "r"(inner), "r"(outer), "r"(barrier) : "memory");
}

// Of a matrix in a stage: where it begins, and bytes between its neighbours of 8 rows (`stride`) and of 64 columns (`leading`).
__device__ u64 descriptor(u32 address, u64 leading, u64 stride) {
    const u64 swizzle_128 = 1ull << 62;
    return swizzle_128 | (stride >> 4) << 32 | (leading >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// sums = left · right, of 64 rows and 16 of the depth, added to what they are where `adds`.
__device__ void multiply(float (&sums)[SUMS], u64 left, u64 right, u32 adds) {
    asm volatile(
        "{\n"
        ".reg .pred adds;\n"
        "setp.ne.b32 adds, " ADDS_REGISTER ", 0;\n"
        "wgmma.mma_async.sync.aligned.m64n" TILE_N_TEXT "k16." MULTIPLY_TYPES " " SUM_REGISTERS ", " LEFT_REGISTER
        ", " RIGHT_REGISTER ", adds, 1, 1, 0, " RIGHT_IS_TRANSPOSED ";\n"
        "}\n" : SUM_OPERANDS : "l"(left), "l"(right), "r"(adds));
}

__device__ float from_half(u16 bits) {
#if BF16
    return __uint_as_float((u32)bits << 16);
#else
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#endif
}

// Neighbours in a row of the addend.
#if OUT_F32
typedef float2 Pair;
#else
typedef u32 Pair;
#endif

__device__ void write_pair(Out *out, float first, float second, Pair more) {
#if OUT_F32
    *(float2 *)out = make_float2(first + more.x, second + more.y);
#else
    first += from_half((u16)more);
    second += from_half((u16)(more >> 16));
    u32 pair;
    asm("cvt.rn." PAIR_TYPE ".f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    *(u32 *)out = pair;
#endif
}

extern "C" __global__ void __launch_bounds__(128 * (1 + MULTIPLIERS), 1) lora_linear_warpgroup(
    const __grid_constant__ TensorMap left,
    const __grid_constant__ TensorMap right,
#if HAS_TAIL
    const __grid_constant__ TensorMap left_tail,
    const __grid_constant__ TensorMap right_tail,
#endif
    const void *,
    const void *,
#if HAS_TAIL
    const void *,
    const void *,
#endif
    Out *out,
#if HAS_ADDEND
    const Out *addend,
#endif
    const void *,
    const void *,
#if HAS_TAIL
    const void *,
    const void *,
#endif
    const __grid_constant__ Extents extents) {
#if !HAS_ADDEND
    const Out *addend = nullptr;
#endif
    extern __shared__ char memory[];
    const u32 stages = ((u32)__cvta_generic_to_shared(memory) + 1023) & ~1023u;
    const u32 filled = stages + STAGES * STAGE_BYTES, emptied = filled + 8 * STAGES;

    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; i++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(filled + 8 * i));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(emptied + 8 * i), "n"(MULTIPLIERS));
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();

    const u32 m = extents.m, n = extents.n, depth_stages = extents.depth_stages;
    const u32 n_stages = depth_stages + (u32)extents.tail_stages;
    // Tiles below each other are made at a time: they share the right operand, which is the larger one.
    const u32 tiles_m = (m + TILE_M - 1) / TILE_M, tiles_of_split = tiles_m * ((n + TILE_N - 1) / TILE_N);
    const u32 tiles = tiles_of_split * (u32)extents.splits, split_stages = (n_stages + (u32)extents.splits - 1) / (u32)extents.splits;
    const u32 warpgroup = threadIdx.x / 128;
    Ring ring;

    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x == 0) {
            for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
                const u32 split = tile / tiles_of_split, first = split * split_stages;
                const u32 row = tile % tiles_of_split % tiles_m * TILE_M, column = tile % tiles_of_split / tiles_m * TILE_N;
                for (u32 i = first; i < min(first + split_stages, n_stages); i++, ring.advance()) {
                    barrier_wait(emptied + 8 * ring.stage, ring.parity ^ 1);
                    const u32 barrier = filled + 8 * ring.stage;
                    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                                 "n"(STAGE_BYTES) : "memory");
                    const u32 to_left = stages + ring.stage * STAGE_BYTES, to_right = to_left + LEFT_BYTES;
#if HAS_TAIL
                    const bool is_tail = i >= depth_stages;
                    const TensorMap &from_left = is_tail ? left_tail : left, &from_right = is_tail ? right_tail : right;
                    const u32 k = (is_tail ? i - depth_stages : i) * TILE_K;
#else
                    const TensorMap &from_left = left, &from_right = right;
                    const u32 k = i * TILE_K;
#endif
                    copy_box(to_left, from_left, k, row, barrier);
#if RIGHT_ALONG_DEPTH
                    copy_box(to_right, from_right, k, column, barrier);
#else
#pragma unroll
                    for (u32 c = 0; c < TILE_N; c += BOX_N) {
                        copy_box(to_right + c * ROW_BYTES, from_right, column + c, k, barrier);
                    }
#endif
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        const u32 part = warpgroup - 1, thread = threadIdx.x % 128;
        float sums[SUMS];
        for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            const u32 split = tile / tiles_of_split, first = split * split_stages;
            u32 before = 0;
            for (u32 i = first; i < min(first + split_stages, n_stages); i++, ring.advance()) {
                barrier_wait(filled + 8 * ring.stage, ring.parity);
                const u32 of_left = stages + ring.stage * STAGE_BYTES + part * (LEFT_BYTES / MULTIPLIERS);
                const u32 of_right = stages + ring.stage * STAGE_BYTES + LEFT_BYTES;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
                for (u32 k = 0; k < TILE_K / 16; k++) {
#if RIGHT_ALONG_DEPTH
                    const u64 right_at = descriptor(of_right + k * 32, 16, 8 * ROW_BYTES);
#else
                    const u64 right_at = descriptor(of_right + k * 16 * ROW_BYTES, BOX_N * ROW_BYTES, 8 * ROW_BYTES);
#endif
                    multiply(sums, descriptor(of_left + k * 32, 16, 8 * ROW_BYTES), right_at, (i - first) | k);
                }
                asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
                // What was begun a stage before is done: that one may be filled again.
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                if (i > first && thread == 0) {
                    barrier_arrive(emptied + 8 * before);
                }
                before = ring.stage;
            }
            asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            // No compiler may read them before.
#pragma unroll
            for (u32 i = 0; i < SUMS; i++) asm volatile("" : "+f"(sums[i])::"memory");
            if (thread == 0) {
                barrier_arrive(emptied + 8 * before);
            }
            const u32 row = tile % tiles_of_split % tiles_m * TILE_M + part * 64 + thread / 32 * 16 + thread % 32 / 4;
            const u32 column = tile % tiles_of_split / tiles_m * TILE_N + thread % 4 * 2;
            const u64 at = ((u64)split * m + row) * n + column;
#pragma unroll
            for (u32 begin = 0; begin < SUMS / 4; begin += BATCH) {
                // All are read before one is written: the output may be the addend, so that no compiler lets a load pass a store.
                Pair more[BATCH][2] = {};
#if HAS_ADDEND
#pragma unroll
                for (u32 i = 0; i < BATCH; i++) {
#pragma unroll
                    for (u32 half = 0; half < 2; half++) {
                        if (column + 8 * (begin + i) < n && row + 8 * half < m) {
                            more[i][half] = *(const Pair *)(addend + at + 8 * (half * (u64)n + begin + i));
                        }
                    }
                }
#endif
#pragma unroll
                for (u32 i = 0; i < BATCH; i++) {
#pragma unroll
                    for (u32 half = 0; half < 2; half++) {
                        if (column + 8 * (begin + i) < n && row + 8 * half < m) {
                            const float *pair = &sums[4 * (begin + i) + 2 * half];
                            write_pair(out + at + 8 * (half * (u64)n + begin + i), pair[0], pair[1], more[i][half]);
                        }
                    }
                }
            }
        }
    }
}
