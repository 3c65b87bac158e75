// The matrix engine of src/ops/lora_linear.rs, launched by src/ops/product.rs.
//
//     out = addend + scale · (main_lhs · main_rhs + prologue_scale · prologue_lhs · prologue_rhs)
//
// The accumulators start from the prologue, whose depth is the adapter's rank, and go on with the main product; both
// are m x n and of one layout. A rank of 0 leaves the prologue out. By layout, with the letters of lora_linear.rs:
//
//                      main_lhs     main_rhs     prologue_lhs   prologue_rhs
//     rows_rows        [m, depth]   [n, depth]   [m, rank]      [n, rank]      y = x Wᵀ + scale · s Bᵀ, s = x Aᵀ
//     rows_columns     [m, depth]   [depth, n]   [m, rank]      [rank, n]      dx = dy W + ds A, ds = scale · dy B
//     columns_columns  [depth, m]   [depth, n]                                 dB = scale · dyᵀ s, dA = dsᵀ x
//
//     out: [splits, m, n]; split z sums span z of the depth, and lora_linear_sum.wgsl adds more than one split up; prologue
//          and addend are the first split's
//     addend: [m, n], which may be `out` itself: a thread reads an entry before it writes it, and no other touches it
//
// One workgroup a BLOCK_M x BLOCK_N block of `out`, walking the depth in steps of BLOCK_K. A step stages both operands
// in workgroup memory as [BLOCK_K][lines], so that a thread reads four lines at once. A thread keeps blocks of 4 x 4
// accumulators, TILE_M (TILE_N) of them apart, so that neighbours read neighbouring words. Workgroups are numbered in
// bands of BAND blocks down m, so that those running together share operands in the cache. All sums are f32.

#if f16
enable f16;
#endif

const BLOCK_M = {{ block_m }}u;
const BLOCK_N = {{ block_n }}u;
const BLOCK_K = {{ block_k }}u;
const TILE_M = {{ tile_m }}u;
const TILE_N = {{ tile_n }}u;
const BAND = {{ band }}u;
const WORKGROUP_SIZE = TILE_M * TILE_N;
// One quad more than needed keeps the transposing stores of a step out of each other's banks.
const LHS_PITCH = BLOCK_M / 4u + {{ padding }}u;
const RHS_PITCH = BLOCK_N / 4u + {{ padding }}u;

var<workgroup> lhs_tile: array<vec4f, BLOCK_K * LHS_PITCH>;
var<workgroup> rhs_tile: array<vec4f, BLOCK_K * RHS_PITCH>;

#for i in {{ quads_m }}
#for j in {{ quads_n }}
var<private> acc_{{ i }}_{{ j }}: mat4x4f;
#endfor
#endfor

