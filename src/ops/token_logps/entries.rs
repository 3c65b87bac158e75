//! The scored tokens as the kernels read them: integers in sections, grouped so that every sum has one thread and one order.

use super::ScoredToken;

/// The entries grouped by row, as the kernels read them: where each row's begin and the last ends, then their targets, then their
/// places in the list that they came in.
pub(super) struct Entries {
    pub(super) words: Vec<u32>,
    pub(super) targets_at: usize,
    pub(super) order_at: usize,
}

impl Entries {
    pub(super) fn new(scored: &[ScoredToken], n_rows: usize) -> Self {
        let mut order: Vec<u32> = (0..scored.len() as u32).collect();
        order.sort_by_key(|&i| scored[i as usize].row_idx);
        let mut words = vec![0; n_rows + 1];
        for token in scored {
            words[token.row_idx as usize + 1] += 1;
        }
        for row in 0..n_rows {
            words[row + 1] += words[row];
        }
        let targets_at = words.len();
        words.extend(order.iter().map(|&i| scored[i as usize].target));
        let order_at = words.len();
        words.extend(order);
        Self { words, targets_at, order_at }
    }
}

/// The entries grouped by shard and row: for each such group its row and the range of its entries, then for each entry its place in
/// the list that it came in and its target's row in the shard.
pub(super) struct Slots {
    pub(super) words: Vec<u32>,
    /// Where each shard's groups begin, and how many there are.
    pub(super) shards: Vec<(usize, usize)>,
    pub(super) entries_at: usize,
}

impl Slots {
    pub(super) fn new(scored: &[ScoredToken], first_ids: &[usize]) -> Self {
        let shard_of = |token: &ScoredToken| first_ids.partition_point(|&id| id <= token.target as usize) - 1;
        let mut order: Vec<(usize, u32, u32)> =
            (0u32..).zip(scored).map(|(i, token)| (shard_of(token), token.row_idx, i)).collect();
        order.sort_unstable();
        let (mut words, mut shards) = (Vec::new(), vec![(0, 0); first_ids.len()]);
        let mut start = 0;
        for group in order.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            let (shard, row, _) = group[0];
            if shards[shard].1 == 0 {
                shards[shard].0 = words.len();
            }
            shards[shard].1 += 1;
            let end = start + group.len() as u32;
            words.extend([row, start, end]);
            start = end;
        }
        let entries_at = words.len();
        let target = |i: u32| scored[i as usize].target;
        words.extend(order.iter().flat_map(|&(shard, _, i)| [i, target(i) - first_ids[shard] as u32]));
        Self { words, shards, entries_at }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows and targets; row 1 has no entry, row 2 two.
    fn scored() -> Vec<ScoredToken> {
        [(2, 7), (0, 3), (2, 0), (3, 9)].map(|(row_idx, target)| ScoredToken { row_idx, target }).to_vec()
    }

    #[test]
    fn entries_are_grouped_by_row_in_their_order() {
        let Entries { words, targets_at, order_at } = Entries::new(&scored(), 4);
        assert_eq!(words[..targets_at], [0, 1, 1, 3, 4], "where the rows begin and the last ends");
        assert_eq!(words[targets_at..order_at], [3, 7, 0, 9], "targets");
        assert_eq!(words[order_at..], [1, 0, 2, 3], "places");
    }

    #[test]
    fn slots_are_grouped_by_shard_and_row() {
        let Slots { words, shards, entries_at } = Slots::new(&scored(), &[0, 4, 6, 8]);
        assert_eq!(shards, [(0, 2), (0, 0), (6, 1), (9, 1)], "the second shard has no target");
        assert_eq!(words[..entries_at], [0, 0, 1, 2, 1, 2, 2, 2, 3, 3, 3, 4], "row, first entry, end");
        assert_eq!(words[entries_at..], [1, 3, 2, 0, 0, 1, 3, 1], "place, row in the shard");
    }
}
