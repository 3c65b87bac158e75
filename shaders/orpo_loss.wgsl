// Statistics of src/ops/orpo_loss.rs.
//
//     log_odds       = (ℓw − ℓl) − (log1mexp(ℓw) − log1mexp(ℓl))
//     log_odds_ratio = log σ(log_odds)
//
// with ℓ the mean log-probability of the chosen (w) and the rejected (l) response, in the odds at most max_mean_logp.
//
//     logps: [entries]   spans: [pairs]   stats: [pairs, 5] = weighted NLL, ℓw, ℓl, log_odds, log_odds_ratio
//
// One workgroup a pair; its threads stride over the pair's entries and add up in a tree. All f32.

@group(0) @binding(0) var<storage, read_write> logps: array<f32>;
@group(0) @binding(1) var<storage, read_write> spans: array<Span>;
@group(0) @binding(2) var<storage, read_write> stats: array<f32>;
@group(0) @binding(3) var<uniform> params: Params;

struct Params {
    pairs: u32,
    max_mean_logp: f32,
    unused_0: u32,
    unused_1: u32,
}

const WORKGROUP_SIZE = {{ workgroup_size }}u;

// Sums over prompt, chosen and rejected entries, by thread.
var<workgroup> sums: array<vec3f, WORKGROUP_SIZE>;

fn sum_between(thread: u32, start: u32, end: u32) -> f32 {
    var sum = 0.0;
    for (var i = start + thread; i < end; i += WORKGROUP_SIZE) {
        sum += logps[i];
    }
    return sum;
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let pair = group.x;
    let span = spans[pair];
    sums[thread] = vec3f(
        sum_between(thread, span.nll_start, span.chosen_start),
        sum_between(thread, span.chosen_start, span.rejected_start),
        sum_between(thread, span.rejected_start, span.end),
    );
    for (var half = WORKGROUP_SIZE / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if (thread < half) {
            sums[thread] += sums[thread + half];
        }
    }
    if (thread == 0u) {
        let total = sums[0];
        let chosen = total.y / f32(span.rejected_start - span.chosen_start);
        let rejected = total.z / f32(span.end - span.rejected_start);
        // Not min(): it may drop a NaN, and a NaN has to reach the loss.
        let w = select(chosen, params.max_mean_logp, chosen > params.max_mean_logp);
        let l = select(rejected, params.max_mean_logp, rejected > params.max_mean_logp);
        let log_odds = (w - l) - (log1mexp(w) - log1mexp(l));
        stats[pair * 5u] = -span.nll_weight * (total.x + total.y);
        stats[pair * 5u + 1u] = chosen;
        stats[pair * 5u + 2u] = rejected;
        stats[pair * 5u + 3u] = log_odds;
        stats[pair * 5u + 4u] = log_sigmoid(log_odds);
    }
}
