//! Products on matrix units: operands lie in workgroup memory in the tensors' type, sums stay in the units' own matrices, whose layout
//! nobody knows, and threads see scores and sums by way of workgroup memory.
//!
//! A plane of threads has `side` of the block's lines to itself: it multiplies them, and its threads' lines are among them. All
//! meetings are nevertheless of the whole workgroup: one of a plane orders its memory on no runtime but CUDA.

use burn::cubecl;
use burn::cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use burn::cubecl::prelude::*;

use super::lines::{Block, Lines, Quad};
use super::tile::{Form, Tile, column, thread_m, thread_n};

/// Workgroup memory, and how the work is cut. Rows are longer than what they hold, which keeps neighbours out of each other's banks,
/// by so much that every matrix of 16 x 16 starts at a multiple of 32 bytes, as CUDA wants it.
#[derive(CubeType)]
pub(super) struct MatrixRoom<F: Float> {
    /// `[n_owned, block_m, head_dim]`
    owned: SharedMemory<Quad<F>>,
    /// `[block_n, head_dim]`
    walked: SharedMemory<Quad<F>>,
    /// `[block_m, block_n]`
    scores: SharedMemory<f32>,
    /// `[block_m, block_n]`
    weights: SharedMemory<F>,
    /// The last step in which some line's sums had to be rescaled.
    rescaled: SharedMemory<u32>,
    #[cube(comptime)]
    side: usize,
    #[cube(comptime)]
    form: Form,
    #[cube(comptime)]
    tile: Tile,
}

/// A plane's sums of its lines, `[side, head_dim]` in matrices side by side.
#[derive(CubeType)]
pub(super) struct MatrixSums {
    matrices: Sequence<Matrix<f32>>,
}

/// How far a line's scores may grow past what its weights are relative to before the latter follows: a weight of e^8 is as exact as
/// one of 1, and far from the largest number of either 16-bit type.
const SLACK: f32 = 8.0;
/// Bytes to which a matrix is aligned.
const ALIGNMENT: usize = 32;
/// Quads that a staged line is longer than what it holds.
const PADDING: usize = 2;
/// Entries that a row of weights is longer.
const WEIGHTS_PADDING: usize = 8;
/// Entries that a row of scores is longer.
const SCORES_PADDING: usize = 4;

/// Quads from one staged line to the next.
const fn pitch(form: Form) -> usize {
    form.quads + PADDING
}

/// Bytes of workgroup memory that the hungriest kernel takes, for tensors of 16-bit types: of two owned lines, or of one and what the
/// forward kernel's threads tell each other.
pub(super) fn shared_bytes(form: Form, tile: Tile) -> usize {
    let line = 8 * pitch(form);
    let scores = 4 * (tile.block_n() + SCORES_PADDING) + 2 * (tile.block_n() + WEIGHTS_PADDING);
    let owned = line + line.max(4 * tile.threads_n);
    let rescaled = 4;
    tile.block_m() * (owned + scores) + tile.block_n() * line + rescaled
}

#[cube]
impl<F: Float> MatrixRoom<F> {
    pub(super) fn new(
        #[comptime] n_owned: usize,
        #[comptime] side: usize,
        #[comptime] form: Form,
        #[comptime] tile: Tile,
    ) -> MatrixRoom<F> {
        let owned = comptime!(n_owned * tile.block_m() * pitch(form));
        let walked = comptime!(tile.block_n() * pitch(form));
        let scores = comptime!(tile.block_m() * (tile.block_n() + SCORES_PADDING));
        let weights = comptime!(tile.block_m() * (tile.block_n() + WEIGHTS_PADDING));
        MatrixRoom::<F> {
            owned: SharedMemory::new_aligned(owned, ALIGNMENT),
            walked: SharedMemory::new_aligned(walked, ALIGNMENT),
            scores: SharedMemory::new_aligned(scores, ALIGNMENT),
            weights: SharedMemory::new_aligned(weights, ALIGNMENT),
            rescaled: SharedMemory::new(1usize),
            side,
            form,
            tile,
        }
    }

    pub(super) fn zeros(&self) -> MatrixSums {
        let mut matrices = Sequence::<Matrix<f32>>::new();
        #[unroll]
        for _ in 0..comptime!(4 * self.form.quads / self.side) {
            matrices.push(zero(self.side));
        }
        MatrixSums { matrices }
    }

    pub(super) fn own(&mut self, #[comptime] slot: usize, owned: &Block<F>) {
        let at = comptime!(slot * self.tile.block_m() * pitch(self.form));
        let n = comptime!(self.tile.block_m());
        let own = fetch::<F>(owned, n, self.tile);
        stage::<F>(&own, &mut self.owned, at, n, comptime!(self.form.quads), self.tile);
    }

