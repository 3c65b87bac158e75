//! The types of a model's numbers on a device.

use std::fmt;

use burn::tensor::DType;

use crate::ops::quantize::Storage;

/// In what a model is stored and computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Of activations, and of a frozen matrix in a product: `f32`, `f16` or `bf16`.
    pub dtype: DType,
    /// How the layers' frozen matrices are stored.
    pub linears: Storage,
    /// How the head is stored.
    pub head: Storage,
}

impl Precision {
    /// Everything as it is computed in.
    ///
    /// # Panics
    /// If that is none of `f32`, `f16` and `bf16`.
    pub fn dense(dtype: DType) -> Self {
        let storage = match dtype {
            DType::F32 => Storage::F32,
            DType::F16 => Storage::F16,
            DType::BF16 => Storage::Bf16,
            _ => panic!("models are computed in f32, f16 or bf16, not in {dtype:?}"),
        };
        Self { dtype, linears: storage, head: storage }
    }

    /// What `--dtype` knows it by.
    pub fn dtype_name(&self) -> &'static str {
        let is_packed = [self.linears, self.head].contains(&Storage::PackedF16);
        match self.dtype {
            DType::BF16 => "bf16",
            DType::F16 => "fp16",
            _ if is_packed => "fp16",
            _ => "fp32",
        }
    }
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.dtype_name())?;
        match self.linears {
            Storage::PackedF16 => f.write_str(" weights, computed in fp32")?,
            Storage::Int8 => f.write_str(" with int8 linear layers")?,
            Storage::Nf4 => f.write_str(" with NF4 linear layers")?,
            Storage::F32 | Storage::F16 | Storage::Bf16 => {}
        }
        if self.head == Storage::Int8 { f.write_str(" and int8 lm_head") } else { Ok(()) }
    }
}
