//! Timings of the device's products, kept between runs.
//!
//! A run that is long enough to gain from it times the products of its own shapes once; the next run on the same adapter and driver
//! reads them from `${XDG_CACHE_HOME:-~/.cache}/orpo-wgpu/tune-….json`. Another driver, other kernels and a run without matrix units have
//! files of their own, so that none writes over another's. A file is only ever a saving of time: without it, or with one that cannot be
//! read, the products are timed again.

use std::collections::HashSet;
use std::fs;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::device::{Adapter, DeviceChoice};
use crate::fnv::Fnv1a;
use crate::model::Llama;
use crate::model::llama::{joins_stream, shares_input};
use crate::ops::tune::{self, DeviceOf, LinearKind, Timings, Tunable, Verdict};
use crate::ops::{Cuts, Kernels, matrix_units_are_off};

/// Runs of fewer operations are over before timing would have paid.
const LEAST_FLOPS: f64 = 1e14;
/// The longest that timing may take, but for the compilation of one kernel and a launch of each that is compiled then.
const BUDGET: Duration = Duration::from_secs(20);

/// What the file holds.
#[derive(Debug, Serialize)]
struct Cache<T> {
    /// The device, its driver and the kernels: timings of others say nothing.
    of: [String; 3],
    timings: T,
}

/// Whose timings a file has.
struct Identity {
    file_name: String,
    of: [String; 3],
}

fn revision<E: Tunable>() -> String {
    let units = if matrix_units_are_off() { ", no matrix units" } else { "" };
    format!("{}, method {}{units}", E::revision(), tune::METHOD)
}

impl Identity {
    fn of_adapter(adapter: &Adapter) -> Self {
        let device = format!("{:04x}-{:04x}", adapter.vendor_id, adapter.device_id);
        Self::new(&device, [adapter.name.clone(), adapter.driver.clone(), revision::<Cuts>()])
    }

    fn new(device: &str, of: [String; 3]) -> Self {
        let mut hash = Fnv1a::default();
        hash.write(of.join("\n").as_bytes());
        Self { file_name: format!("tune-{device}-{:016x}.json", hash.finish()), of }
    }

    #[cfg(feature = "cuda")]
    fn of_gpu<E: Tunable>(gpu: &crate::device::CudaGpu, driver: String) -> Self {
        let name: String =
            gpu.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        Self::new(&format!("cuda-{name}").to_lowercase(), [gpu.name.clone(), driver, revision::<E>()])
    }
}

/// The model's linear layers on packed rows of so many tokens, each kind once.
pub(super) fn linears<B: Kernels>(model: &Llama<B>, tokens: [usize; 2]) -> Vec<LinearKind> {
    let mut linears = Vec::new();
    for (name, linear) in model.layers.iter().flat_map(|layer| layer.linears()) {
        let [n_out, n_in] = linear.weight.dims();
        let rank = linear.lora.as_ref().map_or(0, |lora| lora.a.dims()[0]);
        for tokens in tokens {
            let extents = [tokens, n_in, n_out, rank].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
            let (joins_stream, shares_input) = (joins_stream(name), shares_input(name));
            let linear = LinearKind { extents, dtype: linear.weight.dtype(), joins_stream, shares_input };
            if !linears.contains(&linear) {
                linears.push(linear);
            }
        }
    }
    linears
}

/// Lets the device's products for these linear layers follow timings: those of earlier runs and, where some are missing and a run of
/// `steps` steps would gain from them, new ones. `note` is told of these, and of what is not as it should be.
pub(super) fn tune(choice: &DeviceChoice, linears: &[LinearKind], steps: usize, note: impl Fn(String)) {
    match choice {
        DeviceChoice::Cpu => {}
        DeviceChoice::Wgpu { device, adapter } => {
            tune_on::<Cuts>(device, &Identity::of_adapter(adapter), linears, steps, note);
        }
        #[cfg(feature = "cuda")]
        DeviceChoice::Cuda(gpu) => {
            type Routes = crate::ops::engine::Routes<burn::cubecl::cuda::CudaRuntime>;
            let identity = Identity::of_gpu::<Routes>(gpu, crate::device::driver_and_compiler());
            tune_on::<Routes>(&gpu.device(), &identity, linears, steps, note);
        }
    }
}

