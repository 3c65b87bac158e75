//! The WGSL sources of this project, the variants that they are compiled in, and their launch through cubecl's client.
//!
//! A source is text with directives, each on a line of its own, and placeholders:
//!
//! ```text
//! {{ name }}             the variant's value of that name
//! #if name … #else …     a part that is there when the variant has that flag, ended by #endif
//! #for i in a b … #endfor  a part repeated with {{ i }} = a, b, …; the list may come from a placeholder
//! ```
//!
//! Repetition instead of WGSL loops is what keeps a thread's accumulators in registers: no compiler has to unroll anything.

use std::hash::Hash;

use burn::cubecl::client::ComputeClient;
use burn::cubecl::ir::{ElemType, StorageType, UIntKind};
use burn::cubecl::prelude::{CompiledKernel, KernelId, KernelMetadata};
use burn::cubecl::server::{Handle, KernelArguments, MetadataBindingInfo};
use burn::cubecl::{CompilationError, Compiler, CubeCount, CubeDim, CubeTask, ExecutionMode};
use burn_wgpu::WgpuRuntime;
use serde::{Deserialize, Serialize};

/// Which index of an operand runs along its rows' memory, by operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Layout {
    /// `[m, depth] · [n, depth]ᵀ`
    RowsRows,
    /// `[m, depth] · [depth, n]`
    RowsColumns,
    /// `[depth, m]ᵀ · [depth, n]`
    ColumnsColumns,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Self; 3] = [Self::RowsRows, Self::RowsColumns, Self::ColumnsColumns];
}

/// What a buffer holds. Every sum is `f32` all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Element {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
}

impl Element {
    /// Both.
    pub const ALL: [Self; 2] = [Self::F32, Self::F16];

    /// Its WGSL, as vectors of four where rows allow them.
    fn wgsl(self, is_vec4: bool) -> String {
        let name = match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        };
        if is_vec4 { format!("vec4<{name}>") } else { name.to_owned() }
    }
}

/// What the operands of a product hold; those of its prologue are always `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Elements {
    /// The left operand.
    pub lhs: Element,
    /// The right operand.
    pub rhs: Element,
    /// The output, and what is added to it.
    pub out: Element,
}

impl Elements {
    /// `f32` throughout.
    pub const F32: Self = Self { lhs: Element::F32, rhs: Element::F32, out: Element::F32 };

    /// Every mix.
    pub fn all() -> impl Iterator<Item = Self> + Clone {
        let pairs = Element::ALL.into_iter().flat_map(|lhs| Element::ALL.map(|rhs| (lhs, rhs)));
        pairs.flat_map(|(lhs, rhs)| Element::ALL.map(|out| Self { lhs, rhs, out }))
    }
}

/// How a product is cut: what a workgroup computes, and what a thread of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Rows of the output that a workgroup computes.
    pub block_m: u32,
    /// Columns of the output that a workgroup computes.
    pub block_n: u32,
    /// Depth of one step.
    pub block_k: u32,
    /// Blocks of 4 x 4 that a thread computes, down the rows.
    pub quads_m: u32,
    /// Blocks of 4 x 4 that a thread computes, along the columns.
    pub quads_n: u32,
}

impl Tile {
    const fn new(block_m: u32, block_n: u32, block_k: u32, quads_m: u32, quads_n: u32) -> Self {
        Self { block_m, block_n, block_k, quads_m, quads_n }
    }

    /// For devices whose lanes have registers of their own: 64 to 256 threads of at most 8 x 8 accumulators.
    pub const GPU: [Self; 7] = [
        Self::new(128, 128, 16, 2, 2),
        Self::new(64, 64, 16, 2, 2),
        Self::new(32, 64, 16, 1, 2),
        Self::new(128, 16, 16, 2, 1),
        Self::new(128, 8, 16, 1, 1),
        Self::new(16, 128, 16, 1, 2),
        Self::new(8, 128, 16, 1, 1),
    ];

    /// For software adapters, where a load costs much more than a product and registers spill to the first-level
    /// cache: threads of up to 16 x 16 accumulators.
    pub const SOFTWARE: [Self; 8] = [
        Self::new(256, 128, 8, 4, 4),
        Self::new(128, 128, 8, 4, 4),
        Self::new(256, 64, 8, 4, 4),
        Self::new(64, 256, 8, 4, 4),
        Self::new(256, 16, 8, 4, 4),
        Self::new(256, 8, 8, 4, 2),
        Self::new(16, 256, 8, 4, 4),
        Self::new(8, 128, 16, 2, 4),
    ];

    fn tile_m(self) -> u32 {
        self.block_m / (4 * self.quads_m)
    }

    fn tile_n(self) -> u32 {
        self.block_n / (4 * self.quads_n)
    }
}

/// One compiled variant of one of the sources in `shaders/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shader {
    /// `lora_linear.wgsl`
    Product {
        /// How the operands lie in memory.
        layout: Layout,
        /// How the product is cut.
        tile: Tile,
        /// What the operands hold.
        elements: Elements,
        /// Whether every row of every operand is a multiple of four entries.
        is_vec4: bool,
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
        /// Whether every row of every operand is a multiple of four entries.
        is_vec4: bool,
    },
    /// `orpo_loss.wgsl`
    OrpoLoss,
    /// `orpo_loss_backward.wgsl`
    OrpoLossBackward,
}

