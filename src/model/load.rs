//! Reading safetensors: memory-mapped, one file or many with an index, converted tensor by tensor.

mod index;
mod llama;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use half::f16;
use safetensors::{Dtype, SafeTensorError, SafeTensors};

use super::stored::{Bytes, HostMatrix, StoredTensor};
use crate::error::{Error, Result};
use crate::ops::Kernels;
use crate::ops::quantize::{Storage, Weight};
use index::index;

pub use index::{INDEX_FILE, SINGLE_FILE};
pub use llama::{check_llama, load_llama};

/// Tensors of a checkpoint or an adapter by name, not yet read.
pub struct Checkpoint {
    /// The folder or file, for messages.
    path: PathBuf,
    tensors: BTreeMap<String, StoredTensor>,
    reading: Mutex<Reading>,
    on_read: OnRead,
}

/// What was wrong with values that were read. What is stored as bf16 has f32's range, of which f16 has the middle.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flaws {
    /// NaN and infinities, by tensor.
    pub not_finite: BTreeMap<String, usize>,
    /// Values beyond 65,504 that became infinite as `f16`, by tensor.
    pub overflowed: BTreeMap<String, usize>,
    /// Values other than 0 that became 0 as `f16`: those up to 2⁻²⁵, 3e-8.
    pub n_flushed: usize,
}

/// Hears how many bytes are read, as stored, and how many there are to read.
type OnRead = Box<dyn Fn(u64, u64) + Send + Sync>;

/// What reading has come to.
#[derive(Default)]
struct Reading {
    flaws: Flaws,
    /// Bytes as stored.
    read_bytes: u64,
    /// As far as is known.
    total_bytes: u64,
    /// Bytes handed to the device since it was last waited for.
    queued_bytes: usize,
}

/// The most bytes that may be queued for a device: each is in host memory until it is there, once or twice.
const MAX_QUEUED_BYTES: usize = 256 << 20;

impl Checkpoint {
    fn new(path: &Path, tensors: BTreeMap<String, StoredTensor>) -> Self {
        Self { path: path.to_owned(), tensors, reading: Mutex::default(), on_read: Box::new(|_, _| {}) }
    }

