//! Products in the threads' own registers.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::lanes::{line_quad, n_read, read_line};
use super::lines::{Block, Lines, Quad};
use super::tile::{Form, Tile, Units, column, thread_m, thread_n};

/// Workgroup memory, and how the work is cut.
#[derive(CubeType)]
pub(super) struct RegisterRoom {
    /// `[block_m, block_n]`, of which [`RegisterRoom::share`] puts a thread's columns side by side, or turned, see
    /// [`RegisterRoom::share_turned`].
    weights: SharedMemory<Quad<f32>>,
    /// `[block_n, stage + 1]`: one quad more a line keeps neighbours out of each other's banks. One quad where nothing is staged.
    staged: SharedMemory<Quad<f32>>,
    #[cube(comptime)]
    form: Form,
    #[cube(comptime)]
    tile: Tile,
}

/// A thread's quads of its owned lines, `[lines, thread_quads]`.
#[derive(CubeType)]
pub(super) struct RegisterSums {
    quads: Array<Quad<f32>>,
}

/// Quads of a line that one thread sums.
const fn thread_quads(form: Form, tile: Tile) -> usize {
    form.quads.div_ceil(tile.threads_n)
}

/// The quad of a line that is a thread's number `i`; past the line's end there is nothing to store.
#[cube]
fn thread_quad(i: usize, #[comptime] tile: Tile) -> usize {
    thread_n(tile) + i * tile.threads_n
}

#[cube]
impl RegisterRoom {
    pub(super) fn new(#[comptime] form: Form, #[comptime] tile: Tile) -> RegisterRoom {
        let staged = comptime!(match tile.units {
            Units::Registers { stage } => tile.block_n() * (stage + 1),
            Units::Lanes { lanes } => {
                assert!(
                    tile.threads_n.is_multiple_of(lanes),
                    "{tile:?}: a plane's threads have the same owned lines"
                );
                1
            }
            Units::Matrices { .. } | Units::Mma(_) => unreachable!(),
        });
        RegisterRoom {
            weights: SharedMemory::new(comptime!(tile.block_m() * tile.block_n() / 4)),
            staged: SharedMemory::new(staged),
            form,
            tile,
        }
    }

    pub(super) fn zeros(&self) -> RegisterSums {
        let len = comptime!(self.tile.lines * thread_quads(self.form, self.tile));
        let mut quads = Array::<Quad<f32>>::new(len);
        #[unroll]
        for i in 0..len {
            quads[i] = Quad::new(0.0f32);
        }
        RegisterSums { quads }
    }

    pub(super) fn products<F: Float>(&mut self, owned: &Block<F>, walked: &Block<F>) -> Array<f32> {
        let tile = comptime!(self.tile);
        let mut sums = Array::<f32>::new(comptime!(tile.lines * tile.columns));
        #[unroll]
        for i in 0..comptime!(tile.lines * tile.columns) {
            sums[i] = 0.0f32;
        }
        let mut at_owned = Array::<usize>::new(comptime!(n_read(tile)));
        #[unroll]
        for i in 0..comptime!(n_read(tile)) {
            at_owned[i] = owned.start(read_line(i, tile));
        }
        let quads = comptime!(owned.lines.quads);
        if let Units::Registers { stage } = comptime!(tile.units) {
            let pitch = comptime!(stage + 1);
            for first in range_stepped(0, quads, stage) {
                let mut item = UNIT_POS as usize;
                while item < comptime!(tile.block_n() * stage) {
                    let line = item / stage;
                    let quad = item % stage;
                    let at = walked.start(line) + min(first + quad, comptime!(quads - 1));
                    self.staged[line * pitch + quad] = Quad::cast_from(walked.entries[at]);
                    item += comptime!(tile.threads_m * tile.threads_n);
                }
                sync_cube();
                for quad in 0..min(stage, quads - first) {
                    let mut right = Array::<Quad<f32>>::new(comptime!(tile.columns));
                    #[unroll]
                    for j in 0..tile.columns {
                        right[j] = self.staged[column(thread_n(tile), j, tile) * pitch + quad];
                    }
                    multiply::<F>(owned, &at_owned, first + quad, &right, &mut sums, tile);
                }
                sync_cube();
            }
        } else {
            let mut at_walked = Array::<usize>::new(comptime!(tile.columns));
            #[unroll]
            for j in 0..tile.columns {
                at_walked[j] = walked.start(column(thread_n(tile), j, tile));
            }
            for quad in 0..quads {
                let mut right = Array::<Quad<f32>>::new(comptime!(tile.columns));
                #[unroll]
                for j in 0..tile.columns {
                    right[j] = Quad::cast_from(walked.entries[at_walked[j] + quad]);
                }
                multiply::<F>(owned, &at_owned, quad, &right, &mut sums, tile);
            }
        }
        sums
    }

