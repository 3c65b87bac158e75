//! The forward kernel: a workgroup owns lines of queries and walks over the keys that they see, with the online softmax of
//! arXiv:2205.14135.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::bounds::{Bounds, sees};
use super::lines::{Block, Quad, key_lines, query_lines};
use super::mask::MASKED;
use super::tile::{Form, Room, Tile, column, thread_m, thread_n};

#[cube(launch_unchecked)]
pub(super) fn forward<F: Float>(
    q: &Array<Quad<F>>,
    k: &Array<Quad<F>>,
    v: &Array<Quad<F>>,
    mask: &Array<Quad<u32>>,
    out: &mut Array<Quad<F>>,
    lse: &mut Array<f32>,
    n_queries: u32,
    n_keys: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: StorageType,
) {
    let head = CUBE_POS_X as usize * form.heads;
    let kv_head = head * kv_heads as usize / heads as usize;
    let q_lines = query_lines(n_queries as usize, heads as usize, head, form);
    let k_lines = key_lines(n_keys as usize, kv_heads as usize, kv_head, form);

    // Later queries see more keys. Workgroups start in the order of x, then of y: the longest walks first, those of all heads.
    let blocks = q_lines.n_lines.div_ceil(tile.block_m());
    let first = (blocks - 1 - CUBE_POS_Y as usize) * tile.block_m();
    let thread_first = first + thread_m(tile) * tile.lines;
    let last = min(first + tile.block_m(), q_lines.n_lines) - 1;
    let bounds = Bounds::new(mask, n_queries as usize, first / form.heads, last / form.heads);

    let mut room = Room::<F>::new(1usize, form, tile);
    let mut shared = SharedMemory::<f32>::new(comptime!(tile.block_m() * tile.threads_n));
    let owned = Block::new(q, q_lines, first);
    room.own(0usize, &owned);
    let mut sums = room.zeros();
    let mut maxima = Array::<f32>::new(comptime!(tile.lines));
    let mut totals = Array::<f32>::new(comptime!(tile.lines));
    #[unroll]
    for i in 0..tile.lines {
        maxima[i] = MASKED;
        totals[i] = 0.0f32;
    }

    let mut key = bounds.first();
    while key < bounds.end() {
        let keys = Block::new(k, k_lines, key as usize);
        room.walk(&keys);
        let mut scores = room.products(0usize, &owned, &keys);
        let is_masked = !bounds.all_see(key, key + comptime!(tile.block_n() as u32));
        #[unroll]
        for i in 0..tile.lines {
            let mut max_score = f32::new(MASKED);
            if is_masked {
                let token = min((thread_first + i) / form.heads, n_queries as usize - 1);
                let visible = mask[token];
                #[unroll]
                for j in 0..tile.columns {
                    let is_seen = sees(visible, key + column(thread_n(tile), j, tile) as u32);
                    let at = i * tile.columns + j;
                    scores[at] = select(is_seen, scores[at] * scale, f32::new(MASKED));
                    max_score = max(max_score, scores[at]);
                }
            } else {
                #[unroll]
                for j in 0..tile.columns {
                    let at = i * tile.columns + j;
                    scores[at] = scores[at] * scale;
                    max_score = max(max_score, scores[at]);
                }
            }
            let line = thread_m(tile) * tile.lines + i;
            shared[line * tile.threads_n + thread_n(tile)] = max_score;
        }
        sync_cube();
        let mut largest = Array::<f32>::new(comptime!(tile.lines));
        #[unroll]
        for i in 0..tile.lines {
            largest[i] = maxima[i];
        }
        for t in 0..comptime!(tile.threads_n) {
            #[unroll]
            for i in 0..tile.lines {
                let line = thread_m(tile) * tile.lines + i;
                largest[i] = max(largest[i], shared[line * tile.threads_n + t]);
            }
        }
        let mut factors = Array::<f32>::new(comptime!(tile.lines));
        #[unroll]
        for i in 0..tile.lines {
            // A line that has seen nothing yet has weights of one, which its first key takes back with a factor of zero.
            let max_score = room.maximum(maxima[i], largest[i], key);
            let factor = (maxima[i] - max_score).exp();
            let mut total = totals[i] * factor;
            #[unroll]
            for j in 0..tile.columns {
                let at = i * tile.columns + j;
                scores[at] = (scores[at] - max_score).exp();
                total += scores[at];
            }
            totals[i] = total;
            maxima[i] = max_score;
            factors[i] = factor;
        }
        room.share(&scores);
        sync_cube();
        room.rescale(&mut sums, &factors, key);
        let values = Block::new(v, k_lines, key as usize);
        room.walk(&values);
        room.accumulate(&values, &mut sums);
        key = bounds.next(key + comptime!(tile.block_n() as u32));
    }

    sync_cube();
    #[unroll]
    for i in 0..tile.lines {
        let line = thread_m(tile) * tile.lines + i;
        shared[line * tile.threads_n + thread_n(tile)] = totals[i];
    }
    sync_cube();
    let mut factors = Array::<f32>::new(comptime!(tile.lines));
    #[unroll]
    for i in 0..tile.lines {
        totals[i] = 0.0f32;
    }
    for t in 0..comptime!(tile.threads_n) {
        #[unroll]
        for i in 0..tile.lines {
            let line = thread_m(tile) * tile.lines + i;
            totals[i] += shared[line * tile.threads_n + t];
        }
    }
    #[unroll]
    for i in 0..tile.lines {
        factors[i] = 1.0f32 / totals[i];
        let line = first + thread_m(tile) * tile.lines + i;
        if thread_n(tile) == 0 && line < q_lines.n_lines {
            lse[line / form.heads * heads as usize + head + line % form.heads] = maxima[i] + totals[i].ln();
        }
    }
    room.store::<F>(&sums, &factors, out, &q_lines, first);
}
