//! Values as a file stores them, and their conversion to what a model computes in.

use std::fmt;
use std::ops::{Add, Range};
use std::sync::Arc;

use burn::tensor::{DType, TensorData};
use half::{bf16, f16, slice::HalfFloatSliceExt, vec::HalfBitsVecExt};
use rayon::prelude::*;
use safetensors::Dtype;

/// The bytes of a file: mapped, or part of the executable.
pub(super) type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Values that are converted at a time: few enough that their `f32` stay in the first cache.
const BLOCK: usize = 4096;
/// Blocks that a processor takes at least: long beside what it takes to hand them over.
const BLOCKS_OF_A_TASK: usize = 32;

/// Where a tensor's values are.
#[derive(Clone)]
pub(super) struct StoredTensor {
    pub(super) bytes: Bytes,
    pub(super) range: Range<usize>,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

/// How many values were no numbers, or a conversion to `f16` did not keep.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lost {
    /// NaN or infinite as stored.
    pub(super) not_finite: usize,
    /// Became infinite.
    pub(super) overflowed: usize,
    /// Became 0.
    pub(super) flushed: usize,
}

impl Add for Lost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            not_finite: self.not_finite + other.not_finite,
            overflowed: self.overflowed + other.overflowed,
            flushed: self.flushed + other.flushed,
        }
    }
}

impl StoredTensor {
    /// Bytes of a value in the file.
    pub(super) fn width(&self) -> usize {
        self.dtype.bitsize() / 8
    }

    /// Values as `f32`, and how many are no numbers.
    pub(super) fn floats(&self, elements: Range<usize>) -> (Vec<f32>, Lost) {
        let mut floats = vec![0.0; elements.len()];
        let lost = self.convert(elements, &mut floats, |stored, dtype, floats| {
            widen(stored, dtype, floats);
            Lost { not_finite: floats.iter().filter(|float| !float.is_finite()).count(), ..Lost::default() }
        });
        (floats, lost)
    }

    /// Values as `f16`, and how many of them are no longer what they were.
    pub(super) fn halves(&self, elements: Range<usize>) -> (Vec<f16>, Lost) {
        let mut halves: Vec<f16> = vec![0u16; elements.len()].reinterpret_into();
        let lost = self.convert(elements, &mut halves, narrow);
        (halves, lost)
    }

    /// Values as `bf16`: those of a file in it as they are, others rounded; and how many are no numbers. It has the range of `f32`, so
    /// that all but nothing is lost.
    pub(super) fn brain_floats(&self, elements: Range<usize>) -> (Vec<bf16>, Lost) {
        let mut floats: Vec<bf16> = vec![0u16; elements.len()].reinterpret_into();
        let lost = self.convert(elements, &mut floats, |stored, dtype, floats| {
            if dtype == Dtype::BF16 {
                let pairs = stored.chunks_exact(2).map(|b| [b[0], b[1]]);
                floats.iter_mut().zip(pairs).for_each(|(float, b)| *float = bf16::from_le_bytes(b));
            } else {
                let mut block = [0.0; BLOCK];
                let values = &mut block[..floats.len()];
                widen(stored, dtype, values);
                floats.convert_from_f32_slice(values);
            }
            Lost { not_finite: floats.iter().filter(|float| !float.is_finite()).count(), ..Lost::default() }
        });
        (floats, lost)
    }

    /// Converts values, at most [`BLOCK`] at a time, on all processors.
    fn convert<F: Send>(
        &self,
        elements: Range<usize>,
        values: &mut [F],
        convert: impl Fn(&[u8], Dtype, &mut [F]) -> Lost + Sync,
    ) -> Lost {
        let stored = self.stored(elements).par_chunks(BLOCK * self.width());
        let blocks = values.par_chunks_mut(BLOCK).zip(stored).with_min_len(BLOCKS_OF_A_TASK);
        blocks.map(|(values, stored)| convert(stored, self.dtype, values)).reduce(Lost::default, Lost::add)
    }

    /// The values of a matrix in the type that they are stored in, after `change` of each row, `[columns]` in `f32`; and how many are no
    /// finite numbers before and after, as those beyond what the type holds.
    pub(super) fn changed(&self, change: impl Fn(usize, &mut [f32]) + Sync) -> (Vec<u8>, [usize; 2]) {
        let n_columns = self.shape[1];
        let stored = self.stored(0..self.shape.iter().product());
        let mut changed = vec![0; stored.len()];
        let rows =
            changed.par_chunks_mut(n_columns * self.width()).zip(stored.par_chunks(n_columns * self.width()));
        let not_finite = rows.enumerate().map_init(
            || vec![0.0; n_columns],
            |values, (row, (changed, stored))| {
                widen(stored, self.dtype, values);
                let before = values.iter().filter(|value| !value.is_finite()).count();
                change(row, values);
                [before, store(values, self.dtype, changed)]
            },
        );
        let not_finite = not_finite.reduce(|| [0; 2], |a, b| [a[0] + b[0], a[1] + b[1]]);
        (changed, not_finite)
    }

