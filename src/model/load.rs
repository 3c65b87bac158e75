//! Reading safetensors: memory-mapped, one file or many with an index, converted tensor by tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::Deserialize;

use super::llama::{LINEAR_NAMES, Llama};
use super::parts::{Parts, assemble, in_shards};
use super::{LlamaConfig, Precision};
use crate::error::{Error, Result};
use crate::ops::Kernels;
use crate::ops::quantize::{Storage, Weight};

/// The bytes of a file: mapped, or part of the executable.
type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Tensors of a checkpoint or an adapter by name, not yet read.
pub struct Checkpoint {
    /// The folder or file, for messages.
    path: PathBuf,
    tensors: BTreeMap<String, StoredTensor>,
    to_f16: Mutex<ToF16>,
}

/// What conversions to `f16` have cost. What is stored as bf16 has f32's range, of which f16 has the middle.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ToF16 {
    /// Values beyond 65,504, which became infinite, by tensor.
    pub overflowed: BTreeMap<String, usize>,
    /// Values other than 0 that became 0: those up to 2⁻²⁵, 3e-8.
    pub n_flushed: usize,
}

/// Where a tensor's values are.
#[derive(Clone)]
struct StoredTensor {
    bytes: Bytes,
    range: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl StoredTensor {
    fn values(&self, elements: Range<usize>) -> Vec<f32> {
        let stored = &(*self.bytes).as_ref()[self.range.clone()];
        let width = self.dtype.bitsize() / 8;
        let stored = &stored[elements.start * width..elements.end * width];
        let pairs = || stored.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self.dtype {
            Dtype::F16 => pairs().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
            Dtype::BF16 => pairs().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
            _ => stored.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

/// A matrix that stays in host memory as its file stores it; rows are converted to `f32` as they are asked for.
#[derive(Clone)]
pub struct HostMatrix(StoredTensor);

impl HostMatrix {
    /// A matrix of little-endian values, row by row.
    ///
    /// # Panics
    /// If there are more or fewer bytes than the shape takes, or the dtype is neither `f32` nor `f16`.
    pub(super) fn new(bytes: Vec<u8>, dtype: DType, shape: [usize; 2]) -> Self {
        let stored = match dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            _ => panic!("a matrix in host memory is f32 or f16, not {dtype:?}"),
        };
        assert_eq!(bytes.len(), shape[0] * shape[1] * dtype.size(), "bytes of a matrix of {shape:?}");
        let range = 0..bytes.len();
        Self(StoredTensor { bytes: Arc::new(bytes), range, dtype: stored, shape: shape.to_vec() })
    }

    /// Gathers rows, `[ids] -> [ids · columns]`.
    ///
    /// # Panics
    /// If an id is not a row.
    pub fn gather(&self, ids: &[u32]) -> Vec<f32> {
        let n_columns = self.0.shape[1];
        ids.iter()
            .flat_map(|&id| self.0.values(id as usize * n_columns..(id as usize + 1) * n_columns))
            .collect()
    }
}

impl fmt::Debug for HostMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMatrix({:?} {:?})", self.0.dtype, self.0.shape)
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the weights of a Hugging Face model folder: `model.safetensors.index.json` and its shards, or `model.safetensors`.
    ///
    /// # Errors
    /// If there are no such files, or one of them is damaged.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        let index_path = folder.join("model.safetensors.index.json");
        let single = folder.join("model.safetensors");
        if !index_path.exists() {
            if !single.exists() {
                return Err(Error::file(folder, "holds neither model.safetensors nor model.safetensors.index.json")
                    .with_hint("only safetensors weights are read; convert a .bin checkpoint with transformers' save_pretrained"));
            }
            return Self::open_file(&single);
        }
        let text = std::fs::read_to_string(&index_path).map_err(Error::io("read", &index_path))?;
        let index: Index = serde_json::from_str(&text)
            .map_err(|e| Error::file(&index_path, format!("is not an index: {e}")))?;
        let mut files: Vec<&String> = index.weight_map.values().collect();
        files.sort();
        files.dedup();
        let mut tensors = BTreeMap::new();
        for file in files {
            tensors.extend(Self::open_file(&folder.join(file))?.tensors);
        }
        let missing: Vec<String> = index
            .weight_map
            .iter()
            .filter(|(name, _)| !tensors.contains_key(*name))
            .map(|(name, file)| format!("`{name}` is not in {file}, where the index says it is"))
            .collect();
        if !missing.is_empty() {
            return Err(Error::Tensors { path: index_path, problems: missing });
        }
        Ok(Self { path: folder.to_owned(), tensors, to_f16: Mutex::default() })
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// If it cannot be mapped, is truncated or is no safetensors file.
    pub fn open_file(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        #[expect(
            unsafe_code,
            reason = "mapping a file that another program truncates is undefined; every reader of checkpoints lives with it"
        )]
        // SAFETY: the map is read-only and lives as long as every tensor that points into it.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io("map", path))?;
        Self::from_bytes(Arc::new(map), path)
    }

