//! Of the products on matrix units: by which of cubek's routines, or on warpgroups.

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
use cubek::matmul::routines::double_buffering::{CyclicDoubleBufferingAlgorithm, DoubleBufferingArgs};
use cubek::matmul::routines::ordered_double_buffering::{
    OrderedDoubleBufferingAlgorithm, OrderedSelectionArgs,
};
use cubek::matmul::routines::simple::{SimpleAlgorithm, SimpleArgs};
use serde::{Deserialize, Serialize};

use super::extended::{Pair, Place, is_turned, launch};
use super::product::{Adapter, Rest, has_matrices, turned};
use super::{Engine, warpgroup};
use crate::ops::cube::empty;
use crate::ops::tune::{self, LEFT, LinearKind, RIGHT, Table, Tunable, like_rows, typical_rows};

/// What the time of a product depends on: `[m, depth] · [depth, n]` of 16-bit entries, summed in `f32`, with an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RouteKind {
    /// What the output's rows count as, see [`like_rows`].
    pub m: usize,
    /// Columns of the output.
    pub n: usize,
    /// Entries that each entry of the output sums.
    pub depth: usize,
    /// Rank of the adapter, or 0.
    pub rank: usize,
    /// Whether the right operand's columns lie along its memory, as a weight's do in the forward product.
    pub is_turned: bool,
    /// What the operands hold.
    pub dtype: DType,
    /// What the output does.
    pub out: DType,
    /// Whether the product is added to something.
    pub has_addend: bool,
}

impl RouteKind {
    /// The kind of a product of these tensors.
    pub(super) fn of<R: CubeRuntime>(lhs: &CubeTensor<R>, rhs: &CubeTensor<R>, rest: &Rest<R>) -> Self {
        let ([m, depth], [_, n]) = ([0, 1].map(|i| lhs.meta.shape()[i]), [0, 1].map(|i| rhs.meta.shape()[i]));
        let (rank, m) = (rest.rank(), like_rows(m));
        let (is_turned, has_addend) = (is_turned(rhs), rest.addend.is_some());
        Self { m, n, depth, rank, is_turned, dtype: rhs.dtype, out: rest.dtype, has_addend }
    }

    /// A product by which one like this is judged that was not timed: a few blocks of it, whose extents are multiples of the powers of two
    /// that its own are multiples of. By those, loads are of several entries, or held against edges.
    pub(super) fn sample(self) -> Self {
        let like = |extent: usize| match 1 << extent.trailing_zeros() {
            power if power < 256 => 256 + power,
            _ => 256,
        };
        let rank = 8 * self.rank.min(1);
        Self { m: 256, n: like(self.n), depth: like(self.depth), rank, ..self }
    }

    /// The same for warpgroups: of more tiles than a GPU has processors and more stages than two turns of a ring have, so that
    /// workgroups make several tiles and use their stages again.
    pub fn sample_of_many_tiles(self) -> Self {
        let like = self.sample();
        Self { m: 2048, n: like.n + 10 * 256, depth: like.depth + 4 * 256, ..like }
    }
}

/// What a plane multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Instruction {
    /// Cooperative matrices, of whose layout the compiler knows.
    Cmma,
    /// Matrices in registers, whose layout the kernel knows; CUDA's alone, from Turing on.
    Mma,
}

impl Instruction {
    fn tile(self) -> TileMatmulKind {
        match self {
            Self::Cmma => TileMatmulKind::Cmma,
            Self::Mma => TileMatmulKind::Mma,
        }
    }
}

/// One of cubek's routines, or warpgroups.
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
    /// `lora_linear_warpgroup.cu`, where the device has warpgroups that multiply.
    Warpgroups {
        /// Of a tile.
        columns: u32,
    },
}

impl Route {
    /// What is taken unless another was timed to be faster.
    pub const UNTIMED: Self = Self::Simple { instruction: Instruction::Cmma, multi_rows: true };

    /// cubek's, by what multiplies.
    fn of_cubek(instructions: &[Instruction]) -> Vec<Self> {
        let routines: [fn(Instruction) -> Self; 5] = [
            |instruction| Self::Simple { instruction, multi_rows: true },
            |instruction| Self::Simple { instruction, multi_rows: false },
            |instruction| Self::DoubleBuffered { instruction, specialized: false },
            |instruction| Self::DoubleBuffered { instruction, specialized: true },
            |instruction| Self::Ordered { instruction },
        ];
        routines.iter().flat_map(|routine| instructions.iter().map(|&by| routine(by))).collect()
    }

