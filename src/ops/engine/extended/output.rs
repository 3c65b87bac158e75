//! What cubek's kernels write: a product that is added to something.

#![expect(dead_code, reason = "a kernel is made of what the macro expands these to")]

use burn::cubecl;
use burn::cubecl::intrinsic;
use burn::cubecl::prelude::barrier::BarrierExpand;
use burn::cubecl::prelude::*;
use burn::cubecl::std::tensor::{
    View, ViewExpand, ViewOperations, ViewOperationsExpand, ViewOperationsMut, ViewOperationsMutExpand,
};
use cubek::matmul::launch::BatchedCoords;

use super::Expand;

/// A product that is added to something where it is written.
#[derive(CubeType, Clone)]
struct Sum<E: CubePrimitive> {
    out: View<E, BatchedCoords, ReadWrite>,
    addend: View<E, BatchedCoords>,
}

#[cube]
pub(super) fn sum<E: CubePrimitive>(
    out: View<E, BatchedCoords, ReadWrite>,
    addend: ComptimeOption<View<E, BatchedCoords>>,
) -> View<E, BatchedCoords, ReadWrite> {
    #[comptime]
    match addend {
        ComptimeOption::Some(addend) => sum_view::<E>(Sum::<E> { out, addend }),
        ComptimeOption::None => out,
    }
}

#[cube]
#[expect(unused_variables, reason = "what the macro makes of it uses them")]
fn sum_view<E: CubePrimitive>(sum: Sum<E>) -> View<E, BatchedCoords, ReadWrite> {
    intrinsic!(|_| ViewExpand::new_mut(sum))
}

#[cube]
impl<E: CubePrimitive> Sum<E> {
    fn at(&self, pos: BatchedCoords, value: E) -> E {
        let addend = Vector::<f32, E::Size>::cast_from(self.addend.read_checked(pos));
        E::cast_from(Vector::<f32, E::Size>::cast_from(value) + addend)
    }
}

impl<E: CubePrimitive> Vectorized for Sum<E> {}
impl<E: CubePrimitive> VectorizedExpand for SumExpand<E> {
    fn vector_size(&self) -> VectorSize {
        self.out.vector_size()
    }
}

impl<E: CubePrimitive> ViewOperations<E, BatchedCoords> for Sum<E> {}
impl<E: CubePrimitive> ViewOperationsExpand<E, BatchedCoords> for SumExpand<E> {
    fn __expand_read_method(&self, _scope: &mut Scope, _pos: Expand<BatchedCoords>) -> Expand<E> {
        panic!("a sum is only written")
    }

    fn __expand_read_checked_method(&self, _scope: &mut Scope, _pos: Expand<BatchedCoords>) -> Expand<E> {
        panic!("a sum is only written")
    }

    fn __expand_read_masked_method(
        &self,
        _scope: &mut Scope,
        _pos: Expand<BatchedCoords>,
        _mask: Expand<E>,
    ) -> Expand<E> {
        panic!("a sum is only written")
    }

    fn __expand_read_unchecked_method(&self, _scope: &mut Scope, _pos: Expand<BatchedCoords>) -> Expand<E> {
        panic!("a sum is only written")
    }

    fn __expand_to_linear_slice_method(
        &self,
        _scope: &mut Scope,
        _pos: Expand<BatchedCoords>,
        _end: Expand<BatchedCoords>,
    ) -> SliceExpand<E, ReadOnly> {
        panic!("a sum is only written")
    }

    fn __expand_tensor_map_load_method(
        &self,
        _scope: &mut Scope,
        _barrier: BarrierExpand,
        _shared_memory: SliceExpand<E, ReadWrite>,
        _pos: Expand<BatchedCoords>,
    ) {
        panic!("a sum is only written")
    }

    fn __expand_shape_method(&self, scope: &mut Scope) -> Expand<BatchedCoords> {
        self.out.__expand_shape_method(scope)
    }

    fn __expand_is_in_bounds_method(
        &self,
        scope: &mut Scope,
        pos: Expand<BatchedCoords>,
    ) -> NativeExpand<bool> {
        self.out.__expand_is_in_bounds_method(scope, pos)
    }
}

impl<E: CubePrimitive> ViewOperationsMut<E, BatchedCoords> for Sum<E> {}
impl<E: CubePrimitive> ViewOperationsMutExpand<E, BatchedCoords> for SumExpand<E> {
    fn __expand_write_method(&self, scope: &mut Scope, pos: Expand<BatchedCoords>, value: Expand<E>) {
        let value = self.clone().__expand_at_method(scope, pos.clone(), value);
        ViewOperationsMutExpand::__expand_write_method(&self.out, scope, pos, value);
    }

    fn __expand_write_checked_method(&self, scope: &mut Scope, pos: Expand<BatchedCoords>, value: Expand<E>) {
        let value = self.clone().__expand_at_method(scope, pos.clone(), value);
        ViewOperationsMutExpand::__expand_write_checked_method(&self.out, scope, pos, value);
    }

    fn __expand_to_linear_slice_mut_method(
        &self,
        _scope: &mut Scope,
        _pos: Expand<BatchedCoords>,
        _end: Expand<BatchedCoords>,
    ) -> SliceExpand<E, ReadWrite> {
        panic!("a sum is no slice")
    }

    fn __expand_tensor_map_store_method(
        &self,
        _scope: &mut Scope,
        _shared_memory: SliceExpand<E, ReadOnly>,
        _pos: Expand<BatchedCoords>,
    ) {
        panic!("a sum has no tensor map")
    }
}
