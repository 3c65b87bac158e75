// The products of lora_linear.wgsl on cooperative matrices (tensor cores), for weights stored as f16; same formula, same
// buffers, same numbering of workgroups. Launched by src/ops/product.rs on devices that list the matrix shape
// SIZE x SIZE x SIZE, f16 in, f32 sums.
//
// One workgroup a BLOCK_M x BLOCK_N block of `out`, walking the depth in steps of BLOCK_K. A step stages both operands
// in workgroup memory as f16, in lines as they lie in their buffers; a thread reads its quads of them a step ahead. The
// block is cut into PATCH_M x PATCH_N patches, a subgroup's each, as SIZE x SIZE fragments. How many lanes a subgroup has
// is the driver's choice: where there are fewer subgroups than patches, the block is walked again for the rest, and where
// there are more, some make the same. The prologue's operands are f32 and rounded to f16 when staged; sums are f32, and
// go out through workgroup memory, since a fragment's entries cannot be seen otherwise.

enable f16;
enable wgpu_cooperative_matrix;

const SIZE = {{ size }}u;
const BLOCK_M = {{ block_m }}u;
const BLOCK_N = {{ block_n }}u;
const BLOCK_K = {{ block_k }}u;
const PATCH_M = {{ patch_m }}u;
const PATCH_N = {{ patch_n }}u;
const PATCHES_N = BLOCK_N / PATCH_N;
const PATCHES = BLOCK_M / PATCH_M * PATCHES_N;
// Of a step's depth, what is multiplied without a loop.
const TURN = {{ turn }}u;
const BAND = {{ band }}u;
const WORKGROUP_SIZE = {{ workgroup_size }}u;
const FRAGMENT = SIZE * SIZE;
const LHS_QUADS = BLOCK_K / 4u;
#if rhs_rows
const RHS_QUADS = BLOCK_K / 4u;
const RHS_LINES = BLOCK_N;
#else
const RHS_QUADS = BLOCK_N / 4u;
const RHS_LINES = BLOCK_K;
#endif
// In quads. Two more than needed keep lines 16 bytes aligned and out of each other's banks.
const LHS_PITCH = LHS_QUADS + 2u;
const RHS_PITCH = RHS_QUADS + 2u;
// Threads along a line, the largest power of two that divides its quads; lines that the workgroup stages at once, and in how many passes
// along them. So the places of a thread's quads differ by constants.
const LHS_ACROSS = LHS_QUADS;
const LHS_AT_ONCE = WORKGROUP_SIZE / LHS_ACROSS;
const RHS_ACROSS = RHS_QUADS & (~RHS_QUADS + 1u);
const RHS_AT_ONCE = WORKGROUP_SIZE / RHS_ACROSS;
const RHS_PASSES = RHS_QUADS / RHS_ACROSS;
// Where lines are short, sixteen threads store quads of several at once: of each eight lines those whose pitches put them into banks of
// their own.
const LHS_TOGETHER = {{ lhs_together }}u;
const RHS_TOGETHER = {{ rhs_together }}u;

alias Lhs = coop_mat{{ size }}x{{ size }}<f16, A>;
alias Rhs = coop_mat{{ size }}x{{ size }}<f16, B>;
alias Sums = coop_mat{{ size }}x{{ size }}<f32, C>;

var<workgroup> lhs_tile: array<vec4<f16>, BLOCK_M * LHS_PITCH>;
var<workgroup> rhs_tile: array<vec4<f16>, RHS_LINES * RHS_PITCH>;
var<workgroup> fragments: array<f32, PATCHES * FRAGMENT>;

#for matrix in {{ matrices }}
// A quad as it is multiplied, times `factor` where it is f32.
fn {{ matrix }}_half(quad: {{ matrix }}_stored, factor: f32) -> vec4<f16> {
#if {{ matrix }}_f16
    return quad;
#else
    return vec4<f16>(factor * quad);
#endif
}

#endfor
// A line of each eight for a group of threads, of which so many are stored together.
fn apart(group: u32, together: u32) -> u32 {
    return group / 8u * 8u + group % together * (8u / together) + group % 8u / together;
}

