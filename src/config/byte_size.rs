//! A number of bytes as people write it: `24GB`, `8GiB`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes: `GB` counts in powers of 1000, `GiB` in powers of 1024, and a number alone is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

/// Larger units stand first, so that a size is written in the largest that divides it.
const UNITS: [(&str, u64); 8] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("KB", 1000),
];

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "expected 24GiB (1 GiB = 2^30 bytes, as cards are sold), 24GB (1 GB = 10^9) or bytes";
        let fails = || format!("`{text}` is no size: {expected}");
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = (&text[..end], text[end..].trim());
        let factor = match unit {
            "" | "B" => 1,
            // As cards are sold: 24 G are 24 GiB.
            "G" | "g" => 1 << 30,
            unit => UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).ok_or_else(fails)?.1,
        };
        let bytes = number.parse::<f64>().map_err(|_| fails())? * factor as f64;
        if unit.is_empty() && bytes > 0.0 && bytes < 1024.0 {
            return Err(format!("`{text}` without a unit is bytes; did you mean {number}GiB? {expected}"));
        }
        if bytes >= 1024.0 && bytes < u64::MAX as f64 { Ok(Self(bytes as u64)) } else { Err(fails()) }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, factor)| self.0 > 0 && self.0.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

impl TryFrom<String> for ByteSize {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> Self {
        size.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in [
            ("24GB", 24_000_000_000),
            ("8GiB", 8 << 30),
            ("24G", 24 << 30),
            ("1.5 gb", 1_500_000_000),
            ("700mib", 700 << 20),
            ("4096", 4096),
        ] {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size, ByteSize(bytes), "{text}");
            assert_eq!(size.to_string().parse::<ByteSize>(), Ok(size), "{text}");
        }
        assert_eq!(ByteSize(24_000_000_000).to_string(), "24GB");
        let unit_is_forgotten = "8".parse::<ByteSize>().unwrap_err();
        assert!(unit_is_forgotten.starts_with("`8` without a unit is bytes; did you mean 8GiB? "));
        for text in ["", "GB", "24", "24B", "24T", "0GB", "-1GB", "1.2.3GB", "1e9"] {
            assert!(text.parse::<ByteSize>().unwrap_err().contains("expected 24GiB"), "{text}");
        }
    }
}
