// Gradient of src/ops/orpo_loss.rs by the log-probabilities, times grad_scale.
//
//     chosen    −beta / pairs · exp(log σ(−log_odds) − log1mexp(ℓw)) / n_chosen − nll_weight
//     rejected  +beta / pairs · exp(log σ(−log_odds) − log1mexp(ℓl)) / n_rejected
//     prompt    −nll_weight
//
//     stats: [pairs, 5] of orpo_loss.wgsl   spans: [pairs]   dlogps: [entries]
//
// One workgroup a pair; its threads stride over the pair's entries, and over those between it and the pair before, which are no
// pair's and get 0. The factor is taken in log space: its parts overflow where it does not. All f32.

@group(0) @binding(0) var<storage, read_write> stats: array<f32>;
@group(0) @binding(1) var<storage, read_write> spans: array<Span>;
@group(0) @binding(2) var<storage, read_write> dlogps: array<f32>;
@group(0) @binding(3) var<uniform> params: Params;

struct Params {
    pairs: u32,
    max_mean_logp: f32,
    beta: f32,
    grad_scale: f32,
}

const WORKGROUP_SIZE = {{ workgroup_size }}u;

// What the odds-ratio term's gradient by a mean log-probability is, without its sign.
fn odds_factor(log_odds: f32, mean_logp: f32) -> f32 {
    let x = select(mean_logp, params.max_mean_logp, mean_logp > params.max_mean_logp);
    return params.beta / f32(params.pairs) * exp(log_sigmoid(-log_odds) - log1mexp(x));
}

@compute @workgroup_size(WORKGROUP_SIZE)
fn main(@builtin(workgroup_id) group: vec3u, @builtin(local_invocation_index) thread: u32) {
    let pair = group.x;
    let span = spans[pair];
    let log_odds = stats[pair * 5u + 3u];
    let n_chosen = f32(span.rejected_start - span.chosen_start);
    let n_rejected = f32(span.end - span.rejected_start);
    let prompt = -span.nll_weight;
    let chosen = -odds_factor(log_odds, stats[pair * 5u + 1u]) / n_chosen - span.nll_weight;
    let rejected = odds_factor(log_odds, stats[pair * 5u + 2u]) / n_rejected;
    var first = 0u;
    if (pair > 0u) {
        first = spans[pair - 1u].end;
    }
    for (var i = first + thread; i < span.end; i += WORKGROUP_SIZE) {
        var dlogp = rejected;
        if (i < span.nll_start) {
            dlogp = 0.0;
        } else if (i < span.chosen_start) {
            dlogp = prompt;
        } else if (i < span.rejected_start) {
            dlogp = chosen;
        }
        dlogps[i] = dlogp * params.grad_scale;
    }
}