// Where a quad lies of the fragments that the subgroups leave, one a patch: a line of the block and an entry of it, as of the first
// fragment of every patch.
fn place(first_patch: u32, quad: u32) -> vec2u {
    let owned = first_patch + quad / (FRAGMENT / 4u);
    let line = quad % (FRAGMENT / 4u) / (SIZE / 4u);
    let entry = quad % (SIZE / 4u) * 4u;
    return vec2u(owned / PATCHES_N * PATCH_M + line, owned % PATCHES_N * PATCH_N + entry);
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
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
    let main_scale = 1.0;
    let prologue_scale = params.prologue_scale;
    let lhs_line = apart(thread / LHS_ACROSS, LHS_TOGETHER);
    let lhs_at = lhs_line * LHS_PITCH + thread % LHS_ACROSS;
    let lhs_entry = thread % LHS_ACROSS * 4u;
#for i in {{ lhs_items }}
    let lhs_line_{{ i }} = lhs_line + {{ i }}u * LHS_AT_ONCE;
#endfor
    let rhs_line = apart(thread / RHS_ACROSS, RHS_TOGETHER);
    let rhs_at = rhs_line * RHS_PITCH + thread % RHS_ACROSS;
#for i in {{ rhs_items }}
    let rhs_line_{{ i }} = rhs_line + {{ i }}u / RHS_PASSES * RHS_AT_ONCE;
    let rhs_entry_{{ i }} = (thread % RHS_ACROSS + {{ i }}u % RHS_PASSES * RHS_ACROSS) * 4u;
#endfor
    for (var first_patch = 0u; first_patch < PATCHES; first_patch += subgroups) {
        // Without a patch of its own a subgroup makes the last one as well, so that all take every step.
        let owned = min(first_patch + subgroup, PATCHES - 1u);
        let patch_m = owned / PATCHES_N * PATCH_M;
        let patch_n = owned % PATCHES_N * PATCH_N;
        // Sums start from zeros in memory: a matrix without a value keeps those of the turn before.
        for (var i = thread; i < FRAGMENT; i += WORKGROUP_SIZE) {
            fragments[i] = 0.0;
        }
        workgroupBarrier();
#for i in {{ fragments_m }}
#for j in {{ fragments_n }}
        var sums_{{ i }}_{{ j }} = coopLoadT<Sums>(&fragments[0], SIZE);
#endfor
#endfor
#for part in prologue main
#for i in {{ lhs_items }}
        var {{ part }}_lhs_{{ i }} =
            {{ part }}_lhs_near(first_m + lhs_line_{{ i }}, first_{{ part }} + lhs_entry, params.m, {{ part }}_depth);
#endfor
#for i in {{ rhs_items }}
#if rhs_rows
        var {{ part }}_rhs_{{ i }} =
            {{ part }}_rhs_near(first_n + rhs_line_{{ i }}, first_{{ part }} + rhs_entry_{{ i }}, params.n, {{ part }}_depth);
#else
        var {{ part }}_rhs_{{ i }} =
            {{ part }}_rhs_near(first_{{ part }} + rhs_line_{{ i }}, first_n + rhs_entry_{{ i }}, {{ part }}_depth, params.n);
#endif
#endfor
        for (var k = first_{{ part }}; k < last_{{ part }}; k += BLOCK_K) {
            workgroupBarrier();
            // What is past the depth counts for nothing once one operand is zero there; what is past the last row or column is not
            // stored.
            let rest = {{ part }}_depth - k;
            if (rest >= BLOCK_K) {
#for i in {{ lhs_items }}
                lhs_tile[lhs_at + {{ i }}u * (LHS_AT_ONCE * LHS_PITCH)] = {{ part }}_lhs_half({{ part }}_lhs_{{ i }}, {{ part }}_scale);
#endfor
            } else {
                let is_there = vec4(lhs_entry) + vec4(0u, 1u, 2u, 3u) < vec4(rest);
#for i in {{ lhs_items }}
                lhs_tile[lhs_at + {{ i }}u * (LHS_AT_ONCE * LHS_PITCH)] =
                    select(vec4<f16>(), {{ part }}_lhs_half({{ part }}_lhs_{{ i }}, {{ part }}_scale), is_there);
#endfor
            }
#for i in {{ rhs_items }}
            rhs_tile[rhs_at + {{ i }}u / RHS_PASSES * (RHS_AT_ONCE * RHS_PITCH) + {{ i }}u % RHS_PASSES * RHS_ACROSS] =
                {{ part }}_rhs_half({{ part }}_rhs_{{ i }}, 1.0);
#endfor
            workgroupBarrier();
            // After the last step once more, where it is in the cache.
            let next = select(k, k + BLOCK_K, k + BLOCK_K < last_{{ part }});
#for i in {{ lhs_items }}
            {{ part }}_lhs_{{ i }} =
                {{ part }}_lhs_near(first_m + lhs_line_{{ i }}, next + lhs_entry, params.m, {{ part }}_depth);
#endfor
#for i in {{ rhs_items }}
#if rhs_rows
            {{ part }}_rhs_{{ i }} =
                {{ part }}_rhs_near(first_n + rhs_line_{{ i }}, next + rhs_entry_{{ i }}, params.n, {{ part }}_depth);
#else
            {{ part }}_rhs_{{ i }} =
                {{ part }}_rhs_near(next + rhs_line_{{ i }}, first_n + rhs_entry_{{ i }}, {{ part }}_depth, params.n);
#endif
#endfor
            for (var first = 0u; first < BLOCK_K; first += TURN) {
#for step in {{ steps }}
                {
                    let step = first + {{ step }}u * SIZE;
#for i in {{ fragments_m }}
                    let lhs_{{ i }} =
                        coopLoadT<Lhs>(&lhs_tile[(patch_m + {{ i }}u * SIZE) * LHS_PITCH + step / 4u], LHS_PITCH);
#endfor
#for j in {{ fragments_n }}
#if rhs_rows
                    let rhs_{{ j }} =
                        coopLoad<Rhs>(&rhs_tile[(patch_n + {{ j }}u * SIZE) * RHS_PITCH + step / 4u], RHS_PITCH);
#else
                    let rhs_{{ j }} =
                        coopLoadT<Rhs>(&rhs_tile[step * RHS_PITCH + (patch_n + {{ j }}u * SIZE) / 4u], RHS_PITCH);
#endif
#for i in {{ fragments_m }}
                    sums_{{ i }}_{{ j }} = coopMultiplyAdd(lhs_{{ i }}, rhs_{{ j }}, sums_{{ i }}_{{ j }});
#endfor
#endfor
                }
#endfor
            }
        }
#endfor
        let slot = (owned - first_patch) * FRAGMENT;
        let pitch = SIZE;
        let n_quads = min(subgroups, PATCHES - first_patch) * (FRAGMENT / 4u);
#for item in {{ store_items }}
        let quad_{{ item }} = thread + {{ item }}u * WORKGROUP_SIZE;
        let place_{{ item }} = vec2u(first_m, first_n) + place(first_patch, quad_{{ item }});
#endfor
#for i in {{ fragments_m }}
        // Before the barriers, so that the loads of a row of fragments can be under way together.
#for j in {{ fragments_n }}
#for item in {{ store_items }}
        let at_{{ i }}_{{ j }}_{{ item }} = place_{{ item }} + vec2u({{ i }}u, {{ j }}u) * SIZE;
        var more_{{ i }}_{{ j }}_{{ item }} = vec4f();
        if (quad_{{ item }} < n_quads) {
            more_{{ i }}_{{ j }}_{{ item }} =
                addend_quad(at_{{ i }}_{{ j }}_{{ item }}.x, at_{{ i }}_{{ j }}_{{ item }}.y, group.z);
        }
#endfor
#endfor
#for j in {{ fragments_n }}
        coopStoreT(sums_{{ i }}_{{ j }}, &fragments[slot], pitch);
        workgroupBarrier();
#for item in {{ store_items }}
        if (quad_{{ item }} < n_quads) {
            let sums = vec4f(
                fragments[quad_{{ item }} * 4u],
                fragments[quad_{{ item }} * 4u + 1u],
                fragments[quad_{{ item }} * 4u + 2u],
                fragments[quad_{{ item }} * 4u + 3u],
            );
            store(
                at_{{ i }}_{{ j }}_{{ item }}.x,
                at_{{ i }}_{{ j }}_{{ item }}.y,
                group.z,
                sums * params.scale + more_{{ i }}_{{ j }}_{{ item }},
            );
        }
#endfor
        workgroupBarrier();
#endfor
#endfor
    }
}
