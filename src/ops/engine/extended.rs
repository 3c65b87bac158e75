//! cubek's routines with an adapter in their product: behind its depth each operand goes on with a factor of the adapter's,
//!
//! ```text
//! y = [x | s] [W | B]ᵀ      dx = [dy | ds] [W ; A]
//! ```
//!
//! so that matrix units add `s Bᵀ` or `ds A` up with the rest, and the product is written once, in the type that it goes on in. No tensor
//! is copied beside another: a load from behind the frozen depth reads a second one. There the factor, which is `f32`, lies as numbers
//! of 16 bits: `a` as the sum of two, `a₁ + a₂`, and a product as three, `a₁ b₁ + a₂ b₁ + a₁ b₂`. What is left out is 2⁻¹⁶ of it in
//! `bf16`, 2⁻²² in `f16` or, of a number below 1/8 there, 2⁻²⁵ times the other. A product that is added to a 16-bit tensor is rounded
//! before, and so is the sum.

mod operand;
mod output;
mod tail;

use burn::cubecl;
use burn::cubecl::prelude::*;
use burn::cubecl::std::tensor::View;
use burn::cubecl::std::tensor::launch::ViewArg;
use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::components::global::memory::{GlobalLayout, GlobalLayoutConfig, GlobalLayoutLaunch};
use cubek::matmul::definition::{
    AvailableVectorSizes, Blueprint, MatmulGlobalElems, MatmulProblem, MatmulSetupError, TilingBlueprint,
};
use cubek::matmul::launch::{BatchedCoords, MatmulArgs, launch_kernel};
use cubek::matmul::routines::{BlueprintStrategy, Routine};

use super::product::Adapter;
use operand::{Tail, TailLaunch, extended};
use output::sum;
use tail::{Side, tails};

type Expand<T> = <T as CubeType>::ExpandType;

/// The frozen operands, what they go on with, and what the product is added to.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Operands<Lhs: CubePrimitive, Rhs: CubePrimitive, E: CubePrimitive> {
    lhs: View<Lhs, BatchedCoords>,
    rhs: View<Rhs, BatchedCoords>,
    left: ComptimeOption<Tail<Lhs>>,
    right: ComptimeOption<Tail<Rhs>>,
    addend: ComptimeOption<View<E, BatchedCoords>>,
}

/// Where the product goes.
#[derive(CubeType, CubeLaunch, Clone)]
pub(super) struct Output<E: CubePrimitive> {
    view: View<E, BatchedCoords, ReadWrite>,
}

/// [`Operands`] and [`Output`] as cubek takes them.
#[derive(Clone)]
pub(super) struct Extension;

#[cube]
impl MatmulArgs for Extension {
    type Input<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive> = Operands<Lhs, Rhs, EO>;
    type Output<EO: CubePrimitive> = Output<EO>;
    type Config = ();
    type State<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive> =
        (Operands<Lhs, Rhs, EO>, Output<EO>);

    fn init_state<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        input: &Self::Input<Lhs, Rhs, EO>,
        output: &mut Self::Output<EO>,
        _config: (),
        #[comptime] _lhs: GlobalLayoutConfig,
        #[comptime] _rhs: GlobalLayoutConfig,
        #[comptime] _out: GlobalLayoutConfig,
    ) -> Self::State<Lhs, Rhs, EO> {
        (input.clone(), output.clone())
    }

    fn view_lhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        state: &Self::State<Lhs, Rhs, EO>,
    ) -> View<Lhs, BatchedCoords> {
        extended::<Lhs>(state.0.lhs, state.0.left.clone())
    }

    fn view_rhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        state: &Self::State<Lhs, Rhs, EO>,
    ) -> View<Rhs, BatchedCoords> {
        extended::<Rhs>(state.0.rhs, state.0.right.clone())
    }

    fn view_acc<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
    ) -> ComptimeOption<View<EO, BatchedCoords>> {
        ComptimeOption::new_None()
    }

    fn view_out<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        state: &mut Self::State<Lhs, Rhs, EO>,
    ) -> View<EO, BatchedCoords, ReadWrite> {
        sum::<EO>(state.1.view, state.0.addend)
    }

    fn batch_lhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        batch: usize,
    ) -> usize {
        batch
    }

    fn batch_rhs<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        batch: usize,
    ) -> usize {
        batch
    }

    fn batch_acc<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        batch: usize,
    ) -> usize {
        batch
    }

    fn batch_out<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
        batch: usize,
    ) -> usize {
        batch
    }

    fn runtime_config<Lhs: CubePrimitive, Rhs: CubePrimitive, EO: CubePrimitive>(
        _state: &Self::State<Lhs, Rhs, EO>,
    ) {
    }
}

/// Whether a matrix's columns lie along its memory.
pub(in crate::ops) fn is_turned<R: CubeRuntime>(matrix: &CubeTensor<R>) -> bool {
    matrix.meta.strides()[0] < matrix.meta.strides()[1]
}