    /// Opens safetensors in memory; `path` is for messages.
    ///
    /// # Errors
    /// See [`open_file`](Self::open_file).
    pub fn from_bytes(bytes: Bytes, path: &Path) -> Result<Self> {
        let content = (*bytes).as_ref();
        let (header_len, metadata) =
            SafeTensors::read_metadata(content).map_err(|e| damaged(path, content, &e))?;
        let data_start = header_len + size_of::<u64>();
        if data_start + metadata.data_len() != content.len() {
            return Err(truncated(path, data_start + metadata.data_len(), content.len()));
        }
        let tensors = metadata.tensors().into_iter().map(|(name, info)| {
            let range = data_start + info.data_offsets.0..data_start + info.data_offsets.1;
            (name, StoredTensor { bytes: bytes.clone(), range, dtype: info.dtype, shape: info.shape.clone() })
        });
        Ok(Self { path: path.to_owned(), tensors: tensors.collect(), to_f16: Mutex::default() })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's shape, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Checks names, shapes and dtypes of everything that is expected, and that nothing else is there.
    ///
    /// # Errors
    /// Names every missing, extra and misshapen tensor.
    pub fn check(&self, expected: &[(String, Vec<usize>)], ignored: impl Fn(&str) -> bool) -> Result<()> {
        let mut problems = Vec::new();
        for (name, shape) in expected {
            match self.tensors.get(name) {
                None => problems.push(format!("`{name}` {shape:?} is missing")),
                Some(t) if t.shape != *shape => {
                    problems.push(format!("`{name}` has shape {:?}, expected {shape:?}", t.shape));
                }
                Some(t) if !matches!(t.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                    problems.push(format!("`{name}` is stored as {:?}, expected F32, F16 or BF16", t.dtype));
                }
                Some(_) => {}
            }
        }
        let known: std::collections::BTreeSet<&str> =
            expected.iter().map(|(name, _)| name.as_str()).collect();
        for name in self.names().filter(|name| !known.contains(name) && !ignored(name)) {
            problems.push(format!("`{name}` {:?} is not part of the model", self.tensors[name].shape));
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: self.path.clone(), problems }) }
    }

    /// Reads a tensor that [`check`](Self::check) has seen, converted to `f32`.
    ///
    /// # Panics
    /// If the tensor is not there or has another number of dimensions.
    pub fn tensor<B: Backend, const D: usize>(&self, name: &str, device: &B::Device) -> Tensor<B, D> {
        let stored = &self.tensors[name];
        let values = stored.values(0..stored.shape.iter().product());
        self.upload(name, values, stored.shape.clone(), DType::F32, device)
    }

    /// What the conversions to `f16` so far have cost.
    pub fn to_f16(&self) -> ToF16 {
        self.lock_to_f16().clone()
    }

    fn lock_to_f16(&self) -> MutexGuard<'_, ToF16> {
        // The counts are right whenever the lock is free, also after a panic.
        self.to_f16.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what the conversion of these values to `f16` costs.
    fn count_f16(&self, name: &str, values: &[f32]) {
        let is_flushed = |v: &&f32| **v != 0.0 && f16::from_f32(**v) == f16::ZERO;
        let is_overflowed = |v: &&f32| v.is_finite() && f16::from_f32(**v).is_infinite();
        let n_overflowed = values.iter().filter(is_overflowed).count();
        let mut to_f16 = self.lock_to_f16();
        to_f16.n_flushed += values.iter().filter(is_flushed).count();
        if n_overflowed > 0 {
            *to_f16.overflowed.entry(name.to_owned()).or_default() += n_overflowed;
        }
    }

    /// Values of a tensor of this name as one of `dtype`.
    fn upload<B: Backend, const D: usize>(
        &self,
        name: &str,
        values: Vec<f32>,
        shape: Vec<usize>,
        dtype: DType,
        device: &B::Device,
    ) -> Tensor<B, D> {
        if dtype == DType::F16 {
            self.count_f16(name, &values);
        }
        // Converted here: the transfer is half of what it would be, and so is the memory on the device.
        Tensor::from_data(TensorData::new(values, shape).convert_dtype(dtype), (device, dtype))
    }

    /// A matrix left in host memory.
    fn host_matrix(&self, name: &str) -> HostMatrix {
        HostMatrix(self.tensors[name].clone())
    }

    /// Reads rows of a matrix, stored as `storage` and multiplied in `dtype`.
    fn weight<B: Kernels>(
        &self,
        name: &str,
        rows: Range<usize>,
        storage: Storage,
        dtype: DType,
        device: &B::Device,
    ) -> Weight<B> {
        let stored = &self.tensors[name];
        let n_columns = stored.shape[1];
        let shape = [rows.len(), n_columns];
        let start = rows.start * n_columns;
        let values = || stored.values(start..rows.end * n_columns);
        let dense = |dtype| Weight::Dense(self.upload(name, values(), shape.to_vec(), dtype, device));
        match storage {
            Storage::F32 => dense(DType::F32),
            Storage::F16 => dense(DType::F16),
            Storage::PackedF16 => {
                let values = values();
                self.count_f16(name, &values);
                let halves: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
                Weight::packed_f16(&halves, shape, device)
            }
            Storage::Int8 | Storage::Nf4 => Weight::quantize(shape, storage, dtype, |range| {
                let values = stored.values(start + range.start..start + range.end);
                let shape = vec![values.len()];
                self.upload(name, values, shape, DType::F32, device)
            }),
        }
    }
}