    pub(super) fn stored(&self, elements: Range<usize>) -> &[u8] {
        let stored = &(*self.bytes).as_ref()[self.range.clone()];
        &stored[elements.start * self.width()..elements.end * self.width()]
    }
}

fn widen(stored: &[u8], dtype: Dtype, values: &mut [f32]) {
    let pairs = stored.chunks_exact(2).map(|b| [b[0], b[1]]);
    match dtype {
        Dtype::F16 => values.iter_mut().zip(pairs).for_each(|(v, b)| *v = f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => values.iter_mut().zip(pairs).for_each(|(v, b)| *v = bf16::from_le_bytes(b).to_f32()),
        _ => {
            let quads = stored.chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
            values.iter_mut().zip(quads).for_each(|(v, b)| *v = f32::from_le_bytes(b));
        }
    }
}

/// The reverse of [`widen`], rounded to the nearest; and how many are no finite numbers in that type.
fn store(values: &[f32], dtype: Dtype, stored: &mut [u8]) -> usize {
    let mut not_finite = 0;
    let mut keep = |bytes: &mut [u8], kept: &[u8], is_finite: bool| {
        bytes.copy_from_slice(kept);
        not_finite += usize::from(!is_finite);
    };
    let width = dtype.bitsize() / 8;
    for (value, bytes) in values.iter().zip(stored.chunks_exact_mut(width)) {
        match dtype {
            Dtype::F16 => {
                let half = f16::from_f32(*value);
                keep(bytes, &half.to_le_bytes(), half.is_finite());
            }
            Dtype::BF16 => {
                let half = bf16::from_f32(*value);
                keep(bytes, &half.to_le_bytes(), half.is_finite());
            }
            _ => keep(bytes, &value.to_le_bytes(), value.is_finite()),
        }
    }
    not_finite
}

/// Converts at most [`BLOCK`] values.
fn narrow(stored: &[u8], dtype: Dtype, halves: &mut [f16]) -> Lost {
    if dtype == Dtype::F16 {
        let pairs = stored.chunks_exact(2).map(|b| [b[0], b[1]]);
        halves.iter_mut().zip(pairs).for_each(|(half, b)| *half = f16::from_le_bytes(b));
        let not_finite = halves.iter().filter(|half| !half.is_finite()).count();
        return Lost { not_finite, ..Lost::default() };
    }
    let mut block = [0.0; BLOCK];
    let values = &mut block[..halves.len()];
    widen(stored, dtype, values);
    halves.convert_from_f32_slice(values);
    let mut lost = Lost::default();
    for (value, half) in values.iter().zip(halves) {
        lost.not_finite += usize::from(!value.is_finite());
        lost.overflowed += usize::from(value.is_finite() && half.is_infinite());
        lost.flushed += usize::from(*value != 0.0 && half.to_bits() << 1 == 0);
    }
    lost
}

/// A matrix that stays in host memory as its file stores it.
#[derive(Clone)]
pub struct HostMatrix(pub(super) StoredTensor);

impl HostMatrix {
    /// A matrix of little-endian values, row by row.
    ///
    /// # Panics
    /// If there are more or fewer bytes than the shape takes, or the dtype is none of `f32`, `f16` and `bf16`.
    pub(super) fn new(bytes: Vec<u8>, dtype: DType, shape: [usize; 2]) -> Self {
        let stored = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            _ => panic!("a matrix in host memory is f32, f16 or bf16, not {dtype:?}"),
        };
        assert_eq!(bytes.len(), shape[0] * shape[1] * dtype.size(), "bytes of a matrix of {shape:?}");
        let range = 0..bytes.len();
        Self(StoredTensor { bytes: Arc::new(bytes), range, dtype: stored, shape: shape.to_vec() })
    }

    /// Gathers rows, `[ids] -> [ids, columns]`: in `dtype` where that is of 16 bits and the file stores it, otherwise in `f32`, so that
    /// no value changes.
    ///
    /// # Panics
    /// If an id is not a row.
    pub fn gather(&self, ids: &[u32], dtype: DType) -> TensorData {
        let shape = [ids.len(), self.0.shape[1]];
        match (dtype, self.0.dtype) {
            (DType::F16, Dtype::F16) => TensorData::new(self.rows(ids, f16::from_le_bytes), shape),
            (DType::BF16, Dtype::BF16) => TensorData::new(self.rows(ids, bf16::from_le_bytes), shape),
            (_, Dtype::F16) => TensorData::new(self.rows(ids, |b| f16::from_le_bytes(b).to_f32()), shape),
            (_, Dtype::BF16) => TensorData::new(self.rows(ids, |b| bf16::from_le_bytes(b).to_f32()), shape),
            _ => TensorData::new(self.rows(ids, f32::from_le_bytes), shape),
        }
    }

    fn rows<F: Copy + Default, const WIDTH: usize>(
        &self,
        ids: &[u32],
        value: impl Fn([u8; WIDTH]) -> F,
    ) -> Vec<F> {
        let n_columns = self.0.shape[1];
        let mut rows = vec![F::default(); ids.len() * n_columns];
        for (row, &id) in rows.chunks_exact_mut(n_columns).zip(ids) {
            let first = id as usize * n_columns;
            let (stored, _) = self.0.stored(first..first + n_columns).as_chunks();
            row.iter_mut().zip(stored).for_each(|(entry, &bytes)| *entry = value(bytes));
        }
        rows
    }
}

