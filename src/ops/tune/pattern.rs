//! Operands of which every entry of a product is known.
//!
//! The left operand's lines are turns of the same 17 numbers, the right one's of 19 whose sum is zero: over 17 · 19 entries of the depth a
//! product comes to nothing, and what is left of the rest is small. So a block of the depth that is missing, or there twice, shows in
//! any type: entries are multiples of 1/16 below 11, which 16-bit types hold, and their sums are the same in any order. Two entries of
//! the depth have numbers of their own, which make a product large and small again: between them sums in 16 bits lose what they add.

use burn::cubecl::client::ComputeClient;
use burn::cubecl::server::ServerError;
use burn::tensor::{DType, Shape, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

/// Numbers, and how many of them a line is ahead of the line before it; an entry of the depth is one ahead of the one before. So no
/// block of an operand is that block turned.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Pattern {
    numbers: &'static [f32],
    step: usize,
    /// All lines' entries [`PEAKS`].
    peaks: [f32; 2],
}

/// Entries of the depth that have the same number in all lines. No product that is checked is less deep.
const PEAKS: [usize; 2] = [0, 32];

impl Pattern {
    /// The number of a line's entry `k`.
    fn at(self, line: usize, k: usize) -> f32 {
        PEAKS.iter().position(|&peak| peak == k).map_or_else(|| self.turn(line, k), |i| self.peaks[i])
    }

    /// The same, but for peaks.
    fn turn(self, line: usize, k: usize) -> f32 {
        self.numbers[(line * self.step + k) % self.numbers.len()]
    }
}

/// The left operand's.
pub(in crate::ops) const LEFT: Pattern = Pattern {
    numbers: &[
        1.0, 0.25, -0.5, 0.75, 1.0, -0.25, 0.5, -1.0, 0.75, 0.25, -0.75, 1.0, 0.5, 0.25, -0.5, 1.0, 0.75,
    ],
    step: 3,
    peaks: [2048.0, -2048.0],
};
/// The right operand's.
pub(in crate::ops) const RIGHT: Pattern = Pattern {
    numbers: &[
        0.5, 1.0, -0.25, 0.75, 0.25, -1.0, -0.5, 0.75, -0.75, 0.5, -0.25, -1.0, 1.0, 0.25, -0.5, 0.75, -1.0,
        0.25, -0.75,
    ],
    step: 2,
    peaks: [1.0, 1.0],
};

/// What a product is added to.
const ADDEND: Pattern = Pattern { numbers: LEFT.numbers, step: 5, peaks: [0.5, -0.5] };

/// Rows that are looked at, at either end.
const END_ROWS: usize = 16;
/// Rows between them that are looked at, about.
const ROWS: usize = 256;

/// The operand of this shape, `[lines, depth]` if its rows are its lines; its depth starts `first` entries into the pattern.
pub(in crate::ops) fn operand<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::Device,
    [rows, columns]: [usize; 2],
    is_rows: bool,
    first: usize,
    pattern: Pattern,
    dtype: DType,
) -> CubeTensor<R> {
    let at = |row: usize, column: usize| match is_rows {
        true => pattern.at(row, first + column),
        false => pattern.at(column, first + row),
    };
    let row = |row: usize| {
        let row: Vec<f32> = (0..columns).map(|column| at(row, column)).collect();
        TensorData::new(row, [columns]).convert_dtype(dtype)
    };
    // Rows repeat after as many as there are numbers, but for peaks, all of which are before these.
    let n_different = pattern.numbers.len();
    let different: Vec<_> = (2 * n_different..3 * n_different).map(row).collect();
    let mut bytes = Vec::with_capacity(rows * columns * dtype.size());
    for i in 0..rows {
        let peak = (!is_rows && PEAKS.contains(&(first + i))).then(|| row(i));
        bytes.extend_from_slice(peak.as_ref().unwrap_or(&different[i % n_different]).as_bytes());
    }
    let handle = client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(client.clone(), device.clone(), Shape::from([rows, columns]), handle, dtype)
}

