//! The WGSL sources of this project, the variants that they are compiled in, and their launch through cubecl's client. The sources in
//! CUDA's language have a room of their own, `kernel/cuda.rs`.
//!
//! A source is text with directives, each on a line of its own, and placeholders:
//!
//! ```text
//! {{ name }}             the variant's value of that name, which may have a value of a #for in it: {{ {{ i }}_items }}
//! #if name … #else …     a part that is there when the variant has that flag, ended by #endif
//! #for i in a b … #endfor  a part repeated with {{ i }} = a, b, …; the list may come from a placeholder
//! ```
//!
//! Repetition instead of WGSL loops is what keeps a thread's accumulators in registers: no compiler has to unroll anything.
//!
//! No branch of a source depends on its parameters alone: Mesa's software adapter would compile the shader anew for each launch, with
//! the values of its parameters.

#[cfg(feature = "cuda")]
pub(super) mod cuda;
mod render;
mod tile;

pub use tile::{Cut, DirectTile, Element, Elements, Layout, MatrixTile, Quads, Tile};

use std::hash::{DefaultHasher, Hash, Hasher};

use burn::cubecl::client::ComputeClient;
use burn::cubecl::ir::{ElemType, StorageType, UIntKind};
use burn::cubecl::prelude::{CompiledKernel, KernelId, KernelMetadata};
use burn::cubecl::server::{Handle, KernelArguments, MetadataBindingInfo};
use burn::cubecl::{CompilationError, Compiler, CubeCount, CubeDim, CubeTask, ExecutionMode};
use burn_wgpu::WgpuRuntime;

use render::render;

/// One compiled variant of one of the sources in `shaders/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shader {
    /// `lora_linear.wgsl`, `lora_linear_direct.wgsl` or `lora_linear_matrix.wgsl`
    Product {
        /// How the operands lie in memory; matrices know the first two layouts.
        layout: Layout,
        /// How the product is cut.
        cut: Cut,
        /// What the operands hold.
        elements: Elements,
        /// Which buffers are read in quads.
        quads: Quads,
    },
    /// `lora_linear_sum.wgsl`
    Sum {
        /// What the output holds, and what is added to it.
        out: Element,
    },
    /// `lora_linear_backward.wgsl`
    LoraBackward {
        /// What the gradient by the output holds.
        dy: Element,
        /// The rank's quads, rounded up.
        rank_quads: u32,
        /// Whether the gradient's rows are whole quads.
        is_dy_vec4: bool,
        /// Whether the rank is a multiple of four, so that the rows of the other operands are.
        is_rank_vec4: bool,
    },
    /// `lora_linear_lanes.wgsl`
    Lanes {
        /// Lanes of a subgroup.
        lanes: u32,
    },
    /// `orpo_loss.wgsl`
    OrpoLoss,
    /// `orpo_loss_backward.wgsl`
    OrpoLossBackward,
}

/// A number that changes with the sources of the products, to tell timings of others by.
pub fn products_revision() -> u64 {
    let mut hasher = DefaultHasher::new();
    PRODUCTS.hash(&mut hasher);
    hasher.finish()
}

/// What products are made of.
const PRODUCTS: [&str; 6] = [
    include_str!("../../shaders/lora_linear.wgsl"),
    include_str!("../../shaders/lora_linear_direct.wgsl"),
    include_str!("../../shaders/lora_linear_matrix.wgsl"),
    include_str!("../../shaders/lora_linear_sum.wgsl"),
    include_str!("../../shaders/shared/product.wgsl"),
    include_str!("../../shaders/shared/staging.wgsl"),
];

/// Threads of a workgroup where a shader does not say otherwise.
const WORKGROUP_SIZE: u32 = 64;
/// Blocks down m that neighbouring workgroups of a product share a column of blocks over.
pub const BAND: u32 = 8;
/// Tokens and columns of a step of `lora_linear_backward.wgsl`.
pub const PANEL: u32 = 64;
/// Rank quads that `lora_linear_backward.wgsl` is compiled for. Of a higher rank than these have, its partial sums cost more than reading
/// `dy` again: those of `ds` are written and read once for every [`PANEL`] columns, which is `8 rank / PANEL` bytes for each entry of
/// `dy`, as much as one takes in `f16` for a rank of 16.
pub const RANK_QUADS: [u32; 3] = [1, 2, 4];
/// What WebGPU guarantees in each dimension of a dispatch.
pub const MAX_WORKGROUPS: u32 = 65_535;

impl Shader {
    /// Threads of a workgroup.
    pub fn workgroup_size(self) -> u32 {
        match self {
            Self::Product { cut: Cut::Registers(tile), .. } => tile.tile_m() * tile.tile_n(),
            Self::Product { cut: Cut::Direct(tile), .. } => tile.threads(),
            Self::Product { cut: Cut::Matrices(tile), .. } => tile.threads(),
            Self::LoraBackward { rank_quads, .. } => PANEL / 2 * rank_quads,
            Self::Lanes { lanes } => 2 * lanes,
            _ => WORKGROUP_SIZE,
        }
    }

