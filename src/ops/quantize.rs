//! How frozen matrices are stored, and what makes them of their values and back: block-wise int8, and NF4 with double quantisation
//! (QLoRA, arXiv:2305.14314, section 3; levels and rounding as in bitsandbytes).
//!
//! A block is 64 values in a row, as they follow each other in memory:
//!
//! ```text
//! int8   scale = max |v| · (1/127)     code: (code − ½) · scale ≤ v < (code + ½) · scale    v' = code · scale
//! NF4    scale = max |v|               code: the nearest of 16 levels to v / scale          v' = level[code] · scale
//! ```
//!
//! NF4's scales are quantised in turn: less their mean, in blocks of 256, to the nearest of 256 levels. A weight costs 8.5 bits in
//! int8 and 4.127 in NF4. A matrix is multiplied in a dense form that is made for the product and dropped behind it, so that the
//! matrix engine is one for all, and the gradient by the input goes through the very weights that forward saw.
//!
//! 16-bit weights on a device that computes in `f32` alone are stored as pairs of `f16`, and made `f32` in the same way.

mod kernel;
mod levels;
mod reference;

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Tensor, TensorData};
use half::f16;

use super::Kernels;

pub(super) use kernel::{KernelScales, launch_dequantize, launch_quantize};
pub use levels::{DYNAMIC_LEVELS, NF4_LEVELS, double_quantize};
pub use reference::{dequantize_reference, quantize_reference};

/// Values that share a scale.
pub const BLOCK: usize = 64;
/// Scales that share a scale of their own.
pub const SCALES_BLOCK: usize = 256;
/// Values that are quantised at a time, in whole blocks: as `f32` they take 32 MiB.
const CHUNK: usize = 1 << 23;

/// How a frozen matrix is stored on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// As `f32`.
    F32,
    /// As `f16`, in which it is multiplied.
    F16,
    /// As `bf16`, likewise.
    Bf16,
    /// As `f16`, two in a word, on a device that has no arithmetic for them.
    PackedF16,
    /// Eight bits a value and an `f32` a block.
    Int8,
    /// Four bits a value and eight a block.
    Nf4,
}

impl Storage {
    /// What a matrix of so many values takes, in bytes.
    pub fn bytes(self, n_values: usize) -> usize {
        const WORD: usize = size_of::<u32>();
        let n_blocks = n_values.div_ceil(BLOCK);
        match self {
            Self::F32 => size_of::<f32>() * n_values,
            Self::F16 | Self::Bf16 => size_of::<f16>() * n_values,
            Self::PackedF16 => WORD * self.n_words(n_values),
            Self::Int8 => WORD * (self.n_words(n_values) + n_blocks),
            Self::Nf4 => {
                WORD * (self.n_words(n_values) + n_blocks.div_ceil(4) + n_blocks.div_ceil(SCALES_BLOCK))
            }
        }
    }

    /// Whether it is multiplied as it is stored.
    pub fn is_dense(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }

    /// Bits of a code.
    fn bits(self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 | Self::Bf16 | Self::PackedF16 => 16,
            Self::Int8 => 8,
            Self::Nf4 => 4,
        }
    }

    /// Words of the codes of so many values; those of a block fill theirs.
    fn n_words(self, n_values: usize) -> usize {
        let n_codes = if self == Self::PackedF16 { n_values } else { n_values.next_multiple_of(BLOCK) };
        (n_codes * self.bits()).div_ceil(32)
    }
}

/// A frozen matrix on a device.
#[derive(Debug, Clone)]
pub enum Weight<B: Backend> {
    /// Multiplied as it is stored, in `f32`, `f16` or `bf16`.
    Dense(Tensor<B, 2>),
    /// Made dense for every product.
    Packed(Packed<B>),
}

/// A matrix in codes.
#[derive(Debug, Clone)]
pub struct Packed<B: Backend> {
    /// Rows and columns.
    pub shape: [usize; 2],
    /// [`PackedF16`](Storage::PackedF16), [`Int8`](Storage::Int8) or [`Nf4`](Storage::Nf4).
    pub storage: Storage,
    /// What it is made for a product: `f32`, `f16` or `bf16`.
    pub dtype: DType,
    /// The codes, the first one in the lowest bits of the first word, each block in words of its own.
    pub codes: Tensor<B, 1, Int>,
    /// What scales the blocks.
    pub scales: Scales<B>,
}

