//! Operands of which every entry of a product is known.
//!
//! A row is a turn of the same seven numbers, one further than the row before it, so that a product has up to 49 different entries. Their
//! sums are the same in any order: all products of two entries are multiples of 1/16.

use burn::cubecl::client::ComputeClient;
use burn::tensor::{DType, Shape, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

/// One period of an operand.
pub(in crate::ops) type Pattern = [f32; 7];

/// The left operand's.
pub(in crate::ops) const LEFT: Pattern = [1.0, 0.25, -0.5, 0.75, 1.0, -0.25, 0.5];
/// The right operand's.
pub(in crate::ops) const RIGHT: Pattern = [0.5, 1.0, -0.25, 0.75, 0.25, -1.0, 0.0];

/// Rows that are looked at, at either end.
const ROWS: usize = 16;
/// Four times what `bf16` rounds off; the outputs of neighbouring rows and columns are further away.
const TOLERANCE: f32 = 1.0 / 64.0;

/// The operand of this shape. Which of its indices runs along the depth makes no difference.
pub(in crate::ops) fn operand<R: CubeRuntime>(
    client: &ComputeClient<R>,
    device: &R::Device,
    [rows, columns]: [usize; 2],
    pattern: Pattern,
    dtype: DType,
) -> CubeTensor<R> {
    let line: Vec<f32> = pattern.iter().copied().cycle().take(columns + pattern.len()).collect();
    let line = TensorData::new(line, [columns + pattern.len()]).convert_dtype(dtype);
    let size = dtype.size();
    let mut bytes = Vec::with_capacity(rows * columns * size);
    for row in 0..rows {
        let first = row % pattern.len();
        bytes.extend_from_slice(&line.as_bytes()[first * size..(first + columns) * size]);
    }
    let handle = client.create_from_slice(&bytes);
    CubeTensor::new_contiguous(client.clone(), device.clone(), Shape::from([rows, columns]), handle, dtype)
}

/// Whether this is the product of the two operands over so much depth, by its first and its last rows.
pub(super) fn is_product<R: CubeRuntime>(out: &CubeTensor<R>, depth: usize) -> bool {
    let [m, n] = [0, 1].map(|i| out.meta.shape()[i]);
    let period = LEFT.len();
    let sum = |row: usize, column: usize| -> f32 {
        (0..depth).map(|k| LEFT[(row + k) % period] * RIGHT[(column + k) % period]).sum()
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
        values.iter().enumerate().all(|(at, value)| {
            let (row, column) = (first + at / n, at % n);
            let want = sums[row % period * period + column % period];
            (value - want).abs() <= TOLERANCE * want.abs()
        })
    })
}
