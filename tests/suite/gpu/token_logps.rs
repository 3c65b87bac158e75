//! The chunked head against the whole log-softmax under burn's own autodiff, against its formula in f64, and at its real size.

use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Distribution, FloatDType, Int, Tensor, TensorData};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use half::{bf16, f16};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::quantize::Weight;
use orpo_wgpu::ops::token_logps::{Expected, Head, ScoredToken, token_logps, token_logps_backward};

use super::on::{Gpu, GpuDevice, adapter, stored_types};
use crate::support::{Numbers, assert_close};

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

    /// The same with a weight that this type holds without rounding.
    fn stored_in(mut self, dtype: DType) -> Self {
        for value in &mut self.weight {
            *value = match dtype {
                DType::F16 => f16::from_f32(*value).to_f32(),
                DType::BF16 => bf16::from_f32(*value).to_f32(),
                _ => *value,
            };
        }
        self
    }

    /// Log-probabilities and gradient of the formula, in `f64`.
    fn formula(&self, hidden: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let n = self.n_hidden;
        let (mut logps, mut dhidden) = (vec![0.0; self.scored.len()], vec![0.0; hidden.len()]);
        for (row, h) in hidden.chunks(n).enumerate() {
            let dot = |w: &[f32]| w.iter().zip(h).map(|(&w, h)| f64::from(w) * h).sum::<f64>();
            let logits: Vec<f64> = self.weight.chunks(n).map(dot).collect();
            let max = logits.iter().copied().fold(f64::MIN, f64::max);
            let log_sum = max + logits.iter().map(|z| (z - max).exp()).sum::<f64>().ln();
            for (i, token) in self.scored.iter().enumerate().filter(|(_, t)| t.row_idx as usize == row) {
                logps[i] = logits[token.target as usize] - log_sum;
                for (id, w) in self.weight.chunks(n).enumerate() {
                    let hit = f64::from(u8::from(id == token.target as usize));
                    let factor = f64::from(self.dlogps[i]) * (hit - (logits[id] - log_sum).exp());
                    for (d, &w) in dhidden[row * n..].iter_mut().zip(w) {
                        *d += factor * f64::from(w);
                    }
                }
            }
        }
        (logps, dhidden)
    }

    fn run<B: Kernels>(
        &self,
        [shard_rows, chunk_rows]: [usize; 2],
        dtype: DType,
        device: &B::Device,
    ) -> (Vec<f32>, Vec<f32>) {
        let matrix = |values: &[f32]| {
            let shape = [values.len() / self.n_hidden, self.n_hidden];
            Tensor::<B, 2>::from_data(TensorData::new(values.to_vec(), shape), device)
        };
        let shards = self.weight.chunks(shard_rows * self.n_hidden);
        let head = Head {
            shards: shards.map(|shard| Weight::Dense(matrix(shard).cast(FloatDType::from(dtype)))).collect(),
            chunk_bytes: chunk_rows * shard_rows.min(self.vocab) * size_of::<f32>(),
        };
        let forward = token_logps(matrix(&self.hidden), &head, &self.scored, Expected::Keep);
        let logps = forward.logps.clone();
        let alone = token_logps(matrix(&self.hidden), &head, &self.scored, Expected::Skip);
        let values = |t: Tensor<B, 1>| t.into_data().to_vec::<f32>().unwrap();
        assert_close(&values(alone.logps), &values(logps.clone()), 1e-7, 1e-7, "evaluation against training");
        let dlogps =
            Tensor::<B, 1>::from_data(TensorData::new(self.dlogps.clone(), [self.scored.len()]), device);
        let dhidden = token_logps_backward(dlogps, forward, &head, &self.scored);
        (values(logps), dhidden.into_data().to_vec().unwrap())
    }
}

/// Rows, hidden, vocabulary: one row, lengths that no vector divides, and more columns than a row has threads.
const SHAPES: [[usize; 3]; 4] = [[1, 8, 11], [23, 40, 331], [64, 64, 1000], [9, 13, 2100]];

/// How far a gradient may be off: sums over the vocabulary, of exponentials stored in `dtype`.
fn tolerances(dtype: DType) -> (f32, f32) {
    match dtype {
        DType::F16 => (1e-3, 2e-3),
        DType::BF16 => (2e-3, 1.6e-2),
        _ => (1e-5, 1e-4),
    }
}

