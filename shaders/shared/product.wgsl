
// What the products of src/ops/lora_linear.rs share, whichever way they multiply: operands and epilogue.

alias Out = {{ out }};

@group(0) @binding(0) var<storage, read_write> main_lhs: array<{{ main_lhs }}>;
@group(0) @binding(1) var<storage, read_write> main_rhs: array<{{ main_rhs }}>;
@group(0) @binding(2) var<storage, read_write> prologue_lhs: array<{{ prologue_lhs }}>;
@group(0) @binding(3) var<storage, read_write> prologue_rhs: array<{{ prologue_rhs }}>;
@group(0) @binding(4) var<storage, read_write> out: array<Out>;
@group(0) @binding(5) var<storage, read_write> addend: array<Out>;
@group(0) @binding(6) var<uniform> params: Params;

struct Params {
    m: u32,
    n: u32,
    depth: u32,
    rank: u32,
    // Entries of the depth that one split sums, whole steps of it.
    span: u32,
    prologue_scale: f32,
    scale: f32,
    // Whether there is an addend; without it, its buffer only stands in.
    has_addend: u32,
}

// Four entries of a line of what one split adds: the addend is the first split's.
fn addend_quad(line: u32, entry: u32, split: u32) -> vec4f {
    var quad = vec4f();
#if out_vec4
    if (params.has_addend > split && line < params.m && entry < params.n) {
        quad = vec4f(addend[(line * params.n + entry) / 4u]);
    }
#else
#for c in 0 1 2 3
    if (params.has_addend > split && line < params.m && entry + {{ c }}u < params.n) {
        quad[{{ c }}] = f32(addend[line * params.n + entry + {{ c }}u]);
    }
#endfor
#endif
    return quad;
}

// Stores four entries of a line of one split's `out`.
fn store(line: u32, entry: u32, split: u32, quad: vec4f) {
    let first_out = split * params.m * params.n;
#if out_vec4
    if (line < params.m && entry < params.n) {
        out[(first_out + line * params.n + entry) / 4u] = Out(quad);
    }
#else
#for c in 0 1 2 3
    if (line < params.m && entry + {{ c }}u < params.n) {
        out[first_out + line * params.n + entry + {{ c }}u] = Out(quad[{{ c }}]);
    }
#endfor
#endif
}