    pub(super) fn share(&mut self, values: &Array<f32>) {
        let tile = comptime!(self.tile);
        let row = comptime!(tile.block_n() / 4);
        let quads = comptime!(tile.columns / 4);
        #[unroll]
        for i in 0..tile.lines {
            #[unroll]
            for h in 0..quads {
                let at = i * tile.columns + 4 * h;
                let mut quad = Quad::<f32>::empty();
                #[unroll]
                for c in 0..4usize {
                    quad[c] = values[at + c];
                }
                let line = thread_m(tile) * tile.lines + i;
                self.weights[line * row + thread_n(tile) * quads + h] = quad;
            }
        }
    }

    pub(super) fn accumulate<F: Float>(&self, walked: &Block<F>, sums: &mut RegisterSums) {
        let tile = comptime!(self.tile);
        let width = comptime!(thread_quads(self.form, tile));
        let row = comptime!(tile.block_n() / 4);
        let quads = comptime!(tile.columns / 4);
        for at in 0..row {
            let thread = at / quads;
            let h = at % quads;
            let mut values = Array::<Quad<f32>>::new(comptime!(4 * width));
            #[unroll]
            for c in 0..4usize {
                let start = walked.start(column(thread, 4 * h + c, tile));
                #[unroll]
                for i in 0..width {
                    let quad = min(thread_quad(i, tile), comptime!(self.form.quads - 1));
                    values[c * width + i] = Quad::cast_from(walked.entries[start + quad]);
                }
            }
            let mut read = Array::<Quad<f32>>::new(comptime!(n_read(tile)));
            #[unroll]
            for i in 0..comptime!(n_read(tile)) {
                read[i] = self.weights[read_line(i, tile) * row + at];
            }
            #[unroll]
            for i in 0..tile.lines {
                let w = line_quad(&read, i, tile);
                #[unroll]
                for k in 0..width {
                    sums.quads[i * width + k] += values[k] * Quad::new(w[0])
                        + values[width + k] * Quad::new(w[1])
                        + values[2 * width + k] * Quad::new(w[2])
                        + values[3 * width + k] * Quad::new(w[3]);
                }
            }
        }
    }

    /// Puts a thread's `[lines, columns]` where [`RegisterRoom::add_turned`] finds them: `[block_n, block_m]`, its owned lines side by side.
    pub(super) fn share_turned(&mut self, values: &Array<f32>) {
        let tile = comptime!(self.tile);
        let row = comptime!(tile.block_m() / 4);
        let quads = comptime!({
            assert!(
                tile.lines >= 4 && tile.block_n() >= tile.block_m(),
                "{tile:?} is not one for software adapters"
            );
            tile.lines / 4
        });
        #[unroll]
        for j in 0..tile.columns {
            #[unroll]
            for h in 0..quads {
                let mut quad = Quad::<f32>::empty();
                #[unroll]
                for c in 0..4usize {
                    quad[c] = values[(4 * h + c) * tile.columns + j];
                }
                let line = column(thread_n(tile), j, tile);
                self.weights[line * row + thread_m(tile) * quads + h] = quad;
            }
        }
    }

