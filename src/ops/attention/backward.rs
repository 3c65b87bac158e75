//! The backward kernels. Where a device is kept busy by many workgroups, the gradients by queries are a walk of their own and those by
//! keys and values another, so that every sum has one owner and one order; where few will do, one walk makes all.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::bounds::{Bounds, seeing, sees};
use super::lines::{Block, Lines, Quad, key_lines, query_lines};
use super::registers::RegisterRoom;
use super::tile::{Form, Room, Tile, column, thread_m, thread_n};
use crate::ops::cube::THREADS;

/// `(lse, D)` of every query's head, `[queries, heads, 2]`, where `D = Σ dout · out`; a few threads a query's head.
#[cube(launch_unchecked)]
pub(super) fn row_stats<F: Float>(
    dout: &Array<Quad<F>>,
    out: &Array<Quad<F>>,
    lse: &Array<f32>,
    stats: &mut Array<f32>,
    n_lines: u32,
    #[comptime] quads: usize,
    #[comptime] threads: usize,
    #[define(F)] _dtype: StorageType,
) {
    let line = ABSOLUTE_POS / threads;
    let turn = ABSOLUTE_POS % threads;
    let begin = min(line, n_lines as usize - 1) * quads;
    let mut sums = Quad::<f32>::new(0.0f32);
    for quad in range_stepped(begin + turn, begin + quads, threads) {
        sums += Quad::cast_from(dout[quad]) * Quad::cast_from(out[quad]);
    }
    let mut sum = sums[0] + sums[1] + sums[2] + sums[3];
    if comptime!(threads > 1) {
        let mut shared = SharedMemory::<f32>::new(comptime!(THREADS as usize));
        shared[UNIT_POS as usize] = sum;
        sync_cube();
        #[unroll]
        for i in 1..threads {
            sum += shared[(UNIT_POS as usize + i) % comptime!(THREADS as usize)];
        }
    }
    if turn == 0 && line < n_lines as usize {
        stats[2 * line] = lse[line];
        stats[2 * line + 1] = sum;
    }
}

/// `dQ`: a workgroup owns lines of queries and walks over the keys that they see.
#[cube(launch_unchecked)]
pub(super) fn backward_queries<F: Float>(
    dout: &Array<Quad<F>>,
    q: &Array<Quad<F>>,
    k: &Array<Quad<F>>,
    v: &Array<Quad<F>>,
    stats: &Array<f32>,
    mask: &Array<Quad<u32>>,
    dq: &mut Array<Quad<F>>,
    n_queries: u32,
    n_keys: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: StorageType,
) {
    let n_queries = n_queries as usize;
    let head = CUBE_POS_X as usize * form.heads;
    let kv_head = head * kv_heads as usize / heads as usize;
    let q_lines = query_lines(n_queries, heads as usize, head, form);
    let k_lines = key_lines(n_keys as usize, kv_heads as usize, kv_head, form);

    // As in forward: the longest walks start first, those of all heads.
    let blocks = q_lines.n_lines.div_ceil(tile.block_m());
    let first = (blocks - 1 - CUBE_POS_Y as usize) * tile.block_m();
    let last = min(first + tile.block_m(), q_lines.n_lines) - 1;
    let bounds = Bounds::new(mask, n_queries, first / form.heads, last / form.heads);

    let mut room = Room::<F>::new(2usize, form, tile);
    let queries = Block::new(q, q_lines, first);
    let douts = Block::new(dout, q_lines, first);
    room.own(0usize, &queries);
    room.own(1usize, &douts);
    let mut sums = room.zeros();
    let mut key = bounds.first();
    while key < bounds.end() {
        let end = key + comptime!(tile.block_n() as u32);
        let keys = Block::new(k, k_lines, key as usize);
        let values = Block::new(v, k_lines, key as usize);
        room.walk(&values);
        let dweights = room.products(1usize, &douts, &values);
        room.walk(&keys);
        let mut scores = room.products(0usize, &queries, &keys);
        let is_masked = !bounds.all_see(key, end);
        #[unroll]
        for i in 0..tile.lines {
            let line = min(first + thread_m(tile) * tile.lines + i, q_lines.n_lines - 1);
            let token = line / form.heads;
            let at_stats = 2 * (token * heads as usize + head + line % form.heads);
            let lse = stats[at_stats];
            let delta = stats[at_stats + 1];
            #[unroll]
            for j in 0..tile.columns {
                let at = i * tile.columns + j;
                scores[at] = (scores[at] * scale - lse).exp() * (dweights[at] - delta);
            }
            if is_masked {
                let visible = mask[token];
                #[unroll]
                for j in 0..tile.columns {
                    let at = i * tile.columns + j;
                    let is_seen = sees(visible, key + column(thread_n(tile), j, tile) as u32);
                    scores[at] = select(is_seen, scores[at], 0.0f32);
                }
            }
        }
        sync_cube();
        room.share(&scores);
        sync_cube();
        room.accumulate(&keys, &mut sums);
        key = bounds.next(end);
    }

    let mut factors = Array::<f32>::new(comptime!(tile.lines));
    #[unroll]
    for i in 0..tile.lines {
        factors[i] = scale;
    }
    room.store::<F>(&sums, &factors, dq, &q_lines, first);
}

