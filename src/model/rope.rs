//! The angles of the rotary position embedding, with Llama-3's stretching.

use std::f64::consts::TAU;

use burn::tensor::backend::Backend;
use burn::tensor::{Tensor, TensorData};

use super::LlamaConfig;
use crate::ops::rope::RopeTable;

/// Computes the rotation angles' table for these positions, in `f64`.
pub fn rope_table<B: Backend>(config: &LlamaConfig, positions: &[u32], device: &B::Device) -> RopeTable<B> {
    let frequencies = inv_freq(config);
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f32> = positions
            .iter()
            .flat_map(|&p| frequencies.iter().map(move |&w| f(f64::from(p) * w) as f32))
            .collect();
        Tensor::from_data(TensorData::new(values, [positions.len(), frequencies.len()]), device)
    };
    RopeTable { cos: table(f64::cos), sin: table(f64::sin) }
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
