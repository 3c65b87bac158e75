//! Numbers as people read them.

/// `1,941`
pub fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",")
}

/// Seconds in words: `3 h 20 min`.
pub fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        0..2 => format!("{seconds:.0} s"),
        2..120 => format!("{minutes} min"),
        120..2880 => format!("{} h {} min", minutes / 60, minutes % 60),
        _ => format!("{:.1} days", seconds / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1941, 1_234_567].map(thousands), ["0", "999", "1,941", "1,234,567"]);
        let shown = [4.2, 80.0, 3600.0, 12_000.0, 1e6].map(duration);
        assert_eq!(shown, ["4 s", "80 s", "60 min", "3 h 20 min", "11.6 days"]);
    }
}