    /// Launches the product of two operands; `false` where there is no kernel for it on this device.
    #[must_use]
    pub(super) fn launch<R: Engine>(self, operands: &Pair<'_, R>, place: &Place<'_, R>) -> bool {
        match self {
            Self::Simple { multi_rows, instruction } => {
                let args = SimpleArgs { multi_rows, tile_matmul: instruction.tile() };
                launch::<R, SimpleAlgorithm>(args, operands, place).is_ok()
            }
            Self::DoubleBuffered { specialized, instruction } => {
                let args = DoubleBufferingArgs { specialized, tile_matmul: instruction.tile() };
                launch::<R, CyclicDoubleBufferingAlgorithm>(args, operands, place).is_ok()
            }
            Self::Ordered { instruction } => {
                let args = OrderedSelectionArgs {
                    partition_k: Some(2),
                    row_count: Some(8),
                    rows_per_plane: Some(2),
                    tile_matmul: instruction.tile(),
                };
                launch::<R, OrderedDoubleBufferingAlgorithm>(args, operands, place).is_ok()
            }
            Self::Warpgroups { columns } => warpgroup::launch(columns, operands, place).is_ok(),
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

impl<R: Engine> Tunable for Routes<R> {
    type Runtime = R;
    type Kind = RouteKind;
    type Choice = Route;
    type Scratch = Scratch<R>;

    fn table() -> &'static Table<RouteKind, Route> {
        static TABLE: Table<RouteKind, Route> = LazyLock::new(Default::default);
        &TABLE
    }

    fn revision() -> String {
        env!("CARGO_PKG_VERSION").to_owned()
    }

    fn of_linear(linear: LinearKind) -> [RouteKind; 2] {
        let LinearKind { extents, dtype, joins_stream, shares_input } = linear;
        let [tokens, n_in, n_out, rank] = extents.map(|n| n as usize);
        let m = like_rows(tokens);
        let out = if joins_stream { DType::F32 } else { dtype };
        let kind = RouteKind {
            m,
            n: n_out,
            depth: n_in,
            rank,
            is_turned: true,
            dtype,
            out,
            has_addend: joins_stream,
        };
        [
            kind,
            RouteKind {
                n: n_in,
                depth: n_out,
                is_turned: false,
                out: dtype,
                has_addend: shares_input,
                ..kind
            },
        ]
    }

    fn of_more_rows(kind: RouteKind) -> RouteKind {
        RouteKind { m: like_rows(kind.m + 1), ..kind }
    }

    fn flops(kind: RouteKind) -> f64 {
        2.0 * typical_rows(kind.m) as f64 * kind.n as f64 * (kind.depth + kind.rank) as f64
    }

    fn candidates(device: &R::Device, kind: RouteKind) -> Vec<Route> {
        let client = &R::client(device);
        // Where there are warpgroups cubek's routines are not worth their compilation: of Llama-3-8B's products on an H100 the fastest of
        // them made 200 TFLOP/s.
        if warpgroup::columns(client, kind, kind.m).is_some() || !has_matrices(client, kind.dtype) {
            return Vec::new();
        }
        // CubeCL lists no shapes for Turing, of which cubek takes one all the same; loads of matrices it does list. A GPU without those,
        // a Volta, has no such shapes either.
        let has_mma = !client.properties().features.matmul.ldmatrix.is_empty();
        Route::of_cubek(if has_mma { &[Instruction::Cmma, Instruction::Mma] } else { &[Instruction::Cmma] })
    }

    fn depth(kind: RouteKind) -> usize {
        kind.depth + kind.rank
    }

    fn scratch(client: &ComputeClient<R>, device: &R::Device, kind: RouteKind) -> Scratch<R> {
        let RouteKind { m, n, depth, rank, is_turned, dtype, out, has_addend } = kind;
        let m = typical_rows(m);
        let left =
            |columns, first, dtype| tune::operand(client, device, [m, columns], true, first, LEFT, dtype);
        let right = |rows, first, dtype| match is_turned {
            true => turned(&tune::operand(client, device, [n, rows], true, first, RIGHT, dtype)),
            false => tune::operand(client, device, [rows, n], false, first, RIGHT, dtype),
        };
        let adapter = || Adapter {
            left: left(rank, depth, DType::F32),
            right: right(rank, depth, DType::F32),
            scale: 1.0,
        };
        let operands = [left(depth, 0, dtype), right(depth, 0, dtype)];
        let addend = has_addend.then(|| tune::addend(client, device, [m, n], out));
        Scratch { operands, adapter: (rank > 0).then(adapter), addend, shape: [m, n], out }
    }

    fn launch(scratch: &Scratch<R>, route: Route, place: Option<CubeTensor<R>>) -> Option<CubeTensor<R>> {
        let Scratch { operands: [lhs, rhs], adapter, addend, shape, out } = scratch;
        let operands = Pair::new(lhs, rhs, adapter.as_ref());
        // A residual, which is `f32`, is kept; gradients are added up in place, and where there is only the time to be seen sums of sums
        // do as well.
        let is_in_place = *out != DType::F32;
        let place = match (place, addend) {
            (Some(place), _) => place,
            (None, Some(addend)) if is_in_place => addend.clone(),
            (None, _) => empty(lhs, Shape::from(*shape), *out),
        };
        let at = match addend {
            Some(_) if is_in_place => Place::Over(&place),
            addend => Place::New { out: &place, addend: addend.as_ref() },
        };
        route.launch(&operands, &at).then_some(place)
    }

    fn place(scratch: &Scratch<R>) -> CubeTensor<R> {
        let Scratch { operands: [lhs, _], addend, shape, out, .. } = scratch;
        // An addend that is kept is not what the output is written over: a way that reads that instead of it shows.
        let place = match addend {
            Some(addend) if *out != DType::F32 => addend.copy(),
            _ => zeros_client(lhs.client.clone(), lhs.device.clone(), Shape::from(*shape), *out),
        };
        into_contiguous(place)
    }

    fn is_added(kind: RouteKind) -> bool {
        kind.has_addend
    }
}

/// What a product is made of that is only timed.
pub struct Scratch<R: CubeRuntime> {
    operands: [CubeTensor<R>; 2],
    adapter: Option<Adapter<R>>,
    addend: Option<CubeTensor<R>>,
    shape: [usize; 2],
    out: DType,
}
