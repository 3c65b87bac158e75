//! What the launches of the CubeCL kernels share.
//!
//! A kernel reads contiguous tensors as arrays of [vectors](vector_width), computes in `f32`, and is generic over what it stores.

use std::sync::LazyLock;

use burn::cubecl;
use burn::cubecl::calculate_cube_count_elemwise;
use burn::cubecl::features::{MmaConfig, TypeUsage};
use burn::cubecl::prelude::*;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

/// Threads of a cube: as many as every device has.
pub(super) const THREADS: u32 = 256;

/// Whether the device is a processor behind a GPU's interface. Mesa's and Google's have as many lanes as the processor's vectors;
/// some phones' GPUs have as few, and no other.
pub(super) fn is_software<R: CubeRuntime>(client: &ComputeClient<R>) -> bool {
    client.properties().hardware.plane_size_max <= 16
}

/// Whether the environment variable `ORPO_WGPU_MATRIX_UNITS` is 0, so that nothing computes on matrix units: some driver may not survive
/// their kernels.
pub fn matrix_units_are_off() -> bool {
    static ARE_OFF: LazyLock<bool> =
        LazyLock::new(|| std::env::var("ORPO_WGPU_MATRIX_UNITS").is_ok_and(|value| value == "0"));
    *ARE_OFF
}

/// The matrices, `[m, n, k]`, that the device's units multiply of this type with sums in `f32`, and that may be used.
pub(super) fn matrix_units<R: CubeRuntime>(client: &ComputeClient<R>, dtype: DType) -> Vec<[u32; 3]> {
    let (element, sum) = (dtype.into(), DType::F32.into());
    let is_of = |unit: &&MmaConfig| unit.a_type == element && unit.b_type == element && unit.cd_type == sum;
    let units = client.properties().features.matmul.cmma.iter().filter(|_| !matrix_units_are_off());
    units.filter(is_of).map(|unit| [unit.m, unit.n, unit.k]).collect()
}

/// Whether the device computes in this type, and its buffers hold it.
pub(super) fn computes_in<R: CubeRuntime>(client: &ComputeClient<R>, dtype: DType) -> bool {
    let usage = client.properties().type_usage(dtype.into());
    usage.is_superset(TypeUsage::Arithmetic | TypeUsage::Conversion | TypeUsage::Buffer)
}

/// Waits for all that was launched.
///
/// # Panics
/// If any of it failed.
pub(super) fn settle<R: CubeRuntime>(client: &ComputeClient<R>) {
    if let Err(error) = pollster::block_on(client.sync()) {
        panic!("{error}");
    }
}

/// The tensor as a kernel reads it: contiguous, of one of the storage types, not empty.
pub(super) fn readable<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    let takes = |dtype: DType| match dtype {
        DType::F32 | DType::F16 => true,
        DType::BF16 => computes_in(&tensor.client, dtype),
        _ => false,
    };
    assert!(takes(tensor.dtype), "the kernels take no {:?} here", tensor.dtype);
    assert!(!tensor.meta.shape().contains(&0), "the kernels take no empty tensor: {:?}", tensor.meta.shape());
    into_contiguous(tensor)
}

/// As [`readable`], and `f32`.
pub(super) fn readable_f32<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    assert_eq!(tensor.dtype, DType::F32, "a tensor that has to be f32");
    readable(tensor)
}

/// A new contiguous tensor on the device of `like`, not initialised.
pub(super) fn empty<R: CubeRuntime>(
    like: &CubeTensor<R>,
    shape: impl Into<Shape>,
    dtype: DType,
) -> CubeTensor<R> {
    let shape = shape.into();
    let handle = like.client.empty(shape.num_elements() * dtype.size());
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, handle, dtype)
}

/// The tensor where nobody else holds it, else a copy. CUDA gives burn's own copies rows with gaps between them.
pub(super) fn owned<R: CubeRuntime>(tensor: CubeTensor<R>) -> CubeTensor<R> {
    if tensor.can_mut() { tensor } else { into_contiguous(tensor.copy()) }
}

/// The tensors as a kernel's list of arrays.
pub(super) fn arrays<R: CubeRuntime, E: CubePrimitive>(
    tensors: &[CubeTensor<R>],
) -> SequenceArg<R, Array<E>> {
    let mut arrays = SequenceArg::new();
    for tensor in tensors {
        arrays.push(tensor.clone().into_array_arg());
    }
    arrays
}

/// What the tensors take.
pub(super) fn bytes<R: CubeRuntime>(tensors: &[&CubeTensor<R>]) -> usize {
    tensors.iter().map(|tensor| tensor.meta.num_elements() * tensor.dtype.size()).sum()
}

/// The most elements, at most four, that a thread can load at once from rows of `length`.
pub(super) fn vector_width(length: usize) -> usize {
    [4, 2, 1].into_iter().find(|width| length.is_multiple_of(*width)).unwrap_or(1)
}

/// Cubes and their size for one thread an item.
pub(super) fn one_thread_each<R: CubeRuntime>(
    client: &ComputeClient<R>,
    items: usize,
) -> (CubeCount, CubeDim) {
    let cube = CubeDim::new_1d(THREADS);
    (calculate_cube_count_elemwise(client, items, cube), cube)
}

/// Cubes and their size for one cube an item.
pub(super) fn one_cube_each<R: CubeRuntime>(
    client: &ComputeClient<R>,
    items: usize,
    threads: u32,
) -> (CubeCount, CubeDim) {
    let cube = CubeDim::new_1d(threads);
    (calculate_cube_count_elemwise(client, items * threads as usize, cube), cube)
}

/// An input and the output that takes its place.
pub(super) struct Overwritten<R: CubeRuntime> {
    pub(super) input: ArrayArg<R>,
    pub(super) output: ArrayArg<R>,
    /// The output, once the kernel has run.
    pub(super) tensor: CubeTensor<R>,
}

/// Gives an output of the shape and type of `input`: in its buffer if no other tensor holds it, else in a new one.
///
/// `position` is that of the input among the kernel's buffers. A kernel reads an element of the input only before it writes that
/// element, and from the same thread.
pub(super) fn overwrite<R: CubeRuntime>(input: CubeTensor<R>, position: usize) -> Overwritten<R> {
    let (output, tensor) = if input.can_mut() {
        (input.as_tensor_alias(position).into_array_arg(), input.clone())
    } else {
        let tensor = empty(&input, input.meta.shape().clone(), input.dtype);
        (tensor.clone().into_array_arg(), tensor)
    };
    Overwritten { input: input.into_array_arg(), output, tensor }
}

/// The sum of a vector's elements.
#[cube]
pub(super) fn lane_sum<N: Size>(vector: Vector<f32, N>) -> f32 {
    f32::cast_from(vector.vector_sum())
}

/// The sum of the cube's values, a power of two of them, in the same order every time.
///
/// Every thread of the cube has to arrive here.
#[cube]
pub(super) fn cube_sum<N: Size>(value: Vector<f32, N>, #[comptime] threads: u32) -> Vector<f32, N> {
    let mut sums = SharedMemory::<Vector<f32, N>>::new(threads as usize);
    let unit = UNIT_POS as usize;
    sums[unit] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(threads.ilog2()) {
        let half = comptime!(threads >> (level + 1));
        if UNIT_POS < half {
            let other = sums[unit + half as usize];
            sums[unit] += other;
        }
        sync_cube();
    }
    sums[0]
}
