//! Names that were meant by others.

/// Of the names that there are the one that was meant by a wrong one, if any is near enough: a quarter of its bytes may be wrong.
pub fn meant<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let (distance, nearest) = names.map(|other| (edits(name, other), other)).min()?;
    (!name.is_empty() && distance * 4 <= name.len()).then_some(nearest)
}

/// Levenshtein's distance: how many characters to insert, delete or replace.
pub fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.chars().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[row.len() - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_are_levenshteins() {
        for (a, b, distance) in
            [("", "", 0), ("", "ab", 2), ("kitten", "sitting", 3), ("猫狗", "狗", 1), ("ab", "ab", 0)]
        {
            assert_eq!(edits(a, b), distance, "{a} {b}");
            assert_eq!(edits(b, a), distance, "{b} {a}");
        }
    }

    #[test]
    fn a_name_is_meant_where_a_quarter_is_wrong_at_most() {
        let names = || ["query", "response"].into_iter();
        assert_eq!(meant("respones", names()), Some("response"));
        assert_eq!(meant("answer", names()), None);
        assert_eq!(meant("", names()), None);
    }
}
