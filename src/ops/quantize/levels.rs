//! The levels that codes stand for, and the second quantisation of NF4.

use std::sync::LazyLock;

use super::SCALES_BLOCK;

/// NF4's levels: quantiles of the normal distribution, scaled to [-1, 1], with a zero (bitsandbytes' `get_4bit_type("nf4")`).
pub const NF4_LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// The code of zero.
pub(super) const NF4_ZERO: u32 = 7;

/// Between which levels a value lies: half-way from each to the next.
pub(super) static NF4_BORDERS: LazyLock<[f32; 15]> =
    LazyLock::new(|| std::array::from_fn(|i| (NF4_LEVELS[i] + NF4_LEVELS[i + 1]) / 2.0));

/// The levels of scales, ascending: seven decades of means of equal parts, more of them in the larger, with both signs, zero and one
/// (bitsandbytes' `create_dynamic_map`; arXiv:1511.04561).
pub static DYNAMIC_LEVELS: LazyLock<[f32; 256]> = LazyLock::new(|| {
    let mut levels = vec![0.0f32, 1.0];
    for decade in 0..7 {
        let n_parts = 1 << decade;
        let step = (1.0 - 0.1f32) / n_parts as f32;
        // As `torch.linspace` has it, to the last bit: from the nearer end, and rounded once.
        let border = |i: i32| match i < (n_parts + 1) / 2 {
            true => step.mul_add(i as f32, 0.1),
            false => step.mul_add((i - n_parts) as f32, 1.0),
        };
        for part in 0..n_parts {
            let mean = (border(part) + border(part + 1)) / 2.0;
            let level = 10f64.powi(decade - 6) as f32 * mean;
            levels.extend([level, -level]);
        }
    }
    levels.sort_by(f32::total_cmp);
    levels.try_into().expect("2 + 2 (1 + 2 + … + 64) levels are 256")
});

/// Scales in codes of [`DYNAMIC_LEVELS`].
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuantized {
    /// A code for each.
    pub codes: Vec<u8>,
    /// The largest of each block's, without the mean.
    pub scales: Vec<f32>,
    /// What was subtracted.
    pub mean: f32,
}

/// Quantises scales: less their mean, by blocks of 256, to the nearest level.
pub fn double_quantize(values: &[f32]) -> DoubleQuantized {
    let mean = (values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len().max(1) as f64) as f32;
    let (mut codes, mut scales) = (Vec::with_capacity(values.len()), Vec::new());
    for block in values.chunks(SCALES_BLOCK) {
        let scale = block.iter().map(|v| (v - mean).abs()).fold(0.0, f32::max);
        let code = |v: &f32| nearest_level(if scale > 0.0 { (v - mean) / scale } else { 0.0 });
        codes.extend(block.iter().map(code));
        scales.push(scale);
    }
    DoubleQuantized { codes, scales, mean }
}

fn nearest_level(x: f32) -> u8 {
    let levels = &*DYNAMIC_LEVELS;
    let above = levels.partition_point(|&level| level <= x).clamp(1, levels.len() - 1);
    let is_lower = x - levels[above - 1] <= levels[above] - x;
    (above - usize::from(is_lower)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_levels_ascend_and_have_a_zero() {
        assert!(NF4_LEVELS.is_sorted_by(|a, b| a < b) && NF4_LEVELS[NF4_ZERO as usize] == 0.0);
        assert!(DYNAMIC_LEVELS.is_sorted_by(|a, b| a < b) && DYNAMIC_LEVELS[127] == 0.0);
        assert_eq!(DYNAMIC_LEVELS[255], 1.0, "the largest scale is kept");
        for (code, level) in DYNAMIC_LEVELS.iter().enumerate() {
            assert_eq!(usize::from(nearest_level(*level)), code, "{level} is its own nearest");
        }
    }

    #[test]
    fn equal_scales_are_their_mean() {
        let doubled = double_quantize(&[0.25; 300]);
        assert_eq!((doubled.mean, doubled.scales), (0.25, vec![0.0, 0.0]));
        assert!(doubled.codes.iter().all(|&code| code == 127));
    }
}
