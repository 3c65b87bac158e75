//! A model's weights with an adapter in them, for what reads no adapters.

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::path::Path;

use safetensors::{Dtype, View};

use super::peft::{StoredAdapter, StoredModule};
use crate::error::{Error, Result};
use crate::model::LlamaConfig;
use crate::model::llama::LINEAR_NAMES;
use crate::model::load::Checkpoint;

/// What merging came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Merged {
    /// Matrices that the adapter changed.
    pub n_matrices: usize,
    /// Bytes of all weights.
    pub bytes: u64,
}

/// Writes a model's files of weights, by their names, into a folder, with an adapter in them: `W + s · B A`, where PEFT's scaling `s` is
/// `lora_alpha / r`. Each value is summed in `f32` and rounded once to the type that its file stores; what has no adapter stays as it is,
/// to the bit. A matrix is in memory at a time.
///
/// `on_written` hears how many bytes there are so far, and in all.
///
/// # Errors
/// If the adapter is none of this model's, a value is no finite number of its type any more, or a file cannot be written.
pub fn merge(
    files: &[(String, Checkpoint)],
    config: &LlamaConfig,
    adapter_folder: &Path,
    folder: &Path,
    on_written: &dyn Fn(u64, u64),
) -> Result<Merged> {
    let linears: Vec<_> = (0..config.num_hidden_layers)
        .flat_map(|layer| {
            let name = move |name: &str| format!("model.layers.{layer}.{name}");
            LINEAR_NAMES.map(name).into_iter().zip(config.linear_shapes())
        })
        .collect();
    let adapter = StoredAdapter::open(adapter_folder, &linears)?;
    let updates: HashMap<String, &StoredModule> =
        adapter.modules.iter().map(|module| (format!("{}.weight", module.name), module)).collect();
    let tensors = |(_, file): &&(String, Checkpoint)| file.names().map(str::to_owned).collect::<Vec<_>>();
    let of_file = |file: &(String, Checkpoint)| -> u64 {
        tensors(&file).iter().map(|name| file.1.bytes(name).len() as u64).sum()
    };
    let bytes = files.iter().map(of_file).sum();
    let written = Cell::new(0);
    for file in files {
        let path = folder.join(&file.0);
        let unfit = RefCell::new(None);
        let views = tensors(&file).into_iter().map(|name| {
            let update = updates.get(&name).map(|module| (*module, &adapter.checkpoint));
            let on_read = |n_bytes: u64| {
                written.set(written.get() + n_bytes);
                on_written(written.get(), bytes);
            };
            (name.clone(), MergedTensor { file: &file.1, name, update, unfit: &unfit, on_read })
        });
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        // What a new file may be read by; the library makes one for its owner alone and puts it in this one's place.
        let made =
            File::create_new(&path).and_then(|file| file.metadata()).map_err(Error::io("write", &path))?;
        // As transformers asks of a file.
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        safetensors::serialize_to_file(views, Some(metadata), &path)
            .map_err(|error| Error::file(&path, format!("cannot be written: {error}")))?;
        if let Some((is_of_model, what)) = unfit.into_inner() {
            return Err(if is_of_model {
                Error::file(&file.0, what)
                    .with_hint("the model's weights are damaged, or of a run that had diverged")
            } else {
                Error::file(adapter_folder, what).with_hint(
                    "the run that made it has diverged, or the model needs a type of more range: F16 ends at 65,504",
                )
            });
        }
        // The folder has its name once all of it is on the disk.
        let flushed = OpenOptions::new().write(true).open(&path).and_then(|file| file.sync_all());
        flushed
            .and_then(|()| fs::set_permissions(&path, made.permissions()))
            .map_err(Error::io("write", &path))?;
    }
    Ok(Merged { n_matrices: updates.len(), bytes })
}

/// A tensor that is made when it is written.
struct MergedTensor<'a, F> {
    file: &'a Checkpoint,
    name: String,
    /// What is added, and the file that it is in.
    update: Option<(&'a StoredModule, &'a Checkpoint)>,
    /// The first problem of a tensor, and whether it is of the model's: what reads them takes none.
    unfit: &'a RefCell<Option<(bool, String)>>,
    on_read: F,
}

impl<F: Fn(u64)> View for MergedTensor<'_, F> {
    fn dtype(&self) -> Dtype {
        self.file.dtype(&self.name)
    }

    fn shape(&self) -> &[usize] {
        self.file.shape(&self.name).unwrap_or_default()
    }

    fn data_len(&self) -> usize {
        self.file.bytes(&self.name).len()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        (self.on_read)(self.data_len() as u64);
        let Some((StoredModule { a, b, scale, .. }, adapter)) = self.update else {
            return Cow::Borrowed(self.file.bytes(&self.name));
        };
        let (a, b) = (adapter.floats(a), adapter.floats(b));
        let n_columns = self.shape()[1];
        let r = a.len() / n_columns;
        let (merged, [before, after]) = self.file.changed(&self.name, |row, values| {
            let mut update = vec![0.0; n_columns];
            for (b, a) in b[row * r..(row + 1) * r].iter().zip(a.chunks_exact(n_columns)) {
                update.iter_mut().zip(a).for_each(|(update, a)| *update += b * a);
            }
            values.iter_mut().zip(update).for_each(|(value, update)| *value += scale * update);
        });
        if before > 0 {
            let what = format!("{before} values of `{}` are no finite numbers", self.name);
            self.unfit.borrow_mut().get_or_insert((true, what));
        } else if after > 0 {
            let dtype = self.dtype();
            let what = format!(
                "with it {after} values of `{}` are no finite numbers of {dtype:?} any more",
                self.name
            );
            self.unfit.borrow_mut().get_or_insert((false, what));
        }
        Cow::Owned(merged)
    }
}
