//! The head on a GPU: products by the runtime's matrix engine, everything around them by the kernels of `kernel.rs`.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Shape, Tensor, TensorPrimitive};
use burn_cubecl::CubeRuntime;
use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::cubecl::server::Handle;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;

use super::entries::{Entries, Slots};
use super::kernel::{ROW_THREADS, add_targets, log_probabilities, merge, softmax_shard, subtract_expected};
use super::{Expected, ExpectedRows, Head, ScoredToken, TokenLogps, chunk_rows};
use crate::ops::cube::{bytes, empty, owned, readable, vector_width};
use crate::ops::kernel::MAX_WORKGROUPS;
use crate::ops::{Kernels, profile, to_f32};

/// What the profile calls the head's products, whose kernels are those of the linear layers.
const PRODUCTS: &str = "token_logps products";

/// [`Kernels::token_logps_forward`] in kernels.
pub(in crate::ops) fn forward<R: CubeRuntime, B: Kernels + Backend<FloatTensorPrimitive = CubeTensor<R>>>(
    hidden: Tensor<B, 2>,
    head: &Head<B>,
    scored: &[ScoredToken],
    expected: Expected,
) -> TokenLogps<B> {
    let hidden = to_f32(hidden);
    let [n_rows, n_hidden] = hidden.dims();
    let keeps = expected == Expected::Keep;
    let like = primitive(hidden.clone());
    let entries = Entries::new(scored, n_rows);
    let statistics = Statistics {
        handle: like.client.create_from_slice(bytemuck::cast_slice(&entries.words)),
        target_logits: empty(&like, Shape::from([scored.len()]), DType::F32),
        peaks: empty(&like, Shape::from([2 * n_rows]), DType::F32),
        sums: empty(&like, Shape::from([n_rows]), DType::F32),
        scale: scale(head, keeps),
        entries,
    };
    let chunk_rows = chunk_rows(head, n_rows);
    let (mut chunks, mut peak_bytes) = (Vec::new(), None);
    let in_use = || like.client.memory_usage().ok().map(|usage| usage.bytes_in_use);
    for first_row in (0..n_rows).step_by(chunk_rows) {
        let rows = first_row..(first_row + chunk_rows).min(n_rows);
        let h = if rows.len() == n_rows { hidden.clone() } else { hidden.clone().slice([rows, 0..n_hidden]) };
        let mut weighted = None;
        for (i, (shard, first_id)) in head.shards.iter().zip(head.first_ids()).enumerate() {
            let shard = shard.to_dense();
            let logits =
                profile::named(PRODUCTS, || B::lora_linear_forward(h.clone(), shard.clone(), None, None));
            let is_first = first_id == 0;
            let exps =
                statistics.extend(primitive(logits), shard.dtype(), first_row, first_id, is_first, keeps);
            if let Some(exps) = exps {
                let exps = tensor(exps);
                let part = profile::named(PRODUCTS, || {
                    B::lora_linear_backward_input(exps.clone(), shard.clone(), None, None, DType::F32)
                });
                // Asking has the host wait for what was launched. The first shard is as large as any, and the second finds its sums.
                if first_row == 0 && i < 2 {
                    peak_bytes = peak_bytes.max(in_use());
                }
                drop(exps);
                let part = primitive(part);
                weighted = Some(match weighted {
                    Some(weighted) => statistics.merge(weighted, &part, first_row),
                    None => part,
                });
            }
        }
        chunks.extend(weighted.map(tensor::<R, B, 2>));
    }
    let weighted = if chunks.len() > 1 { Some(Tensor::cat(chunks, 0)) } else { chunks.pop() };
    let logps = tensor(statistics.log_probabilities());
    let sum = tensor(statistics.sums);
    let expected = weighted.map(|weighted| ExpectedRows { weighted, sum });
    TokenLogps { logps, expected, peak_bytes }
}

/// By what the exponentials are multiplied. As `f16` the smallest normal number would be 6e-5, and the unlikely tokens, which may be
/// most of the vocabulary and some of the probability, would lose their digits; from 2^15 down it is 2e-9.
fn scale<B: Backend>(head: &Head<B>, keeps: bool) -> f32 {
    let is_half = head.shards.iter().any(|shard| shard.dtype() == DType::F16);
    if keeps && is_half { 32_768.0 } else { 1.0 }
}

/// The softmax of every row over the shards that were seen.
struct Statistics<R: CubeRuntime> {
    entries: Entries,
    handle: Handle,
    target_logits: CubeTensor<R>,
    peaks: CubeTensor<R>,
    sums: CubeTensor<R>,
    scale: f32,
}

