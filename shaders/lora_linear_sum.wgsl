// The second half of a product of src/ops/lora_linear.rs that was split along its depth.
//
//     out[i] = Σ_z parts[z, i]        parts: [splits, length], out: [length]
//
// One thread an entry. The order of the sum is fixed, so that the same input gives the same bits.

@group(0) @binding(0) var<storage, read_write> parts: array<f32>;
@group(0) @binding(1) var<storage, read_write> out: array<{{ element }}>;
@group(0) @binding(2) var<uniform> params: Params;

struct Params {
    length: u32,
    splits: u32,
    // Threads in x; entries beyond them are those of y.
    row: u32,
    unused: u32,
}

const WORKGROUP_SIZE = {{ workgroup_size }}u;

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(global_invocation_id) id: vec3u) {
    let i = id.y * params.row + id.x;
    if (i >= params.length) {
        return;
    }
    var sum = 0.0;
    for (var z = 0u; z < params.splits; z++) {
        sum += parts[z * params.length + i];
    }
    out[i] = {{ element }}(sum);
}