fn damaged(path: &Path, content: &[u8], error: &SafeTensorError) -> Error {
    // The header's own length is the first 8 bytes; a file shorter than it was cut off.
    let header = content.first_chunk::<8>().map(|b| u64::from_le_bytes(*b));
    match header {
        Some(n) if n < 1 << 32 && n as usize + 8 > content.len() => {
            truncated(path, n as usize + 8, content.len())
        }
        _ if matches!(error, SafeTensorError::MetadataIncompleteBuffer) => Error::file(
            path,
            format!("is truncated: its header describes more than its {} bytes", content.len()),
        )
        .with_hint("fetch the file again"),
        _ => {
            Error::file(path, format!("is not a safetensors file: {error}")).with_hint("fetch the file again")
        }
    }
}

fn truncated(path: &Path, expected: usize, got: usize) -> Error {
    Error::file(
        path,
        format!("is truncated or damaged: its header describes {expected} bytes, the file has {got}"),
    )
    .with_hint("fetch the file again")
}

/// Names and shapes of a model's tensors, without embedding and head.
fn layer_tensors(config: &LlamaConfig) -> Vec<(String, Vec<usize>)> {
    let hidden = config.hidden_size;
    let mut tensors = vec![("model.norm.weight".to_owned(), vec![hidden])];
    for layer in 0..config.num_hidden_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
        tensors.push((name("input_layernorm"), vec![hidden]));
        tensors.push((name("post_attention_layernorm"), vec![hidden]));
        let linears = LINEAR_NAMES.iter().zip(config.linear_shapes());
        tensors.extend(linears.map(|(part, shape)| (name(part), shape.to_vec())));
    }
    tensors
}

/// Loads a Llama model. Matrices that are not to be stored dense are quantised on the device, a few MiB at a time. Those of the
/// vocabulary's size are split into shards of at most `shard_bytes`.
///
/// A tied model may come with `embed_tokens`, with `lm_head` or with both; the embedding counts.
///
/// # Errors
/// If tensors are missing, extra or misshapen: all of them in one error. If a weight is too large for `f16`.
pub fn load_llama<B: Kernels>(
    checkpoint: &Checkpoint,
    config: &LlamaConfig,
    precision: Precision,
    shard_bytes: usize,
    device: &B::Device,
) -> Result<Llama<B>> {
    const EMBED: &str = "model.embed_tokens.weight";
    const HEAD: &str = "lm_head.weight";
    let tied = config.tie_word_embeddings;
    let embed = if tied && checkpoint.shape(EMBED).is_none() && checkpoint.shape(HEAD).is_some() {
        HEAD
    } else {
        EMBED
    };
    let head = if tied { embed } else { HEAD };
    let mut expected = layer_tensors(config);
    expected.push((embed.to_owned(), vec![config.vocab_size, config.hidden_size]));
    if !tied {
        expected.push((head.to_owned(), vec![config.vocab_size, config.hidden_size]));
    }
    // Old conversions store the rotary frequencies, which follow from the configuration.
    checkpoint.check(&expected, |name| name.ends_with("rotary_emb.inv_freq") || (tied && name == HEAD))?;

    let Precision { dtype, linears, head: head_storage } = precision;
    let shard = |rows, _| checkpoint.weight(head, rows, head_storage, dtype, device);
    let parts = Parts {
        norm: |name: &str| checkpoint.tensor(name, device),
        linear: |name: &str, [n_out, _]: [usize; 2]| {
            checkpoint.weight(name, 0..n_out, linears, dtype, device)
        },
        embed_tokens: checkpoint.host_matrix(embed),
        head_shards: in_shards([config.vocab_size, config.hidden_size], dtype, shard_bytes, shard),
    };
    let model = assemble(config, precision, shard_bytes, parts);
    let overflowed = checkpoint.to_f16().overflowed;
    let Some((name, n)) = overflowed.first_key_value() else { return Ok(model) };
    let (total, n_tensors) = (overflowed.values().sum::<usize>(), overflowed.len());
    let what = format!(
        "{total} weights in {n_tensors} tensors are beyond 65504, the largest number of fp16; {n} of them in `{name}`"
    );
    Err(Error::file(&checkpoint.path, what).with_hint("--dtype fp32 holds them"))
}
