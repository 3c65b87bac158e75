//! Operands of which every entry of a product is known.
//!
//! Lines are turns of the same seven numbers, so that a product has up to 49 different entries. Their sums are the same in any order: all
//! products of two entries are multiples of 1/16.

use std::ops::Range;

use burn::cubecl::client::ComputeClient;
use burn::cubecl::server::ServerError;
use burn::tensor::{DType, Shape, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

const PERIOD: usize = 7;

/// Seven numbers, and how many of them a line is ahead of the line before it; an entry of the depth is one ahead of the one before. So
/// no block of an operand is that block turned.
#[derive(Clone, Copy)]
pub(in crate::ops) struct Pattern {
    numbers: [f32; PERIOD],
    step: usize,
}

/// The left operand's.
pub(in crate::ops) const LEFT: Pattern =
    Pattern { numbers: [1.0, 0.25, -0.5, 0.75, 1.0, -0.25, 0.5], step: 3 };
/// The right operand's.
pub(in crate::ops) const RIGHT: Pattern =
    Pattern { numbers: [0.5, 1.0, -0.25, 0.75, 0.25, -1.0, 0.0], step: 2 };

/// Rows that are looked at, at either end.
const END_ROWS: usize = 16;
/// Rows between them that are looked at, about.
const ROWS: usize = 256;
/// By what the adapter's products count more than the others: so that one that is missing shows in any type.
pub(in crate::ops) const ADAPTER_SCALE: f32 = 64.0;

/// The operand of this shape, `[lines, depth]` if its rows are its lines; its depth starts `first` entries into the pattern.
pub(in crate::ops) fn operand<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::Device,
    [rows, columns]: [usize; 2],
    is_rows: bool,
    first: usize,
    Pattern { numbers, step }: Pattern,
    dtype: DType,
) -> CubeTensor<R> {
    let [row_step, column_step] = if is_rows { [step, 1] } else { [1, step] };
    let turn = |start: usize| {
        let row: Vec<f32> =
            (0..columns).map(|column| numbers[(start + column * column_step) % PERIOD]).collect();
        TensorData::new(row, [columns]).convert_dtype(dtype)
    };
    let turns: Vec<_> = (0..PERIOD).map(turn).collect();
    let mut bytes = Vec::with_capacity(rows * columns * dtype.size());
    for row in 0..rows {
        bytes.extend_from_slice(turns[(first + row * row_step) % PERIOD].as_bytes());
    }
    let handle = client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(client.clone(), device.clone(), Shape::from([rows, columns]), handle, dtype)
}

/// Whether this is the product of the two operands over so much depth, that of the adapter behind it, which counts [`ADAPTER_SCALE`]
/// times, included.
///
/// Looked at are all columns of the first and the last rows, and of rows between that lie apart by a number that divides neither a
/// block's rows nor the period.
///
/// # Errors
/// If the device fails.
pub fn is_product<R: CubeRuntime>(
    out: &CubeTensor<R>,
    [depth, rank]: [usize; 2],
) -> Result<bool, ServerError> {
    let [m, n] = [0, 1].map(|i| out.meta.shape()[i]);
    let row_bytes = n * out.dtype.size();
    let step = (m / ROWS) | 1;
    let step = if step.is_multiple_of(PERIOD) { step + 2 } else { step };
    let is_end = |row: usize| row < END_ROWS || row + END_ROWS >= m;
    let rows: Vec<_> = (0..m).filter(|&row| is_end(row) || row.is_multiple_of(step)).collect();
    let of_row = |&row: &usize| {
        let handle = out.handle.clone().offset_start((row * row_bytes) as u64);
        handle.offset_end(((m - row - 1) * row_bytes) as u64)
    };
    let read = pollster::block_on(out.client.read_async(rows.iter().map(of_row).collect()))?;
    let sums = sums(depth, rank);
    let tolerance = match out.dtype {
        DType::F32 => 0.0,
        DType::BF16 => 1.0 / 128.0,
        _ => 1.0 / 1024.0,
    };
    Ok(rows.into_iter().zip(read).all(|(row, bytes)| {
        let data = TensorData::from_bytes(bytes, [n], out.dtype);
        let values = data.convert::<f32>().into_vec::<f32>().unwrap_or_default();
        let is_sum = |(column, value): (usize, &f32)| {
            let want = sums[row % PERIOD][column % PERIOD];
            (value - want).abs() <= tolerance * want.abs()
        };
        values.len() == n && values.iter().enumerate().all(is_sum)
    }))
}

/// The entries of a product over so much depth and such an adapter, by row and column modulo the period.
fn sums(depth: usize, rank: usize) -> [[f32; PERIOD]; PERIOD] {
    let at = |Pattern { numbers, step }: Pattern, line: usize, k: usize| numbers[(line * step + k) % PERIOD];
    let sum =
        |row, column, ks: Range<usize>| ks.map(|k| at(LEFT, row, k) * at(RIGHT, column, k)).sum::<f32>();
    std::array::from_fn(|row| {
        std::array::from_fn(|column| {
            sum(row, column, 0..depth) + ADAPTER_SCALE * sum(row, column, depth..depth + rank)
        })
    })
}
