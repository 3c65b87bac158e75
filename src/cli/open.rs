//! Opening what a run needs: a model folder, or the demo.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use super::progress::bar_of_bytes;
use super::words::noted;
use crate::config;
use crate::data::template::Template;
use crate::data::tokenize::TextTokenizer;
use crate::demo;
use crate::device::size;
use crate::error::{Error, Result};
use crate::lora;
use crate::model::config::TokenIds;
use crate::model::load::{Checkpoint, SINGLE_FILE, load_llama};
use crate::model::{Llama, LlamaConfig, Precision};
use crate::ops::Kernels;

/// A model whose folder has been looked at and whose weights are not loaded.
pub struct OpenModel {
    /// The shape.
    pub config: LlamaConfig,
    /// The tokenizer, with the ids that end an answer.
    pub tokenizer: TextTokenizer,
    /// How conversations are written.
    pub template: Template,
    /// The folder as the user gave it, or `demo`.
    pub name: String,
    source: Source,
}

enum Source {
    Demo,
    Folder(PathBuf),
}

/// What loading took.
pub struct Loaded {
    /// Bytes read, as the file stores them.
    pub bytes: u64,
    /// Until the device had everything.
    pub elapsed: Duration,
}

impl Loaded {
    /// `14.0 GiB loaded in 32.0 s, 447.3 MiB/s`, where that tells something: from a GiB on.
    pub fn speed(&self) -> Option<String> {
        let seconds = self.elapsed.as_secs_f64();
        let (bytes, speed) = (size(self.bytes), size((self.bytes as f64 / seconds) as u64));
        (self.bytes >= 1 << 30).then(|| format!("{bytes} loaded in {seconds:.1} s, {speed}/s"))
    }
}

impl OpenModel {
    /// Opens a model folder, or the demo where none is named.
    ///
    /// # Errors
    /// If the folder, its `config.json` or its tokenizer is missing or cannot be used.
    pub fn open(folder: Option<&Path>, template_type: &str) -> Result<Self> {
        let (config, tokenizer, name, source) = match folder {
            None => (demo::config()?, demo::tokenizer()?, demo::NAME.to_owned(), Source::Demo),
            Some(folder) => {
                check_folder(folder)?;
                let config = LlamaConfig::read(&folder.join("config.json"))?;
                let tokenizer = TextTokenizer::from_folder(folder)?;
                (config, tokenizer, folder.display().to_string(), Source::Folder(folder.to_owned()))
            }
        };
        let mut stop_ids = config.eos_token_ids.clone();
        if let Source::Folder(folder) = &source {
            stop_ids.extend(generation_eos(folder)?);
        }
        let tokenizer = tokenizer.with_stop_ids(&stop_ids);
        let template = match config::template(template_type)? {
            None => Template::detect(&tokenizer, tokenizer.chat_template())?,
            Some(named) => named,
        };
        Ok(Self { config, tokenizer, template, name, source })
    }

    /// Whether this is the demo inside the program.
    pub fn is_demo(&self) -> bool {
        matches!(self.source, Source::Demo)
    }

    /// Bytes of a value of the weights, as the model's `config.json` tells.
    ///
    /// # Errors
    /// If that cannot be read.
    pub fn width(&self) -> Result<usize> {
        let Source::Folder(folder) = &self.source else { return Ok(size_of::<half::f16>()) };
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        let config: Value = serde_json::from_str(&text).map_err(|e| Error::file(&path, e.to_string()))?;
        // A model that does not say is most likely one of f32, transformers' default.
        let dtype = ["dtype", "torch_dtype"].iter().find_map(|name| config[name].as_str());
        let is_half = dtype.is_some_and(|dtype| dtype.ends_with("float16"));
        Ok(if is_half { size_of::<u16>() } else { size_of::<f32>() })
    }

    /// The name of the model, which is its folder's.
    pub fn base_name(&self) -> String {
        let folder = Path::new(&self.name);
        let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
        folder.file_name().map_or(self.name.clone(), |name| name.to_string_lossy().into_owned())
    }

