//! What the attention kernels share: how a tile is cut, where lines lie, and the two products that every kernel is made of.
//!
//! A *line* is one row of `head_dim` entries. On the side of the queries the lines of one tile are those of several query heads that
//! have the same key head, `per_token` of them a token; on the side of the keys there is one a token. Lines past the end are read as
//! the last one, which no mask sees and no store writes.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::mask::STRIP;

/// Four entries of a line.
pub(super) type Quad<E> = Vector<E, Const<4>>;

/// How a workgroup's part of the scores is cut. All numbers but `stage` are powers of two, and `columns` is at least four.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Threads along the lines that the workgroup owns.
    pub threads_m: usize,
    /// Threads along the lines that it walks over, and along `head_dim`.
    pub threads_n: usize,
    /// Owned lines of a thread.
    pub lines: usize,
    /// Walked lines of a thread.
    pub columns: usize,
    /// Quads of the walked lines that are staged in workgroup memory at a time; without any, threads read them where they lie.
    pub stage: usize,
}

impl Tile {
    /// Lines that a workgroup owns.
    pub const fn block_m(&self) -> usize {
        self.threads_m * self.lines
    }

    /// Lines of one step of its walk.
    pub const fn block_n(&self) -> usize {
        self.threads_n * self.columns
    }

    /// Bytes of workgroup memory: a block of weights, the staged quads, and one number a thread's line.
    pub const fn shared_bytes(&self) -> usize {
        4 * self.block_m() * self.block_n() + 16 * self.stage_len() + 4 * self.block_m() * self.threads_n
    }

    pub(super) const fn stage_len(&self) -> usize {
        // One quad more a line keeps neighbours out of each other's banks.
        if self.stage == 0 { 1 } else { self.block_n() * (self.stage + 1) }
    }
}

/// What a kernel is compiled for besides the tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Quads of a line.
    pub(super) quads: usize,
    /// Query heads of one key head that share a tile, a power of two.
    pub(super) heads: usize,
}

/// Where the lines of one tensor lie, in quads.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Lines {
    pub(super) first: usize,
    pub(super) token: usize,
    pub(super) n_lines: usize,
    #[cube(comptime)]
    pub(super) per_token: usize,
    #[cube(comptime)]
    pub(super) quads: usize,
}

#[cube]
impl Lines {
    /// The first quad of a line.
    pub(super) fn start(&self, line: usize) -> usize {
        let line = min(line, self.n_lines - 1);
        self.first + line / self.per_token * self.token + line % self.per_token * self.quads
    }
}

/// The lines of `form.heads` query heads from `head` on.
#[cube]
pub(super) fn query_lines(n_queries: usize, heads: usize, head: usize, #[comptime] form: Form) -> Lines {
    Lines {
        first: head * form.quads,
        token: heads * form.quads,
        n_lines: n_queries * form.heads,
        per_token: comptime!(form.heads),
        quads: comptime!(form.quads),
    }
}

/// The lines of one key head.
#[cube]
pub(super) fn key_lines(n_keys: usize, kv_heads: usize, kv_head: usize, #[comptime] form: Form) -> Lines {
    Lines {
        first: kv_head * form.quads,
        token: kv_heads * form.quads,
        n_lines: n_keys,
        per_token: 1usize,
        quads: comptime!(form.quads),
    }
}

/// A thread's place along the owned lines. Threads are numbered in one dimension, along which software adapters fill their vectors.
#[cube]
pub(super) fn thread_m(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize / tile.threads_n
}

/// A thread's place along the walked lines.
#[cube]
pub(super) fn thread_n(#[comptime] tile: Tile) -> usize {
    UNIT_POS as usize % tile.threads_n
}

/// The walked line of a step that is a thread's column `j`. Neighbours have neighbouring lines.
#[cube]
pub(super) fn column(thread_n: usize, j: usize, #[comptime] tile: Tile) -> usize {
    thread_n + j * tile.threads_n
}

