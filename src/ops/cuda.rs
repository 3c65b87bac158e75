//! The engine of CUDA: cubek's products and, where a GPU has the instructions for it, products and attention of its own.

use burn::cubecl::client::ComputeClient;
use burn::cubecl::cuda::CudaRuntime;
use burn::cubecl::features::Tma;

use super::attention::{MmaLaunch, MmaPass};
use super::engine::{Engine, WarpgroupProduct};
use super::kernel::cuda::{mma, warpgroup};

impl Engine for CudaRuntime {
    /// Compute capability 9.0 has the copy engine and these instructions; from 10.0 on, which copies more, there are others instead.
    fn warpgroup_processors(client: &ComputeClient<Self>) -> Option<usize> {
        let properties = client.properties();
        let copies = |what| properties.features.tma.contains(what);
        let processors = properties.hardware.num_streaming_multiprocessors?;
        (copies(Tma::Base) && !copies(Tma::Im2colWide)).then_some(processors as usize)
    }

    fn warpgroup_product(columns: u32, product: &WarpgroupProduct<'_, Self>) -> Result<(), &'static str> {
        let processors = Self::warpgroup_processors(&product.out.client).ok_or("there are no warpgroups")?;
        warpgroup::launch(columns, processors, product)
    }

    /// From compute capability 8.0 on.
    fn has_mma(client: &ComputeClient<Self>) -> bool {
        client.properties().features.copy_async
    }

    fn attention_mma(pass: MmaPass, launch: &MmaLaunch<'_, Self>) {
        mma::launch(pass, launch);
    }
}