/// What scales the blocks of a matrix in codes.
#[derive(Debug, Clone)]
pub enum Scales<B: Backend> {
    /// Nothing does.
    None,
    /// `[blocks]`
    Single(Tensor<B, 1>),
    /// `level[code] · scale + mean`, with a scale for 256 blocks.
    Double {
        /// `[blocks]`, four in a word.
        codes: Tensor<B, 1, Int>,
        /// `[blocks / 256]`, rounded up.
        scales: Tensor<B, 1>,
        /// The mean of what was quantised.
        mean: f32,
        /// [`NF4_LEVELS`] and [`DYNAMIC_LEVELS`], `[272]`, on the device.
        levels: Tensor<B, 1>,
    },
}

impl<B: Backend> Weight<B> {
    /// Rows and columns, `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(tensor) => tensor.dims(),
            Self::Packed(packed) => packed.shape,
        }
    }

    /// The type in which it is multiplied.
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(tensor) => tensor.dtype(),
            Self::Packed(packed) => packed.dtype,
        }
    }

    /// `f16` values, stored as such and multiplied in `f32`.
    ///
    /// # Panics
    /// If the values are fewer or more than the shape has.
    pub fn packed_f16(values: &[f16], shape: [usize; 2], device: &B::Device) -> Self {
        assert_eq!(values.len(), shape[0] * shape[1], "quantize: values against the shape {shape:?}");
        let bits = |pair: &[f16]| {
            let high = pair.get(1).map_or(0, |value| value.to_bits());
            u32::from(pair[0].to_bits()) | u32::from(high) << 16
        };
        Self::Packed(Packed {
            shape,
            storage: Storage::PackedF16,
            dtype: DType::F32,
            codes: words(values.chunks(2).map(bits).collect(), device),
            scales: Scales::None,
        })
    }
}

impl<B: Kernels> Weight<B> {
    /// Quantises a matrix. `values` gives a range of them, row by row, as `f32`; at most 32 MiB are asked for at a time.
    ///
    /// # Panics
    /// If `storage` is neither [`Int8`](Storage::Int8) nor [`Nf4`](Storage::Nf4).
    pub fn quantize(
        shape: [usize; 2],
        storage: Storage,
        dtype: DType,
        values: impl Fn(std::ops::Range<usize>) -> Tensor<B, 1>,
    ) -> Self {
        assert!(matches!(storage, Storage::Int8 | Storage::Nf4), "quantize: {storage:?} has no scales");
        let n_values = shape[0] * shape[1];
        let starts = (0..n_values).step_by(CHUNK);
        let (mut codes, mut scales) = (Vec::new(), Vec::new());
        for start in starts {
            let (chunk_codes, chunk_scales) =
                B::quantize_blocks(values(start..(start + CHUNK).min(n_values)), storage);
            codes.push(chunk_codes);
            scales.push(chunk_scales);
        }
        let (codes, scales) = (joined(codes), joined(scales));
        let scales = match storage {
            Storage::Nf4 => double(&scales),
            _ => Scales::Single(scales),
        };
        Self::Packed(Packed { shape, storage, dtype, codes, scales })
    }

    /// The matrix as it is multiplied, `[out, in]`.
    pub fn to_dense(&self) -> Tensor<B, 2> {
        match self {
            Self::Dense(tensor) => tensor.clone(),
            Self::Packed(packed) => B::dequantize_blocks(packed),
        }
    }
}

/// Reads words into a tensor.
fn words<B: Backend>(words: Vec<u32>, device: &B::Device) -> Tensor<B, 1, Int> {
    let shape = [words.len()];
    Tensor::from_data(TensorData::new(words, shape), (device, DType::U32))
}

/// The same of numbers.
fn floats<B: Backend>(values: Vec<f32>, device: &B::Device) -> Tensor<B, 1> {
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// The parts one after the other.
fn joined<B: Backend, K: burn::tensor::BasicOps<B>>(mut parts: Vec<Tensor<B, 1, K>>) -> Tensor<B, 1, K> {
    match parts.len() {
        1 => parts.swap_remove(0),
        _ => Tensor::cat(parts, 0),
    }
}

/// Quantises a matrix's scales. They are few enough to do so on the host.
fn double<B: Backend>(scales: &Tensor<B, 1>) -> Scales<B> {
    let device = scales.device();
    let values = scales.clone().into_data().into_vec::<f32>().expect("scales are f32");
    let doubled = double_quantize(&values);
    let packed = doubled
        .codes
        .chunks(4)
        .map(|codes| codes.iter().enumerate().map(|(i, &code)| u32::from(code) << (8 * i)).sum());
    Scales::Double {
        codes: words(packed.collect(), &device),
        scales: floats(doubled.scales, &device),
        mean: doubled.mean,
        levels: floats([&NF4_LEVELS[..], &DYNAMIC_LEVELS[..]].concat(), &device),
    }
}
