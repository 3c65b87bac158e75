//! Numbers and lists as people read them.

use std::fmt::Display;

/// `1 row`, `2 rows`
pub(crate) fn counted(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// `1,941`
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}

/// The first `most` items, and after them `and 1,234 more` where there are others.
pub(crate) fn first_of<T: Display>(items: &[T], most: usize) -> Vec<String> {
    let (shown, others) = items.split_at(items.len().min(most));
    let others = (!others.is_empty()).then(|| format!("and {} more", thousands(others.len())));
    shown.iter().map(T::to_string).chain(others).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1941, 1_234_567].map(thousands), ["0", "999", "1,941", "1,234,567"]);
        assert_eq!([1, 2].map(|n| counted(n, "row")), ["1 row", "2 rows"]);
    }

    #[test]
    fn the_first_of_many_are_named() {
        assert_eq!(first_of(&[1, 2], 2), ["1", "2"]);
        assert_eq!(first_of(&[7; 1239], 5)[4..], ["7", "and 1,234 more"]);
        assert!(first_of::<u32>(&[], 5).is_empty());
    }
}
