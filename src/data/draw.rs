//! Which rows are used, and when: sampling, splitting and ordering them.
//!
//! All randomness comes from xoshiro256++ seeded with the caller's seed, so the same seed gives the same rows on every machine.

use std::collections::HashSet;

use rand::SeedableRng;
use rand::rngs::Xoshiro256PlusPlus;
use rand::seq::SliceRandom;

use super::dataset::Row;

/// The order in which rows are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shuffle {
    /// A permutation drawn from this seed.
    Seeded(u64),
    /// File order.
    Off,
}

/// Splits rows into those to train on and those to validate with: `(train, validation)`.
///
/// `floor(rows · test_ratio)` rows validate: a seeded draw, or the last rows when shuffling is off. Both parts keep
/// the order of `rows`. A row that stands in `rows` more than once, by what it says, is never in both parts: copies of a validation row
/// are taken out of the training part.
///
/// # Panics
/// If `test_ratio` is not in `[0, 1)`.
pub fn split(rows: Vec<Row>, test_ratio: f64, shuffle: Shuffle) -> (Vec<Row>, Vec<Row>) {
    assert!(
        (0.0..1.0).contains(&test_ratio),
        "test_ratio is {test_ratio}, expected at least 0 and less than 1"
    );
    // 100 · 0.29 is 28.999999999999996 in f64, and means 29.
    let n_val = (rows.len() as f64 * test_ratio + 1e-9).floor() as usize;
    let mut order: Vec<usize> = (0..rows.len()).collect();
    if let Shuffle::Seeded(seed) = shuffle {
        order.shuffle(&mut rng(seed, Draw::Split, 0));
    }
    let val_idx: HashSet<usize> = order.split_off(rows.len() - n_val).into_iter().collect();
    let (mut train, mut val) = (Vec::new(), Vec::new());
    for (i, row) in rows.into_iter().enumerate() {
        if val_idx.contains(&i) { val.push(row) } else { train.push(row) }
    }
    let held_out: HashSet<_> = val.iter().map(Row::content).collect();
    train.retain(|row| !held_out.contains(&row.content()));
    (train, val)
}

/// The order in which an epoch (counted from 0) visits `n` rows: a permutation of its own for every epoch, or
/// `0, 1, … n-1` when shuffling is off.
pub fn epoch_order(n: usize, epoch: usize, shuffle: Shuffle) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    if let Shuffle::Seeded(seed) = shuffle {
        order.shuffle(&mut rng(seed, Draw::Epoch, epoch as u64));
    }
    order
}

/// The sample of `n` rows that [`load`](super::dataset::load) takes of the `idx`-th data set, counted from 0.
pub fn sample_of(rows: Vec<Row>, n: usize, seed: u64, idx: u64) -> Vec<Row> {
    sample(rows, n, &mut rng(seed, Draw::Sample, idx))
}

/// Exactly `n` of the rows, in file order; all of them as often as they fit, and a draw for the remainder.
fn sample(rows: Vec<Row>, n: usize, rng: &mut Xoshiro256PlusPlus) -> Vec<Row> {
    let mut remainder: Vec<usize> = (0..rows.len()).collect();
    remainder.shuffle(rng);
    remainder.truncate(n % rows.len());
    remainder.sort_unstable();
    let whole = (0..n / rows.len()).flat_map(|_| 0..rows.len());
    whole.chain(remainder).map(|i| rows[i].clone()).collect()
}

/// What a random number is for; every use has a stream of its own.
enum Draw {
    Sample,
    Split,
    Epoch,
}