    /// Checks by its configuration that an adapter is one that is computed, and that it is not another model's where none is named. Says
    /// on standard error where it names another: models of one shape take each other's.
    ///
    /// # Errors
    /// If it is none, or another model's.
    pub fn check_adapter(&self, folder: &Path) -> Result<()> {
        match lora::base_model(folder)? {
            Some(base) if self.is_demo() && base != demo::NAME => {
                let what = format!(
                    "is an adapter of `{base}`, and without --model_id_or_path the model is the demo"
                );
                let is_here = Path::new(&base).is_dir();
                let model = if is_here { base } else { format!("DIR, where DIR is the folder of {base}") };
                let config = folder.join(lora::ADAPTER_CONFIG_FILE);
                Err(Error::file(config, what).with_hint(format!("pass --model_id_or_path {model}")))
            }
            Some(base) if !is_named(&base, &self.name) => {
                note!(
                    "{}",
                    noted(
                        "adapter",
                        &format!("it names `{base}` as its model, and is used with {}", self.name)
                    )
                );
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The model's folder; none of the demo.
    pub fn folder(&self) -> Option<&Path> {
        match &self.source {
            Source::Demo => None,
            Source::Folder(folder) => Some(folder),
        }
    }

    /// The weights, not read yet.
    ///
    /// # Errors
    /// If they are missing or damaged.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        self.folder().map_or_else(demo::checkpoint, Checkpoint::open_folder)
    }

    /// The files that they are in, by name.
    ///
    /// # Errors
    /// As [`checkpoint`](Self::checkpoint).
    pub fn weight_files(&self) -> Result<Vec<(String, Checkpoint)>> {
        match self.folder() {
            None => Ok(vec![(SINGLE_FILE.to_owned(), demo::checkpoint()?)]),
            Some(folder) => Checkpoint::open_files(folder),
        }
    }

    /// Loads the weights onto a device. Matrices of the vocabulary's size come in shards of at most `shard_bytes`. A terminal sees how
    /// far it is.
    ///
    /// # Errors
    /// If the weights are missing, damaged or do not fit `config.json`.
    pub fn load<B: Kernels>(
        &self,
        precision: Precision,
        device: &B::Device,
        shard_bytes: usize,
    ) -> Result<(Llama<B>, Loaded)> {
        let started = Instant::now();
        let checkpoint = self.checkpoint()?;
        let bar = bar_of_bytes("loading");
        let checkpoint = checkpoint.on_read({
            let bar = bar.clone();
            move |read_bytes, total_bytes| {
                bar.set_length(total_bytes);
                bar.set_position(read_bytes);
            }
        });
        // An error drops the bar, which clears its line.
        let model = load_llama(&checkpoint, &self.config, precision, shard_bytes, device)?;
        bar.finish_and_clear();
        let loaded = Loaded { bytes: checkpoint.read_bytes(), elapsed: started.elapsed() };
        let n_flushed = checkpoint.flaws().n_flushed;
        if n_flushed > 0 {
            note!(
                "note: {n_flushed} weights of {} are too small for fp16 and count as 0",
                self.config.n_weights()
            );
        }
        Ok((model, loaded))
    }

    /// Checks that the model has a row for every token of these ids.
    ///
    /// # Errors
    /// Names the first token outside the vocabulary.
    pub fn check_ids<'a>(&self, mut ids: impl Iterator<Item = &'a u32>) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match ids.find(|id| **id as usize >= vocab_size) {
            None => Ok(()),
            Some(id) => Err(Error::file(
                self.tokenizer.path(),
                format!("gives token {id}, but the model's vocab_size is {vocab_size}"),
            )
            .with_hint("tokenizer.json and config.json are of different models")),
        }
    }
}

fn check_folder(folder: &Path) -> Result<()> {
    let problem = match folder {
        _ if folder.join("config.json").exists() => return Ok(()),
        _ if folder.join(lora::ADAPTER_CONFIG_FILE).exists() => {
            return Err(Error::file(folder, "is an adapter, not a model").with_hint(
                "--adapters takes it; --model_id_or_path is the model that it was trained on, and where it is left out, the demo is taken",
            ));
        }
        _ if folder.is_dir() => "holds no config.json",
        _ if folder.exists() => "is not a folder",
        _ => "there is no such folder",
    };
    Err(Error::file(folder, problem).with_hint(
        "--model_id_or_path takes a folder with config.json, tokenizer.json and safetensors weights; \
         nothing is downloaded: fetch the model first, for example with `hf download ID --local-dir FOLDER`",
    ))
}

