// Whether lora_linear_direct.wgsl, and attention on software adapters, may hand entries from lane to lane: every thread of some
// subgroups asks each of its lanes for four numbers. Also shows that subgroups have as many lanes as is said, or more.

const WORKGROUP_SIZE = {{ workgroup_size }}u;

@group(0) @binding(0) var<storage, read_write> is_right: array<u32>;
@group(0) @binding(1) var<uniform> params: Params;

struct Params {
    lanes: u32,
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(local_invocation_index) thread: u32, @builtin(subgroup_invocation_id) lane: u32) {
    let numbers = vec4f(0.25, 0.5, 0.75, 1.0) + f32(lane);
    var n_right = 0u;
#for i in {{ lanes }}
    n_right += u32(all(subgroupShuffle(numbers, {{ i }}u) == vec4f(0.25, 0.5, 0.75, 1.0) + {{ i }}.0));
#endfor
    is_right[thread] = u32(n_right == params.lanes);
}