    /// Adds to the walked lines in `out`, from `first` on, the sums of owned lines by the weights that were shared turned, times `scale`.
    pub(super) fn add_turned<F: Float>(
        &self,
        owned: &Block<F>,
        scale: f32,
        out: &mut Array<Quad<f32>>,
        lines: &Lines,
        first: usize,
    ) {
        let tile = comptime!(self.tile);
        let width = comptime!(thread_quads(self.form, tile));
        let row = comptime!(tile.block_m() / 4);
        for part in 0..comptime!(tile.block_n() / tile.block_m()) {
            let line = part * tile.block_m() + thread_m(tile) * tile.lines;
            let mut sums = self.zeros();
            for at in 0..row {
                let mut values = Array::<Quad<f32>>::new(comptime!(4 * width));
                #[unroll]
                for c in 0..4usize {
                    let start = owned.start(4 * at + c);
                    #[unroll]
                    for k in 0..width {
                        let quad = min(thread_quad(k, tile), comptime!(self.form.quads - 1));
                        values[c * width + k] = Quad::cast_from(owned.entries[start + quad]);
                    }
                }
                let mut read = Array::<Quad<f32>>::new(comptime!(n_read(tile)));
                #[unroll]
                for i in 0..comptime!(n_read(tile)) {
                    read[i] = self.weights[(part * tile.block_m() + read_line(i, tile)) * row + at];
                }
                #[unroll]
                for i in 0..tile.lines {
                    let w = line_quad(&read, i, tile);
                    #[unroll]
                    for k in 0..width {
                        sums.quads[i * width + k] += values[k] * Quad::new(w[0])
                            + values[width + k] * Quad::new(w[1])
                            + values[2 * width + k] * Quad::new(w[2])
                            + values[3 * width + k] * Quad::new(w[3]);
                    }
                }
            }
            #[unroll]
            for i in 0..tile.lines {
                let at = first + line + i;
                if at < lines.n_lines {
                    #[unroll]
                    for k in 0..width {
                        let quad = thread_quad(k, tile);
                        if quad < self.form.quads {
                            out[lines.start(at) + quad] += sums.quads[i * width + k] * Quad::new(scale);
                        }
                    }
                }
            }
        }
    }

    pub(super) fn rescale(&self, sums: &mut RegisterSums, factors: &Array<f32>) {
        let tile = comptime!(self.tile);
        let width = comptime!(thread_quads(self.form, tile));
        #[unroll]
        for i in 0..tile.lines {
            #[unroll]
            for k in 0..width {
                sums.quads[i * width + k] = sums.quads[i * width + k] * Quad::new(factors[i]);
            }
        }
    }

    pub(super) fn store<F: Float>(
        &self,
        sums: &RegisterSums,
        factors: &Array<f32>,
        out: &mut Array<Quad<F>>,
        lines: &Lines,
        first: usize,
    ) {
        let tile = comptime!(self.tile);
        let width = comptime!(thread_quads(self.form, tile));
        #[unroll]
        for i in 0..tile.lines {
            let line = first + thread_m(tile) * tile.lines + i;
            if line < lines.n_lines {
                #[unroll]
                for k in 0..width {
                    let quad = thread_quad(k, tile);
                    if quad < self.form.quads {
                        out[lines.start(line) + quad] =
                            Quad::cast_from(sums.quads[i * width + k] * Quad::new(factors[i]));
                    }
                }
            }
        }
    }
}

/// One quad's part of [`RegisterRoom::products`].
#[cube]
fn multiply<F: Float>(
    owned: &Block<F>,
    at_owned: &Array<usize>,
    quad: usize,
    right: &Array<Quad<f32>>,
    sums: &mut Array<f32>,
    #[comptime] tile: Tile,
) {
    let mut read = Array::<Quad<f32>>::new(comptime!(n_read(tile)));
    #[unroll]
    for i in 0..comptime!(n_read(tile)) {
        read[i] = Quad::cast_from(owned.entries[at_owned[i] + quad]);
    }
    #[unroll]
    for i in 0..tile.lines {
        let x = line_quad(&read, i, tile);
        #[unroll]
        for j in 0..tile.columns {
            let y = right[j];
            sums[i * tile.columns + j] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
        }
    }
}
