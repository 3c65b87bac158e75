//! The `attention` group of the ops' bench.

use burn::tensor::{Distribution, Tensor};
use burn_wgpu::{Wgpu, WgpuDevice};
use orpo_wgpu::ops::attention::{
    AdditiveMask, AttentionMask, Visible, attention, attention_backward, attention_reference,
};

use super::{Times, Tracked, WARM_UPS, median, time};

/// Fewer, as one takes seconds on a software adapter.
pub(super) const ATTENTION_RUNS: usize = 3;
/// Heads, key heads, width of a head.
const ATTENTION_HEADS: [[usize; 3]; 2] = [[8, 2, 64], [32, 8, 128]];
/// Tokens: of one sequence, or of a pair of which half is shared.
const ATTENTION_TOKENS: [(usize, bool); 6] =
    [(128, false), (512, false), (512, true), (1024, false), (1024, true), (2048, true)];

fn attention_mask(n_tokens: usize, is_pair: bool, device: &WgpuDevice) -> AttentionMask<Wgpu> {
    let (shared, chosen) = if is_pair { (n_tokens / 2, n_tokens / 4) } else { (0, n_tokens) };
    let row = |i: usize| {
        let (prefix_end, own_start) = match i {
            i if i < shared => (0, 0),
            i if i < shared + chosen => (shared, shared),
            _ => (shared, shared + chosen),
        };
        let [prefix_end, own_start, end] = [prefix_end, own_start, i + 1].map(|n| n as u32);
        Visible { first: 0, prefix_end, own_start, end }
    };
    AttentionMask::new((0..n_tokens).map(row).collect(), device)
}

/// What every device binds in one buffer, which holds burn's table of scores.
const MAX_TABLE_BYTES: usize = 128 << 20;

pub(super) fn bench_attention(device: &WgpuDevice) {
    for [heads, kv_heads, head_dim] in ATTENTION_HEADS {
        for (n_tokens, is_pair) in ATTENTION_TOKENS {
            if heads * n_tokens * n_tokens * size_of::<f32>() > MAX_TABLE_BYTES {
                println!(
                    "attention {heads} heads, {n_tokens} tokens: left out, as burn's table of scores does not fit every device"
                );
                continue;
            }
            let random = |heads: usize| {
                Tensor::<Wgpu, 3>::random(
                    [n_tokens, heads, head_dim],
                    Distribution::Uniform(-1.0, 1.0),
                    device,
                )
            };
            let [q, k, v] = [random(heads), random(kv_heads), random(kv_heads)];
            let dout = random(heads).reshape([n_tokens, heads * head_dim]);
            let mask = attention_mask(n_tokens, is_pair, device);
            let whole = AdditiveMask::<Tracked>::new(&mask.visible, device);
            let (mut ours, mut burn) = (Times::default(), Times::default());
            for _ in 0..WARM_UPS + ATTENTION_RUNS {
                let (output, ms) = time(device, || attention(q.clone(), k.clone(), v.clone(), &mask));
                ours.forward.push(ms);
                let (_, ms) = time(device, || {
                    attention_backward(dout.clone(), q.clone(), k.clone(), v.clone(), output, &mask)
                });
                ours.backward.push(ms);
                let [q, k, v] =
                    [&q, &k, &v].map(|t| Tensor::<Tracked, 3>::from_inner(t.clone()).require_grad());
                let (out, ms) = time(device, || attention_reference(q.clone(), k, v, &whole));
                burn.forward.push(ms);
                let loss = (out * Tensor::from_inner(dout.clone())).sum();
                let (grads, ms) = time(device, || loss.backward());
                assert!(q.grad(&grads).is_some(), "all gradients are there");
                burn.backward.push(ms);
            }
            let what = format!(
                "{heads}/{kv_heads} heads of {head_dim}, {n_tokens} tokens{}",
                if is_pair { " in a pair" } else { "" }
            );
            let [mut sum_ours, mut sum_burn] = [0.0, 0.0];
            for (direction, ours, burn) in [
                ("forward", &mut ours.forward, &mut burn.forward),
                ("backward", &mut ours.backward, &mut burn.backward),
            ] {
                let (ours, burn) = (median(ours), median(burn));
                sum_ours += ours;
                sum_burn += burn;
                println!(
                    "attention {direction:8} {what}: {ours:8.2} ms, burn {burn:8.2} ms, ratio {:.2}",
                    burn / ours
                );
            }
            println!("attention both ways {what}: ratio {:.2}", sum_burn / sum_ours);
        }
    }
}
