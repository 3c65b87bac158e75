//! Operands of which every entry of a product is known.
//!
//! Lines are turns of the same seven numbers, so that a product has up to 49 different entries. Their sums are the same in any order: all
//! products of two entries are multiples of 1/16.

use burn::cubecl::client::ComputeClient;
use burn::tensor::{DType, Shape, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

/// Seven numbers, and how many of them a line is ahead of the line before it; an entry of the depth is one ahead of the one before. So
/// no block of an operand is that block turned.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Pattern {
    numbers: [f32; 7],
    step: usize,
}

/// The left operand's.
pub(in crate::ops) const LEFT: Pattern =
    Pattern { numbers: [1.0, 0.25, -0.5, 0.75, 1.0, -0.25, 0.5], step: 3 };
/// The right operand's.
pub(in crate::ops) const RIGHT: Pattern =
    Pattern { numbers: [0.5, 1.0, -0.25, 0.75, 0.25, -1.0, 0.0], step: 2 };

/// Rows that are looked at, at either end.
const ROWS: usize = 16;
/// What an output in `f16` may be off by; one in `f32` is exact.
const TOLERANCE: f32 = 1.0 / 1024.0;

/// The operand of this shape, `[lines, depth]` if its rows are its lines.
pub(in crate::ops) fn operand<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::Device,
    [rows, columns]: [usize; 2],
    is_rows: bool,
    Pattern { numbers, step }: Pattern,
    dtype: DType,
) -> CubeTensor<R> {
    let period = numbers.len();
    let [row_step, column_step] = if is_rows { [step, 1] } else { [1, step] };
    let turn = |first: usize| {
        let row: Vec<f32> =
            (0..columns).map(|column| numbers[(first + column * column_step) % period]).collect();
        TensorData::new(row, [columns]).convert_dtype(dtype)
    };
    let turns: Vec<_> = (0..period).map(turn).collect();
    let mut bytes = Vec::with_capacity(rows * columns * dtype.size());
    for row in 0..rows {
        bytes.extend_from_slice(turns[row * row_step % period].as_bytes());
    }
    let handle = client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(client.clone(), device.clone(), Shape::from([rows, columns]), handle, dtype)
}

/// Whether this is the product of the two operands over so much depth, by its first and its last rows.
pub(super) fn is_product<R: CubeRuntime>(out: &CubeTensor<R>, depth: usize) -> bool {
    let [m, n] = [0, 1].map(|i| out.meta.shape()[i]);
    let period = LEFT.numbers.len();
    let sum = |row: usize, column: usize| -> f32 {
        let at =
            |Pattern { numbers, step }: Pattern, line: usize, k: usize| numbers[(line * step + k) % period];
        (0..depth).map(|k| at(LEFT, row, k) * at(RIGHT, column, k)).sum()
    };
    let sums: Vec<f32> = (0..period * period).map(|at| sum(at / period, at % period)).collect();
    let row_bytes = n * out.dtype.size();
    [0, m.saturating_sub(ROWS)].into_iter().all(|first| {
        let rows = ROWS.min(m - first);
        let handle = out.handle.clone().offset_start((first * row_bytes) as u64);
        let handle = handle.offset_end(((m - first - rows) * row_bytes) as u64);
        let Ok(bytes) = out.client.read_one(handle) else { return false };
        let data = TensorData::from_bytes(bytes, [rows, n], out.dtype);
        let Ok(values) = data.convert::<f32>().into_vec::<f32>() else { return false };
        let tolerance = if out.dtype == DType::F32 { 0.0 } else { TOLERANCE };
        values.len() == rows * n
            && values.iter().enumerate().all(|(at, value)| {
                let (row, column) = (first + at / n, at % n);
                let want = sums[row % period * period + column % period];
                (value - want).abs() <= tolerance * want.abs()
            })
    })
}
