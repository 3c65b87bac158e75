//! Whether a device's matrix units get attention right, before a run is given to them: drivers list matrices that they then multiply
//! wrongly, and nothing but a result shows it.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use burn::cubecl::device::{Device, DeviceId};
use burn::tensor::{DType, Shape, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::launch::{Mask, attention_backward, attention_forward};
use super::mask::Visible;
use super::splits;
use super::tile::Tile;
use crate::ops::cube::settle;
use crate::ops::engine::Engine;
use crate::ops::notes;

/// The part of a line's largest entry by which its entries may be off. Rounding weights, `dS` and results to `bf16` takes at most a
/// third of it, as loops over this sequence showed for heads of 16 to 256; sums lost in rescaling are off by four times as much.
const TOLERANCE: f32 = 1.0 / 32.0;
/// The part of a tensor's largest entry that is nothing: the scores of the first row, which sees one key, have no gradient.
const NOTHING: f32 = 1e-5;
/// By how much a log-sum-exp may be off, in nats; scores are `f32` by either units.
const LSE_TOLERANCE: f32 = 1e-3;

/// What is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Pass {
    /// The output and the log-sum-exp.
    Forward,
    /// The gradients.
    Backward,
    /// The gradients, those by keys and values in several splits of the walks over the queries.
    BackwardInSplits,
}

impl Pass {
    /// Those that it is tried and timed in.
    fn splits(self) -> usize {
        if self == Self::BackwardInSplits { splits::MOST } else { 1 }
    }
}

/// Rows of the last sequence: fewer than any tile owns, so that some of them share it with others.
const LAST: usize = 12;
/// Turns of timing, and launches of a turn.
const ROUNDS: usize = 5;
const LAUNCHES: usize = 4;
/// How many times as fast as the first a tile has to be to be taken: more than two timings of one are apart.
const CLEARLY: f64 = 1.2;

/// What a trial tells of: the runtime, the device, the tensors' type, `[heads, kv_heads, head_dim]`, the tile and the pass.
type Key = (TypeId, DeviceId, DType, [usize; 3], Tile, Pass);

/// Whether attention with `[heads, kv_heads, head_dim]` of this type comes out on matrix units as it does in registers. Tried once a
/// process; where it does not, there is a note.
///
/// # Panics
/// If the device failed before.
pub fn is_right<R: Engine>(
    device: &R::Device,
    dtype: DType,
    shape: [usize; 3],
    tile: Tile,
    pass: Pass,
) -> bool {
    static TRIED: LazyLock<Mutex<HashMap<Key, bool>>> = LazyLock::new(Mutex::default);
    let key = (TypeId::of::<R>(), device.to_id(), dtype, shape, tile, pass);
    let known = TRIED.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
    known.unwrap_or_else(|| {
        // What failed before must not count as a failure of the matrix units.
        settle(&R::client(device));
        let agrees = Sequence::<R>::new(device, dtype, shape, tile.block_n()).agrees(tile, pass);
        // wgpu tells of a launch that failed only when it is waited for.
        let is_right = pollster::block_on(R::client(device).sync()).is_ok() && agrees;
        if !is_right {
            notes::note("the GPU's matrix units get attention wrong, so slower ones compute it");
        }
        TRIED.lock().unwrap_or_else(PoisonError::into_inner).insert(key, is_right);
        is_right
    })
}

/// The first of tiles that are right, unless another is clearly faster: timed once a process, on attention with `[heads, kv_heads,
/// head_dim]` over a sequence of three steps. Of tiles that are about as fast every process takes the same, whose bits it repeats.
///
/// # Panics
/// If there are none, or the device fails.
pub fn fastest<R: Engine>(
    device: &R::Device,
    dtype: DType,
    shape: [usize; 3],
    tiles: &[Tile],
    pass: Pass,
    step: usize,
) -> Tile {
    static TIMED: LazyLock<Mutex<HashMap<Key, Tile>>> = LazyLock::new(Mutex::default);
    let key = (TypeId::of::<R>(), device.to_id(), dtype, shape, tiles[0], pass);
    let known = TIMED.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
    known.unwrap_or_else(|| {
        let client = R::client(device);
        let sequence = Sequence::<R>::new(device, dtype, shape, step);
        let saved = sequence.forward(tiles[0]);
        let mut times = vec![Duration::MAX; tiles.len()];
        for _ in 0..ROUNDS {
            for (best, &tile) in times.iter_mut().zip(tiles) {
                settle(&client);
                let start = Instant::now();
                for _ in 0..LAUNCHES {
                    match pass {
                        Pass::Forward => drop(sequence.forward(tile)),
                        _ => drop(sequence.backward(tile, pass.splits(), &saved)),
                    }
                }
                settle(&client);
                *best = start.elapsed().min(*best);
            }
        }
        let tile = tiles[clearly_fastest(&times)];
        TIMED.lock().unwrap_or_else(PoisonError::into_inner).insert(key, tile);
        tile
    })
}

/// Which of them is [`CLEARLY`] less than the first, and the least such; else the first.
fn clearly_fastest(times: &[Duration]) -> usize {
    let is_clear = |i: &usize| times[*i].mul_f64(CLEARLY) < times[0];
    (0..times.len()).filter(is_clear).min_by_key(|&i| times[i]).unwrap_or(0)
}