fn tune_on<E: Tunable>(
    device: &DeviceOf<E>,
    identity: &Identity,
    linears: &[LinearKind],
    steps: usize,
    note: impl Fn(String),
) {
    let mut seen = HashSet::new();
    let all = linears.iter().flat_map(|&linear| E::of_linear(linear));
    let kinds: Vec<_> = all.filter(|kind| seen.insert(*kind)).collect();
    // A step takes each product once a layer at least, forward or backward; one layer's are enough to tell small runs from others.
    let flops: f64 = kinds.iter().map(|&kind| E::flops(kind)).sum::<f64>() * steps as f64;
    if flops < LEAST_FLOPS {
        return;
    }
    let path = folder().map(|folder| folder.join(&identity.file_name));
    let known = path.as_ref().map(|path| read(path, identity).map_err(|reason| (path, reason)));
    let mut timings: Timings<E> = known.unwrap_or_else(|| Ok(Vec::new())).unwrap_or_else(|(path, reason)| {
        note(format!("{} cannot be read, and is replaced: {reason}", path.display()));
        Vec::new()
    });
    tune::install::<E>(device, &timings);
    let (started, n_before) = (Instant::now(), timings.len());
    let mut unwritten = None;
    tune::tune::<E>(device, &kinds, BUDGET, |timing| {
        timings.push(timing);
        // A kind's at once: the next may not be survived.
        if let Some(path) = &path
            && let Err(reason) = write(path, &Cache { of: identity.of.clone(), timings: &timings })
        {
            unwritten = Some(format!("timings are not kept in {}: {reason}", path.display()));
        }
    });
    let new = &timings[n_before..];
    if new.is_empty() {
        return;
    }
    let new_kinds: HashSet<_> = new.iter().map(|timing| timing.kind).collect();
    note(format!(
        "{} ways of making {} kinds of products timed in {:.1} s",
        new.len(),
        new_kinds.len(),
        started.elapsed().as_secs_f64()
    ));
    let n_wrong = new.iter().filter(|timing| timing.ms.is_none()).count();
    if n_wrong > 0 {
        note(format!("{n_wrong} of them are refused or come out wrong here, and not taken"));
    }
    let is_none_right = |&&kind: &&E::Kind| tune::verdict::<E>(device, kind) == Verdict::NoneRight;
    let n_none = new_kinds.iter().filter(is_none_right).count();
    if n_none > 0 {
        note(format!("{n_none} kinds come out right in no way that was tried: slower ways have to do"));
    }
    unwritten.into_iter().for_each(note);
}

fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("orpo-wgpu"))
}

/// The timings of earlier runs; none where there is no file, or it is of another device or driver, or of other kernels.
fn read<T: DeserializeOwned + Default>(path: &Path, identity: &Identity) -> Result<T, String> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(T::default()),
        text => text.map_err(|error| error.to_string())?,
    };
    // Timings of another method may look otherwise, and are as little to be read as to be warned of.
    let mut cache: Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    if cache["of"] != json!(identity.of) {
        return Ok(T::default());
    }
    serde_json::from_value(cache["timings"].take()).map_err(|error| error.to_string())
}

/// Written beside the file and renamed, so that runs side by side never read half of one.
fn write(path: &Path, cache: &Cache<impl Serialize>) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    fs::write(&unfinished, serde_json::to_string_pretty(cache)?)?;
    fs::rename(&unfinished, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::kernel::{Cut, Elements, Layout, Tile};
    use crate::ops::tune::Timing;
    use crate::ops::{CutChoice, CutKind};

    fn adapter(name: &str) -> Identity {
        let mut adapter = Adapter::unknown();
        adapter.name = name.to_owned();
        Identity::of_adapter(&adapter)
    }

    fn timings() -> Timings<Cuts> {
        let kind = CutKind::new(Layout::RowsRows, [1000, 4096, 4096, 8], Elements::F32);
        let own = Timing { kind, choice: CutChoice::Own(Cut::Registers(Tile::ALL[0])), ms: Some(1.5) };
        let backward = CutKind { layout: Layout::RowsColumns, ..kind };
        vec![own, Timing { kind: backward, choice: CutChoice::Cubek, ms: None }]
    }

    #[test]
    fn timings_come_back_for_the_same_adapter_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/tune.json");
        assert_eq!(read(&path, &adapter("a")), Ok(Timings::<Cuts>::new()));
        write(&path, &Cache { of: adapter("a").of, timings: timings() }).unwrap();
        assert_eq!(read(&path, &adapter("a")), Ok(timings()));
        assert_eq!(read(&path, &adapter("b")), Ok(Timings::<Cuts>::new()));
        let [name, driver, revision] = adapter("a").of;
        let method = [name, driver, format!("{revision}, older")];
        write(&path, &Cache { of: method, timings: json!([{ "kind": "other fields" }]) }).unwrap();
        assert_eq!(read(&path, &adapter("a")), Ok(Timings::<Cuts>::new()));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_timings_say_nothing_of_has_another_file() {
        let name = |driver: &str, revision: &str| {
            let of = ["a GPU", driver, revision].map(str::to_owned);
            Identity::new("10de-2330", of).file_name
        };
        let with = name("580", "1, method 2");
        assert_eq!(with, name("580", "1, method 2"));
        assert!(with.starts_with("tune-10de-2330-") && with.ends_with(".json"), "{with}");
        assert_ne!(with, name("570", "1, method 2"), "another driver");
        assert_ne!(with, name("580", "1, method 2, no matrix units"));
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn a_gpu_has_a_file_of_its_own() {
        let identity = |name: &str, driver: &str| {
            let gpu = crate::device::CudaGpu {
                index: 0,
                name: name.to_owned(),
                memory_bytes: 80 << 30,
                compute_capability: (9, 0),
            };
            Identity::of_gpu::<Cuts>(&gpu, driver.to_owned())
        };
        let new = identity("NVIDIA H100 80GB HBM3", "570.86");
        assert!(new.file_name.starts_with("tune-cuda-nvidia-h100-80gb-hbm3-"), "{}", new.file_name);
        assert_ne!(new.file_name, identity("NVIDIA H100 80GB HBM3", "550.54").file_name);
        assert_ne!(new.file_name, identity("NVIDIA L4", "570.86").file_name);
    }

    #[test]
    fn a_damaged_file_is_a_note() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tune.json");
        fs::write(&path, "{\"of\": [").unwrap();
        assert!(read::<Timings<Cuts>>(&path, &adapter("a")).is_err());
    }
}
