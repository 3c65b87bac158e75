//! FNV-1a, which is the same in every build; the standard library's hashes need not be.

use std::hash::Hasher;

/// A hash under way (draft-eastlake-fnv-17).
pub(crate) struct Fnv1a(u64);

impl Default for Fnv1a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv1a {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_fnv_1a() {
        let mut hash = Fnv1a::default();
        hash.write(b"foo");
        hash.write(b"bar");
        assert_eq!(hash.finish(), 0x8594_4171_f739_67e8);
    }
}