    pub(super) fn walk(&mut self, walked: &Block<F>) {
        let n = comptime!(self.tile.block_n());
        let own = fetch::<F>(walked, n, self.tile);
        sync_cube();
        stage::<F>(&own, &mut self.walked, 0usize, n, comptime!(self.form.quads), self.tile);
        sync_cube();
    }

    pub(super) fn products(&mut self, #[comptime] slot: usize) -> Array<f32> {
        let tile = comptime!(self.tile);
        let side = comptime!(self.side);
        let pitch = comptime!(pitch(self.form));
        let row = plane(side, tile) * side;
        let n = comptime!(tile.block_n() / side);
        let mut sums = Sequence::<Matrix<f32>>::new();
        #[unroll]
        for _ in 0..n {
            sums.push(zero(side));
        }
        for k in 0..comptime!(4 * self.form.quads / side) {
            let at = (comptime!(slot * tile.block_m()) + row) * pitch + k * side / 4;
            let left = operand::<F>(MatrixIdent::A, MatrixLayout::RowMajor, side);
            cmma::load(&left, &self.owned.slice(at, at + 1), comptime!(4 * pitch as u32));
            #[unroll]
            for j in 0..n {
                let at = j * side * pitch + k * side / 4;
                let right = operand::<F>(MatrixIdent::B, MatrixLayout::ColMajor, side);
                cmma::load(&right, &self.walked.slice(at, at + 1), comptime!(4 * pitch as u32));
                let sum = sums.index(j);
                cmma::execute::<F, F, f32, f32>(&left, &right, sum, sum);
            }
        }
        self.show(&sums, 0usize, n);
        let scores_pitch = comptime!(tile.block_n() + SCORES_PADDING);
        let mut values = Array::<f32>::new(comptime!(tile.lines * tile.columns));
        #[unroll]
        for i in 0..tile.lines {
            let line = thread_m(tile) * tile.lines + i;
            #[unroll]
            for j in 0..tile.columns {
                values[i * tile.columns + j] =
                    self.scores[line * scores_pitch + column(thread_n(tile), j, tile)];
            }
        }
        values
    }

    pub(super) fn share(&mut self, values: &Array<f32>) {
        let tile = comptime!(self.tile);
        let pitch = comptime!(tile.block_n() + WEIGHTS_PADDING);
        #[unroll]
        for i in 0..tile.lines {
            let line = thread_m(tile) * tile.lines + i;
            #[unroll]
            for j in 0..tile.columns {
                self.weights[line * pitch + column(thread_n(tile), j, tile)] =
                    F::cast_from(values[i * tile.columns + j]);
            }
        }
    }

    pub(super) fn accumulate(&self, sums: &mut MatrixSums) {
        let side = comptime!(self.side);
        let pitch = comptime!(pitch(self.form));
        let weights_pitch = comptime!(self.tile.block_n() + WEIGHTS_PADDING);
        let row = plane(side, self.tile) * side;
        for k in 0..comptime!(self.tile.block_n() / side) {
            let at = row * weights_pitch + k * side;
            let left = operand::<F>(MatrixIdent::A, MatrixLayout::RowMajor, side);
            cmma::load(&left, &self.weights.slice(at, at + 1), comptime!(weights_pitch as u32));
            #[unroll]
            for j in 0..comptime!(4 * self.form.quads / side) {
                let at = k * side * pitch + j * side / 4;
                let right = operand::<F>(MatrixIdent::B, MatrixLayout::RowMajor, side);
                cmma::load(&right, &self.walked.slice(at, at + 1), comptime!(4 * pitch as u32));
                let sum = sums.matrices.index(j);
                cmma::execute::<F, F, f32, f32>(&left, &right, sum, sum);
            }
        }
    }

    pub(super) fn maximum(&mut self, before: f32, largest: f32, step: u32) -> f32 {
        let is_far = largest > before + SLACK;
        if is_far {
            self.rescaled[0] = step;
        }
        select(is_far, largest, before)
    }

    pub(super) fn rescale(&mut self, sums: &mut MatrixSums, factors: &Array<f32>, step: u32) {
        if self.rescaled[0] == step {
            self.multiply(sums, factors);
        }
    }

    fn multiply(&mut self, sums: &mut MatrixSums, factors: &Array<f32>) {
        let side = comptime!(self.side);
        let pitch = comptime!(self.tile.block_n() + SCORES_PADDING);
        let row = plane(side, self.tile) * side;
        let n = comptime!(4 * self.form.quads / side);
        let chunk = comptime!(self.tile.block_n() / side);
        #[unroll]
        for first in range_stepped(0, n, chunk) {
            let len = comptime!(chunk.min(n - first));
            self.show(&sums.matrices, first, len);
            #[unroll]
            for i in 0..self.tile.lines {
                let line = thread_m(self.tile) * self.tile.lines + i;
                #[unroll]
                for j in 0..self.tile.columns {
                    let at = line * pitch + column(thread_n(self.tile), j, self.tile);
                    self.scores[at] *= factors[i];
                }
            }
            sync_cube();
            #[unroll]
            for j in 0..len {
                let at = row * pitch + j * side;
                let sum = sums.matrices.index(comptime!(first + j));
                cmma::load_with_layout(
                    sum,
                    &self.scores.slice(at, at + 1),
                    comptime!(pitch as u32),
                    MatrixLayout::RowMajor,
                );
            }
            sync_cube();
        }
    }