/// How far a log-probability may be off. In `f16` and `bf16` a hidden state is the sum of two numbers, of which the latter has 16 bits.
fn tolerances_of_logps(dtype: DType) -> (f32, f32) {
    if dtype == DType::BF16 { (1e-4, 1e-4) } else { (2e-6, 1e-5) }
}

fn check<B: Kernels>(dtype: DType, device: &B::Device) {
    for [n_rows, n_hidden, vocab] in SHAPES {
        let case = Case::new(n_rows, n_hidden, vocab).stored_in(dtype);
        let (want_logps, want_dhidden) = case.reference();
        for cut in [[vocab, n_rows], [100, 7], [64, 3], [vocab.div_ceil(40), 64]] {
            let (logps, dhidden) = case.run::<B>(cut, dtype, device);
            let what = |part: &str| format!("{part} of {n_rows} x {n_hidden} x {vocab} by {cut:?}");
            let (atol, rtol) = tolerances(dtype);
            let (logps_atol, logps_rtol) = tolerances_of_logps(dtype);
            assert_close(&logps, &want_logps, logps_atol, logps_rtol, &what("logps"));
            assert_close(&dhidden, &want_dhidden, atol, rtol, &what("dhidden"));
        }
    }
}

#[test]
fn cpu_equals_the_whole_log_softmax() {
    check::<Flex>(DType::F32, &Default::default());
}

#[test]
fn cpu_takes_a_weight_of_halves() {
    check::<Flex>(DType::F16, &Default::default());
}

#[test]
fn gpu_equals_the_whole_log_softmax() {
    if let Some(device) = adapter() {
        check::<Gpu>(DType::F32, &device);
    }
}

#[test]
fn gpu_takes_a_weight_of_halves() {
    let Some(device) = adapter() else { return };
    for (dtype, _) in stored_types().into_iter().filter(|(dtype, _)| *dtype != DType::F32) {
        check::<Gpu>(dtype, &device);
    }
}

#[test]
fn gpu_equals_the_formula_in_f64() {
    let Some(device) = adapter() else { return };
    let case = Case::new(7, 12, 57);
    let hidden: Vec<f64> = case.hidden.iter().map(|&h| f64::from(h)).collect();
    let (logps, dhidden) = case.formula(&hidden);
    let narrow = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<_>>();
    for i in (0..hidden.len()).step_by(5) {
        let loss = |step: f64| {
            let mut hidden = hidden.clone();
            hidden[i] += step;
            case.formula(&hidden).0.iter().zip(&case.dlogps).map(|(l, &d)| l * f64::from(d)).sum::<f64>()
        };
        let slope = (loss(1e-4) - loss(-1e-4)) / 2e-4;
        assert!((slope - dhidden[i]).abs() < 1e-6, "dhidden {i}: {} against the slope {slope}", dhidden[i]);
    }
    let (got_logps, got_dhidden) = case.run::<Gpu>([20, 3], DType::F32, &device);
    assert_close(&got_logps, &narrow(&logps), 2e-6, 1e-5, "logps");
    assert_close(&got_dhidden, &narrow(&dhidden), 1e-5, 1e-4, "dhidden");
}

#[test]
fn gpu_gives_the_same_bits_twice() {
    let Some(device) = adapter() else { return };
    let case = Case::new(23, 40, 331);
    let runs: Vec<_> = (0..3).map(|_| case.run::<Gpu>([100, 7], DType::F32, &device)).collect();
    assert!(runs.iter().all(|run| *run == runs[0]), "the bits differ from run to run");
}

#[test]
#[should_panic(expected = "is outside 23 rows or 331 tokens")]
fn a_target_outside_the_vocabulary_is_refused() {
    let mut case = Case::new(23, 40, 331);
    case.scored[3].target = 331;
    case.run::<Flex>([100, 7], DType::F32, &Default::default());
}

/// Llama 3's head: its vocabulary, its width, and the shards that a binding of 128 MiB allows.
const REAL: [usize; 3] = [128_256, 4096, 8192];

