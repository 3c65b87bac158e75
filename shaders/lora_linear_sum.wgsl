// The second half of a product of src/ops/lora_linear.rs that was split along its depth.
//
//     out[i] = addend[i] + Σ_z parts[z, i]        parts: [splits, length], out, addend: [length]
//
// One thread an entry; `addend` may be `out` itself. The order of the sum is fixed, so that the same input gives the
// same bits.

#if f16
enable f16;
#endif

@group(0) @binding(0) var<storage, read_write> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<{{ out }}>;
@group(0) @binding(2) var<storage, read_write> addend: array<{{ out }}>;
@group(0) @binding(3) var<uniform> params: Params;

struct Params {
    length: u32,
    splits: u32,
    // Threads in x; entries beyond them are those of y.
    row: u32,
    // Whether there is an addend; without it, its buffer only stands in.
    has_addend: u32,
}

const WORKGROUP_SIZE = {{ workgroup_size }}u;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(global_invocation_id) id: vec3u) {
    let i = id.y * params.row + id.x;
    if (i >= params.length) {
        return;
    }
    var sum = 0.0;
    for (var part = i; part < params.splits * params.length; part += params.length) {
        sum += parts[part];
    }
    if (i < params.has_addend * params.length) {
        sum += f32(addend[i]);
    }
    out[i] = {{ out }}(sum);
}