    pub(super) fn store<O: Float>(
        &mut self,
        sums: &MatrixSums,
        factors: &Array<f32>,
        out: &mut Array<Quad<O>>,
        lines: &Lines,
        first: usize,
    ) {
        let tile = comptime!(self.tile);
        let pitch = comptime!(tile.block_n() + SCORES_PADDING);
        let n = comptime!(4 * self.form.quads / self.side);
        let chunk = comptime!(tile.block_n() / self.side);
        #[unroll]
        for first_sum in range_stepped(0, n, chunk) {
            let len = comptime!(chunk.min(n - first_sum));
            let quads = comptime!(len * self.side / 4);
            self.show(&sums.matrices, first_sum, len);
            #[unroll]
            for i in 0..tile.lines {
                let row = thread_m(tile) * tile.lines + i;
                let line = first + row;
                if line < lines.n_lines {
                    let start = lines.start(line) + first_sum * self.side / 4;
                    for quad in range_stepped(thread_n(tile), quads, tile.threads_n) {
                        let mut values = Quad::<f32>::empty();
                        #[unroll]
                        for c in 0..4usize {
                            values[c] = self.scores[row * pitch + 4 * quad + c] * factors[i];
                        }
                        out[start + quad] = Quad::cast_from(values);
                    }
                }
            }
            sync_cube();
        }
    }

    /// Puts some of a plane's sums, as many as fit, where threads read them, and lets everybody arrive there.
    fn show(&mut self, sums: &Sequence<Matrix<f32>>, #[comptime] first: usize, #[comptime] len: usize) {
        let side = comptime!(self.side);
        let pitch = comptime!(self.tile.block_n() + SCORES_PADDING);
        let row = plane(side, self.tile) * side;
        #[unroll]
        for j in 0..len {
            let at = row * pitch + j * side;
            let mut there = self.scores.slice_mut(at, at + 1);
            cmma::store(
                &mut there,
                sums.index(comptime!(first + j)),
                comptime!(pitch as u32),
                MatrixLayout::RowMajor,
            );
        }
        sync_cube();
    }
}

/// The plane that a thread is of.
#[cube]
fn plane(#[comptime] side: usize, #[comptime] tile: Tile) -> usize {
    UNIT_POS as usize / comptime!(side * tile.threads_n / tile.lines)
}

#[cube]
fn zero(#[comptime] side: usize) -> Matrix<f32> {
    Matrix::<f32>::from_value(MatrixIdent::Accumulator, side, side, side, MatrixLayout::Undefined, 0.0f32)
}

/// A matrix that is to be loaded.
#[cube]
fn operand<F: Float>(
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
    #[comptime] side: usize,
) -> Matrix<F> {
    #[expect(unsafe_code, reason = "a matrix that is filled before it is loaded costs the filling")]
    // SAFETY: every caller loads it.
    unsafe {
        Matrix::<F>::uninitialized(ident, side, side, side, layout)
    }
}

/// What a thread stages of a block's `n` lines, loaded at once: one load is on its way while the others are.
#[cube]
fn fetch<F: Float>(from: &Block<F>, #[comptime] n: usize, #[comptime] tile: Tile) -> Array<Quad<F>> {
    let quads = comptime!(from.lines.quads);
    let items = comptime!(n * quads);
    let threads = comptime!(tile.threads_m * tile.threads_n);
    let mut own = Array::<Quad<F>>::new(comptime!(items.div_ceil(threads)));
    #[unroll]
    for i in 0..comptime!(items.div_ceil(threads)) {
        let item = min(UNIT_POS as usize + i * threads, items - 1);
        own[i] = from.entries[from.start(item / quads) + item % quads];
    }
    own
}

/// Puts what was fetched of `n` lines of so many quads where `at` is their first.
#[cube]
fn stage<F: Float>(
    own: &Array<Quad<F>>,
    to: &mut SharedMemory<Quad<F>>,
    at: usize,
    #[comptime] n: usize,
    #[comptime] quads: usize,
    #[comptime] tile: Tile,
) {
    let items = comptime!(n * quads);
    let threads = comptime!(tile.threads_m * tile.threads_n);
    #[unroll]
    for i in 0..comptime!(items.div_ceil(threads)) {
        let item = UNIT_POS as usize + i * threads;
        if comptime!(items.is_multiple_of(threads)) || item < items {
            to[at + item / quads * comptime!(quads + PADDING) + item % quads] = own[i];
        }
    }
}