/// A thread's products of owned lines `a` with walked lines `b`, `[lines, columns]`.
#[cube]
pub(super) fn products<F: Float>(
    a: &Array<Quad<F>>,
    a_lines: &Lines,
    first_a: usize,
    b: &Array<Quad<F>>,
    b_lines: &Lines,
    first_b: usize,
    stage: &mut SharedMemory<Quad<f32>>,
    #[comptime] tile: Tile,
) -> Array<f32> {
    let mut sums = Array::<f32>::new(comptime!(tile.lines * tile.columns));
    #[unroll]
    for i in 0..comptime!(tile.lines * tile.columns) {
        sums[i] = 0.0f32;
    }
    let mut at_a = Array::<usize>::new(comptime!(tile.lines));
    #[unroll]
    for i in 0..tile.lines {
        at_a[i] = a_lines.start(first_a + thread_m(tile) * tile.lines + i);
    }
    let quads = comptime!(a_lines.quads);
    if comptime!(tile.stage == 0) {
        let mut at_b = Array::<usize>::new(comptime!(tile.columns));
        #[unroll]
        for j in 0..tile.columns {
            at_b[j] = b_lines.start(first_b + column(thread_n(tile), j, tile));
        }
        for quad in 0..quads {
            let mut right = Array::<Quad<f32>>::new(comptime!(tile.columns));
            #[unroll]
            for j in 0..tile.columns {
                right[j] = Quad::cast_from(b[at_b[j] + quad]);
            }
            multiply::<F>(a, &at_a, quad, &right, &mut sums, tile);
        }
    } else {
        let pitch = comptime!(tile.stage + 1);
        for first in range_stepped(0, quads, comptime!(tile.stage)) {
            let mut item = UNIT_POS as usize;
            while item < comptime!(tile.block_n() * tile.stage) {
                let line = item / tile.stage;
                let quad = item % tile.stage;
                let at = b_lines.start(first_b + line) + min(first + quad, comptime!(quads - 1));
                stage[line * pitch + quad] = Quad::cast_from(b[at]);
                item += comptime!(tile.threads_m * tile.threads_n);
            }
            sync_cube();
            for quad in 0..min(comptime!(tile.stage), quads - first) {
                let mut right = Array::<Quad<f32>>::new(comptime!(tile.columns));
                #[unroll]
                for j in 0..tile.columns {
                    right[j] = stage[column(thread_n(tile), j, tile) * pitch + quad];
                }
                multiply::<F>(a, &at_a, first + quad, &right, &mut sums, tile);
            }
            sync_cube();
        }
    }
    sums
}

/// One quad's part of [`products()`].
#[cube]
fn multiply<F: Float>(
    a: &Array<Quad<F>>,
    at_a: &Array<usize>,
    quad: usize,
    right: &Array<Quad<f32>>,
    sums: &mut Array<f32>,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for i in 0..tile.lines {
        let x = Quad::<f32>::cast_from(a[at_a[i] + quad]);
        #[unroll]
        for j in 0..tile.columns {
            let y = right[j];
            sums[i * tile.columns + j] += x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
        }
    }
}

/// Quads of a line that one thread sums.
pub(super) const fn thread_quads(form: Form, tile: Tile) -> usize {
    form.quads.div_ceil(tile.threads_n)
}

/// The quad of a line that is a thread's number `i`; past the line's end there is nothing to store.
#[cube]
pub(super) fn thread_quad(i: usize, #[comptime] tile: Tile) -> usize {
    thread_n(tile) + i * tile.threads_n
}

/// A new array of zeros.
#[cube]
pub(super) fn zeros(#[comptime] len: usize) -> Array<Quad<f32>> {
    let mut zeros = Array::<Quad<f32>>::new(len);
    #[unroll]
    for i in 0..len {
        zeros[i] = Quad::new(0.0f32);
    }
    zeros
}

/// Puts a thread's `[lines, columns]` where [`accumulate()`] finds them.
#[cube]
pub(super) fn share(values: &Array<f32>, weights: &mut SharedMemory<Quad<f32>>, #[comptime] tile: Tile) {
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
            weights[line * row + thread_n(tile) * quads + h] = quad;
        }
    }
}

/// Adds the shared weights' sums of walked lines `b` to a thread's quads of its owned lines, `[lines, thread_quads]`.
#[cube]
pub(super) fn accumulate<F: Float>(
    weights: &SharedMemory<Quad<f32>>,
    b: &Array<Quad<F>>,
    b_lines: &Lines,
    first_b: usize,
    sums: &mut Array<Quad<f32>>,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
) {
    let width = comptime!(thread_quads(form, tile));
    let row = comptime!(tile.block_n() / 4);
    let quads = comptime!(tile.columns / 4);
    for at in 0..row {
        let thread = at / quads;
        let h = at % quads;
        let mut values = Array::<Quad<f32>>::new(comptime!(4 * width));
        #[unroll]
        for c in 0..4usize {
            let start = b_lines.start(first_b + column(thread, 4 * h + c, tile));
            #[unroll]
            for i in 0..width {
                let quad = min(thread_quad(i, tile), comptime!(form.quads - 1));
                values[c * width + i] = Quad::cast_from(b[start + quad]);
            }
        }
        #[unroll]
        for i in 0..tile.lines {
            let w = weights[(thread_m(tile) * tile.lines + i) * row + at];
            #[unroll]
            for k in 0..width {
                sums[i * width + k] += values[k] * Quad::new(w[0])
                    + values[width + k] * Quad::new(w[1])
                    + values[2 * width + k] * Quad::new(w[2])
                    + values[3 * width + k] * Quad::new(w[3]);
            }
        }
    }
}