/// Which lines a step has: its workgroup's keys from `first` on, and those of queries from `line` on.
#[derive(CubeType, Clone, Copy)]
struct Seen {
    first: usize,
    line: usize,
    heads: usize,
    head: usize,
    is_masked: bool,
}

/// Makes a thread's scores of keys by queries their weights, and the gradients by weights those by scores.
#[cube]
fn weigh(
    scores: &mut Array<f32>,
    dscores: &mut Array<f32>,
    stats: &Array<f32>,
    mask: &Array<Quad<u32>>,
    q_lines: &Lines,
    seen: Seen,
    scale: f32,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
) {
    #[unroll]
    for j in 0..tile.columns {
        let line = seen.line + column(thread_n(tile), j, tile);
        let is_line = line < q_lines.n_lines;
        let line = min(line, q_lines.n_lines - 1);
        let token = line / form.heads;
        let at_stats = 2 * (token * seen.heads + seen.head + line % form.heads);
        let lse = stats[at_stats];
        let delta = stats[at_stats + 1];
        #[unroll]
        for i in 0..tile.lines {
            let at = i * tile.columns + j;
            scores[at] = (scores[at] * scale - lse).exp();
        }
        if seen.is_masked {
            let visible = mask[token];
            #[unroll]
            for i in 0..tile.lines {
                let at = i * tile.columns + j;
                let key = (seen.first + thread_m(tile) * tile.lines + i) as u32;
                scores[at] = select(is_line && sees(visible, key), scores[at], 0.0f32);
            }
        }
        #[unroll]
        for i in 0..tile.lines {
            let at = i * tile.columns + j;
            dscores[at] = scores[at] * (dscores[at] - delta);
        }
    }
}

/// `dK` and `dV`: a workgroup owns lines of keys and walks over the queries of every head that sees them. In several splits of the grid
/// these take the walks' steps in turns, and the gradients of each lie behind those of the one before.
#[cube(launch_unchecked)]
pub(super) fn backward_keys<F: Float, G: Float>(
    dout: &Array<Quad<F>>,
    q: &Array<Quad<F>>,
    k: &Array<Quad<F>>,
    v: &Array<Quad<F>>,
    stats: &Array<f32>,
    mask: &Array<Quad<u32>>,
    dk: &mut Array<Quad<G>>,
    dv: &mut Array<Quad<G>>,
    n_queries: u32,
    n_keys: u32,
    n_seen: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: StorageType,
    #[define(G)] _grads_dtype: StorageType,
) {
    let n_queries = n_queries as usize;
    let kv_head = (CUBE_POS_X % kv_heads) as usize;
    let split = (CUBE_POS_X / kv_heads) as usize;
    let splits = (CUBE_COUNT_X / kv_heads) as usize;
    let group = (heads / kv_heads) as usize;
    let k_lines = key_lines(n_keys as usize, kv_heads as usize, kv_head, form);
    // More queries see earlier keys: here too the longest walks start first.
    let first = CUBE_POS_Y as usize * tile.block_m();
    let end = first + tile.block_m();
    let (start_query, end_query) = seeing(mask, n_queries, n_seen as usize, first, end - 1);
    let step = comptime!(tile.block_n() / form.heads);

    let mut room = Room::<F>::new(2usize, form, tile);
    let keys = Block::new(k, k_lines, first);
    let values = Block::new(v, k_lines, first);
    room.own(0usize, &keys);
    room.own(1usize, &values);
    let mut k_sums = room.zeros();
    let mut v_sums = room.zeros();
    for part in 0..group / form.heads {
        let head = kv_head * group + part * form.heads;
        let q_lines = query_lines(n_queries, heads as usize, head, form);
        let mut query = (start_query / step + split) * step;
        while query < end_query {
            let last = min(query + step, n_queries) - 1;
            let bounds = Bounds::new(mask, n_queries, query, last);
            if bounds.any_sees(first as u32, end as u32) {
                let line = query * form.heads;
                let queries = Block::new(q, q_lines, line);
                let douts = Block::new(dout, q_lines, line);
                room.walk(&queries);
                let mut scores = room.products(0usize, &keys, &queries);
                room.walk(&douts);
                let mut dscores = room.products(1usize, &values, &douts);
                let is_masked = !bounds.all_see(first as u32, end as u32) || query + step > n_queries;
                let seen = Seen { first, line, heads: heads as usize, head, is_masked };
                weigh(&mut scores, &mut dscores, stats, mask, &q_lines, seen, scale, form, tile);
                sync_cube();
                room.share(&scores);
                sync_cube();
                room.accumulate(&douts, &mut v_sums);
                sync_cube();
                room.share(&dscores);
                sync_cube();
                room.walk(&queries);
                room.accumulate(&queries, &mut k_sums);
            }
            query += splits * step;
        }
    }

    let mut factors = Array::<f32>::new(comptime!(tile.lines));
    #[unroll]
    for i in 0..tile.lines {
        factors[i] = 1.0f32;
    }
    let first_head = split * n_keys as usize * kv_heads as usize + kv_head;
    let out_lines = key_lines(n_keys as usize, kv_heads as usize, first_head, form);
    room.store::<G>(&v_sums, &factors, dv, &out_lines, first);
    #[unroll]
    for i in 0..tile.lines {
        factors[i] = scale;
    }
    room.store::<G>(&k_sums, &factors, dk, &out_lines, first);
}

