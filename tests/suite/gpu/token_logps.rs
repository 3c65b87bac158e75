//! The chunked head against the whole log-softmax under burn's own autodiff.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use burn_wgpu::Wgpu;
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::token_logps::{Expected, Head, ScoredToken, token_logps, token_logps_backward};

use crate::support::{Numbers, adapter, assert_close};

/// A head, hidden states and scored tokens in no order: rows without a target, rows with two, targets in every shard.
struct Case {
    n_rows: usize,
    n_hidden: usize,
    vocab: usize,
    hidden: Vec<f32>,
    weight: Vec<f32>,
    scored: Vec<ScoredToken>,
    dlogps: Vec<f32>,
}

impl Case {
    fn new(n_rows: usize, n_hidden: usize, vocab: usize) -> Self {
        let mut numbers = Numbers::new((n_rows * vocab) as u64);
        let mut scored: Vec<ScoredToken> = (0..n_rows)
            .filter(|row| row % 5 != 3)
            .map(|row| ScoredToken { row_idx: row as u32, target: ((row * 37) % vocab) as u32 })
            .collect();
        scored.extend(
            (0..n_rows).step_by(4).map(|row| ScoredToken { row_idx: row as u32, target: (vocab - 1) as u32 }),
        );
        scored.rotate_left(n_rows / 2);
        // One row is so sure of its target that its log-probability is all rounding in a careless form.
        let mut hidden = numbers.vec(n_rows * n_hidden, 1.0);
        let weight = numbers.vec(vocab * n_hidden, 1.0);
        let sure = scored[0];
        for i in 0..n_hidden {
            hidden[sure.row_idx as usize * n_hidden + i] = 4.0 * weight[sure.target as usize * n_hidden + i];
        }
        let dlogps = numbers.vec(scored.len(), 1.0);
        Self { n_rows, n_hidden, vocab, hidden, weight, scored, dlogps }
    }

    /// Log-probabilities and the gradient by the hidden states, of the whole product.
    fn reference(&self) -> (Vec<f32>, Vec<f32>) {
        type B = Autodiff<Flex>;
        let device = Default::default();
        let matrix = |values: &[f32], shape: [usize; 2]| {
            Tensor::<B, 2>::from_data(TensorData::new(values.to_vec(), shape), &device)
        };
        let hidden = matrix(&self.hidden, [self.n_rows, self.n_hidden]).require_grad();
        let weight = matrix(&self.weight, [self.vocab, self.n_hidden]);
        let all =
            log_softmax(hidden.clone().matmul(weight.transpose()), 1).reshape([self.n_rows * self.vocab]);
        let places: Vec<i64> = self
            .scored
            .iter()
            .map(|t| i64::from(t.row_idx) * self.vocab as i64 + i64::from(t.target))
            .collect();
        let places = Tensor::<B, 1, Int>::from_data(TensorData::new(places, [self.scored.len()]), &device);
        let logps = all.select(0, places);
        let weights =
            Tensor::<B, 1>::from_data(TensorData::new(self.dlogps.clone(), [self.scored.len()]), &device);
        let grads = (logps.clone() * weights).sum().backward();
        let values = |t: Tensor<Flex, 2>| t.into_data().to_vec::<f32>().unwrap();
        (logps.into_data().to_vec().unwrap(), values(hidden.grad(&grads).unwrap()))
    }

    fn run<B: Kernels>(
        &self,
        shard_rows: usize,
        chunk_rows: usize,
        device: &B::Device,
    ) -> (Vec<f32>, Vec<f32>) {
        let matrix = |values: &[f32]| {
            let shape = [values.len() / self.n_hidden, self.n_hidden];
            Tensor::<B, 2>::from_data(TensorData::new(values.to_vec(), shape), device)
        };
        let head = Head {
            shards: self.weight.chunks(shard_rows * self.n_hidden).map(matrix).collect(),
            chunk_bytes: chunk_rows * shard_rows.min(self.vocab) * size_of::<f32>(),
        };
        let forward = token_logps(matrix(&self.hidden), &head, &self.scored, Expected::Keep);
        let logps = forward.logps.clone();
        let alone = token_logps(matrix(&self.hidden), &head, &self.scored, Expected::Skip);
        let values = |t: Tensor<B, 1>| t.into_data().to_vec::<f32>().unwrap();
        assert_eq!(values(alone.logps), values(logps.clone()), "evaluation against training");
        let dlogps =
            Tensor::<B, 1>::from_data(TensorData::new(self.dlogps.clone(), [self.scored.len()]), device);
        let dhidden = token_logps_backward(dlogps, forward, &head, &self.scored);
        (values(logps), dhidden.into_data().to_vec().unwrap())
    }
}

fn check<B: Kernels>(device: &B::Device) {
    for (n_rows, n_hidden, vocab) in [(1, 8, 11), (23, 40, 331), (64, 64, 1000)] {
        let case = Case::new(n_rows, n_hidden, vocab);
        let (want_logps, want_dhidden) = case.reference();
        for (shard_rows, chunk_rows) in [(vocab, n_rows), (100, 7), (64, 1), (7, 64)] {
            let (logps, dhidden) = case.run::<B>(shard_rows, chunk_rows, device);
            let what = |part: &str| {
                format!("{part} of {n_rows} x {n_hidden} x {vocab} by {shard_rows} and {chunk_rows}")
            };
            assert_close(&logps, &want_logps, 2e-6, 1e-5, &what("logps"));
            assert_close(&dhidden, &want_dhidden, 1e-5, 1e-4, &what("dhidden"));
        }
    }
}

#[test]
fn cpu_equals_the_whole_log_softmax() {
    check::<Flex>(&Default::default());
}

#[test]
fn gpu_equals_the_whole_log_softmax() {
    if let Some(device) = adapter() {
        check::<Wgpu>(&device);
    }
}
