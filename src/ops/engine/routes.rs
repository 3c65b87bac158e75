//! Of the products on matrix units that cubek makes: by which of its routines.

use std::fmt;
use std::marker::PhantomData;
use std::sync::LazyLock;

use burn::cubecl::client::ComputeClient;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::zeros_client;
use burn_cubecl::tensor::CubeTensor;
use cubek::matmul::components::tile::TileMatmulKind;
use cubek::matmul::launch::Strategy;
use cubek::matmul::routines::BlueprintStrategy;
use cubek::matmul::routines::double_buffering::DoubleBufferingArgs;
use cubek::matmul::routines::ordered_double_buffering::OrderedSelectionArgs;
use cubek::matmul::routines::simple::SimpleArgs;
use serde::{Deserialize, Serialize};

use super::product::{has_matrices, launch_cubek, turned};
use crate::ops::cube::empty;
use crate::ops::tune::{self, LEFT, LinearKind, RIGHT, Table, Tunable, typical_rows};

/// What the time of a product depends on: `[m, depth] · [depth, n]` of 16-bit entries, summed in `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RouteKind {
    /// Rows of the output, rounded up to a power of two.
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Entries that each entry of the output sums.
    pub depth: usize,
    /// Whether the right operand's columns lie along its memory, as a weight's do in the forward product.
    pub is_turned: bool,
    /// What the operands hold.
    pub dtype: DType,
}

impl RouteKind {
    /// The kind of a product of these tensors.
    pub(crate) fn of<R: CubeRuntime>(lhs: &CubeTensor<R>, rhs: &CubeTensor<R>) -> Self {
        let ([m, depth], [_, n]) = ([0, 1].map(|i| lhs.meta.shape()[i]), [0, 1].map(|i| rhs.meta.shape()[i]));
        let is_turned = rhs.meta.strides()[0] < rhs.meta.strides()[1];
        Self { m: m.next_power_of_two(), n, depth, is_turned, dtype: rhs.dtype }
    }

    /// A product by which one like this is judged that was not timed: a few blocks of it, with edges where it has edges, for which the
    /// routines have kernels of their own.
    pub(super) fn sample(self) -> Self {
        let like = |extent: usize| if extent.is_multiple_of(256) { 256 } else { 264 };
        Self { m: 256, n: like(self.n), depth: like(self.depth), ..self }
    }
}

/// What a plane multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Instruction {
    /// Cooperative matrices, of whose layout the compiler knows.
    Cmma,
    /// Matrices in registers, whose layout the kernel knows; CUDA's alone.
    Mma,
}

/// One of cubek's routines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Route {
    /// A stage at a time.
    Simple {
        /// What multiplies.
        instruction: Instruction,
        /// Whether a plane has several rows of matrices.
        multi_rows: bool,
    },
    /// The next stage is loaded while one is multiplied.
    DoubleBuffered {
        /// What multiplies.
        instruction: Instruction,
        /// Whether some planes do nothing but load.
        specialized: bool,
    },
    /// As before, with the left operand's part kept by the plane that multiplies it.
    Ordered {
        /// What multiplies.
        instruction: Instruction,
    },
}

impl Route {
    /// Every route, the one that is taken unless timed first.
    pub const ALL: [Self; 10] = {
        use Instruction::{Cmma, Mma};
        [
            Self::Simple { instruction: Cmma, multi_rows: true },
            Self::Simple { instruction: Mma, multi_rows: true },
            Self::Simple { instruction: Cmma, multi_rows: false },
            Self::Simple { instruction: Mma, multi_rows: false },
            Self::DoubleBuffered { instruction: Cmma, specialized: false },
            Self::DoubleBuffered { instruction: Mma, specialized: false },
            Self::DoubleBuffered { instruction: Cmma, specialized: true },
            Self::DoubleBuffered { instruction: Mma, specialized: true },
            Self::Ordered { instruction: Cmma },
            Self::Ordered { instruction: Mma },
        ]
    };

