// The products of lora_linear.wgsl for software adapters; same formula, same buffers, same numbering of workgroups.
//
// There a load is a loop over the lanes of a vector and takes the time of twenty products of four, workgroup memory is memory like
// any other, and registers that are too many spill to the first-level cache. So nothing is staged: a thread reads four entries of
// the depth of its own lines where they lie, and keeps up to 128 sums. Of the other operand all threads have the same lines: of these
// the lanes of a subgroup read a part each and hand it to the others, which takes an instruction or two. Turning a block of 4 x 4 only
// renames its vectors.
//
// One workgroup a BLOCK_M x BLOCK_N block of `out`. A thread keeps blocks of 4 x 4 sums, THREADS_M (THREADS_N) of them apart. Lines
// past the end are read as the last one and never stored; entries of main_lhs and prologue_lhs past the depth count as 0. All sums
// are f32.

#if f16
enable f16;
#endif

const BLOCK_M = {{ block_m }}u;
const BLOCK_N = {{ block_n }}u;
const THREADS_M = {{ threads_m }}u;
const THREADS_N = {{ threads_n }}u;
const BAND = {{ band }}u;
const LANES = {{ lanes }}u;
const READS = {{ n_reads }}u;
const WORKGROUP_SIZE = {{ workgroup_size }}u;

#for matrix in {{ matrices }}
// Four entries of a line of {{ matrix }}; past its ends, the last ones.
fn {{ matrix }}_quad(line: u32, entry: u32, lines: u32, length: u32) -> vec4f {
    let start = min(line, lines - 1u) * length;
#if {{ matrix }}_vec4
    return vec4f({{ matrix }}[(start + min(entry, length - 4u)) / 4u]);
#else
    return vec4f(
#for c in 0 1 2 3
        f32({{ matrix }}[start + min(entry + {{ c }}u, length - 1u)]),
#endfor
    );
#endif
}

#endfor
#for part in main prologue
// Quad `i` of the blocks of 4 x 4 that {{ part }}_lhs has from line `line` and entry `k` of the depth on.
fn {{ part }}_lhs_read(line: u32, i: u32, k: u32, depth: u32) -> vec4f {
#if lhs_rows
    let quad = {{ part }}_lhs_quad(line + i, k, params.m, depth);
    return select(vec4f(), quad, k + vec4u(0u, 1u, 2u, 3u) < vec4u(depth));
#else
    let quad = {{ part }}_lhs_quad(k + i % 4u, line + i / 4u * 4u, depth, params.m);
    return select(vec4f(), quad, k + i % 4u < depth);
#endif
}

// The same of {{ part }}_rhs.
fn {{ part }}_rhs_read(line: u32, i: u32, k: u32, depth: u32) -> vec4f {
#if rhs_rows
    return {{ part }}_rhs_quad(line + i, k, params.n, depth);
#else
    return {{ part }}_rhs_quad(k + i % 4u, line + i / 4u * 4u, depth, params.n);
#endif
}

#endfor
// A block of the left operand by its quads, with lines as columns.
fn lhs_block(quads: mat4x4f) -> mat4x4f {
#if lhs_rows
    return quads;
#else
    return transpose(quads);
#endif
}

// A block of the right operand by its quads, with lines as rows.
fn rhs_block(quads: mat4x4f) -> mat4x4f {
#if rhs_rows
    return transpose(quads);
#else
    return quads;
#endif
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(
    @builtin(workgroup_id) group: vec3u,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    let first_m = (group.y * BAND + group.x % BAND) * BLOCK_M;
    let first_n = group.x / BAND * BLOCK_N;
    if (first_m >= params.m) {
        return;
    }
    let line_lhs = first_m + thread / THREADS_N * 4u;
    let line_rhs = first_n + thread % THREADS_N * 4u;
#for i in {{ quads_m }}
#for j in {{ quads_n }}
    var sums_{{ i }}_{{ j }} = mat4x4f();
#endfor
#endfor
    let first_prologue = group.z * params.rank;
    let last_prologue = params.rank;
    let prologue_depth = params.rank;
    let prologue_scale = params.prologue_scale;
    let first_main = group.z * params.span;
    let last_main = min(params.depth, first_main + params.span);
    let main_depth = params.depth;
    let main_scale = params.scale;
#for part in prologue main
    for (var k = first_{{ part }}; k < last_{{ part }}; k += 4u) {
        let read = array<vec4f, READS>(
#for i in {{ reads }}
            {{ part }}_{{ shared }}_read(line_{{ shared }}, {{ i }}u * LANES + lane, k, {{ part }}_depth),
#endfor
        );
#for j in {{ quads_own }}
        let own_{{ j }} = {{ own }}_block(mat4x4f(
#for c in 0 1 2 3
            {{ part }}_{{ own }}_read(line_{{ own }} + {{ j }}u * WORKGROUP_SIZE * 4u, {{ c }}u, k, {{ part }}_depth),
#endfor
        ));
#endfor
#for i in {{ quads_shared }}
        let shared_{{ i }} = {{ shared }}_block(mat4x4f(
#for c in 0 1 2 3
            subgroupShuffle(read[({{ i }}u * 4u + {{ c }}u) / LANES], ({{ i }}u * 4u + {{ c }}u) % LANES),
#endfor
        ));
#for j in {{ quads_own }}
#if shares_lhs
        sums_{{ i }}_{{ j }} += own_{{ j }} * shared_{{ i }};
#else
        sums_{{ j }}_{{ i }} += shared_{{ i }} * own_{{ j }};
#endif
#endfor
#endfor
    }
#for i in {{ quads_m }}
#for j in {{ quads_n }}
    sums_{{ i }}_{{ j }} *= {{ part }}_scale;
#endfor
#endfor
#endfor
#for i in {{ quads_m }}
#for j in {{ quads_n }}
#for c in 0 1 2 3
    {
        let line = line_lhs + {{ i }}u * THREADS_M * 4u + {{ c }}u;
        let entry = line_rhs + {{ j }}u * THREADS_N * 4u;
        store(line, entry, group.z, sums_{{ i }}_{{ j }}[{{ c }}] + addend_quad(line, entry, group.z));
    }
#endfor
#endfor
#endfor
}
