//! What the kernels read of the mask's table.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::lines::Quad;
use super::mask::STRIP;

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
