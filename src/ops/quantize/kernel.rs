//! The kernels of [`quantize`](super).

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::levels::{NF4_BORDERS, NF4_ZERO};
use super::reference::INT8_STEP;
use super::{BLOCK, SCALES_BLOCK, Storage};
use crate::ops::cube::{bytes, empty, one_thread_each, vector_width};
use crate::ops::profile;

/// Codes of a word.
const fn per_word(storage: Storage) -> usize {
    match storage {
        Storage::Nf4 => 8,
        Storage::Int8 => 4,
        _ => 2,
    }
}

#[cube]
fn code_of(value: f32, scale: f32, borders: &Array<f32>, #[comptime] storage: Storage) -> u32 {
    if comptime!(storage == Storage::Int8) {
        let mut code = 0.0f32;
        if scale > 0.0 {
            code = (value / scale + 0.5).floor();
            if value >= (code + 0.5) * scale {
                code += 1.0;
            }
            if value < (code - 0.5) * scale {
                code -= 1.0;
            }
        }
        u32::cast_from(i32::cast_from(clamp(code, -127.0, 127.0))) & 0xff
    } else {
        let mut code = comptime!(NF4_ZERO).runtime();
        if scale > 0.0 {
            code = 0u32;
            #[unroll]
            for i in 0..15usize {
                code += u32::cast_from(value > borders[i] * scale);
            }
        }
        code
    }
}

/// A thread a block.
#[cube(launch_unchecked)]
fn quantize_kernel(
    values: &Array<f32>,
    borders: &Array<f32>,
    codes: &mut Array<u32>,
    scales: &mut Array<f32>,
    n_values: usize,
    n_blocks: usize,
    #[comptime] storage: Storage,
) {
    let block = ABSOLUTE_POS;
    if block < n_blocks {
        let start = block * BLOCK;
        let end = clamp_max(start + BLOCK, n_values);
        let mut most = 0.0f32;
        for i in start..end {
            most = max(most, values[i].abs());
        }
        let mut scale = most;
        if comptime!(storage == Storage::Int8) {
            scale = most * INT8_STEP;
        }
        scales[block] = scale;
        let per_word = comptime!(per_word(storage));
        let n_words = comptime!(BLOCK / per_word);
        for word in 0..n_words {
            let mut bits = 0u32;
            #[unroll]
            for lane in 0..per_word {
                let i = start + word * per_word + lane;
                let mut value = 0.0f32;
                if i < end {
                    value = values[i];
                }
                let code = code_of(value, scale, borders, storage);
                bits |= code << comptime!((lane * 32 / per_word) as u32);
            }
            codes[block * n_words + word] = bits;
        }
    }
}

/// Quantises `f32` values: `(codes, scales)`, with a scale for each block that is not one of [`Scales::Double`](super::Scales).
pub(in crate::ops) fn launch_quantize<R: CubeRuntime>(
    values: CubeTensor<R>,
    storage: Storage,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let (client, n_values) = (values.client.clone(), values.meta.num_elements());
    let n_blocks = n_values.div_ceil(BLOCK);
    let codes = empty(&values, Shape::from([storage.n_words(n_values)]), DType::U32);
    let scales = empty(&values, Shape::from([n_blocks]), DType::F32);
    let (cubes, cube) = one_thread_each(&client, n_blocks);
    let moved = bytes(&[&values, &codes, &scales]);
    profile::kernel("quantize", 2 * n_values, moved, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: blocks are held against their number, values against theirs, and the codes have room for whole blocks.
        unsafe {
            quantize_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                values.clone().into_array_arg(),
                table(&client, &*NF4_BORDERS),
                codes.clone().into_array_arg(),
                scales.clone().into_array_arg(),
                n_values,
                n_blocks,
                storage,
            );
        }
    });
    (codes, scales)
}

/// The value of an `f16` in the low half of a word. Subnormal ones are computed, since `f32` ones of their bits may be flushed; one
/// without a finite value has the largest exponent here as well.
#[cube]
fn f16_value(bits: u32) -> f32 {
    let exponent = bits >> 10 & 0x1f;
    let mantissa = bits & 0x3ff;
    let bias = select(exponent == 31, u32::new(224), u32::new(112));
    let normal = f32::reinterpret((exponent + bias) << 23 | mantissa << 13);
    let subnormal = f32::cast_from(mantissa) * f32::new(5.960_464_5e-8);
    let size = select(exponent == 0, subnormal, normal);
    select(bits >> 15 & 1 == 1, -size, size)
}

