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
// in workgroup memory as [BLOCK_K][lines], so that a thread reads four lines at once.
// A thread keeps blocks of 4 x 4 accumulators, TILE_M (TILE_N) of them apart, so that neighbours read neighbouring words.
// Workgroups are numbered in bands of BAND blocks down m, so that those running together share operands in the cache. All
// sums are f32.

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

#for side in lhs rhs
const {{ side }}_quads = {{ {{ side }}_lines }}u / 4u;
// An item is what a thread stages at once: four quads below each other of an operand's rows, which it turns, else a quad.
#if {{ side }}_rows
const n_{{ side }}_items = {{ side }}_quads * (BLOCK_K / 4u);
#else
const n_{{ side }}_items = {{ side }}_quads * BLOCK_K;
#endif

var<workgroup> {{ side }}_tile: array<vec4f, BLOCK_K * {{ side }}_quads>;

// Where a quad of lines lies at entry k.
fn {{ side }}_place(k: u32, quad: u32) -> u32 {
#if {{ side }}_rows
    // Threads that store what they turned side by side have different k, and would meet in the banks: quads change places within the
    // eight of all banks, or within those that a thread's lie apart where these are fewer.
    return k * {{ side }}_quads + (quad ^ (k / 4u * 2u % {{ {{ side }}_banks }}u));
#else
    return k * {{ side }}_quads + quad;
#endif
}

#endfor

#for i in {{ quads_m }}
#for j in {{ quads_n }}
var<private> acc_{{ i }}_{{ j }}: mat4x4f;
#endfor
#endfor

// What is past the depth counts for nothing once one operand is zero there; what is past the last row or column is not stored.
fn lhs_within(quad: vec4f, is_within: bool) -> vec4f {
    return select(vec4f(), quad, is_within);
}

fn rhs_within(quad: vec4f, is_within: bool) -> vec4f {
    return quad;
}

// Adds the staged step to the accumulators.
fn multiply(tile_m: u32, tile_n: u32) {
    for (var k = 0u; k < BLOCK_K; k++) {
#for j in {{ quads_n }}
        let b_{{ j }} = rhs_tile[rhs_place(k, tile_n) + {{ j }}u * TILE_N];
#endfor
#for i in {{ quads_m }}
        let a_{{ i }} = lhs_tile[lhs_place(k, tile_m) + {{ i }}u * TILE_M];
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
    let first_main = group.z * params.span;
    let last_main = min(params.depth, first_main + params.span);
    let first_prologue = group.z * params.rank;
    let last_prologue = params.rank;
    let main_depth = params.depth;
    let prologue_depth = params.rank;
    let main_scale = params.scale;
    let prologue_scale = params.prologue_scale;
    let first_lhs = first_m;
    let first_rhs = first_n;
    let all_lhs = params.m;
    let all_rhs = params.n;
    // Threads past the last item read it as well, and do not stage it.
#for side in lhs rhs
#for i in {{ {{ side }}_items }}
    let {{ side }}_is_item_{{ i }} = thread + {{ i }}u * WORKGROUP_SIZE < n_{{ side }}_items;
    let {{ side }}_item_{{ i }} = min(thread + {{ i }}u * WORKGROUP_SIZE, n_{{ side }}_items - 1u);
#if {{ side }}_rows
    let {{ side }}_k_{{ i }} = {{ side }}_item_{{ i }} % (BLOCK_K / 4u) * 4u;
    let {{ side }}_quad_{{ i }} = {{ side }}_item_{{ i }} / (BLOCK_K / 4u);
#else
    let {{ side }}_k_{{ i }} = {{ side }}_item_{{ i }} / {{ side }}_quads;
    let {{ side }}_quad_{{ i }} = {{ side }}_item_{{ i }} % {{ side }}_quads;
#endif
    let {{ side }}_line_{{ i }} = first_{{ side }} + {{ side }}_quad_{{ i }} * 4u;
#endfor
#endfor
#for part in prologue main
#for side in lhs rhs
#for i in {{ {{ side }}_items }}
#if {{ side }}_rows
#for c in 0 1 2 3
    var {{ part }}_{{ side }}_{{ i }}_{{ c }} = {{ part }}_{{ side }}_near(
        {{ side }}_line_{{ i }} + {{ c }}u, first_{{ part }} + {{ side }}_k_{{ i }}, all_{{ side }}, {{ part }}_depth);
#endfor
#else
    var {{ part }}_{{ side }}_{{ i }} = {{ part }}_{{ side }}_near(
        first_{{ part }} + {{ side }}_k_{{ i }}, {{ side }}_line_{{ i }}, {{ part }}_depth, all_{{ side }});
#endif
#endfor
#endfor
    for (var k = first_{{ part }}; k < last_{{ part }}; k += BLOCK_K) {
        workgroupBarrier();
        let rest = {{ part }}_depth - k;
#for side in lhs rhs
#for i in {{ {{ side }}_items }}
        if ({{ side }}_is_item_{{ i }}) {
#if {{ side }}_rows
            let turned = transpose(mat4x4f(
#for c in 0 1 2 3
                vec4f({{ part }}_{{ side }}_{{ i }}_{{ c }}),
#endfor
            ));
#for c in 0 1 2 3
            {{ side }}_tile[{{ side }}_place({{ side }}_k_{{ i }} + {{ c }}u, {{ side }}_quad_{{ i }})] =
                {{ side }}_within(turned[{{ c }}], {{ side }}_k_{{ i }} + {{ c }}u < rest);
#endfor
#else
            {{ side }}_tile[{{ side }}_place({{ side }}_k_{{ i }}, {{ side }}_quad_{{ i }})] =
                {{ side }}_within(vec4f({{ part }}_{{ side }}_{{ i }}), {{ side }}_k_{{ i }} < rest);
#endif
        }
#endfor
#endfor
        workgroupBarrier();
        // After the last step once more, where it is in the cache.
        let next = select(k, k + BLOCK_K, k + BLOCK_K < last_{{ part }});
#for side in lhs rhs
#for i in {{ {{ side }}_items }}
#if {{ side }}_rows
#for c in 0 1 2 3
        {{ part }}_{{ side }}_{{ i }}_{{ c }} = {{ part }}_{{ side }}_near(
            {{ side }}_line_{{ i }} + {{ c }}u, next + {{ side }}_k_{{ i }}, all_{{ side }}, {{ part }}_depth);
#endfor
#else
        {{ part }}_{{ side }}_{{ i }} = {{ part }}_{{ side }}_near(
            next + {{ side }}_k_{{ i }}, {{ side }}_line_{{ i }}, {{ part }}_depth, all_{{ side }});
#endif
#endfor
#endfor
        multiply(tile_m, tile_n);
    }
#for i in {{ quads_m }}
#for j in {{ quads_n }}
    acc_{{ i }}_{{ j }} *= {{ part }}_scale;
#endfor
#endfor
#endfor
#for i in {{ quads_m }}
#for j in {{ quads_n }}
#for c in 0 1 2 3
    {
        let line = first_m + ({{ i }}u * TILE_M + tile_m) * 4u + {{ c }}u;
        let entry = first_n + ({{ j }}u * TILE_N + tile_n) * 4u;
        store(line, entry, group.z, acc_{{ i }}_{{ j }}[{{ c }}] + addend_quad(line, entry, group.z));
    }
#endfor
#endfor
#endfor
}