/// `eos_token_id` of a folder's `generation_config.json`, where there is one.
fn generation_eos(folder: &Path) -> Result<Vec<u32>> {
    #[derive(Deserialize)]
    struct GenerationConfig {
        eos_token_id: Option<TokenIds>,
    }
    let path = folder.join("generation_config.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
    let config: GenerationConfig =
        serde_json::from_str(&text).map_err(|e| Error::file(&path, e.to_string()))?;
    Ok(config.eos_token_id.map(TokenIds::into_vec).unwrap_or_default())
}

/// Whether two names, folders or models on the Hub, have one last name: as they stand, behind links, or in Hugging Face's cache, whose
/// folders are `models--owner--name/snapshots/…`.
fn is_named(base: &str, model: &str) -> bool {
    let names = |path: &Path| -> Vec<String> {
        let mut parts = path.iter().map(|part| part.to_string_lossy());
        let cached = parts
            .clone()
            .filter_map(|part| Some(part.strip_prefix("models--")?.rsplit("--").next()?.to_owned()));
        cached.chain(parts.next_back().map(Into::into)).collect()
    };
    let all = |name: &str| {
        let real = Path::new(name).canonicalize().unwrap_or_default();
        [names(Path::new(name)), names(&real)].concat()
    };
    let ours = all(model);
    all(base).iter().any(|name| ours.contains(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_has_its_name_wherever_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let cached = path("models--meta-llama--Meta-Llama-3-8B/snapshots/5f0b02c7");
        std::fs::create_dir_all(&cached).unwrap();
        assert!(is_named("meta-llama/Meta-Llama-3-8B", "models/Meta-Llama-3-8B"));
        assert!(is_named("meta-llama/Meta-Llama-3-8B", &cached));
        assert!(!is_named("meta-llama/Meta-Llama-3-8B", "models/Meta-Llama-3-8B-Instruct"));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(&cached, path("model")).unwrap();
            assert!(
                is_named(&path("model"), &path("model"))
                    && is_named("meta-llama/Meta-Llama-3-8B", &path("model"))
            );
            assert!(is_named(&path("model"), &cached), "by a link before");
        }
    }

    #[test]
    fn a_folder_that_is_no_model_is_told_from_one() {
        let folder = tempfile::tempdir().unwrap();
        let of =
            |name: &str| check_folder(&folder.path().join(name)).map_err(|e| format!("{e}; {:?}", e.hint()));
        for (name, file) in
            [("empty", None), ("adapter", Some(lora::ADAPTER_CONFIG_FILE)), ("model", Some("config.json"))]
        {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            if let Some(file) = file {
                std::fs::write(folder.path().join(name).join(file), "{}").unwrap();
            }
        }
        assert!(of("model").is_ok());
        for (name, says) in [
            ("empty", "holds no config.json"),
            ("adapter", "where it is left out, the demo is taken"),
            ("model/config.json", "is not a folder"),
            ("nowhere", "there is no such folder"),
        ] {
            let error = of(name).unwrap_err();
            assert!(error.contains(says), "{name}: {error}");
        }
    }

    #[test]
    fn the_width_of_the_weights_is_what_the_config_says() {
        let folder = tempfile::tempdir().unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens/gqa/model");
        std::fs::copy(model.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
        let config = std::fs::read_to_string(model.join("config.json")).unwrap();
        let config: serde_json::Map<String, Value> = serde_json::from_str(&config).unwrap();
        // Newer versions of transformers have another name for it, and a file may have both.
        for (names, dtype, width) in [
            (&["torch_dtype"][..], Value::from("bfloat16"), 2),
            (&["dtype", "torch_dtype"], Value::from("float16"), 2),
            (&["dtype"], Value::from("float32"), 4),
            (&["torch_dtype"], Value::Null, 4),
        ] {
            let mut config = config.clone();
            config.remove("torch_dtype");
            config.extend(names.iter().map(|name| ((*name).to_owned(), dtype.clone())));
            std::fs::write(folder.path().join("config.json"), Value::Object(config).to_string()).unwrap();
            let open = OpenModel::open(Some(folder.path()), "llama3").unwrap();
            assert_eq!(open.width().unwrap(), width, "{names:?} {dtype}");
        }
    }

    #[test]
    fn only_what_takes_a_while_has_a_speed() {
        let loaded = |bytes| Loaded { bytes, elapsed: Duration::from_secs(32) };
        assert_eq!(loaded(15_009_849_344).speed().unwrap(), "14.0 GiB loaded in 32.0 s, 447.3 MiB/s");
        assert_eq!(loaded((1 << 30) - 1).speed(), None);
    }
}
