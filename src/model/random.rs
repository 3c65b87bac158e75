//! Models with random weights, for measuring: time and memory do not depend on the values.

use std::ops::Range;

use burn::tensor::{DType, Distribution, Tensor};
use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::parts::{Parts, assemble, in_shards};
use super::stored::HostMatrix;
use super::{Llama, LlamaConfig, Precision};
use crate::ops::Kernels;
use crate::ops::quantize::{Storage, Weight};

/// transformers' `initializer_range`.
const STANDARD_DEVIATION: f64 = 0.02;
/// Prime, so that the rows of an embedding of the usual widths begin at different places of the values that they share.
const EMBEDDING_VALUES: usize = 65_537;

impl<B: Kernels> Llama<B> {
    /// A model of the shape that `config` tells: norms are ones, everything else is random about zero. Matrices of the vocabulary's
    /// size come in shards of at most `shard_bytes`.
    ///
    /// The head is its own, also where it is the embedding in `config`.
    pub fn random(
        config: &LlamaConfig,
        precision: Precision,
        shard_bytes: usize,
        device: &B::Device,
    ) -> Self {
        let Precision { dtype, linears, head } = precision;
        let normal = Distribution::Normal(0.0, STANDARD_DEVIATION);
        let weight = |[n_out, n_in]: [usize; 2], storage: Storage| match storage {
            Storage::F32 | Storage::F16 | Storage::Bf16 => {
                Weight::Dense(Tensor::random([n_out, n_in], normal, (device, dtype)))
            }
            Storage::PackedF16 => {
                let values = Tensor::<B, 1>::random([n_out * n_in], normal, (device, DType::F32));
                let values = values.into_data().iter::<f32>().map(f16::from_f32).collect::<Vec<_>>();
                Weight::packed_f16(&values, [n_out, n_in], device)
            }
            Storage::Int8 | Storage::Nf4 => Weight::quantize([n_out, n_in], storage, dtype, |range| {
                Tensor::random([range.len()], normal, (device, DType::F32))
            }),
        };
        let vocabulary = [config.vocab_size, config.hidden_size];
        let shard = |rows: Range<usize>, n_columns: usize| weight([rows.len(), n_columns], head);
        let parts = Parts {
            norm: |_: &str| Tensor::ones([config.hidden_size], (device, DType::F32)),
            linear: |_: &str, shape| weight(shape, linears),
            embed_tokens: random_embedding(vocabulary, dtype),
            head_shards: in_shards(vocabulary, dtype, shard_bytes, shard),
        };
        assemble(config, precision, shard_bytes, parts)
    }
}

/// An embedding of uniform values with the same standard deviation, always the same.
fn random_embedding(shape: [usize; 2], dtype: DType) -> HostMatrix {
    let mut rng = StdRng::seed_from_u64(0);
    let bound = (STANDARD_DEVIATION * 3f64.sqrt()) as f32;
    let mut period = Vec::with_capacity(EMBEDDING_VALUES * dtype.size());
    for _ in 0..EMBEDDING_VALUES {
        let value: f32 = rng.random_range(-bound..bound);
        match dtype {
            DType::F16 => period.extend(f16::from_f32(value).to_le_bytes()),
            DType::BF16 => period.extend(bf16::from_f32(value).to_le_bytes()),
            _ => period.extend(value.to_le_bytes()),
        }
    }
    let n_bytes = shape[0] * shape[1] * dtype.size();
    let mut bytes = Vec::with_capacity(n_bytes);
    while bytes.len() < n_bytes {
        bytes.extend(&period[..period.len().min(n_bytes - bytes.len())]);
    }
    HostMatrix::new(bytes, dtype, shape)
}
