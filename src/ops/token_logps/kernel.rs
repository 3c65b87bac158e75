//! The head's kernels: everything but its products.
//!
//! `entries` is one list of integers in sections, of which a kernel is told the offsets; see `Entries` and `Slots` in `entries.rs`.

use burn_cubecl::cubecl;
use burn_cubecl::cubecl::prelude::*;

/// Threads that share a row of logits.
pub(super) const ROW_THREADS: u32 = 128;

/// Below every logit; a difference to it is finite, where one to an infinity could be none.
const LOWEST: f32 = -3.0e38;

/// Turns a shard's logits into `scale · exp(z − max)`, extends the running `max` and sum of every row, and copies the targets'
/// logits out. One cube a row.
///
/// # Shapes
/// - `logits`, `exps`: `[chunk_rows, n]`   - `peaks`: `[2, rows]`, the maxima and by what the sums so far were multiplied
/// - `sums`: `[rows]`   - `target_logits`: `[entries]`, by row
#[expect(clippy::too_many_arguments, reason = "a kernel's bindings and scalars")]
#[cube(launch_unchecked)]
pub(super) fn softmax_shard<E: Float, N: Size>(
    logits: &Array<Vector<f32, N>>,
    entries: &Array<u32>,
    exps: &mut Array<Vector<E, N>>,
    target_logits: &mut Array<f32>,
    peaks: &mut Array<f32>,
    sums: &mut Array<f32>,
    first_row: usize,
    chunk_rows: usize,
    width: usize,
    targets_at: usize,
    first_id: u32,
    scale: f32,
    #[comptime] is_first: bool,
    #[comptime] keeps_exps: bool,
    #[define(E)] _dtype: StorageType,
) {
    let n_threads = comptime!(ROW_THREADS as usize);
    if CUBE_POS >= chunk_rows {
        terminate!();
    }
    let thread = UNIT_POS as usize;
    let row = first_row + CUBE_POS;
    let start = CUBE_POS * width;
    let size = N::value();

    // The thread that later overwrites a logit is the one that reads it here.
    let mut entry = entries[row] as usize;
    let end = entries[row + 1] as usize;
    while entry < end {
        let target = entries[targets_at + entry];
        if target >= first_id {
            let column = (target - first_id) as usize;
            let place = column / size;
            if place < width && place % n_threads == thread {
                let found = logits[start + place];
                #[unroll]
                for k in 0..size {
                    if column % size == k {
                        target_logits[entry] = found[k];
                    }
                }
            }
        }
        entry += 1;
    }

    let mut shared = SharedMemory::<f32>::new(n_threads);
    let mut highest = Vector::<f32, N>::new(f32::new(LOWEST));
    let mut i = thread;
    while i < width {
        highest = max(highest, logits[start + i]);
        i += n_threads;
    }
    let mut max_here = highest[0];
    #[unroll]
    for k in 1..size {
        max_here = max(max_here, highest[k]);
    }
    let mut max_before = f32::new(LOWEST);
    if !is_first {
        max_before = peaks[row];
        max_here = max(max_here, max_before);
    }
    let max_all = over_the_cube(&mut shared, max_here, true);

    let mut total = Vector::<f32, N>::new(f32::new(0.0));
    let mut i = thread;
    while i < width {
        let exp = (logits[start + i] - Vector::new(max_all)).exp() * Vector::new(scale);
        total += exp;
        if keeps_exps {
            exps[start + i] = Vector::cast_from(exp);
        }
        i += n_threads;
    }
    let mut sum_here = total[0];
    #[unroll]
    for k in 1..size {
        sum_here += total[k];
    }
    let sum_all = over_the_cube(&mut shared, sum_here, false);
    if thread == 0 {
        if is_first {
            sums[row] = sum_all;
        } else {
            let rescale = (max_before - max_all).exp();
            sums[row] = sums[row] * rescale + sum_all;
            peaks[sums.len() + row] = rescale;
        }
        peaks[row] = max_all;
    }
}

