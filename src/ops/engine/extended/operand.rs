//! What cubek's kernels read: an operand in two tensors.

#![expect(dead_code, reason = "a kernel is made of what the macro expands these to")]

use burn::cubecl;
use burn::cubecl::intrinsic;
use burn::cubecl::prelude::barrier::BarrierExpand;
use burn::cubecl::prelude::*;
use burn::cubecl::std::tensor::{View, ViewExpand, ViewOperations, ViewOperationsExpand};
use cubek::matmul::launch::BatchedCoords;

use super::Expand;
use super::tail::Side;

/// With what an operand goes on.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Tail<E: CubePrimitive> {
    entries: View<E, BatchedCoords>,
    /// Where the frozen operand ends.
    depth: u32,
    #[cube(comptime)]
    side: Side,
}

/// An operand with its tail.
#[derive(CubeType, Clone)]
struct Extended<E: CubePrimitive> {
    frozen: View<E, BatchedCoords>,
    tail: Tail<E>,
}

#[cube]
pub(super) fn extended<E: CubePrimitive>(
    frozen: View<E, BatchedCoords>,
    tail: ComptimeOption<Tail<E>>,
) -> View<E, BatchedCoords> {
    #[comptime]
    match tail {
        ComptimeOption::Some(tail) => view_of::<E>(Extended::<E> { frozen, tail }),
        ComptimeOption::None => frozen,
    }
}

#[cube]
#[expect(unused_variables, reason = "what the macro makes of it uses them")]
fn view_of<E: CubePrimitive>(extended: Extended<E>) -> View<E, BatchedCoords> {
    intrinsic!(|_| ViewExpand::new(extended))
}

#[cube]
impl<E: CubePrimitive> Extended<E> {
    /// The vector at these coordinates; zeros where there is nothing. Routines that load stages in pairs read one past the end, without
    /// a check where the depth is whole stages.
    fn load(&self, pos: BatchedCoords) -> E {
        let (batch, row, column) = pos;
        let depth = self.tail.depth;
        let (_, tail_rows, tail_columns) = self.tail.entries.shape();
        match comptime!(self.tail.side) {
            Side::Left => {
                if column < depth {
                    self.frozen.read_checked((batch, row, column))
                } else {
                    let value = self.tail.entries.read_checked((batch, row, column - depth));
                    select(column < depth + tail_columns, value, E::cast_from(0.0f32))
                }
            }
            Side::Right => {
                if row < depth {
                    self.frozen.read_checked((batch, row, column))
                } else {
                    let value = self.tail.entries.read_checked((batch, row - depth, column));
                    select(row < depth + tail_rows, value, E::cast_from(0.0f32))
                }
            }
        }
    }

    fn extents(&self) -> BatchedCoords {
        let (batches, rows, columns) = self.frozen.shape();
        let (_, tail_rows, tail_columns) = self.tail.entries.shape();
        match comptime!(self.tail.side) {
            Side::Left => (batches, rows, columns + tail_columns),
            Side::Right => (batches, rows + tail_rows, columns),
        }
    }

    fn has(&self, pos: BatchedCoords) -> bool {
        let (_, rows, columns) = self.extents();
        pos.1 < rows && pos.2 < columns
    }
}

impl<E: CubePrimitive> Vectorized for Extended<E> {}
impl<E: CubePrimitive> VectorizedExpand for ExtendedExpand<E> {
    fn vector_size(&self) -> VectorSize {
        self.frozen.vector_size()
    }
}

impl<E: CubePrimitive> ViewOperations<E, BatchedCoords> for Extended<E> {}
impl<E: CubePrimitive> ViewOperationsExpand<E, BatchedCoords> for ExtendedExpand<E> {
    fn __expand_read_method(&self, scope: &mut Scope, pos: Expand<BatchedCoords>) -> Expand<E> {
        self.clone().__expand_load_method(scope, pos)
    }

    fn __expand_read_checked_method(&self, scope: &mut Scope, pos: Expand<BatchedCoords>) -> Expand<E> {
        self.clone().__expand_load_method(scope, pos)
    }

    fn __expand_read_masked_method(
        &self,
        scope: &mut Scope,
        pos: Expand<BatchedCoords>,
        mask: Expand<E>,
    ) -> Expand<E> {
        let is_there = self.__expand_is_in_bounds_method(scope, pos.clone());
        let value = self.clone().__expand_load_method(scope, pos);
        select::expand::<E>(scope, is_there, value, mask)
    }

    fn __expand_read_unchecked_method(&self, scope: &mut Scope, pos: Expand<BatchedCoords>) -> Expand<E> {
        self.clone().__expand_load_method(scope, pos)
    }

    fn __expand_to_linear_slice_method(
        &self,
        _scope: &mut Scope,
        _pos: Expand<BatchedCoords>,
        _end: Expand<BatchedCoords>,
    ) -> SliceExpand<E, ReadOnly> {
        panic!("an operand of two tensors is no slice")
    }

    fn __expand_tensor_map_load_method(
        &self,
        _scope: &mut Scope,
        _barrier: BarrierExpand,
        _shared_memory: SliceExpand<E, ReadWrite>,
        _pos: Expand<BatchedCoords>,
    ) {
        panic!("an operand of two tensors has no tensor map")
    }

    fn __expand_shape_method(&self, scope: &mut Scope) -> Expand<BatchedCoords> {
        self.clone().__expand_extents_method(scope)
    }

    fn __expand_is_in_bounds_method(
        &self,
        scope: &mut Scope,
        pos: Expand<BatchedCoords>,
    ) -> NativeExpand<bool> {
        self.clone().__expand_has_method(scope, pos)
    }
}