fn rng(seed: u64, draw: Draw, idx: u64) -> Xoshiro256PlusPlus {
    let stream =
        (draw as u64 + 1).wrapping_mul(0xd1b5_4a32_d192_ed03) ^ idx.wrapping_mul(0x8cb9_2ba7_2f3d_8dd7);
    Xoshiro256PlusPlus::seed_from_u64(seed ^ stream)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::dataset::Location;

    /// `n` rows of which the `i`-th (from 0) asks `i` and stands on line `i + 1`.
    fn rows(n: usize) -> Vec<Row> {
        let row = |i: usize| Row {
            query: i.to_string(),
            response: "c".to_owned(),
            rejected_response: "r".to_owned(),
            system: None,
            history: Vec::new(),
            location: Location::new(Path::new("rows.jsonl"), i + 1),
        };
        (0..n).map(row).collect()
    }

    fn queries(rows: &[Row]) -> Vec<usize> {
        rows.iter().map(|row| row.query.parse().unwrap()).collect()
    }

    #[test]
    fn a_sample_has_the_asked_size_in_file_order() {
        let rng = |seed| rng(seed, Draw::Sample, 0);
        let drawn = queries(&sample(rows(20), 5, &mut rng(42)));
        assert_eq!(drawn.len(), 5);
        assert!(
            drawn.is_sorted() && drawn.windows(2).all(|w| w[0] < w[1]),
            "file order, no row twice: {drawn:?}"
        );
        assert_eq!(drawn, queries(&sample(rows(20), 5, &mut rng(42))), "the same seed, the same rows");
        assert_ne!(drawn, queries(&sample(rows(20), 5, &mut rng(43))), "another seed, other rows");
        assert_eq!(queries(&sample(rows(4), 4, &mut rng(42))), [0, 1, 2, 3]);
        let repeated = queries(&sample(rows(4), 10, &mut rng(42)));
        assert_eq!(repeated[..8], [0, 1, 2, 3, 0, 1, 2, 3]);
        assert!(repeated[8] < repeated[9] && repeated.len() == 10, "{repeated:?}");
    }

    #[test]
    fn a_split_has_the_asked_sizes_and_loses_nothing() {
        for (n, ratio, n_val) in
            [(100, 0.01, 1), (99, 0.01, 0), (100, 0.29, 29), (10, 0.0, 0), (7, 0.5, 3), (0, 0.1, 0)]
        {
            for shuffle in [Shuffle::Seeded(42), Shuffle::Off] {
                let (train, val) = split(rows(n), ratio, shuffle);
                assert_eq!((train.len(), val.len()), (n - n_val, n_val), "{n} · {ratio}");
                let (train, val) = (queries(&train), queries(&val));
                assert!(train.is_sorted() && val.is_sorted(), "{train:?} {val:?}");
                let mut all = [train, val].concat();
                all.sort_unstable();
                assert_eq!(all, (0..n).collect::<Vec<_>>());
            }
        }
        assert_eq!(queries(&split(rows(10), 0.2, Shuffle::Off).1), [8, 9], "the last rows");
        let val = |seed| queries(&split(rows(50), 0.2, Shuffle::Seeded(seed)).1);
        assert_eq!(val(42), val(42));
        assert_ne!(val(42), val(43));
        assert_ne!(val(42), (40..50).collect::<Vec<_>>());
    }

    #[test]
    fn no_row_is_both_trained_on_and_validated_with() {
        let repeated = sample(rows(10), 25, &mut rng(42, Draw::Sample, 0));
        let (train, val) = split(repeated, 0.2, Shuffle::Seeded(1));
        assert_eq!(val.len(), 5);
        assert!(!train.is_empty(), "something must be left to train on");
        let (train, val) = (queries(&train), queries(&val));
        assert!(train.iter().all(|query| !val.contains(query)), "{train:?} {val:?}");
        let elsewhere = Row { location: Location::new(Path::new("other.jsonl"), 1), ..rows(2).remove(1) };
        let (train, val) = split([rows(2), vec![elsewhere]].concat(), 0.4, Shuffle::Off);
        assert_eq!((queries(&train), queries(&val)), (vec![0], vec![1]), "of another file");
    }

    /// The numbers themselves are pinned: another order would change every published run.
    #[test]
    fn epochs_have_orders_of_their_own() {
        let order = |seed, epoch| epoch_order(10, epoch, Shuffle::Seeded(seed));
        assert_eq!(order(42, 0), PINNED[0]);
        assert_eq!(order(42, 1), PINNED[1]);
        assert_ne!(order(43, 0), order(42, 0));
        for epoch in 0..50 {
            let mut all = order(42, epoch);
            all.sort_unstable();
            assert_eq!(all, (0..10).collect::<Vec<_>>(), "epoch {epoch}");
        }
        assert_eq!(epoch_order(4, 3, Shuffle::Off), [0, 1, 2, 3]);
        assert!(epoch_order(0, 0, Shuffle::Seeded(42)).is_empty());
    }

    const PINNED: [[usize; 10]; 2] = [[3, 2, 7, 1, 8, 6, 0, 4, 5, 9], [1, 5, 9, 2, 4, 3, 6, 7, 8, 0]];
}