/// The maximum, or else the sum, of a value of every thread of the cube.
#[cube]
fn over_the_cube(shared: &mut SharedMemory<f32>, value: f32, #[comptime] is_max: bool) -> f32 {
    let thread = UNIT_POS as usize;
    shared[thread] = value;
    sync_cube();
    #[unroll]
    for level in 0..comptime!(ROW_THREADS.ilog2()) {
        let half = comptime!((ROW_THREADS >> (level + 1)) as usize);
        if thread < half {
            let (own, other) = (shared[thread], shared[thread + half]);
            if is_max {
                shared[thread] = max(own, other);
            } else {
                shared[thread] = own + other;
            }
        }
        sync_cube();
    }
    let result = shared[0];
    sync_cube();
    result
}

/// `weighted · rescale + part`, in place; `[chunk_rows, hidden]`, `width` vectors a row.
#[cube(launch_unchecked)]
pub(super) fn merge<N: Size>(
    part: &Array<Vector<f32, N>>,
    peaks: &Array<f32>,
    weighted: &mut Array<Vector<f32, N>>,
    width: usize,
    rescale_at: usize,
) {
    if ABSOLUTE_POS >= weighted.len() {
        terminate!();
    }
    let rescale = peaks[rescale_at + ABSOLUTE_POS / width];
    weighted[ABSOLUTE_POS] = weighted[ABSOLUTE_POS] * Vector::new(rescale) + part[ABSOLUTE_POS];
}

/// The entries' log-probabilities, in their own order; a thread a row.
#[cube(launch_unchecked)]
pub(super) fn log_probabilities(
    entries: &Array<u32>,
    target_logits: &Array<f32>,
    peaks: &Array<f32>,
    sums: &Array<f32>,
    logps: &mut Array<f32>,
    order_at: usize,
    scale: f32,
) {
    let row = ABSOLUTE_POS;
    if row >= sums.len() {
        terminate!();
    }
    // In this order: where the target is the likeliest token the difference is exactly zero, and the logarithm is all there is.
    let log_sum = (sums[row] / scale).ln();
    let mut entry = entries[row] as usize;
    let end = entries[row + 1] as usize;
    while entry < end {
        let place = entries[order_at + entry] as usize;
        logps[place] = (target_logits[entry] - peaks[row]) - log_sum;
        entry += 1;
    }
}

/// `−(Σ dlogp) / sum · weighted`, in place; `[rows, hidden]`, `width` vectors a row.
#[cube(launch_unchecked)]
pub(super) fn subtract_expected<N: Size>(
    entries: &Array<u32>,
    dlogps: &Array<f32>,
    sums: &Array<f32>,
    weighted: &mut Array<Vector<f32, N>>,
    width: usize,
    order_at: usize,
) {
    if ABSOLUTE_POS >= weighted.len() {
        terminate!();
    }
    let row = ABSOLUTE_POS / width;
    let mut total = f32::new(0.0);
    let mut entry = entries[row] as usize;
    let end = entries[row + 1] as usize;
    while entry < end {
        total += dlogps[entries[order_at + entry] as usize];
        entry += 1;
    }
    weighted[ABSOLUTE_POS] = weighted[ABSOLUTE_POS] * Vector::new(-total / sums[row]);
}

/// `dhidden[row] += Σ dlogp · W[target]` over the entries whose targets one shard holds; `width` vectors a row, a slot for every row
/// that has such entries.
#[expect(clippy::too_many_arguments, reason = "a kernel's bindings and scalars")]
#[cube(launch_unchecked)]
pub(super) fn add_targets<E: Float, N: Size>(
    slots: &Array<u32>,
    dlogps: &Array<f32>,
    weight: &Array<Vector<E, N>>,
    dhidden: &mut Array<Vector<f32, N>>,
    width: usize,
    n_slots: usize,
    slots_at: usize,
    entries_at: usize,
    #[define(E)] _dtype: StorageType,
) {
    let slot = ABSOLUTE_POS / width;
    if slot >= n_slots {
        terminate!();
    }
    let column = ABSOLUTE_POS % width;
    let slot = slots_at + 3 * slot;
    let place = slots[slot] as usize * width + column;
    let mut sum = dhidden[place];
    let mut entry = slots[slot + 1] as usize;
    let end = slots[slot + 2] as usize;
    while entry < end {
        let dlogp = dlogps[slots[entries_at + 2 * entry] as usize];
        let target = slots[entries_at + 2 * entry + 1] as usize;
        sum += Vector::cast_from(weight[target * width + column]) * Vector::new(dlogp);
        entry += 1;
    }
    dhidden[place] = sum;
}
