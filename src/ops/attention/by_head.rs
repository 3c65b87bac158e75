//! Attention on the CPU: the reference of one key head and its query heads at a time, on all processors.
//!
//! burn's products use all processors by themselves, but what is done to a table of scores, one. A key head has its part of a table,
//! so that together they hold no more than the reference would.

use burn::tensor::Tensor;
use burn_flex::Flex;
use rayon::prelude::*;

use super::{AttentionMask, AttentionOutput, attention_backward_reference, attention_forward_reference};

/// [`attention_forward_reference`], by head.
pub(in crate::ops) fn attention_forward_by_head(
    q: &Tensor<Flex, 3>,
    k: &Tensor<Flex, 3>,
    v: &Tensor<Flex, 3>,
    mask: &AttentionMask<Flex>,
) -> AttentionOutput<Flex> {
    let heads = Heads::of(q, k);
    let parts = heads.each(|head| {
        let AttentionOutput { out, lse } = attention_forward_reference(
            heads.queries(q, head),
            heads.keys(k, head),
            heads.keys(v, head),
            mask,
        );
        (out, lse)
    });
    let (outs, lses) = parts.into_iter().unzip();
    AttentionOutput { out: Tensor::cat(outs, 1), lse: Tensor::cat(lses, 1) }
}

/// [`attention_backward_reference`], by head.
pub(in crate::ops) fn attention_backward_by_head(
    dout: &Tensor<Flex, 2>,
    q: &Tensor<Flex, 3>,
    k: &Tensor<Flex, 3>,
    v: &Tensor<Flex, 3>,
    output: &AttentionOutput<Flex>,
    mask: &AttentionMask<Flex>,
) -> [Tensor<Flex, 3>; 3] {
    let heads = Heads::of(q, k);
    let parts = heads.each(|head| {
        let AttentionOutput { out, lse } = output;
        let output = AttentionOutput { out: heads.rows(out, head), lse: heads.rows(lse, head) };
        let [dq, dk, dv] = attention_backward_reference(
            heads.rows(dout, head),
            heads.queries(q, head),
            heads.keys(k, head),
            heads.keys(v, head),
            output,
            mask,
        );
        (dq, (dk, dv))
    });
    let (dqs, (dks, dvs)): (Vec<_>, (Vec<_>, Vec<_>)) = parts.into_iter().unzip();
    [dqs, dks, dvs].map(|parts| Tensor::cat(parts, 1))
}

#[derive(Clone, Copy)]
struct Heads {
    kv_heads: usize,
    /// Query heads of a key head.
    group: usize,
}

impl Heads {
    fn of(q: &Tensor<Flex, 3>, k: &Tensor<Flex, 3>) -> Self {
        let kv_heads = k.dims()[1];
        Self { kv_heads, group: q.dims()[1] / kv_heads }
    }

    fn each<T: Send>(self, of_head: impl Fn(usize) -> T + Sync + Send) -> Vec<T> {
        (0..self.kv_heads).into_par_iter().map(of_head).collect()
    }

    /// Of a key head, `[keys, 1, head_dim]`.
    fn keys(self, t: &Tensor<Flex, 3>, head: usize) -> Tensor<Flex, 3> {
        t.clone().narrow(1, head, 1)
    }

    /// Of its query heads, `[queries, group, head_dim]`.
    fn queries(self, t: &Tensor<Flex, 3>, head: usize) -> Tensor<Flex, 3> {
        t.clone().narrow(1, head * self.group, self.group)
    }

    /// Of the same in a line a query, `[queries, group · width]`.
    fn rows(self, t: &Tensor<Flex, 2>, head: usize) -> Tensor<Flex, 2> {
        let width = t.dims()[1] / self.kv_heads;
        t.clone().narrow(1, head * width, width)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::super::Visible;
    use super::*;

    fn largest<const D: usize>(tensor: Tensor<Flex, D>) -> f32 {
        tensor.abs().max().into_scalar()
    }

    /// A pair's prompt and two answers behind it, from this row on.
    fn pair(first: u32, [prompt, chosen, rejected]: [u32; 3]) -> Vec<Visible> {
        let end = first + prompt;
        let sees = |prefix_end, own_start, row| Visible { first, prefix_end, own_start, end: row + 1 };
        let own = |start: u32, n: u32| (start..start + n).map(move |row| sees(end, start, row));
        let shared = (first..end).map(|row| sees(first, first, row));
        shared.chain(own(end, chosen)).chain(own(end + chosen, rejected)).collect()
    }

    #[test]
    fn heads_by_themselves_are_those_of_all_together() {
        let device = Default::default();
        let cached = (0..3).map(|row| Visible { first: 0, prefix_end: 0, own_start: 0, end: 40 + row });
        let pairs = [pair(0, [70, 11, 50]), pair(131, [5, 1, 90])].concat();
        // More rows than the reference takes at a time, in two sequences; fewer queries than keys; a single number.
        for (kv_heads, group, head_dim, visible) in
            [(3, 2, 20, pairs), (2, 3, 16, cached.collect()), (1, 1, 1, pair(0, [1, 1, 1]))]
        {
            let n_keys = visible.iter().map(|v| v.end).max().unwrap() as usize;
            let random = |n: usize, heads: usize| {
                Tensor::<Flex, 3>::random([n, heads, head_dim], Distribution::Normal(0.0, 1.0), &device)
            };
            let (n, heads) = (visible.len(), kv_heads * group);
            let (q, k, v) = (random(n, heads), random(n_keys, kv_heads), random(n_keys, kv_heads));
            let dout = random(n, heads).reshape([n, heads * head_dim]);
            let mask = AttentionMask::new(visible, &device);
            let got = attention_forward_by_head(&q, &k, &v, &mask);
            let want = attention_forward_reference(q.clone(), k.clone(), v.clone(), &mask);
            assert!(largest(want.out.clone()) > 0.1 && largest(got.out.clone() - want.out.clone()) < 1e-5);
            assert!(largest(got.lse.clone() - want.lse.clone()) < 1e-5);
            let got = attention_backward_by_head(&dout, &q, &k, &v, &got, &mask);
            let wants = attention_backward_reference(dout, q, k, v, want, &mask);
            for (got, want) in got.into_iter().zip(wants) {
                assert_eq!(got.dims(), want.dims());
                assert!(head_dim == 1 || largest(want.clone()) > 0.1);
                assert!(largest(got - want) < 1e-4);
            }
        }
    }
}