    /// Every variant that a launch can ask for.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::OrpoLoss, Self::OrpoLossBackward];
        all.extend(Element::ALL.map(|out| Self::Sum { out }));
        all.extend(DirectTile::LANES.map(|lanes| Self::Lanes { lanes }));
        let cuts = Cut::all();
        for layout in Layout::ALL {
            for quads in Quads::all(layout) {
                for &cut in &cuts {
                    let is_matrix = matches!(cut, Cut::Matrices(_));
                    if is_matrix && layout == Layout::ColumnsColumns {
                        continue;
                    }
                    let elements = Elements::all().filter(|e| !is_matrix || e.rhs == Element::F16);
                    all.extend(elements.map(|elements| Self::Product { layout, cut, elements, quads }));
                }
            }
        }
        for rank_quads in RANK_QUADS {
            for (is_dy_vec4, is_rank_vec4) in [(true, true), (true, false), (false, true), (false, false)] {
                let variant = |dy| Self::LoraBackward { dy, rank_quads, is_dy_vec4, is_rank_vec4 };
                all.extend(Element::ALL.map(variant));
            }
        }
        all
    }

    /// The variant's WGSL.
    pub fn wgsl(self) -> String {
        let list = |n: u32| (0..n).map(|i| i.to_string()).collect::<Vec<_>>().join(" ");
        let mut values = vec![("workgroup_size", self.workgroup_size().to_string())];
        let mut flags = vec![];
        let source = match self {
            Self::Product { layout, cut, elements, quads } => {
                let [block_m, block_n, block_k] = cut.block();
                values.extend([
                    ("block_m", block_m.to_string()),
                    ("block_n", block_n.to_string()),
                    ("block_k", block_k.to_string()),
                    ("band", BAND.to_string()),
                    ("main_lhs", elements.lhs.wgsl(quads.main_lhs)),
                    ("main_rhs", elements.rhs.wgsl(quads.main_rhs)),
                    ("prologue_lhs", Element::F32.wgsl(quads.prologue_lhs)),
                    ("prologue_rhs", Element::F32.wgsl(quads.prologue_rhs)),
                    ("out", elements.out.wgsl(quads.out)),
                    ("matrices", "main_lhs main_rhs prologue_lhs prologue_rhs".to_owned()),
                ]);
                let is_f16 = [elements.lhs, elements.rhs, elements.out].contains(&Element::F16);
                flags.extend(is_f16.then_some("f16"));
                let [lhs_rows, rhs_rows] = layout.are_rows();
                flags.extend(lhs_rows.then_some("lhs_rows"));
                flags.extend(rhs_rows.then_some("rhs_rows"));
                flags.extend(quads.main_lhs.then_some("main_lhs_vec4"));
                flags.extend(quads.main_rhs.then_some("main_rhs_vec4"));
                flags.extend(quads.prologue_lhs.then_some("prologue_lhs_vec4"));
                flags.extend(quads.prologue_rhs.then_some("prologue_rhs_vec4"));
                flags.extend(quads.out.then_some("out_vec4"));
                flags.extend((elements.lhs == Element::F16).then_some("main_lhs_f16"));
                flags.extend((elements.rhs == Element::F16).then_some("main_rhs_f16"));
                match cut {
                    Cut::Registers(tile) => {
                        values.extend([
                            ("tile_m", tile.tile_m().to_string()),
                            ("tile_n", tile.tile_n().to_string()),
                            ("quads_m", list(tile.quads_m)),
                            ("quads_n", list(tile.quads_n)),
                            ("lhs_banks", tile.tile_m().min(8).to_string()),
                            ("rhs_banks", tile.tile_n().min(8).to_string()),
                            ("lhs_lines", block_m.to_string()),
                            ("rhs_lines", block_n.to_string()),
                            ("lhs_items", list(tile.items(block_m, lhs_rows))),
                            ("rhs_items", list(tile.items(block_n, rhs_rows))),
                        ]);
                        concat!(
                            include_str!("../../shaders/lora_linear.wgsl"),
                            include_str!("../../shaders/shared/product.wgsl"),
                            include_str!("../../shaders/shared/staging.wgsl")
                        )
                    }
                    Cut::Direct(tile) => {
                        values.extend([
                            ("threads_m", tile.threads_m.to_string()),
                            ("threads_n", tile.threads_n.to_string()),
                            ("lanes", tile.lanes.to_string()),
                            ("quads_m", list(tile.lines / 4)),
                            ("quads_n", list(tile.columns / 4)),
                            ("reads", list(tile.reads())),
                            ("n_reads", tile.reads().to_string()),
                            ("shared", if tile.shares_lhs() { "lhs" } else { "rhs" }.to_owned()),
                            ("own", if tile.shares_lhs() { "rhs" } else { "lhs" }.to_owned()),
                            ("quads_shared", list(tile.shared_and_own()[0] / 4)),
                            ("quads_own", list(tile.shared_and_own()[1] / 4)),
                        ]);
                        flags.extend(tile.shares_lhs().then_some("shares_lhs"));
                        concat!(
                            include_str!("../../shaders/lora_linear_direct.wgsl"),
                            include_str!("../../shaders/shared/product.wgsl")
                        )
                    }
                    Cut::Matrices(tile) => {
                        values.extend([
                            ("size", tile.size.to_string()),
                            ("patch_m", tile.patch_m.to_string()),
                            ("patch_n", tile.patch_n.to_string()),
                            ("turn", tile.turn().to_string()),
                            ("steps", list(tile.turn() / tile.size)),
                            ("lhs_items", list(tile.items()[0])),
                            ("rhs_items", list(tile.items()[1])),
                            ("lhs_together", tile.together(block_k).to_string()),
                            (
                                "rhs_together",
                                tile.together(if rhs_rows { block_k } else { block_n }).to_string(),
                            ),
                            ("store_items", list(tile.store_items())),
                            ("fragments_m", list(tile.patch_m / tile.size)),
                            ("fragments_n", list(tile.patch_n / tile.size)),
                        ]);
                        concat!(
                            include_str!("../../shaders/lora_linear_matrix.wgsl"),
                            include_str!("../../shaders/shared/product.wgsl"),
                            include_str!("../../shaders/shared/staging.wgsl")
                        )
                    }
                }
            }
            Self::LoraBackward { dy, rank_quads, is_dy_vec4, is_rank_vec4 } => {
                values.extend([
                    ("panel", PANEL.to_string()),
                    ("rank_quads", rank_quads.to_string()),
                    ("dy", dy.wgsl(is_dy_vec4)),
                    ("adapter", Element::F32.wgsl(is_rank_vec4)),
                    ("matrices", "dy b s".to_owned()),
                ]);
                flags.extend((dy == Element::F16).then_some("f16"));
                flags.extend(is_dy_vec4.then_some("dy_vec4"));
                flags.extend(is_rank_vec4.then_some("b_vec4"));
                flags.extend(is_rank_vec4.then_some("s_vec4"));
                include_str!("../../shaders/lora_linear_backward.wgsl")
            }
            Self::Sum { out } => {
                values.push(("out", out.wgsl(false)));
                flags.extend((out == Element::F16).then_some("f16"));
                include_str!("../../shaders/lora_linear_sum.wgsl")
            }
            Self::Lanes { lanes } => {
                values.push(("lanes", list(lanes)));
                include_str!("../../shaders/lora_linear_lanes.wgsl")
            }
            Self::OrpoLoss => concat!(
                include_str!("../../shaders/shared/odds.wgsl"),
                include_str!("../../shaders/orpo_loss.wgsl")
            ),
            Self::OrpoLossBackward => concat!(
                include_str!("../../shaders/shared/odds.wgsl"),
                include_str!("../../shaders/orpo_loss_backward.wgsl")
            ),
        };
        render(source, &values, &flags)
    }
}