impl<R: CubeRuntime> Statistics<R> {
    /// Takes in a shard's logits, `[rows, n]` from `first_row` on; gives their exponentials in `dtype`, if they are to be kept.
    fn extend(
        &self,
        logits: CubeTensor<R>,
        dtype: DType,
        first_row: usize,
        first_id: usize,
        is_first: bool,
        keeps: bool,
    ) -> Option<CubeTensor<R>> {
        assert_eq!(logits.dtype, DType::F32, "token_logps: logits are f32");
        let client = logits.client.clone();
        let logits = into_contiguous(logits);
        let [n_rows, n] = [0, 1].map(|i| logits.meta.shape()[i]);
        let vector = vector_width(n);
        let in_place = dtype == DType::F32 && logits.can_mut();
        let exps =
            if in_place || !keeps { logits.clone() } else { empty(&logits, Shape::from([n_rows, n]), dtype) };
        let exps_arg = if in_place || !keeps {
            ArrayArg::Alias { input_pos: 0, length: [n_rows * n] }
        } else {
            exps.clone().into_array_arg()
        };
        let x = (n_rows as u32).min(MAX_WORKGROUPS);
        let work = [4 * n_rows * n, 2 * bytes(&[&logits])];
        profile::kernel("token_logps softmax", work[0], work[1], &client, || {
            #[expect(
                unsafe_code,
                reason = "a checked launch counts every turn of loops that are known to end"
            )]
            // SAFETY: the kernel holds rows and columns against `chunk_rows` and `width`, and the entries are those of `Entries`.
            unsafe {
                softmax_shard::launch_unchecked(
                    &client,
                    CubeCount::Static(x, (n_rows as u32).div_ceil(x), 1),
                    CubeDim::new_1d(ROW_THREADS),
                    vector,
                    logits.into_array_arg(),
                    words(&self.handle, &self.entries.words),
                    exps_arg,
                    self.target_logits.clone().into_array_arg(),
                    self.peaks.clone().into_array_arg(),
                    self.sums.clone().into_array_arg(),
                    first_row,
                    n_rows,
                    n / vector,
                    self.entries.targets_at,
                    first_id as u32,
                    self.scale,
                    is_first,
                    keeps,
                    if keeps { dtype } else { DType::F32 }.into(),
                );
            }
        });
        keeps.then_some(exps)
    }

    /// Rescales what the shards so far weighted, `[rows, hidden]` from `first_row` on, and adds the next one's part.
    fn merge(&self, weighted: CubeTensor<R>, part: &CubeTensor<R>, first_row: usize) -> CubeTensor<R> {
        let n_hidden = weighted.meta.shape()[1];
        let n_rows = self.sums.meta.shape()[0];
        let (vector, count, dim) = by_vector(&weighted, weighted.meta.num_elements(), n_hidden);
        let work = [3 * weighted.meta.num_elements(), 3 * bytes(&[&weighted])];
        profile::kernel("token_logps merge", work[0], work[1], &weighted.client, || {
            #[expect(
                unsafe_code,
                reason = "a checked launch counts every turn of loops that are known to end"
            )]
            // SAFETY: the kernel holds its position against the length of `weighted`, which `part` has too.
            unsafe {
                merge::launch_unchecked(
                    &weighted.client,
                    count,
                    dim,
                    vector,
                    part.clone().into_array_arg(),
                    self.peaks.clone().into_array_arg(),
                    weighted.clone().into_array_arg(),
                    n_hidden / vector,
                    n_rows + first_row,
                );
            }
        });
        weighted
    }

    fn log_probabilities(&self) -> CubeTensor<R> {
        let [n_entries, n_rows] = [&self.target_logits, &self.sums].map(|t| t.meta.shape()[0]);
        let logps = empty(&self.sums, Shape::from([n_entries]), DType::F32);
        let (_, count, dim) = by_vector(&self.sums, n_rows, 1);
        let work = [2 * n_entries, 2 * bytes(&[&self.target_logits])];
        profile::kernel("token_logps log-probabilities", work[0], work[1], &self.sums.client, || {
            #[expect(
                unsafe_code,
                reason = "a checked launch counts every turn of loops that are known to end"
            )]
            // SAFETY: the kernel holds the row against the length of `sums`, and the entries are those of `Entries`.
            unsafe {
                log_probabilities::launch_unchecked(
                    &logps.client,
                    count,
                    dim,
                    words(&self.handle, &self.entries.words),
                    self.target_logits.clone().into_array_arg(),
                    self.peaks.clone().into_array_arg(),
                    self.sums.clone().into_array_arg(),
                    logps.clone().into_array_arg(),
                    self.entries.order_at,
                    self.scale,
                );
            }
        });
        logps
    }
}

