//! `lora_linear_warpgroup.cu`, the one source in CUDA's language: neither WGSL nor CubeCL has words for what it does.

use burn::cubecl;
use burn::cubecl::cuda::CudaRuntime;
use burn::cubecl::ir::StorageType;
use burn::cubecl::prelude::*;
use burn::cubecl::server::{KernelArguments, MetadataBindingInfo, TensorMapBinding, TensorMapMeta};
use burn::cubecl::zspace::metadata::Metadata;
use burn::cubecl::zspace::strides;
use burn::cubecl::{CompilationError, Compiler, CubeTask, Runtime};
use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;

use crate::ops::engine::{TILE_ROWS, WarpgroupProduct, is_turned, turned};

type CudaCompiler = <CudaRuntime as Runtime>::Compiler;

const ENTRY_POINT: &str = "lora_linear_warpgroup";
/// Entries of the depth in a stage.
const TILE_DEPTH: usize = 64;
/// Columns of a right operand that lies along its rows that are copied at once.
const BOX_COLUMNS: usize = 64;
/// One that copies and two that multiply, of 128 threads each.
const THREADS: u32 = 3 * 128;
/// What the stages may take of the 227 KiB that a workgroup has.
const STAGES_BYTES: usize = 200 << 10;
/// Stages lie at multiples of so many bytes.
const ALIGNMENT: usize = 1 << 10;

/// One compiled variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Variant {
    /// Of a tile.
    columns: usize,
    is_bf16: bool,
    is_right_along_depth: bool,
    has_tail: bool,
    has_addend: bool,
    is_out_f32: bool,
}

impl Variant {
    /// What is begun to be copied before the first of it is multiplied.
    fn stages(self) -> usize {
        STAGES_BYTES / self.stage_bytes()
    }

    fn stage_bytes(self) -> usize {
        (TILE_ROWS + self.columns) * TILE_DEPTH * size_of::<u16>()
    }

    /// Stages and, for each, two barriers.
    fn shared_bytes(self) -> usize {
        ALIGNMENT + self.stages() * (self.stage_bytes() + 2 * size_of::<u64>())
    }

    /// The variant's text.
    fn source(self) -> String {
        let sums = self.columns / 2;
        let list = |item: &dyn Fn(usize) -> String| (0..sums).map(item).collect::<Vec<_>>().join(", ");
        let registers = list(&|i| format!("%{i}"));
        let operands = list(&|i| format!("\"+f\"(sums[{i}])"));
        let defined = [
            ("TILE_N", self.columns.to_string()),
            ("TILE_N_TEXT", format!("\"{}\"", self.columns)),
            ("STAGES", self.stages().to_string()),
            ("BF16", u8::from(self.is_bf16).to_string()),
            ("RIGHT_ALONG_DEPTH", u8::from(self.is_right_along_depth).to_string()),
            ("RIGHT_IS_TRANSPOSED", format!("\"{}\"", u8::from(!self.is_right_along_depth))),
            ("HAS_TAIL", u8::from(self.has_tail).to_string()),
            ("HAS_ADDEND", u8::from(self.has_addend).to_string()),
            ("OUT_F32", u8::from(self.is_out_f32).to_string()),
            ("SUM_REGISTERS", format!("\"{{{registers}}}\"")),
            ("LEFT_REGISTER", format!("\"%{sums}\"")),
            ("RIGHT_REGISTER", format!("\"%{}\"", sums + 1)),
            ("ADDS_REGISTER", format!("\"%{}\"", sums + 2)),
            ("SUM_OPERANDS", operands),
        ];
        let defined = defined.map(|(name, value)| format!("#define {name} {value}\n")).concat();
        defined + include_str!("../../../shaders/lora_linear_warpgroup.cu")
    }
}

/// Takes so much of a workgroup's memory.
#[cube]
fn share(#[comptime] words: usize) {
    let mut memory = SharedMemory::<u32>::new(words);
    memory[0] = 0u32;
}

impl CubeTask<CudaCompiler> for Variant {
    fn compile(
        &self,
        compiler: &mut CudaCompiler,
        options: &<CudaCompiler as Compiler>::CompilationOptions,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<CompiledKernel<CudaCompiler>, CompilationError> {
        // The launch reads from what CubeCL's compiler makes how much memory workgroups share, and nothing else.
        let mut builder = KernelBuilder::default();
        AddressType::U32.register(&mut builder.scope);
        share::expand(&mut builder.scope, self.shared_bytes().div_ceil(size_of::<u32>()));
        let sharing = builder.build(KernelSettings::default().cube_dim(CubeDim::new_1d(THREADS)));
        Ok(CompiledKernel {
            entrypoint_name: ENTRY_POINT.to_owned(),
            debug_name: None,
            source: self.source(),
            repr: Some(compiler.compile(sharing, options, mode, address_type)?),
            cube_dim: CubeDim::new_1d(THREADS),
            debug_info: None,
        })
    }
}

impl KernelMetadata for Variant {
    fn id(&self) -> KernelId {
        KernelId::new::<Self>().info(*self).cube_dim(CubeDim::new_1d(THREADS))
    }