impl<C: Compiler> CubeTask<C> for Shader {
    fn compile(
        &self,
        _compiler: &mut C,
        _options: &C::CompilationOptions,
        _mode: ExecutionMode,
        _address_type: StorageType,
    ) -> Result<CompiledKernel<C>, CompilationError> {
        Ok(CompiledKernel {
            entrypoint_name: "main".to_owned(),
            debug_name: None,
            source: self.wgsl(),
            repr: None,
            cube_dim: CubeDim::new_1d(self.workgroup_size()),
            debug_info: None,
        })
    }
}

impl KernelMetadata for Shader {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().info(*self).cube_dim(CubeDim::new_1d(self.workgroup_size()))
    }

    fn address_type(&self) -> StorageType {
        StorageType::Scalar(ElemType::UInt(UIntKind::U32))
    }
}

/// Launches a shader on its buffers, in the order of its bindings, with `params` as the uniform after the last of them.
///
/// `params` travels with the launch. A buffer made for it with the client would cost a submission of everything queued so far.
///
/// # Panics
/// If a dimension of `workgroups` is more than every device has.
pub fn launch(
    client: &ComputeClient<WgpuRuntime>,
    shader: Shader,
    workgroups: [u32; 3],
    buffers: &[&Handle],
    params: &[u32],
) {
    assert!(
        workgroups.iter().all(|&n| n <= MAX_WORKGROUPS),
        "{shader:?}: {workgroups:?} workgroups, at most {MAX_WORKGROUPS} in a dimension"
    );
    let mut words = params.to_vec();
    words.resize(params.len().next_multiple_of(4), 0);
    let info = words.chunks_exact(2).map(|pair| bytemuck::cast([pair[0], pair[1]])).collect();
    let buffers = buffers.iter().map(|handle| (*handle).clone().binding()).collect();
    let arguments = KernelArguments::new().with_buffers(buffers).with_info(MetadataBindingInfo::custom(info));
    let [x, y, z] = workgroups;
    #[expect(unsafe_code, reason = "a checked launch counts every turn of loops that are known to end")]
    // SAFETY: every index of every shader is held against the sizes in `params`, and every loop counts up to one of them.
    unsafe {
        client.launch_unchecked(Box::new(shader), CubeCount::Static(x, y, z), arguments);
    };
}