/// [`Kernels::token_logps_backward`] in kernels.
pub(in crate::ops) fn backward<R: CubeRuntime, B: Kernels + Backend<FloatTensorPrimitive = CubeTensor<R>>>(
    dlogps: Tensor<B, 1>,
    expected: ExpectedRows<B>,
    head: &Head<B>,
    scored: &[ScoredToken],
) -> Tensor<B, 2> {
    let (dlogps, weighted, sum) = (primitive(dlogps), primitive(expected.weighted), primitive(expected.sum));
    let dhidden = owned(weighted);
    let [n_rows, n_hidden] = [0, 1].map(|i| dhidden.meta.shape()[i]);
    let client = dhidden.client.clone();

    let entries = Entries::new(scored, n_rows);
    let handle = client.create_from_slice(bytemuck::cast_slice(&entries.words));
    let (vector, count, dim) = by_vector(&dhidden, n_rows * n_hidden, n_hidden);
    let work = [2 * n_rows * n_hidden, 2 * bytes(&[&dhidden])];
    profile::kernel("token_logps backward", work[0], work[1], &client, || {
        #[expect(unsafe_code, reason = "a checked launch counts every turn of loops that are known to end")]
        // SAFETY: the kernel holds its position against the length of `dhidden`, and the entries are those of `Entries`.
        unsafe {
            subtract_expected::launch_unchecked(
                &client,
                count,
                dim,
                vector,
                words(&handle, &entries.words),
                dlogps.clone().into_array_arg(),
                sum.into_array_arg(),
                dhidden.clone().into_array_arg(),
                n_hidden / vector,
                entries.order_at,
            );
        }
    });

    let slots = Slots::new(scored, &head.first_ids());
    let handle = client.create_from_slice(bytemuck::cast_slice(&slots.words));
    for (shard, &(slots_at, n_slots)) in head.shards.iter().zip(&slots.shards) {
        if n_slots == 0 {
            continue;
        }
        let weight = primitive(shard.to_dense());
        let (vector, count, dim) = by_vector(&dhidden, n_slots * n_hidden, n_hidden);
        let work = [2 * n_slots * n_hidden, 2 * n_slots * n_hidden * size_of::<f32>()];
        profile::kernel("token_logps backward", work[0], work[1], &client, || {
            #[expect(
                unsafe_code,
                reason = "a checked launch counts every turn of loops that are known to end"
            )]
            // SAFETY: the kernel holds its position against the slots, which name rows of `dhidden` and of the shard.
            unsafe {
                add_targets::launch_unchecked(
                    &client,
                    count,
                    dim,
                    vector,
                    words(&handle, &slots.words),
                    dlogps.clone().into_array_arg(),
                    weight.into_array_arg(),
                    dhidden.clone().into_array_arg(),
                    n_hidden / vector,
                    n_slots,
                    slots_at,
                    slots.entries_at,
                    shard.dtype().into(),
                );
            }
        });
    }
    tensor(dhidden)
}

/// The tensor as the kernels read it.
fn primitive<R: CubeRuntime, B: Backend<FloatTensorPrimitive = CubeTensor<R>>, const D: usize>(
    tensor: Tensor<B, D>,
) -> CubeTensor<R> {
    readable(tensor.into_primitive().tensor())
}

fn tensor<R: CubeRuntime, B: Backend<FloatTensorPrimitive = CubeTensor<R>>, const D: usize>(
    primitive: CubeTensor<R>,
) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn words<R: CubeRuntime>(handle: &Handle, words: &[u32]) -> ArrayArg<R> {
    #[expect(unsafe_code, reason = "an array of plain integers has no other constructor")]
    // SAFETY: the buffer was made of these words.
    unsafe {
        ArrayArg::from_raw_parts(handle.clone(), words.len())
    }
}

/// A launch over `n_elements` of rows of `n_columns`, a thread a vector.
fn by_vector<R: CubeRuntime>(
    like: &CubeTensor<R>,
    n_elements: usize,
    n_columns: usize,
) -> (usize, CubeCount, CubeDim) {
    let vector = vector_width(n_columns);
    let dim = CubeDim::new(&like.client, n_elements / vector);
    (vector, calculate_cube_count_elemwise(&like.client, n_elements / vector, dim), dim)
}
