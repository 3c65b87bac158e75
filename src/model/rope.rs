//! Rotary position embedding (arXiv:2104.09864) in Hugging Face's half-split layout, with Llama-3's stretching.

use std::f64::consts::TAU;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::LlamaConfig;

/// Rotation angles' cosine and sine for a list of positions, `[tokens, head_dim / 2]` each, computed in `f64`.
#[derive(Debug, Clone)]
pub struct RopeTable<B: Backend> {
    /// `cos(position · frequency)`
    pub cos: Tensor<B, 2>,
    /// `sin(position · frequency)`
    pub sin: Tensor<B, 2>,
}

impl<B: Backend> RopeTable<B> {
    /// Computes the table for these positions.
    pub fn new(config: &LlamaConfig, positions: &[u32], device: &B::Device) -> Self {
        let frequencies = inv_freq(config);
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = positions
                .iter()
                .flat_map(|&p| frequencies.iter().map(move |&w| f(f64::from(p) * w) as f32))
                .collect();
            Tensor::from_data(TensorData::new(values, [positions.len(), frequencies.len()]), device)
        };
        Self { cos: table(f64::cos), sin: table(f64::sin) }
    }

    /// Rotates every head: `[x1, x2] -> [x1 cos − x2 sin, x2 cos + x1 sin]` over the halves of the last dimension.
    ///
    /// # Shapes
    /// - `x`, output: `[tokens, heads, head_dim]`
    pub fn rotate(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let half = x.dims()[2] / 2;
        let (x1, x2) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
        let (cos, sin) = (self.cos.clone().unsqueeze_dim::<3>(1), self.sin.clone().unsqueeze_dim::<3>(1));
        let first = x1.clone() * cos.clone() - x2.clone() * sin.clone();
        let second = x2 * cos + x1 * sin;
        Tensor::cat(vec![first, second], 2)
    }
}

/// Rotary frequencies in radians a position, `[head_dim / 2]`: `theta^(−2i / head_dim)`, long wavelengths divided by `factor` and the
/// band between blended (transformers, `_compute_llama3_parameters`).
pub fn inv_freq(config: &LlamaConfig) -> Vec<f64> {
    let plain =
        (0..config.head_dim / 2).map(|i| config.rope_theta.powf(-2.0 * i as f64 / config.head_dim as f64));
    let Some(scaling) = config.rope_scaling else { return plain.collect() };
    let (low, high, context) =
        (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings);
    plain
        .map(|frequency| {
            let wavelength = TAU / frequency;
            if wavelength < context / high {
                frequency
            } else if wavelength > context / low {
                frequency / scaling.factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                (1.0 - smooth) * frequency / scaling.factor + smooth * frequency
            }
        })
        .collect()
}