#for part in main prologue
// Stages one step of both operands of the {{ part }} product.
fn stage_{{ part }}(thread: u32, first_m: u32, first_n: u32, first_k: u32, depth: u32) {
#if lhs_rows
    for (var block = thread; block < BLOCK_M * BLOCK_K / 16u; block += WORKGROUP_SIZE) {
        let k = block % (BLOCK_K / 4u) * 4u;
        let quad = block / (BLOCK_K / 4u);
        let line = first_m + quad * 4u;
        let turned = transpose(mat4x4f(
            {{ part }}_lhs_quad(line, first_k + k, params.m, depth),
            {{ part }}_lhs_quad(line + 1u, first_k + k, params.m, depth),
            {{ part }}_lhs_quad(line + 2u, first_k + k, params.m, depth),
            {{ part }}_lhs_quad(line + 3u, first_k + k, params.m, depth),
        ));
#for c in 0 1 2 3
        lhs_tile[(k + {{ c }}u) * LHS_PITCH + quad] = turned[{{ c }}];
#endfor
    }
#else
    for (var item = thread; item < BLOCK_M * BLOCK_K / 4u; item += WORKGROUP_SIZE) {
        let quad = item % (BLOCK_M / 4u);
        let k = item / (BLOCK_M / 4u);
        lhs_tile[k * LHS_PITCH + quad] = {{ part }}_lhs_quad(first_k + k, first_m + quad * 4u, depth, params.m);
    }
#endif
#if rhs_rows
    for (var block = thread; block < BLOCK_N * BLOCK_K / 16u; block += WORKGROUP_SIZE) {
        let k = block % (BLOCK_K / 4u) * 4u;
        let quad = block / (BLOCK_K / 4u);
        let line = first_n + quad * 4u;
        let turned = transpose(mat4x4f(
            {{ part }}_rhs_quad(line, first_k + k, params.n, depth),
            {{ part }}_rhs_quad(line + 1u, first_k + k, params.n, depth),
            {{ part }}_rhs_quad(line + 2u, first_k + k, params.n, depth),
            {{ part }}_rhs_quad(line + 3u, first_k + k, params.n, depth),
        ));
#for c in 0 1 2 3
        rhs_tile[(k + {{ c }}u) * RHS_PITCH + quad] = turned[{{ c }}];
#endfor
    }
#else
    for (var item = thread; item < BLOCK_N * BLOCK_K / 4u; item += WORKGROUP_SIZE) {
        let quad = item % (BLOCK_N / 4u);
        let k = item / (BLOCK_N / 4u);
        rhs_tile[k * RHS_PITCH + quad] = {{ part }}_rhs_quad(first_k + k, first_n + quad * 4u, depth, params.n);
    }
#endif
}

#endfor
// Adds the staged step to the accumulators.
fn multiply(tile_m: u32, tile_n: u32) {
    for (var k = 0u; k < BLOCK_K; k++) {
#for j in {{ quads_n }}
        let b_{{ j }} = rhs_tile[k * RHS_PITCH + {{ j }}u * TILE_N + tile_n];
#endfor
#for i in {{ quads_m }}
        let a_{{ i }} = lhs_tile[k * LHS_PITCH + {{ i }}u * TILE_M + tile_m];
#for j in {{ quads_n }}
        acc_{{ i }}_{{ j }} += mat4x4f(
            a_{{ i }}.x * b_{{ j }},
            a_{{ i }}.y * b_{{ j }},
            a_{{ i }}.z * b_{{ j }},
            a_{{ i }}.w * b_{{ j }},
        );
#endfor
#endfor
    }
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let tile_n = thread % TILE_N;
    let tile_m = thread / TILE_N;
    let first_m = (group.y * BAND + group.x % BAND) * BLOCK_M;
    let first_n = group.x / BAND * BLOCK_N;
    if (first_m >= params.m) {
        return;
    }
    for (var k = group.z * params.rank; k < params.rank; k += BLOCK_K) {
        stage_prologue(thread, first_m, first_n, k, params.rank);
        workgroupBarrier();
        multiply(tile_m, tile_n);
        workgroupBarrier();
    }
#for i in {{ quads_m }}
#for j in {{ quads_n }}
    acc_{{ i }}_{{ j }} *= params.prologue_scale;
#endfor
#endfor
    let last_k = min(params.depth, (group.z + 1u) * params.span);
    for (var k = group.z * params.span; k < last_k; k += BLOCK_K) {
        stage_main(thread, first_m, first_n, k, params.depth);
        workgroupBarrier();
        multiply(tile_m, tile_n);
        workgroupBarrier();
    }
#for i in {{ quads_m }}
#for j in {{ quads_n }}
#for c in 0 1 2 3
    {
        let line = first_m + ({{ i }}u * TILE_M + tile_m) * 4u + {{ c }}u;
        let entry = first_n + ({{ j }}u * TILE_N + tile_n) * 4u;
        let sums = acc_{{ i }}_{{ j }}[{{ c }}] * params.scale;
        store(line, entry, group.z, sums + addend_quad(line, entry, group.z));
    }
#endfor
#endfor
#endfor
}