/// Log-probabilities and gradient of the real head, from its shards one after the other on the CPU, merged in `f64`.
fn by_shard(
    hidden: &Tensor<Flex, 2>,
    shards: impl Iterator<Item = Weight<Gpu>>,
    scored: &[ScoredToken],
    dlogps: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let [n_rows, n_hidden] = hidden.dims();
    let (mut sums, mut weighted) = (vec![0.0f64; n_rows], vec![0.0f64; n_rows * n_hidden]);
    let (mut target_logits, mut dhidden) = (vec![0.0f64; scored.len()], vec![0.0f64; n_rows * n_hidden]);
    let mut first_id = 0;
    for shard in shards {
        let shard =
            Tensor::<Flex, 2>::from_data(shard.to_dense().into_data().convert::<f32>(), &Default::default());
        let n = shard.dims()[0];
        let logits = hidden.clone().matmul(shard.clone().transpose());
        // The logits of this head are small: their exponentials need no maximum taken off.
        let exps = logits.clone().exp();
        let part = exps.clone().matmul(shard.clone()).into_data().to_vec::<f32>().unwrap();
        weighted.iter_mut().zip(part).for_each(|(sum, part)| *sum += f64::from(part));
        let exps = exps.into_data().to_vec::<f32>().unwrap();
        for (sum, exps) in sums.iter_mut().zip(exps.chunks(n)) {
            *sum += exps.iter().map(|&e| f64::from(e)).sum::<f64>();
        }
        for (i, token) in scored.iter().enumerate() {
            let (row, Some(id)) = (token.row_idx as usize, (token.target as usize).checked_sub(first_id))
            else {
                continue;
            };
            if id < n {
                target_logits[i] = f64::from(logits.clone().slice([row..row + 1, id..id + 1]).into_scalar());
                let w = shard.clone().slice([id..id + 1, 0..n_hidden]).into_data().to_vec::<f32>().unwrap();
                for (d, w) in dhidden[row * n_hidden..].iter_mut().zip(w) {
                    *d += f64::from(dlogps[i]) * f64::from(w);
                }
            }
        }
        first_id += n;
    }
    let logps = scored.iter().zip(target_logits).map(|(t, z)| (z - sums[t.row_idx as usize].ln()) as f32);
    let logps = logps.collect();
    for (token, &dlogp) in scored.iter().zip(dlogps) {
        let row = token.row_idx as usize;
        for column in row * n_hidden..(row + 1) * n_hidden {
            dhidden[column] -= f64::from(dlogp) * weighted[column] / sums[row];
        }
    }
    (logps, dhidden.into_iter().map(|d| d as f32).collect())
}

fn check_the_real_head(dtype: DType, device: &GpuDevice) {
    let [vocab, n_hidden, shard_rows] = REAL;
    let n_rows = 5;
    let shards = (0..vocab).step_by(shard_rows).map(|first_id| {
        let shape = [shard_rows.min(vocab - first_id), n_hidden];
        let shard = Tensor::<Gpu, 2>::random(shape, Distribution::Uniform(-0.1, 0.1), device);
        Weight::Dense(shard.cast(FloatDType::from(dtype)))
    });
    let head = Head { shards: shards.collect(), chunk_bytes: 64 << 20 };
    let hidden = TensorData::new(Numbers::new(3).vec(n_rows * n_hidden, 1.0), [n_rows, n_hidden]);
    let targets = [0, 8191, 8192, 65_000, 128_000, 128_255];
    let rows = [4, 0, 2, 1, 2, 3];
    let scored: Vec<_> =
        rows.into_iter().zip(targets).map(|(row_idx, target)| ScoredToken { row_idx, target }).collect();
    let dlogps = Numbers::new(5).vec(scored.len(), 1.0);

    let forward = token_logps(Tensor::from_data(hidden.clone(), device), &head, &scored, Expected::Keep);
    let logps = forward.logps.clone().into_data().to_vec::<f32>().unwrap();
    let gradient = Tensor::from_data(TensorData::new(dlogps.clone(), [scored.len()]), device);
    let dhidden = token_logps_backward(gradient, forward, &head, &scored);
    let dhidden = dhidden.into_data().to_vec::<f32>().unwrap();

    let hidden = Tensor::from_data(hidden, &Default::default());
    let (want_logps, want_dhidden) = by_shard(&hidden, head.shards.into_iter(), &scored, &dlogps);
    assert_close(&logps, &want_logps, 0.0, 1e-5, "logps");
    assert_close(&dhidden, &want_dhidden, if dtype == DType::F16 { 1e-5 } else { 1e-6 }, 1e-4, "dhidden");
}

#[test]
fn the_real_head_fits_the_software_adapter() {
    let Some(device) = adapter() else { return };
    for dtype in [DType::F32, DType::F16] {
        check_the_real_head(dtype, &device);
    }
}
