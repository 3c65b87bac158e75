// The adapter's half of the backward of src/ops/lora_linear.rs in one read of dy, for small ranks on software adapters;
// launched by src/ops/product.rs.
//
//     ds = scale · dy B      dB = scale · dyᵀ s
//
//     dy: [tokens, out]   b: [out, rank]   s: [tokens, rank]
//     ds_parts: [ceil(out / PANEL), tokens, rank]   db_parts: [ceil(tokens / span), out, rank]
//
// lora_linear_sum.wgsl adds the parts up. One workgroup PANEL columns of dy by `span` tokens, in steps of PANEL tokens.
// A step stages PANEL x PANEL entries; then the first half of the threads makes ds of the step while the second goes on
// with dB, each thread four lines by four ranks. The tile holds four tokens a word, as [column][token quad ^ column
// quad]: either half then reads words of different banks. All sums are f32.

#if f16
enable f16;
#endif

@group(0) @binding(0) var<storage, read_write> dy: array<{{ dy }}>;
@group(0) @binding(1) var<storage, read_write> b: array<{{ adapter }}>;
@group(0) @binding(2) var<storage, read_write> s: array<{{ adapter }}>;
@group(0) @binding(3) var<storage, read_write> ds_parts: array<f32>;
@group(0) @binding(4) var<storage, read_write> db_parts: array<f32>;
@group(0) @binding(5) var<uniform> params: Params;

struct Params {
    tokens: u32,
    out: u32,
    rank: u32,
    // Tokens of a workgroup, a multiple of PANEL.
    span: u32,
    scale: f32,
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
}

const PANEL = {{ panel }}u;
const QUADS = PANEL / 4u;
const RANK_QUADS = {{ rank_quads }}u;
const HALF = QUADS * RANK_QUADS;
const WORKGROUP_SIZE = 2u * HALF;

var<workgroup> tile: array<vec4f, PANEL * QUADS>;

#for parts in ds_parts db_parts
// Stores four lines by four ranks of {{ parts }}, whose first line is `first` of `lines` of part `part`.
fn store_{{ parts }}(part: u32, first: u32, lines: u32, rank: u32, sums: mat4x4f) {
#for i in 0 1 2 3
#for c in 0 1 2 3
    if ((first + {{ i }}u < lines) & (rank + {{ c }}u < params.rank)) {
        {{ parts }}[(part * lines + first + {{ i }}u) * params.rank + rank + {{ c }}u] =
            sums[{{ i }}][{{ c }}] * params.scale;
    }
#endfor
#endfor
}

#endfor
#for matrix in {{ matrices }}
// Four entries of a line of {{ matrix }}, zeros past its ends.
fn {{ matrix }}_quad(line: u32, entry: u32, lines: u32, length: u32) -> vec4f {
    var quad = vec4f();
#if {{ matrix }}_vec4
    if (line < lines && entry < length) {
        quad = vec4f({{ matrix }}[(line * length + entry) / 4u]);
    }
#else
#for c in 0 1 2 3
    if (line < lines && entry + {{ c }}u < length) {
        quad[{{ c }}] = f32({{ matrix }}[line * length + entry + {{ c }}u]);
    }
#endfor
#endif
    return quad;
}

#endfor
@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let first_column = group.x * PANEL;
    let is_ds = thread < HALF;
    let quad = thread % QUADS;
    let rank = thread / QUADS % RANK_QUADS * 4u;
    let last_token = min(params.tokens, (group.y + 1u) * params.span);
    var db = mat4x4f();
    for (var first_token = group.y * params.span; first_token < last_token; first_token += PANEL) {
        for (var block = thread; block < QUADS * QUADS; block += WORKGROUP_SIZE) {
            let column_quad = block % QUADS;
            let token_quad = block / QUADS;
            let column = first_column + column_quad * 4u;
            let token = first_token + token_quad * 4u;
            let turned = transpose(mat4x4f(
                dy_quad(token, column, params.tokens, params.out),
                dy_quad(token + 1u, column, params.tokens, params.out),
                dy_quad(token + 2u, column, params.tokens, params.out),
                dy_quad(token + 3u, column, params.tokens, params.out),
            ));
#for c in 0 1 2 3
            tile[(column_quad * 4u + {{ c }}u) * QUADS + (token_quad ^ column_quad)] = turned[{{ c }}];
#endfor
        }
        workgroupBarrier();
        if (is_ds) {
            // Columns of the matrix: tokens, its rows: ranks.
            var ds = mat4x4f();
            for (var column = 0u; column < PANEL; column++) {
                let dys = tile[column * QUADS + (quad ^ (column / 4u))];
                let ranks = b_quad(first_column + column, rank, params.out, params.rank);
                ds += mat4x4f(dys.x * ranks, dys.y * ranks, dys.z * ranks, dys.w * ranks);
            }
            store_ds_parts(group.x, first_token + quad * 4u, params.tokens, rank, ds);
        } else {
            for (var token_quad = 0u; token_quad < QUADS; token_quad++) {
                let token = first_token + token_quad * 4u;
                let ranks = mat4x4f(
                    s_quad(token, rank, params.tokens, params.rank),
                    s_quad(token + 1u, rank, params.tokens, params.rank),
                    s_quad(token + 2u, rank, params.tokens, params.rank),
                    s_quad(token + 3u, rank, params.tokens, params.rank),
                );
                // Columns of the matrix: columns of dy, its rows: ranks.
                db += mat4x4f(
#for c in 0 1 2 3
                    ranks * tile[(quad * 4u + {{ c }}u) * QUADS + (token_quad ^ quad)],
#endfor
                );
            }
        }
        workgroupBarrier();
    }
    if (!is_ds) {
        store_db_parts(group.y, first_column + quad * 4u, params.out, rank, db);
    }
}