impl fmt::Debug for HostMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMatrix({:?} {:?})", self.0.dtype, self.0.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(bytes: Vec<u8>, dtype: Dtype) -> StoredTensor {
        let range = 0..bytes.len();
        let n_values = bytes.len() * 8 / dtype.bitsize();
        StoredTensor { bytes: Arc::new(bytes), range, dtype, shape: vec![n_values] }
    }

    #[test]
    fn stored_brain_floats_are_copied_bit_by_bit() {
        // Every pattern, with infinities, NaNs and subnormals; more than a block of them.
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let tensor = stored(bits.iter().flat_map(|b| b.to_le_bytes()).collect(), Dtype::BF16);
        let (got, lost) = tensor.brain_floats(1..bits.len());
        assert_eq!(got.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), bits[1..]);
        assert_eq!(lost.not_finite, 2 << 7, "all patterns of the largest exponent");
    }

    #[test]
    fn what_processors_find_is_added_up() {
        let n = 3 * BLOCKS_OF_A_TASK * BLOCK + 5;
        let mut values = vec![1.5f32; n];
        for at in [0, BLOCKS_OF_A_TASK * BLOCK, n - 1] {
            values[at] = f32::NAN;
        }
        (values[1], values[n - 2]) = (1e6, 1e-9);
        let tensor = stored(values.iter().flat_map(|v| v.to_le_bytes()).collect(), Dtype::F32);
        let (floats, lost) = tensor.floats(0..n);
        assert!(floats.iter().zip(&values).all(|(got, want)| got.to_bits() == want.to_bits()));
        assert_eq!(lost.not_finite, 3);
        assert_eq!(tensor.brain_floats(0..n).1.not_finite, 3);
        let (halves, lost) = tensor.halves(0..n);
        assert_eq!((lost.not_finite, lost.overflowed, lost.flushed), (3, 1, 1));
        assert_eq!(halves.iter().filter(|half| half.to_f32() == 1.5).count(), n - 5);
    }

    #[test]
    fn other_types_are_rounded_to_brain_floats() {
        let values: Vec<f32> = (0..2 * BLOCK + 3).map(|i| 1.0 + i as f32 / 1000.0).collect();
        let tensor = stored(values.iter().flat_map(|v| v.to_le_bytes()).collect(), Dtype::F32);
        let want: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        assert_eq!(tensor.brain_floats(0..values.len()).0, want);
    }

    #[test]
    fn rows_are_gathered_in_the_type_of_the_file_or_in_f32() {
        let values: Vec<f32> = (0..12).map(|i| i as f32 / 8.0).collect();
        let bytes = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        let matrix = HostMatrix::new(bytes, DType::BF16, [4, 3]);
        for (asked, given) in [(DType::BF16, DType::BF16), (DType::F16, DType::F32), (DType::F32, DType::F32)]
        {
            let rows = matrix.gather(&[2, 0, 2], asked);
            assert_eq!((rows.dtype, rows.shape.as_slice()), (given, &[3, 3][..]));
            let want = [&values[6..9], &values[..3], &values[6..9]].concat();
            assert_eq!(rows.iter::<f32>().collect::<Vec<_>>(), want, "{asked:?}");
        }
    }
}