/// What is computed: a pair whose prefix is a step of the walk and a little more. With that step's end scores grow by ten, and values
/// shrink so that what was summed before still counts: sums that are not rescaled show, and so do some that are lost. Its last rows are a
/// sequence of their own, and see nothing in the first steps of a walk that they share with those before.
struct Sequence<R: CubeRuntime> {
    qkv: [CubeTensor<R>; 3],
    dout: CubeTensor<R>,
    mask: Mask<R>,
}

impl<R: Engine> Sequence<R> {
    fn new(device: &R::Device, dtype: DType, [heads, kv_heads, head_dim]: [usize; 3], step: usize) -> Self {
        let (prefix_end, rejected) = (step + 8, 2 * step);
        let tokens = 3 * step + 16;
        let last = tokens - LAST;
        let client = R::client(device);
        let mut state = 42u32;
        let mut tensor = |shape: Shape, entry: &dyn Fn(usize, f32) -> f32| {
            let line = shape.num_elements() / tokens;
            let values = (0..shape.num_elements()).map(|i| {
                // Constants of Numerical Recipes, section 7.1; the upper bits are the random ones.
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                entry(i / line, (state >> 8) as f32 / (1 << 23) as f32 - 1.0)
            });
            let data = TensorData::new(values.collect(), [shape.num_elements()]).convert_dtype(dtype);
            let handle = client.create_from_slice(data.as_bytes());
            CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, dtype)
        };
        // Queries are two on average, which makes a score `2 · sqrt(head_dim)` times what all of a key's entries have in common.
        let common = 5.0 / (head_dim as f32).sqrt();
        let is_late = |token: usize| token >= step;
        let of = |heads: usize| Shape::from([tokens, heads, head_dim]);
        let q = tensor(of(heads), &|_, random| 2.0 + random);
        let k = tensor(of(kv_heads), &|token, random| random + if is_late(token) { common } else { 0.0 });
        let v = tensor(of(kv_heads), &|token, random| random * if is_late(token) { 1.0 } else { 4096.0 });
        let dout = tensor(Shape::from([tokens, heads * head_dim]), &|_, random| random / 16.0);
        let row = |i: usize| {
            let [first, prefix_end, own_start] = match i {
                _ if i < rejected => [0, 0, 0],
                _ if i < last => [0, prefix_end, rejected],
                _ => [last; 3],
            };
            let [first, prefix_end, own_start, end] = [first, prefix_end, own_start, i + 1].map(|n| n as u32);
            Visible { first, prefix_end, own_start, end }
        };
        let mask = Mask::new(&(0..tokens).map(row).collect::<Vec<_>>(), device);
        Self { qkv: [q, k, v], dout, mask }
    }

    /// Whether a pass on the tile's units gives what registers do.
    fn agrees(&self, tile: Tile, pass: Pass) -> bool {
        let saved = self.forward(Tile::GPU);
        match pass {
            Pass::Forward => {
                let [out, lse] = self.forward(tile);
                self.are_lines_close(&out, &saved[0]) && is_lse_close(&lse, &saved[1])
            }
            Pass::Backward | Pass::BackwardInSplits => {
                let got = self.backward(tile, pass.splits(), &saved);
                let want = self.backward(Tile::GPU, 1, &saved);
                got.iter().zip(&want).all(|(got, want)| self.are_lines_close(got, want))
            }
        }
    }

    fn forward(&self, tile: Tile) -> [CubeTensor<R>; 2] {
        attention_forward(self.qkv.clone(), &self.mask, tile).into()
    }

    fn backward(&self, tile: Tile, splits: usize, saved: &[CubeTensor<R>; 2]) -> [CubeTensor<R>; 3] {
        attention_backward(self.dout.clone(), self.qkv.clone(), saved.clone(), &self.mask, tile, splits)
    }

    fn are_lines_close(&self, got: &CubeTensor<R>, want: &CubeTensor<R>) -> bool {
        let (Some(got), Some(want)) = (values(got), values(want)) else { return false };
        let largest =
            |values: &[f32]| values.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        let nothing = NOTHING * largest(&want);
        let head_dim = self.qkv[0].meta.shape()[2];
        got.chunks(head_dim).zip(want.chunks(head_dim)).all(|(got, want)| {
            let tolerance = TOLERANCE * largest(want) + nothing;
            got.iter().zip(want).all(|(got, want)| (got - want).abs() <= tolerance)
        })
    }
}

fn is_lse_close<R: CubeRuntime>(got: &CubeTensor<R>, want: &CubeTensor<R>) -> bool {
    let (Some(got), Some(want)) = (values(got), values(want)) else { return false };
    got.iter().zip(&want).all(|(got, want)| (got - want).abs() <= LSE_TOLERANCE)
}

/// The entries, unless the device fails.
fn values<R: CubeRuntime>(tensor: &CubeTensor<R>) -> Option<Vec<f32>> {
    let bytes = tensor.client.read_one(tensor.handle.clone()).ok()?;
    let data = TensorData::from_bytes(bytes, tensor.meta.shape().clone(), tensor.dtype);
    data.convert::<f32>().into_vec::<f32>().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_taken_unless_another_is_clearly_faster() {
        for (ms, taken) in
            [(&[10, 9, 30][..], 0), (&[10, 8, 7], 2), (&[10, 11], 0), (&[10, 8], 1), (&[10], 0)]
        {
            let times: Vec<_> = ms.iter().map(|&ms| Duration::from_millis(ms)).collect();
            assert_eq!(clearly_fastest(&times), taken, "{ms:?}");
        }
    }
}
