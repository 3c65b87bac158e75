//! Which keys each query sees, and the summary of it by which kernels skip tiles.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::launch::Mask;

/// What stands for a masked score: small enough for a weight of exactly zero, and finite.
pub(super) const MASKED: f32 = -1e30;
/// Neighbouring queries, or keys, that the table has a summary of.
pub(super) const STRIP: usize = 8;

/// The keys that one query sees: `[first, prefix_end)` and `[own_start, end)`.
///
/// The first range is what a pair's answers share, the second the answer's own rows up to the query; where there is no gap between
/// them, `prefix_end == own_start`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visible {
    /// First visible key.
    pub first: u32,
    /// One past the last key of the shared prefix.
    pub prefix_end: u32,
    /// First key of the query's own part, at least `prefix_end`.
    pub own_start: u32,
    /// One past the last visible key.
    pub end: u32,
}

impl Visible {
    /// How many keys the query sees.
    pub fn n_keys(&self) -> usize {
        (self.prefix_end - self.first + self.end - self.own_start) as usize
    }

    /// Two ranges without a gap as one, the first of them empty.
    fn joined(self) -> Self {
        let Self { first, prefix_end, own_start, .. } = self;
        if prefix_end == own_start { Self { prefix_end: first, own_start: first, ..self } } else { self }
    }

    fn words(self) -> [u32; 4] {
        [self.first, self.prefix_end, self.own_start, self.end]
    }
}

/// Which keys each query sees. Rows that have the same `first` stand together.
#[derive(Debug, Clone)]
pub struct AttentionMask<B: Backend> {
    /// By query.
    pub visible: Vec<Visible>,
    /// The same for the kernels, which read it once for all layers: rows of four. As a matrix, CUDA would leave gaps between them.
    table: Tensor<B, 1, Int>,
    /// One past the last key that any query sees.
    n_seen: usize,
}

impl<B: Backend> AttentionMask<B> {
    /// Builds the mask of these queries.
    ///
    /// # Panics
    /// If a query sees no key of its own, or its ranges are out of order.
    pub fn new(visible: Vec<Visible>, device: &B::Device) -> Self {
        for (i, v) in visible.iter().enumerate() {
            let is_ordered = v.first <= v.prefix_end && v.prefix_end <= v.own_start && v.own_start < v.end;
            assert!(is_ordered, "attention: query {i} sees {v:?}");
        }
        let words = words(&visible);
        let table = Tensor::from_data(TensorData::new(words.clone(), [words.len()]), device);
        Self { n_seen: n_seen(&visible), visible, table }
    }

    /// One sequence's next `n_new` rows after `n_cached` cached ones: row `i` sees the cache and rows up to itself.
    pub fn causal(n_cached: usize, n_new: usize, device: &B::Device) -> Self {
        let row =
            |i: usize| Visible { first: 0, prefix_end: 0, own_start: 0, end: (n_cached + i + 1) as u32 };
        Self::new((0..n_new).map(row).collect(), device)
    }

    /// What the kernels take of it.
    pub fn launch_mask<R: CubeRuntime>(&self) -> Mask<R>
    where
        B: Backend<IntTensorPrimitive = CubeTensor<R>>,
    {
        Mask {
            table: self.table.clone().into_primitive(),
            n_visible: n_visible(&self.visible),
            n_seen: self.n_seen,
        }
    }
}

impl<R: CubeRuntime> Mask<R> {
    /// The mask of these queries, for kernels alone.
    pub(super) fn new(visible: &[Visible], device: &R::Device) -> Self {
        let (client, words) = (R::client(device), words(visible));
        let handle = client.create_from_slice(bytemuck::cast_slice(&words));
        let shape = Shape::from([words.len()]);
        let table = CubeTensor::new_contiguous(client, device.clone(), shape, handle, DType::I32);
        Self { table, n_visible: n_visible(visible), n_seen: n_seen(visible) }
    }
}

/// (query, key) pairs that attend to each other.
fn n_visible(visible: &[Visible]) -> usize {
    visible.iter().map(Visible::n_keys).sum()
}

/// The table's numbers.
fn words(visible: &[Visible]) -> Vec<i32> {
    table(visible).into_iter().flatten().map(|n| n as i32).collect()
}

fn n_seen(visible: &[Visible]) -> usize {
    visible.iter().map(|v| v.end).max().unwrap_or(0) as usize
}

/// Rows of the table: what each query sees; then two for every [`STRIP`] queries, around and within whose ranges all keys lie that
/// any of them and that all of them see; then one for every [`STRIP`] keys, with the first and one past the last query that sees
/// any of them.
fn table(visible: &[Visible]) -> Vec<[u32; 4]> {
    let mut rows: Vec<_> = visible.iter().map(|v| v.words()).collect();
    let mut keys = vec![[u32::MAX, 0, 0, 0]; n_seen(visible).div_ceil(STRIP)];
    for (strip, queries) in visible.chunks(STRIP).enumerate() {
        let words = || queries.iter().map(|v| v.joined().words());
        let fold = |pick: [fn(u32, u32) -> u32; 4]| {
            words().reduce(|a, b| [0, 1, 2, 3].map(|c| pick[c](a[c], b[c]))).unwrap_or_default()
        };
        rows.push(fold([u32::min, u32::max, u32::min, u32::max]));
        rows.push(fold([u32::max, u32::min, u32::max, u32::min]));
        let first = (strip * STRIP) as u32;
        for (query, v) in (first..).zip(queries) {
            for range in [v.first..v.prefix_end, v.own_start..v.end] {
                if range.is_empty() {
                    continue;
                }
                let strips = range.start as usize / STRIP..(range.end as usize).div_ceil(STRIP);
                for key in &mut keys[strips] {
                    key[0] = key[0].min(query);
                    key[1] = key[1].max(query + 1);
                }
            }
        }
    }
    rows.extend(keys);
    rows
}