/// Writes a thread's quads of its owned lines, each times its line's factor.
#[cube]
pub(super) fn store<F: Float>(
    sums: &Array<Quad<f32>>,
    factors: &Array<f32>,
    out: &mut Array<Quad<F>>,
    lines: &Lines,
    first: usize,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
) {
    let width = comptime!(thread_quads(form, tile));
    #[unroll]
    for i in 0..tile.lines {
        let line = first + thread_m(tile) * tile.lines + i;
        if line < lines.n_lines {
            #[unroll]
            for k in 0..width {
                let quad = thread_quad(k, tile);
                if quad < form.quads {
                    out[lines.start(line) + quad] =
                        Quad::cast_from(sums[i * width + k] * Quad::new(factors[i]));
                }
            }
        }
    }
}

/// The keys that any and that all of some neighbouring queries see, as the mask's table has them.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Bounds {
    any: Quad<u32>,
    all: Quad<u32>,
}

#[cube]
impl Bounds {
    /// The bounds of the queries from `first` to `last`, or of a few more around them.
    pub(super) fn new(mask: &Array<Quad<u32>>, n_queries: usize, first: usize, last: usize) -> Self {
        let mut any = mask[n_queries + first / STRIP * 2];
        let mut all = mask[n_queries + first / STRIP * 2 + 1];
        for i in first / STRIP + 1..last / STRIP + 1 {
            let more = mask[n_queries + i * 2];
            let less = mask[n_queries + i * 2 + 1];
            let mut any_next = Quad::<u32>::empty();
            let mut all_next = Quad::<u32>::empty();
            #[unroll]
            for c in 0..2usize {
                any_next[2 * c] = min(any[2 * c], more[2 * c]);
                any_next[2 * c + 1] = max(any[2 * c + 1], more[2 * c + 1]);
                all_next[2 * c] = max(all[2 * c], less[2 * c]);
                all_next[2 * c + 1] = min(all[2 * c + 1], less[2 * c + 1]);
            }
            any = any_next;
            all = all_next;
        }
        Bounds { any, all }
    }

    /// The first key that any of the queries sees.
    pub(super) fn first(&self) -> u32 {
        self.any[0]
    }

    /// One past the last.
    pub(super) fn end(&self) -> u32 {
        self.any[3]
    }

    /// The first key from `key` on that any of the queries may see.
    pub(super) fn next(&self, key: u32) -> u32 {
        select(key >= self.any[1] && key < self.any[2], self.any[2], key)
    }

    /// Whether any of the queries may see one of the keys.
    pub(super) fn any_sees(&self, first: u32, end: u32) -> bool {
        let is_outside = end <= self.any[0] || first >= self.any[3];
        let is_in_gap = first >= self.any[1] && end <= self.any[2];
        !(is_outside || is_in_gap)
    }

    /// Whether all queries see all of the keys.
    pub(super) fn all_see(&self, first: u32, end: u32) -> bool {
        (first >= self.all[0] && end <= self.all[1]) || (first >= self.all[2] && end <= self.all[3])
    }
}

/// The queries that see one of the keys from `first` to `last`: the first, and one past the last.
#[cube]
pub(super) fn seeing(
    mask: &Array<Quad<u32>>,
    n_queries: usize,
    n_seen: usize,
    first: usize,
    last: usize,
) -> (usize, usize) {
    let strips = n_queries + n_queries.div_ceil(STRIP) * 2;
    let mut start = n_queries as u32;
    let mut end = 0u32;
    for i in first / STRIP..min(last / STRIP + 1, n_seen.div_ceil(STRIP)) {
        start = min(start, mask[strips + i][0]);
        end = max(end, mask[strips + i][1]);
    }
    (start as usize, end as usize)
}

/// Whether a query sees a key; `visible` is its row of the mask.
#[cube]
pub(super) fn sees(visible: Quad<u32>, key: u32) -> bool {
    (key >= visible[0] && key < visible[1]) || (key >= visible[2] && key < visible[3])
}