/// What a product of this shape is added to.
pub(in crate::ops) fn addend<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::Device,
    shape: [usize; 2],
    dtype: DType,
) -> CubeTensor<R> {
    operand(client, device, shape, true, 0, ADDEND, dtype)
}

/// Whether this is the product of the two operands over so much depth, if it `is_added` with the known addend.
///
/// Looked at are all columns of the first and the last rows, and of rows between that lie apart by a number that divides neither a
/// block's rows nor the numbers'.
///
/// # Errors
/// If the device fails.
pub fn is_product<R: CubeRuntime>(
    out: &CubeTensor<R>,
    depth: usize,
    is_added: bool,
) -> Result<bool, ServerError> {
    let [m, n] = [0, 1].map(|i| out.meta.shape()[i]);
    let row_bytes = n * out.dtype.size();
    let step = (m / ROWS) | 1;
    let step = if step.is_multiple_of(LEFT.numbers.len()) { step + 2 } else { step };
    let is_end = |row: usize| row < END_ROWS || row + END_ROWS >= m;
    let rows: Vec<_> = (0..m).filter(|&row| is_end(row) || row.is_multiple_of(step)).collect();
    let part = |first: usize, n_bytes: usize| {
        let handle = out.handle.clone().offset_start(first as u64);
        handle.offset_end((m * row_bytes - first - n_bytes) as u64)
    };
    // Reads start at whole words.
    let is_by_row = row_bytes.is_multiple_of(size_of::<u32>());
    let parts = match is_by_row {
        true => rows.iter().map(|row| part(row * row_bytes, row_bytes)).collect(),
        false => vec![part(0, m * row_bytes)],
    };
    let read = pollster::block_on(out.client.read_async(parts))?;
    let sums = sums(depth);
    Ok(rows.into_iter().enumerate().all(|(i, row)| {
        let bytes = if is_by_row { &read[i][..] } else { &read[0][row * row_bytes..][..row_bytes] };
        let data = TensorData::from_bytes_vec(bytes.to_vec(), [n], out.dtype);
        let values = data.convert::<f32>().into_vec::<f32>().unwrap_or_default();
        let sums = &sums[row % sums.len()];
        let sums = sums.iter().cycle().enumerate();
        let mut wanted = sums.map(|(column, sum)| if is_added { sum + ADDEND.at(row, column) } else { *sum });
        values.len() == n && values.into_iter().all(|value| wanted.next() == Some(value))
    }))
}

/// The entries of a product over so much depth, of as many rows and columns as there are different ones.
fn sums(depth: usize) -> Vec<Vec<f32>> {
    let [rows, columns] = [LEFT, RIGHT].map(|pattern| pattern.numbers.len());
    let sum = |row, column| {
        let turn = |k: usize| LEFT.turn(row, k) * RIGHT.turn(column, k);
        let peaks = PEAKS.into_iter().filter(|&k| k < depth);
        let peaks = peaks.map(|k| LEFT.at(row, k) * RIGHT.at(column, k) - turn(k)).sum::<f32>();
        (0..depth % (rows * columns)).map(turn).sum::<f32>() + peaks
    };
    (0..rows).map(|row| (0..columns).map(|column| sum(row, column)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_those_of_the_entries_and_fit_16_bits() {
        for depth in [33, 96, 322, 323, 646, 4104, 5168, 14_336] {
            let sums = sums(depth);
            let is_right = |row: usize, column: usize| {
                let want: f32 = (0..depth).map(|k| LEFT.at(row, k) * RIGHT.at(column, k)).sum();
                sums[row][column] == want && want.abs() < 11.0 && ADDEND.at(row, column).abs() <= 1.0
            };
            assert!((0..17).all(|row| (0..19).all(|column| is_right(row, column))), "{depth}");
            let n_zeros = sums.iter().flatten().filter(|sum| **sum == 0.0).count();
            assert!(n_zeros < 17 * 19 / 8, "{depth}: {n_zeros} entries are nothing");
        }
    }
}