    /// Opens the weights of a Hugging Face model folder: `model.safetensors.index.json` and its shards, or `model.safetensors`.
    ///
    /// # Errors
    /// If there are no such files, or one of them is damaged.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        let Some((index_path, weight_map)) = index(folder)? else {
            return Self::open_file(&folder.join(SINGLE_FILE));
        };
        let mut tensors = BTreeMap::new();
        for (_, file) in Self::open_files(folder)? {
            tensors.extend(file.tensors);
        }
        let missing: Vec<String> = weight_map
            .iter()
            .filter(|(name, _)| !tensors.contains_key(*name))
            .map(|(name, file)| format!("`{name}` is not in {file}, where the index says it is"))
            .collect();
        if !missing.is_empty() {
            return Err(Error::Tensors { path: index_path, problems: missing, hint: None });
        }
        Ok(Self::new(folder, tensors))
    }

    /// Opens the same files one by one, each with its name.
    ///
    /// # Errors
    /// See [`open_folder`](Self::open_folder), which sees more.
    pub fn open_files(folder: &Path) -> Result<Vec<(String, Self)>> {
        let files: BTreeSet<String> = match index(folder)? {
            Some((_, weight_map)) => weight_map.into_values().collect(),
            None => [SINGLE_FILE.to_owned()].into(),
        };
        files.into_iter().map(|name| Ok((name.clone(), Self::open_file(&folder.join(name))?))).collect()
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
        Ok(Self::new(path, tensors.collect()))
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's shape, if it is there.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// How a tensor is stored.
    ///
    /// # Panics
    /// If it is not there.
    pub fn dtype(&self, name: &str) -> Dtype {
        self.tensors[name].dtype
    }

    /// A tensor as it is stored.
    ///
    /// # Panics
    /// If it is not there.
    pub fn bytes(&self, name: &str) -> &[u8] {
        let tensor = &self.tensors[name];
        &(*tensor.bytes).as_ref()[tensor.range.clone()]
    }

    /// A tensor that [`check`](Self::check) has seen, in `f32`.
    ///
    /// # Panics
    /// If it is not there.
    pub fn floats(&self, name: &str) -> Vec<f32> {
        let tensor = &self.tensors[name];
        tensor.floats(0..tensor.shape.iter().product()).0
    }

    /// A matrix that [`check`](Self::check) has seen as it would be stored after `change` of each row, by its number, `[columns]` in `f32`;
    /// and how many of its values are no finite numbers before and after, as those beyond what its type holds.
    ///
    /// # Panics
    /// If it is not there or no matrix.
    pub fn changed(&self, name: &str, change: impl Fn(usize, &mut [f32]) + Sync) -> (Vec<u8>, [usize; 2]) {
        self.tensors[name].changed(change)
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
        let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
        for name in self.names().filter(|name| !known.contains(name) && !ignored(name)) {
            problems.push(format!("`{name}` {:?} is not part of the model", self.tensors[name].shape));
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Tensors { path: self.path.clone(), problems, hint: None })
        }
    }

    /// Reads a tensor that [`check`](Self::check) has seen, converted to `f32`.
    ///
    /// # Panics
    /// If the tensor is not there or has another number of dimensions.
    pub fn tensor<B: Backend, const D: usize>(&self, name: &str, device: &B::Device) -> Tensor<B, D> {
        let shape = self.tensors[name].shape.clone();
        self.upload(self.read(name, 0..shape.iter().product(), shape, DType::F32), device)
    }

    /// Has somebody hear, after every piece, how many bytes are read and how many [`load_llama`] reads in all; as stored.
    #[must_use]
    pub fn on_read(self, hear: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        Self { on_read: Box::new(hear), ..self }
    }

    /// Bytes read so far, as stored.
    pub fn read_bytes(&self) -> u64 {
        self.lock_reading().read_bytes
    }

    /// What was wrong with the values so far.
    pub fn flaws(&self) -> Flaws {
        self.lock_reading().flaws.clone()
    }

    fn lock_reading(&self) -> MutexGuard<'_, Reading> {
        // The counts are right whenever the lock is free, also after a panic.
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what is going to be read.
    fn expect_to_read<'a>(&self, names: impl Iterator<Item = &'a str>) {
        let total_bytes = names.map(|name| self.tensors[name].range.len() as u64).sum();
        self.lock_reading().total_bytes = total_bytes;
    }

    /// Reads values of a tensor of this name as those of one of `shape` and `dtype`.
    fn read(&self, name: &str, elements: Range<usize>, shape: Vec<usize>, dtype: DType) -> TensorData {
        let stored = &self.tensors[name];
        let n_bytes = (elements.len() * stored.width()) as u64;
        // Converted here: the transfer is half of what it would be, and so is the memory on the device.
        let (data, lost) = match dtype {
            DType::F32 => {
                let (floats, lost) = stored.floats(elements);
                (TensorData::new(floats, shape), lost)
            }
            DType::F16 => {
                let (halves, lost) = stored.halves(elements);
                (TensorData::new(halves, shape), lost)
            }
            DType::BF16 => {
                let (floats, lost) = stored.brain_floats(elements);
                (TensorData::new(floats, shape), lost)
            }
            _ => panic!("weights are read as f32, f16 or bf16, not {dtype:?}"),
        };
        let (read_bytes, total_bytes) = {
            let mut reading = self.lock_reading();
            let flaws = &mut reading.flaws;
            flaws.n_flushed += lost.flushed;
            for (n, by_tensor) in
                [(lost.not_finite, &mut flaws.not_finite), (lost.overflowed, &mut flaws.overflowed)]
            {
                if n > 0 {
                    *by_tensor.entry(name.to_owned()).or_default() += n;
                }
            }
            reading.read_bytes += n_bytes;
            (reading.read_bytes, reading.total_bytes)
        };
        (self.on_read)(read_bytes, total_bytes);
        data
    }

    /// Counts values that are quantised as `f32`, but made `f16` for a product.
    fn count_overflow(&self, name: &str, values: &TensorData) {
        let values = values.as_slice::<f32>().expect("values were read as f32");
        let n = values.iter().filter(|v| v.is_finite() && f16::from_f32(**v).is_infinite()).count();
        if n > 0 {
            *self.lock_reading().flaws.overflowed.entry(name.to_owned()).or_default() += n;
        }
    }

    /// Hands a tensor to the device, and waits for the device once much has been handed to it.
    fn upload<B: Backend, const D: usize>(&self, data: TensorData, device: &B::Device) -> Tensor<B, D> {
        let (n_bytes, dtype) = (data.bytes.len(), data.dtype);
        let tensor = Tensor::from_data(data, (device, dtype));
        self.queued::<B>(n_bytes, device);
        tensor
    }

    /// Counts what was handed to the device, and waits for it once that is much.
    fn queued<B: Backend>(&self, n_bytes: usize, device: &B::Device) {
        let mut reading = self.lock_reading();
        reading.queued_bytes += n_bytes;
        if reading.queued_bytes > MAX_QUEUED_BYTES {
            reading.queued_bytes = 0;
            drop(reading);
            settle::<B>(device);
        }
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
        let n_columns = self.tensors[name].shape[1];
        let shape = [rows.len(), n_columns];
        let start = rows.start * n_columns;
        let read = |dtype| self.read(name, start..rows.end * n_columns, shape.to_vec(), dtype);
        match storage {
            Storage::F32 => Weight::Dense(self.upload(read(DType::F32), device)),
            Storage::F16 => Weight::Dense(self.upload(read(DType::F16), device)),
            Storage::Bf16 => Weight::Dense(self.upload(read(DType::BF16), device)),
            Storage::PackedF16 => {
                let halves = read(DType::F16).into_vec::<f16>().expect("values were read as f16");
                let weight = Weight::packed_f16(&halves, shape, device);
                self.queued::<B>(size_of_val(halves.as_slice()), device);
                weight
            }
            Storage::Int8 | Storage::Nf4 => Weight::quantize(shape, storage, dtype, |range| {
                let shape = vec![range.len()];
                let values = self.read(name, start + range.start..start + range.end, shape, DType::F32);
                if dtype == DType::F16 {
                    self.count_overflow(name, &values);
                }
                self.upload(values, device)
            }),
        }
    }
}

/// Waits until the device has all that was handed to it.
///
/// cubecl keeps up to 32 writes for later and wgpu a copy of each until the next submission, to which neither comes by
/// [`Backend::sync`], only by work: here that of reading a number back.
fn settle<B: Backend>(device: &B::Device) {
    Tensor::<B, 1>::from_data(TensorData::from([0f32]), (device, DType::F32)).into_data();
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