/// A thread a word of codes, all of one block.
#[cube(launch_unchecked)]
fn dequantize_kernel<F: Float, N: Size>(
    codes: &Array<u32>,
    scale_codes: &Array<u32>,
    scales: &Array<f32>,
    levels: &Array<f32>,
    values: &mut Array<Vector<F, N>>,
    n_words: usize,
    vectors: usize,
    mean: f32,
    #[comptime] storage: Storage,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < n_words {
        let width = N::value();
        let per_word = comptime!(per_word(storage));
        let bits = comptime!(32 / per_word);
        let block = ABSOLUTE_POS * per_word / BLOCK;
        let word = codes[ABSOLUTE_POS];
        let mut scale = 1.0f32;
        if comptime!(storage == Storage::Int8) {
            scale = scales[block];
        }
        if comptime!(storage == Storage::Nf4) {
            let code = scale_codes[block / 4] >> ((block % 4 * 8) as u32) & 0xff;
            scale = levels[16 + code as usize] * scales[block / SCALES_BLOCK] + mean;
        }
        let n_vectors = comptime!(per_word / width);
        #[unroll]
        for v in 0..n_vectors {
            let mut vector = Vector::<F, N>::empty();
            #[unroll]
            for lane in 0..width {
                let code = word >> comptime!(((v * width + lane) * bits) as u32);
                let mut value = scale;
                if comptime!(storage == Storage::PackedF16) {
                    value = f16_value(code & 0xffff);
                } else if comptime!(storage == Storage::Int8) {
                    value *= f32::cast_from(i32::reinterpret(code << 24) >> 24);
                } else {
                    value *= levels[(code & 0xf) as usize];
                }
                vector[lane] = F::cast_from(value);
            }
            let at = ABSOLUTE_POS * n_vectors + v;
            if at < vectors {
                values[at] = vector;
            }
        }
    }
}

/// What scales a matrix's blocks, as the kernel takes it.
pub(in crate::ops) struct KernelScales<R: CubeRuntime> {
    pub(in crate::ops) codes: Option<CubeTensor<R>>,
    pub(in crate::ops) scales: Option<CubeTensor<R>>,
    pub(in crate::ops) levels: Option<CubeTensor<R>>,
    pub(in crate::ops) mean: f32,
}

/// Makes the dense matrix.
pub(in crate::ops) fn launch_dequantize<R: CubeRuntime>(
    codes: CubeTensor<R>,
    scales: KernelScales<R>,
    storage: Storage,
    shape: [usize; 2],
    dtype: DType,
) -> CubeTensor<R> {
    let client = codes.client.clone();
    let n_values = shape[0] * shape[1];
    let width = vector_width(n_values).min(per_word(storage));
    let values = empty(&codes, Shape::from(shape), dtype);
    let n_words = n_values.div_ceil(per_word(storage));
    let (cubes, cube) = one_thread_each(&client, n_words);
    let moved = bytes(&[&codes, &values]) + scales.scales.as_ref().map_or(0, |scales| bytes(&[scales]));
    // What a storage does not have is never read; some buffer has to stand in its place.
    let scale_codes = scales.codes.unwrap_or_else(|| codes.clone());
    let block_scales = scales.scales.unwrap_or_else(|| codes.clone());
    let levels = scales.levels.unwrap_or_else(|| codes.clone());
    profile::kernel("dequantize", n_values, moved, &client, || {
        #[expect(unsafe_code, reason = "a checked launch costs a comparison for every access")]
        // SAFETY: words are held against their number and vectors against theirs; the scales cover all words.
        unsafe {
            dequantize_kernel::launch_unchecked::<R>(
                &client,
                cubes,
                cube,
                width,
                codes.into_array_arg(),
                scale_codes.into_array_arg(),
                block_scales.into_array_arg(),
                levels.into_array_arg(),
                values.clone().into_array_arg(),
                n_words,
                n_values / width,
                scales.mean,
                storage,
                dtype.into(),
            );
        }
    });
    values
}

fn table<R: CubeRuntime>(client: &ComputeClient<R>, values: &[f32]) -> ArrayArg<R> {
    #[expect(unsafe_code, reason = "an array of plain numbers has no other constructor")]
    // SAFETY: the buffer was made of these numbers.
    unsafe {
        ArrayArg::from_raw_parts(client.create_from_slice(bytemuck::cast_slice(values)), values.len())
    }
}
