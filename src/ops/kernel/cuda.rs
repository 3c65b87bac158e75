//! The sources in CUDA's language, for what neither WGSL nor CubeCL has words for: how they are compiled and launched by CubeCL.
//!
//! A variant is the source behind a few definitions; its branches are the preprocessor's.

pub(in crate::ops) mod mma;
pub(in crate::ops) mod warpgroup;

use std::fmt::Debug;
use std::hash::Hash;

use burn::cubecl;
use burn::cubecl::cuda::CudaRuntime;
use burn::cubecl::ir::StorageType;
use burn::cubecl::prelude::*;
use burn::cubecl::server::{KernelArguments, MetadataBindingInfo, TensorMapBinding};
use burn::cubecl::{CompilationError, Compiler, CubeTask, Runtime};
use burn_cubecl::tensor::CubeTensor;

type CudaCompiler = <CudaRuntime as Runtime>::Compiler;

/// One compiled variant of a source.
trait Variant: Debug + Copy + Eq + Hash + Send + Sync + 'static {
    /// The kernel's name in the source.
    const ENTRY_POINT: &'static str;
    /// Threads of a workgroup.
    const THREADS: u32;

    /// Bytes that a workgroup shares.
    fn shared_bytes(&self) -> usize;

    /// What the source leaves to be defined.
    fn definitions(&self) -> Vec<(&'static str, String)>;

    /// The source.
    fn source(&self) -> &'static str;
}

/// A flag's definition.
fn flag(is_set: bool) -> String {
    u8::from(is_set).to_string()
}

/// A variant as CubeCL takes it.
#[derive(Debug)]
struct Task<V>(V);

/// Takes so much of a workgroup's memory.
#[cube]
fn share(#[comptime] words: usize) {
    let mut memory = SharedMemory::<u32>::new(words);
    memory[0] = 0u32;
}

impl<V: Variant> CubeTask<CudaCompiler> for Task<V> {
    fn compile(
        &self,
        compiler: &mut CudaCompiler,
        options: &<CudaCompiler as Compiler>::CompilationOptions,
        mode: ExecutionMode,
        address_type: StorageType,
    ) -> Result<CompiledKernel<CudaCompiler>, CompilationError> {
        let cube_dim = CubeDim::new_1d(V::THREADS);
        // The launch reads from what CubeCL's compiler makes how much memory a workgroup shares, and nothing else.
        let mut builder = KernelBuilder::default();
        AddressType::U32.register(&mut builder.scope);
        share::expand(&mut builder.scope, self.0.shared_bytes().div_ceil(size_of::<u32>()));
        let sharing = builder.build(KernelSettings::default().cube_dim(cube_dim));
        let definitions = self.0.definitions().into_iter();
        let definitions: String =
            definitions.map(|(name, value)| format!("#define {name} {value}\n")).collect();
        Ok(CompiledKernel {
            entrypoint_name: V::ENTRY_POINT.to_owned(),
            debug_name: None,
            source: definitions + self.0.source(),
            repr: Some(compiler.compile(sharing, options, mode, address_type)?),
            cube_dim,
            debug_info: None,
        })
    }
}

impl<V: Variant> KernelMetadata for Task<V> {
    fn id(&self) -> KernelId {
        KernelId::new::<V>().info(self.0).cube_dim(CubeDim::new_1d(V::THREADS))
    }

    fn address_type(&self) -> StorageType {
        u32::as_type_native_unchecked().storage_type()
    }
}

/// Launches a variant. Its arguments are the maps, what these are of, the buffers and the numbers.
fn launch<V: Variant>(
    variant: V,
    workgroups: [usize; 2],
    maps: Vec<TensorMapBinding>,
    buffers: &[&CubeTensor<CudaRuntime>],
    numbers: Vec<u64>,
) {
    let client = &buffers[0].client;
    let buffers = buffers.iter().map(|tensor| tensor.handle.clone().binding()).collect();
    // All of the numbers are an argument of the kernel, and none a buffer.
    let n_numbers = numbers.len();
    let numbers = MetadataBindingInfo::new(numbers, n_numbers);
    let arguments = KernelArguments::new().with_buffers(buffers).with_tensor_maps(maps).with_info(numbers);
    let [x, y] = workgroups.map(|n| n as u32);
    #[expect(unsafe_code, reason = "a source is not checked, and its loops are known to end")]
    // SAFETY: every line that a source reads or writes is held against the numbers, and every loop counts up to one of them.
    unsafe {
        client.launch_unchecked(Box::new(Task(variant)), CubeCount::Static(x, y, 1), arguments);
    };
}
