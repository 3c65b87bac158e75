//! Codes in plain loops over host memory: what the CPU runs, and what the kernels are held to.

use burn::tensor::backend::Backend;
use burn::tensor::{Int, Tensor, TensorData};
use half::f16;
use rayon::prelude::*;

use super::levels::{NF4_BORDERS, NF4_ZERO};
use super::{BLOCK, DYNAMIC_LEVELS, NF4_LEVELS, Packed, SCALES_BLOCK, Scales, Storage, floats, words};

/// [`Kernels::quantize_blocks`](crate::ops::Kernels::quantize_blocks) on the host.
pub fn quantize_reference<B: Backend>(
    values: Tensor<B, 1>,
    storage: Storage,
) -> (Tensor<B, 1, Int>, Tensor<B, 1>) {
    let device = values.device();
    let values = numbers(values);
    let n_words = BLOCK * storage.bits() / 32;
    let mut codes = vec![0; values.len().div_ceil(BLOCK) * n_words];
    let scales: Vec<f32> = values
        .par_chunks(BLOCK)
        .zip(codes.par_chunks_mut(n_words))
        .map(|(block, words)| {
            let most = block.iter().fold(0f32, |most, v| most.max(v.abs()));
            let scale = if storage == Storage::Int8 { most * INT8_STEP } else { most };
            for i in 0..BLOCK {
                let value = block.get(i).copied().unwrap_or_default();
                let code = match storage {
                    Storage::Int8 => int8_code(value, scale),
                    _ => nf4_code(value, scale),
                };
                let bit = i * storage.bits();
                words[bit / 32] |= code << (bit % 32);
            }
            scale
        })
        .collect();
    (words(codes, &device), floats(scales, &device))
}

/// `max |v|` as a scale: 127 is the largest code.
pub(super) const INT8_STEP: f32 = 1.0 / 127.0;

fn int8_code(value: f32, scale: f32) -> u32 {
    if scale == 0.0 {
        return 0;
    }
    let mut code = (value / scale + 0.5).floor();
    // A quotient is not exact on every device; products are.
    if value >= (code + 0.5) * scale {
        code += 1.0;
    }
    if value < (code - 0.5) * scale {
        code -= 1.0;
    }
    (code.clamp(-127.0, 127.0) as i32 as u32) & 0xff
}

fn nf4_code(value: f32, scale: f32) -> u32 {
    if scale == 0.0 {
        return NF4_ZERO;
    }
    // Borders are scaled instead of the value: a product is exact to rounding on every device, a quotient is not.
    NF4_BORDERS.iter().map(|border| u32::from(value > border * scale)).sum()
}

/// [`Kernels::dequantize_blocks`](crate::ops::Kernels::dequantize_blocks) on the host.
pub fn dequantize_reference<B: Backend>(packed: &Packed<B>) -> Tensor<B, 2> {
    let device = packed.codes.device();
    let codes = integers(&packed.codes);
    let scales = match &packed.scales {
        Scales::None => Vec::new(),
        Scales::Single(scales) => numbers(scales.clone()),
        Scales::Double { codes, scales, mean, .. } => {
            let (codes, scales) = (integers(codes), numbers(scales.clone()));
            let n_blocks = (packed.shape[0] * packed.shape[1]).div_ceil(BLOCK);
            let level =
                |block: usize| DYNAMIC_LEVELS[(codes[block / 4] >> (8 * (block % 4)) & 0xff) as usize];
            (0..n_blocks).map(|block| level(block) * scales[block / SCALES_BLOCK] + mean).collect()
        }
    };
    let bits = packed.storage.bits();
    let mut values = vec![0f32; packed.shape[0] * packed.shape[1]];
    let blocks = values.par_chunks_mut(BLOCK).zip(codes.par_chunks(BLOCK * bits / 32)).enumerate();
    blocks.for_each(|(block, (values, words))| {
        let scale = scales.get(block).copied().unwrap_or(1.0);
        for (values, word) in values.chunks_mut(32 / bits).zip(words) {
            for (i, value) in values.iter_mut().enumerate() {
                let code = word >> (i * bits);
                *value = match packed.storage {
                    Storage::PackedF16 => f16::from_bits(code as u16).to_f32(),
                    Storage::Int8 => f32::from(code as i8) * scale,
                    _ => NF4_LEVELS[(code & 0xf) as usize] * scale,
                };
            }
        }
    });
    Tensor::from_data(
        TensorData::new(values, packed.shape).convert_dtype(packed.dtype),
        (&device, packed.dtype),
    )
}

fn numbers<B: Backend>(tensor: Tensor<B, 1>) -> Vec<f32> {
    tensor.into_data().into_vec().expect("values and scales are f32")
}

fn integers<B: Backend>(tensor: &Tensor<B, 1, Int>) -> Vec<u32> {
    tensor.clone().into_data().into_vec().expect("codes are u32")
}