/// `dQ`, `dK` and `dV` in one walk, which makes the weights once, where few workgroups keep a device busy: a workgroup takes a split's
/// queries of one key head, and walks over the queries for one block of keys after the other. It has `dK` and `dV` of a block in
/// registers, and adds to `dQ`, which is zero before, in memory, where nobody else adds to its queries. A launch takes the blocks from
/// `first_block` to before `end_block`, see [`MOST_TURNS`](super::launch::MOST_TURNS).
#[cube(launch_unchecked)]
pub(super) fn backward_whole<F: Float, G: Float>(
    dout: &Array<Quad<F>>,
    q: &Array<Quad<F>>,
    k: &Array<Quad<F>>,
    v: &Array<Quad<F>>,
    stats: &Array<f32>,
    mask: &Array<Quad<u32>>,
    dq: &mut Array<Quad<f32>>,
    dk: &mut Array<Quad<G>>,
    dv: &mut Array<Quad<G>>,
    n_queries: u32,
    n_keys: u32,
    n_seen: u32,
    heads: u32,
    kv_heads: u32,
    first_block: u32,
    end_block: u32,
    scale: f32,
    #[comptime] form: Form,
    #[comptime] tile: Tile,
    #[define(F)] _dtype: StorageType,
    #[define(G)] _grads_dtype: StorageType,
) {
    let n_queries = n_queries as usize;
    let kv_head = (CUBE_POS_X % kv_heads) as usize;
    let split = (CUBE_POS_X / kv_heads) as usize;
    let splits = (CUBE_COUNT_X / kv_heads) as usize;
    let group = (heads / kv_heads) as usize;
    let k_lines = key_lines(n_keys as usize, kv_heads as usize, kv_head, form);
    let out_lines = key_lines(
        n_keys as usize,
        kv_heads as usize,
        split * n_keys as usize * kv_heads as usize + kv_head,
        form,
    );
    let step = comptime!(tile.block_n() / form.heads);
    let mut ones = Array::<f32>::new(comptime!(tile.lines));
    let mut scales = Array::<f32>::new(comptime!(tile.lines));
    #[unroll]
    for i in 0..tile.lines {
        ones[i] = 1.0f32;
        scales[i] = scale;
    }

    let mut room = RegisterRoom::new(form, tile);
    for block in first_block..end_block {
        let first = block as usize * tile.block_m();
        let end = first + tile.block_m();
        let (start_query, end_query) = seeing(mask, n_queries, n_seen as usize, first, end - 1);
        let keys = Block::new(k, k_lines, first);
        let values = Block::new(v, k_lines, first);
        let mut k_sums = room.zeros();
        let mut v_sums = room.zeros();
        for part in 0..group / form.heads {
            let head = kv_head * group + part * form.heads;
            let q_lines = query_lines(n_queries, heads as usize, head, form);
            // A split has the same steps for every block of keys, so that it alone adds to their `dQ`.
            let begin = start_query / step;
            let mut query = (begin + (split + splits - begin % splits) % splits) * step;
            while query < end_query {
                let last = min(query + step, n_queries) - 1;
                let bounds = Bounds::new(mask, n_queries, query, last);
                if bounds.any_sees(first as u32, end as u32) {
                    let line = query * form.heads;
                    let queries = Block::new(q, q_lines, line);
                    let douts = Block::new(dout, q_lines, line);
                    let mut scores = room.products::<F>(&keys, &queries);
                    let mut dscores = room.products::<F>(&values, &douts);
                    let is_masked = !bounds.all_see(first as u32, end as u32) || query + step > n_queries;
                    let seen = Seen { first, line, heads: heads as usize, head, is_masked };
                    weigh(&mut scores, &mut dscores, stats, mask, &q_lines, seen, scale, form, tile);
                    sync_cube();
                    room.share(&scores);
                    sync_cube();
                    room.accumulate::<F>(&douts, &mut v_sums);
                    sync_cube();
                    room.share(&dscores);
                    sync_cube();
                    room.accumulate::<F>(&queries, &mut k_sums);
                    sync_cube();
                    room.share_turned(&dscores);
                    sync_cube();
                    room.add_turned::<F>(&keys, scale, dq, &q_lines, line);
                }
                query += splits * step;
            }
        }
        room.store::<G>(&v_sums, &ones, dv, &out_lines, first);
        room.store::<G>(&k_sums, &scales, dk, &out_lines, first);
    }
}