/// Threads of a workgroup where a shader does not say otherwise.
const WORKGROUP_SIZE: u32 = 64;
/// Blocks down m that neighbouring workgroups of a product share a column of blocks over.
pub const BAND: u32 = 8;
/// Tokens and columns of a step of `lora_linear_backward.wgsl`.
pub const PANEL: u32 = 64;
/// Rank quads that `lora_linear_backward.wgsl` is compiled for.
pub const RANK_QUADS: [u32; 3] = [1, 2, 4];
/// What WebGPU guarantees in each dimension of a dispatch.
pub const MAX_WORKGROUPS: u32 = 65_535;

impl Shader {
    /// Threads of a workgroup.
    pub fn workgroup_size(self) -> u32 {
        match self {
            Self::Product { tile, .. } => tile.tile_m() * tile.tile_n(),
            Self::LoraBackward { rank_quads, .. } => PANEL / 2 * rank_quads,
            _ => WORKGROUP_SIZE,
        }
    }

    /// Every variant that a launch can ask for.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::OrpoLoss, Self::OrpoLossBackward];
        all.extend(Element::ALL.map(|out| Self::Sum { out }));
        for is_vec4 in [true, false] {
            for layout in Layout::ALL {
                for tile in Tile::GPU.into_iter().chain(Tile::SOFTWARE) {
                    all.extend(Elements::all().map(|elements| Self::Product {
                        layout,
                        tile,
                        elements,
                        is_vec4,
                    }));
                }
            }
            for rank_quads in RANK_QUADS {
                all.extend(Element::ALL.map(|dy| Self::LoraBackward { dy, rank_quads, is_vec4 }));
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
            Self::Product { layout, tile, elements, is_vec4 } => {
                // The largest tiles fill the 16 KiB that every device has, and go without.
                let quads = tile.block_k * (tile.block_m + tile.block_n) / 4;
                let padding = u32::from((quads + 2 * tile.block_k) * 16 <= 16_384);
                values.extend([
                    ("block_m", tile.block_m.to_string()),
                    ("block_n", tile.block_n.to_string()),
                    ("block_k", tile.block_k.to_string()),
                    ("tile_m", tile.tile_m().to_string()),
                    ("tile_n", tile.tile_n().to_string()),
                    ("quads_m", list(tile.quads_m)),
                    ("quads_n", list(tile.quads_n)),
                    ("padding", padding.to_string()),
                    ("band", BAND.to_string()),
                    ("lhs", elements.lhs.wgsl(is_vec4)),
                    ("rhs", elements.rhs.wgsl(is_vec4)),
                    ("prologue", Element::F32.wgsl(is_vec4)),
                    ("out", elements.out.wgsl(is_vec4)),
                ]);
                let is_f16 = [elements.lhs, elements.rhs, elements.out].contains(&Element::F16);
                flags.extend(is_f16.then_some("f16"));
                flags.extend((layout != Layout::ColumnsColumns).then_some("lhs_rows"));
                flags.extend((layout == Layout::RowsRows).then_some("rhs_rows"));
                flags.extend(is_vec4.then_some("vec4"));
                include_str!("../../shaders/lora_linear.wgsl")
            }
            Self::LoraBackward { dy, rank_quads, is_vec4 } => {
                values.extend([
                    ("panel", PANEL.to_string()),
                    ("rank_quads", rank_quads.to_string()),
                    ("dy", dy.wgsl(is_vec4)),
                    ("adapter", Element::F32.wgsl(is_vec4)),
                ]);
                flags.extend((dy == Element::F16).then_some("f16"));
                flags.extend(is_vec4.then_some("vec4"));
                include_str!("../../shaders/lora_linear_backward.wgsl")
            }
            Self::Sum { out } => {
                values.push(("out", out.wgsl(false)));
                flags.extend((out == Element::F16).then_some("f16"));
                include_str!("../../shaders/lora_linear_sum.wgsl")
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

/// Fills a source in for one variant.
fn render(source: &str, values: &[(&str, String)], flags: &[&str]) -> String {
    fn block(
        lines: &mut std::slice::Iter<&str>,
        values: &[(&str, String)],
        flags: &[&str],
        out: &mut String,
    ) -> String {
        while let Some(&line) = lines.next() {
            let mut line = line.to_owned();
            for (name, value) in values {
                line = line.replace(&format!("{{{{ {name} }}}}"), value);
            }
            let words: Vec<_> = line.split_whitespace().collect();
            match words.as_slice() {
                ["#if", flag] => {
                    let (mut then, mut otherwise) = (String::new(), String::new());
                    if block(lines, values, flags, &mut then) == "#else" {
                        block(lines, values, flags, &mut otherwise);
                    }
                    out.push_str(if flags.contains(flag) { &then } else { &otherwise });
                }
                ["#for", name, "in", items @ ..] => {
                    let start = lines.clone();
                    for item in items {
                        *lines = start.clone();
                        let mut values = values.to_vec();
                        values.push((name, (*item).to_owned()));
                        block(lines, &values, flags, out);
                    }
                }
                [end @ ("#else" | "#endif" | "#endfor")] => return (*end).to_owned(),
                _ => {
                    out.push_str(&line);
                    out.push('\n');
                }
            }
        }
        String::new()
    }
    let lines: Vec<_> = source.lines().collect();
    let mut out = String::with_capacity(4 * source.len());
    let end = block(&mut lines.iter(), values, flags, &mut out);
    assert!(end.is_empty(), "a shader has an {end} without its beginning");
    assert!(!out.contains("{{"), "a shader has a placeholder without a value:\n{out}");
    out
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