    fn address_type(&self) -> StorageType {
        u32::as_type_native_unchecked().storage_type()
    }
}

/// Launches a product in tiles of so many columns, on a device of so many processors.
///
/// Operands and output have to lie as [`launch`](crate::ops::engine) has made sure of.
pub(in crate::ops) fn launch(columns: u32, processors: usize, product: &WarpgroupProduct<'_, CudaRuntime>) {
    let WarpgroupProduct { left, right, tails, out, addend } = *product;
    let ([m, depth], [_, n]) = ([0, 1].map(|i| left.meta.shape()[i]), [0, 1].map(|i| right.meta.shape()[i]));
    let columns = columns as usize;
    let variant = Variant {
        columns,
        is_bf16: right.dtype == DType::BF16,
        is_right_along_depth: is_turned(right),
        has_tail: tails.is_some(),
        has_addend: addend.is_some(),
        is_out_f32: out.dtype == DType::F32,
    };
    let left_map = |left: &CubeTensor<CudaRuntime>| map(left, [TILE_ROWS, TILE_DEPTH]);
    let right_map = |right: &CubeTensor<CudaRuntime>| match variant.is_right_along_depth {
        true => map(&turned(right), [columns, TILE_DEPTH]),
        false => map(right, [TILE_DEPTH, BOX_COLUMNS]),
    };
    let mut maps = vec![left_map(left), right_map(right)];
    maps.extend(tails.iter().flat_map(|[left, right]| [left_map(left), right_map(right)]));
    let buffers = [Some(out), addend].into_iter().flatten();
    let buffers = buffers.map(|tensor| tensor.handle.clone().binding()).collect();
    let stages = |left: &CubeTensor<CudaRuntime>| left.meta.shape()[1].div_ceil(TILE_DEPTH);
    let tail_stages = tails.map_or(0, |[left, _]| stages(left));
    let extents = [m, n, depth.div_ceil(TILE_DEPTH), tail_stages].map(|extent| extent as u64);
    // All of it is an argument of the kernel, and none a buffer.
    let extents = MetadataBindingInfo::new(extents.to_vec(), extents.len());
    let arguments = KernelArguments::new().with_buffers(buffers).with_tensor_maps(maps).with_info(extents);
    let tiles = m.div_ceil(TILE_ROWS) * n.div_ceil(columns);
    let workgroups = CubeCount::Static(tiles.min(processors) as u32, 1, 1);
    #[expect(unsafe_code, reason = "its loops are known to end")]
    // SAFETY: the copy engine reads within its maps, rows and columns are held against the extents, and loops count up to them.
    unsafe {
        out.client.launch_unchecked(Box::new(variant), workgroups, arguments);
    };
}

/// What the copy engine reads a matrix by, in boxes of so many rows and columns.
fn map(matrix: &CubeTensor<CudaRuntime>, extents: [usize; 2]) -> TensorMapBinding {
    let map = TensorMapMeta {
        format: TensorMapFormat::Tiled(TiledArgs::new(Shape::from(extents))),
        metadata: Metadata::new(matrix.meta.shape().clone(), matrix.meta.strides().clone()),
        elem_stride: strides![1; 2],
        interleave: TensorMapInterleave::None,
        swizzle: TensorMapSwizzle::B128,
        prefetch: TensorMapPrefetch::B128,
        oob_fill: OobFill::Zero,
        storage_ty: matrix.dtype.into(),
    };
    TensorMapBinding { binding: matrix.handle.clone().binding(), map }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::engine::TILE_COLUMNS;

    #[test]
    fn stages_fit_the_memory_of_a_workgroup() {
        for columns in TILE_COLUMNS {
            let variant = Variant {
                columns: columns as usize,
                is_bf16: true,
                is_right_along_depth: true,
                has_tail: true,
                has_addend: true,
                is_out_f32: true,
            };
            assert!(variant.stages() >= 4 && variant.shared_bytes() <= 227 << 10, "{variant:?}");
            // A sum a column and row, of which a thread has one in 128.
            let sums = variant
                .source()
                .lines()
                .find(|line| line.starts_with("#define SUM_OPERANDS"))
                .unwrap()
                .to_owned();
            assert_eq!(sums.matches("\"+f\"(sums[").count(), TILE_ROWS / 2 * variant.columns / 128);
        }
    }
}