/// Two 16-bit operands, `[m, depth]` and `[depth, n]`, and the tails with which they go on.
pub(super) struct Pair<'a, R: CubeRuntime> {
    pub(super) frozen: [&'a CubeTensor<R>; 2],
    pub(super) tails: Option<[CubeTensor<R>; 2]>,
}

impl<'a, R: CubeRuntime> Pair<'a, R> {
    pub(super) fn new(lhs: &'a CubeTensor<R>, rhs: &'a CubeTensor<R>, adapter: Option<&Adapter<R>>) -> Self {
        let tails = adapter
            .map(|Adapter { left, right, scale }| tails(left, *scale, right, is_turned(rhs), rhs.dtype));
        Self { frozen: [lhs, rhs], tails }
    }
}

/// Where a product `[m, n]` goes, and what it is added to.
pub(super) enum Place<'a, R: CubeRuntime> {
    /// Into `out`.
    New { out: &'a CubeTensor<R>, addend: Option<&'a CubeTensor<R>> },
    /// Over the tensor that it is added to.
    Over(&'a CubeTensor<R>),
}

/// The product of two operands, in its place.
///
/// # Errors
/// If the routine has no kernel for it on this device.
pub(super) fn launch<R: CubeRuntime, A: Routine<(), Blueprint = TilingBlueprint>>(
    strategy: A::Strategy,
    Pair { frozen: [lhs, rhs], tails }: &Pair<'_, R>,
    place: &Place<'_, R>,
) -> Result<(), MatmulSetupError> {
    let client = &lhs.client;
    let [m, depth] = [0, 1].map(|i| lhs.meta.shape()[i]);
    let n = rhs.meta.shape()[1];
    let (target, addend) = match *place {
        Place::New { out, addend } => (out, addend),
        Place::Over(addend) => (addend, Some(addend)),
    };
    let [lhs_type, rhs_type, out_type] = [lhs, rhs, target].map(|tensor| tensor.dtype.into());
    let elements = MatmulGlobalElems { lhs: lhs_type, rhs: rhs_type, out: out_type };
    let mut problem = MatmulProblem::from_shapes_and_strides(
        lhs.meta.shape().clone(),
        rhs.meta.shape().clone(),
        target.meta.shape().clone(),
        lhs.meta.strides().clone(),
        rhs.meta.strides().clone(),
        target.meta.strides().clone(),
        elements,
        [lhs, rhs, target].map(CubeTensor::required_address_type).into_iter().max().unwrap_or_default(),
        None,
        None,
    )?;
    let sizes = [lhs, rhs, target].map(|tensor| tensor.dtype.size());
    let vectors = AvailableVectorSizes::from_type_sizes(client, sizes[0], sizes[1], sizes[2])
        .filter_lhs_with_tensor(&problem.lhs_strides, &problem.lhs_shape, problem.lhs_layout)
        .filter_rhs_with_tensor(&problem.rhs_strides, &problem.rhs_shape, problem.rhs_layout)
        .filter_out_with_tensor(&problem.out_strides, &problem.out_shape)
        .pick_max()?;
    let end = depth + tails.as_ref().map_or(0, |[left, _]| left.meta.shape()[1]);
    problem.k = end;
    problem.lhs_shape = [m, end].into();
    problem.rhs_shape = [end, n].into();

    let settings = A::device_settings(client, vectors);
    let inferred = A::expand_blueprint(&problem, &settings, &BlueprintStrategy::Inferred(strategy))?;
    let launch = A::prepare(&problem, &settings, inferred)?;
    let layout = |tensor: &CubeTensor<R>, (vector_size, config)| {
        GlobalLayoutLaunch::from_handle(&tensor.clone().binding(), vector_size, config)
    };
    let view = |tensor: &CubeTensor<R>, form| {
        ViewArg::new_tensor::<GlobalLayout>(tensor.clone().into_tensor_arg(), layout(tensor, form))
    };
    let (blueprint, sizes) = (&launch.blueprint, launch.vector_sizes);
    let [left, right, output] = [
        (sizes.lhs, blueprint.lhs_global_layout_config()),
        (sizes.rhs, blueprint.rhs_global_layout_config()),
        (sizes.out, blueprint.out_global_layout_config()),
    ];
    let depth = depth as u32;
    let left_tail = tails.as_ref().map(|[tail, _]| TailLaunch::new(view(tail, left), depth, Side::Left));
    let right_tail = tails.as_ref().map(|[_, tail]| TailLaunch::new(view(tail, right), depth, Side::Right));
    let operands = OperandsLaunch::new(
        view(lhs, left),
        view(rhs, right),
        left_tail.into(),
        right_tail.into(),
        addend.map(|addend| view(addend, output)).into(),
    );
    let out = match *place {
        Place::New { out, .. } => out.clone().into_tensor_arg(),
        // Behind the operands and their tails.
        Place::Over(_) => target.as_tensor_alias(if tails.is_some() { 4 } else { 2 }),
    };
    let out = OutputLaunch::new(ViewArg::new_tensor::<GlobalLayout>(out, layout(target, output)));
    launch_kernel::<Extension, R, A>(client, operands, out, (), launch)
}
