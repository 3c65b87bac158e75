//! `--dtype` and `--quantization_bit` on a device: what is stored and computed how.

use burn::tensor::DType;

use crate::config::{TrainArgs, check_precision, parse_dtype};
use crate::device::DeviceChoice;
use crate::error::{Error, Result};
use crate::model::Precision;
use crate::ops::quantize::Storage;

/// The flags of `infer` and `bench`; `train` has them among its own.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct PrecisionArgs {
    /// Data type of the computation: bf16, fp16, fp32, or AUTO for the first of them that a GPU computes in
    #[arg(long, default_value_t = TrainArgs::default().dtype, value_parser = parse_dtype)]
    pub(super) dtype: String,
    /// Bits of the frozen linear layers: 8 (int8), 4 (NF4), or 0 for those of --dtype
    #[arg(long, default_value_t = TrainArgs::default().quantization_bit)]
    pub(super) quantization_bit: u32,
    /// Store lm_head in int8 as well, where the linear layers are quantised
    #[arg(long, action = clap::ArgAction::Set, num_args = 0..=1, default_missing_value = "true", default_value_t = TrainArgs::default().quantize_lm_head)]
    pub(super) quantize_lm_head: bool,
}

impl PrecisionArgs {
    /// See [`resolve`].
    pub(super) fn resolve(&self, choice: &DeviceChoice) -> Result<Precision> {
        resolve(choice, &self.dtype, self.quantization_bit, self.quantize_lm_head)
    }
}

/// The precision of a model on a device.
///
/// `AUTO` is bf16 on a GPU that computes in it, else fp16 likewise. A software adapter converts every value, and is faster in fp32. On a
/// device that does not compute in fp16, that is how weights are stored.
///
/// # Errors
/// If there is no such type, or the device does not have it.
pub(super) fn resolve(
    choice: &DeviceChoice,
    dtype: &str,
    quantization_bit: u32,
    quantize_lm_head: bool,
) -> Result<Precision> {
    check_precision(dtype, quantization_bit, quantize_lm_head)?;
    let precision = match dtype.to_ascii_lowercase().as_str() {
        "auto" if choice.computes_bf16() => Precision::dense(DType::BF16),
        "auto" if choice.computes_f16() && !choice.is_software() => Precision::dense(DType::F16),
        "fp16" if choice.computes_f16() => Precision::dense(DType::F16),
        "fp16" => Precision { dtype: DType::F32, linears: Storage::PackedF16, head: Storage::PackedF16 },
        "bf16" if choice.computes_bf16() => Precision::dense(DType::BF16),
        "bf16" => {
            let fp16 = if choice.computes_f16() { "fp16" } else { "fp16, as which it stores weights," };
            let what = format!(
                "--dtype {dtype}: {choice} does not compute in bf16; {} can do {fp16} and fp32",
                choice.describe()
            );
            return Err(Error::config(what).with_hint(
                "--dtype AUTO takes what suits the device; a checkpoint in bf16 is converted while it is loaded",
            ));
        }
        // AUTO on every other device, and fp32.
        _ => Precision::dense(DType::F32),
    };
    let linears = match quantization_bit {
        8 => Storage::Int8,
        4 => Storage::Nf4,
        _ => return Ok(precision),
    };
    let head = if quantize_lm_head { Storage::Int8 } else { precision.head };
    Ok(Precision { linears, head, ..precision })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_without_f16_stores_it_and_computes_in_f32() {
        let cpu = |dtype, bits, head| resolve(&DeviceChoice::Cpu, dtype, bits, head);
        assert_eq!(cpu("AUTO", 0, false).unwrap(), Precision::dense(DType::F32));
        let fp16 = cpu("fp16", 0, false).unwrap();
        assert_eq!(
            (fp16.dtype, fp16.linears, fp16.head),
            (DType::F32, Storage::PackedF16, Storage::PackedF16)
        );
        let nf4 = cpu("FP16", 4, true).unwrap();
        assert_eq!((nf4.dtype, nf4.linears, nf4.head), (DType::F32, Storage::Nf4, Storage::Int8));
        assert_eq!(cpu("auto", 8, false).unwrap().linears, Storage::Int8);
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn auto_is_bf16_from_ampere_on_and_fp16_before() {
        let resolved = |compute_capability, dtype, bits| {
            let name = "a GPU".to_owned();
            let gpu = crate::device::CudaGpu { index: 0, name, memory_bytes: 1 << 34, compute_capability };
            resolve(&DeviceChoice::Cuda(gpu), dtype, bits, false)
        };
        assert_eq!(resolved((8, 0), "AUTO", 0).unwrap(), Precision::dense(DType::BF16));
        assert_eq!(resolved((8, 9), "bf16", 4).unwrap().to_string(), "bf16 with NF4 linear layers");
        assert_eq!(resolved((8, 0), "fp16", 0).unwrap(), Precision::dense(DType::F16));
        assert_eq!(resolved((7, 5), "AUTO", 0).unwrap(), Precision::dense(DType::F16));
        assert!(resolved((7, 5), "bf16", 0).unwrap_err().to_string().contains("does not compute in bf16"));
    }

    #[test]
    fn what_there_is_not_is_an_error_that_names_what_there_is() {
        let error =
            |dtype, bits, head| resolve(&DeviceChoice::Cpu, dtype, bits, head).unwrap_err().to_string();
        assert!(
            error("bf16", 0, false).contains("the CPU can do fp16, as which it stores weights, and fp32"),
            "a type"
        );
        assert!(error("fp8", 0, false).contains("expected AUTO, bf16, fp16 or fp32"), "no type");
        assert!(error("fp32", 3, false).contains("expected 0, 4 or 8"), "bits");
        assert!(error("fp32", 0, true).contains("not quantised"), "the head alone");
    }
}