    /// cubek's name for it.
    pub(crate) fn strategy(self) -> Strategy {
        use BlueprintStrategy::Inferred;
        let (Self::Simple { instruction, .. }
        | Self::DoubleBuffered { instruction, .. }
        | Self::Ordered { instruction }) = self;
        let is_mma = instruction == Instruction::Mma;
        let tile_matmul = if is_mma { TileMatmulKind::Mma } else { TileMatmulKind::Cmma };
        match self {
            Self::Simple { multi_rows, .. } => {
                let args = Inferred(SimpleArgs { multi_rows, tile_matmul });
                if is_mma { Strategy::SimpleCyclicMma(args) } else { Strategy::SimpleCyclicCmma(args) }
            }
            Self::DoubleBuffered { specialized, .. } => {
                let args = Inferred(DoubleBufferingArgs { specialized, tile_matmul });
                if is_mma { Strategy::DoubleCyclicMma(args) } else { Strategy::DoubleCyclicCmma(args) }
            }
            Self::Ordered { .. } => {
                let args = Inferred(OrderedSelectionArgs {
                    partition_k: Some(2),
                    row_count: Some(8),
                    rows_per_plane: Some(2),
                    tile_matmul,
                });
                if is_mma { Strategy::OrderedDoubleMma(args) } else { Strategy::OrderedDoubleCmma(args) }
            }
        }
    }
}

/// The matrix engine of a runtime that brings none of its own.
pub struct Routes<R>(PhantomData<R>);

impl<R> fmt::Debug for Routes<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Routes")
    }
}

impl<R: CubeRuntime> Tunable for Routes<R> {
    type Runtime = R;
    type Kind = RouteKind;
    type Choice = Route;
    type Scratch = [CubeTensor<R>; 2];

    fn table() -> &'static Table<RouteKind, Route> {
        static TABLE: Table<RouteKind, Route> = LazyLock::new(Default::default);
        &TABLE
    }

    fn revision() -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    fn of_linear(LinearKind { extents, dtype, .. }: LinearKind) -> [RouteKind; 2] {
        // The adapter is no part of the product, whose output is `f32` whatever it goes on as.
        let [tokens, n_in, n_out, _] = extents.map(|n| n as usize);
        let m = tokens.next_power_of_two();
        [
            RouteKind { m, n: n_out, depth: n_in, is_turned: true, dtype },
            RouteKind { m, n: n_in, depth: n_out, is_turned: false, dtype },
        ]
    }

    fn flops(kind: RouteKind) -> f64 {
        2.0 * typical_rows(kind.m) as f64 * kind.n as f64 * kind.depth as f64
    }

    fn candidates(client: &ComputeClient<R>, kind: RouteKind) -> Vec<Route> {
        if has_matrices(client, kind.dtype) { Route::ALL.to_vec() } else { Vec::new() }
    }

    fn depth(kind: RouteKind) -> usize {
        kind.depth
    }

    fn scratch(client: &ComputeClient<R>, device: &R::Device, kind: RouteKind) -> [CubeTensor<R>; 2] {
        let RouteKind { m, n, depth, is_turned, dtype } = kind;
        let operand =
            |shape, is_rows, pattern| tune::operand(client, device, shape, is_rows, 0, pattern, dtype);
        let rhs = if is_turned {
            turned(&operand([n, depth], true, RIGHT))
        } else {
            operand([depth, n], false, RIGHT)
        };
        [operand([typical_rows(m), depth], true, LEFT), rhs]
    }

    fn launch(
        [lhs, rhs]: &[CubeTensor<R>; 2],
        route: Route,
        zeros: Option<CubeTensor<R>>,
    ) -> Option<CubeTensor<R>> {
        let out = zeros.unwrap_or_else(|| empty(lhs, out_shape(lhs, rhs), DType::F32));
        launch_cubek(&route.strategy(), lhs, rhs, &out).ok().map(|()| out)
    }

    fn zeros([lhs, rhs]: &[CubeTensor<R>; 2]) -> CubeTensor<R> {
        let zeros = zeros_client(lhs.client.clone(), lhs.device.clone(), out_shape(lhs, rhs), DType::F32);
        into_contiguous(zeros)
    }
}

fn out_shape<R: CubeRuntime>(lhs: &CubeTensor<R>, rhs: &CubeTensor<R>) -> Shape {
    Shape::from([lhs.meta.shape()[0], rhs.meta.shape()[1]])
}
