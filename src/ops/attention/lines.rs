//! Where the lines of one tensor lie.
//!
//! A *line* is one row of `head_dim` entries. On the side of the queries the lines of one tile are those of several query heads that
//! have the same key head, `per_token` of them a token; on the side of the keys there is one a token. Lines past the end are read as
//! the last one, which no mask sees and no store writes.

use burn::cubecl;
use burn::cubecl::prelude::*;

use super::tile::Form;

/// Four entries of a line.
pub(super) type Quad<E> = Vector<E, Const<4>>;

/// Where the lines of one tensor lie, in quads.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Lines {
    pub(super) first: usize,
    pub(super) token: usize,
    pub(super) n_lines: usize,
    #[cube(comptime)]
    pub(super) per_token: usize,
    #[cube(comptime)]
    pub(super) quads: usize,
}

#[cube]
impl Lines {
    /// The first quad of a line.
    pub(super) fn start(&self, line: usize) -> usize {
        let line = min(line, self.n_lines - 1);
        self.first + line / self.per_token * self.token + line % self.per_token * self.quads
    }
}

/// The lines of `form.heads` query heads from `head` on.
#[cube]
pub(super) fn query_lines(n_queries: usize, heads: usize, head: usize, #[comptime] form: Form) -> Lines {
    Lines {
        first: head * form.quads,
        token: heads * form.quads,
        n_lines: n_queries * form.heads,
        per_token: comptime!(form.heads),
        quads: comptime!(form.quads),
    }
}

/// The lines of one key head.
#[cube]
pub(super) fn key_lines(n_keys: usize, kv_heads: usize, kv_head: usize, #[comptime] form: Form) -> Lines {
    Lines {
        first: kv_head * form.quads,
        token: kv_heads * form.quads,
        n_lines: n_keys,
        per_token: 1usize,
        quads: comptime!(form.quads),
    }
}

/// Neighbouring lines of one tensor.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Block<F: Float> {
    pub(super) entries: Slice<Quad<F>>,
    pub(super) lines: Lines,
    pub(super) first: usize,
}

#[cube]
impl<F: Float> Block<F> {
    pub(super) fn new(entries: &Array<Quad<F>>, lines: Lines, first: usize) -> Block<F> {
        Block::<F> { entries: entries.to_slice(), lines, first }
    }

    /// The first quad of the block's line `i`.
    pub(super) fn start(&self, i: usize) -> usize {
        self.lines.start(self.first + i)
    }
}
