//! Whether a device's matrix units get attention right, before a run is given to them: drivers list matrices that they then multiply
//! wrongly, and nothing but a result shows it.

use std::any::TypeId;
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};

use burn::cubecl::device::{Device, DeviceId};
use burn::tensor::{DType, Shape, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::launch::{Mask, attention_backward, attention_forward};
use super::mask::Visible;
use super::tile::Tile;

/// Of the sequence that is tried: more than a block of lines, and several steps of a walk.
const TOKENS: usize = 80;
/// The part of a tensor's largest entry by which another may be off: four times what `bf16` rounds off.
const TOLERANCE: f32 = 1.0 / 64.0;

/// What a trial tells of: the runtime, the device, the tensors' type, `[heads, kv_heads, head_dim]` and the tile.
type Key = (TypeId, DeviceId, DType, [usize; 3], Tile);

/// Whether attention with `[heads, kv_heads, head_dim]` of this type comes out on matrix units as it does in registers. Tried once a
/// process, and told of where it does not.
pub fn is_right<R: CubeRuntime>(device: &R::Device, dtype: DType, shape: [usize; 3], tile: Tile) -> bool {
    static TRIED: LazyLock<Mutex<HashMap<Key, bool>>> = LazyLock::new(Mutex::default);
    let key = (TypeId::of::<R>(), device.to_id(), dtype, shape, tile);
    let known = TRIED.lock().unwrap_or_else(PoisonError::into_inner).get(&key).copied();
    known.unwrap_or_else(|| {
        let is_right =
            agree(&run::<R>(device, dtype, shape, tile), &run::<R>(device, dtype, shape, Tile::GPU));
        if !is_right {
            eprintln!("device   its matrix units get attention wrong, so registers compute it");
        }
        TRIED.lock().unwrap_or_else(PoisonError::into_inner).insert(key, is_right);
        is_right
    })
}

/// The output, the log-sum-exp and all gradients of one causal sequence.
fn run<R: CubeRuntime>(
    device: &R::Device,
    dtype: DType,
    [heads, kv_heads, head_dim]: [usize; 3],
    tile: Tile,
) -> Vec<CubeTensor<R>> {
    let client = R::client(device);
    let tensor = |shape: Shape, seed: usize| {
        let values =
            (0..shape.num_elements()).map(|i| ((i * 7919 + seed * 104_729) % 1009) as f32 / 504.5 - 1.0);
        let data = TensorData::new(values.collect(), [shape.num_elements()]).convert_dtype(dtype);
        let handle = client.create_from_slice(data.as_bytes());
        CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, dtype)
    };
    let qkv = [(heads, 1), (kv_heads, 2), (kv_heads, 3)]
        .map(|(heads, seed)| tensor(Shape::from([TOKENS, heads, head_dim]), seed));
    let dout = tensor(Shape::from([TOKENS, heads * head_dim]), 4);
    let row = |i: usize| Visible { first: 0, prefix_end: 0, own_start: 0, end: (i + 1) as u32 };
    let mask = Mask::new(&(0..TOKENS).map(row).collect::<Vec<_>>(), device);
    let (out, lse) = attention_forward(qkv.clone(), &mask, tile);
    let grads = attention_backward(dout, qkv, [out.clone(), lse.clone()], &mask, tile);
    [out, lse].into_iter().chain(grads).collect()
}

fn agree<R: CubeRuntime>(got: &[CubeTensor<R>], want: &[CubeTensor<R>]) -> bool {
    let values = |tensor: &CubeTensor<R>| {
        let bytes = tensor.client.read_one(tensor.handle.clone()).ok()?;
        let data = TensorData::from_bytes(bytes, tensor.meta.shape().clone(), tensor.dtype);
        data.convert::<f32>().into_vec::<f32>().ok()
    };
    got.iter().zip(want).all(|(got, want)| {
        let (Some(got), Some(want)) = (values(got), values(want)) else { return false };
        let largest = want.iter().fold(0.0, |largest: f32, value| largest.max(value.abs()));
        got.iter().zip(&want).all(|(got, want)| (got - want).abs() <= TOLERANCE * largest)
    })
}
