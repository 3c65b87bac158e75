//! Timings of the device's products, kept between runs.
//!
//! A run that is long enough to gain from it times the products of its own shapes once; the next run on the same adapter and driver
//! reads them from `${XDG_CACHE_HOME:-~/.cache}/orpo-wgpu/tune-….json`. The file is only ever a saving of time: without it, or with
//! one that cannot be read, the products are timed again.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::device::{Adapter, DeviceChoice};
use crate::model::Llama;
use crate::ops::Kernels;
use crate::ops::kernel::{Element, Elements, products_revision};
use crate::ops::tune::{self, Kind, Timing};

/// Runs of fewer operations are over before timing would have paid.
const LEAST_FLOPS: f64 = 1e14;
/// The longest that timing may take.
const BUDGET: Duration = Duration::from_secs(20);

/// What the file holds.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Cache {
    /// The adapter, its driver and the kernels: timings of others say nothing.
    of: [String; 3],
    timings: Vec<Timing>,
}

/// The products of the model's linear layers on packed rows of so many tokens, each kind once.
pub(super) fn kinds<B: Kernels>(model: &Llama<B>, tokens: [usize; 2]) -> Vec<Kind> {
    let mut seen = HashSet::new();
    let linears = model.layers.iter().flat_map(|layer| layer.linears());
    let linears =
        tokens.into_iter().flat_map(|tokens| linears.clone().map(move |(_, linear)| (tokens, linear)));
    let all = linears.flat_map(|(tokens, linear)| {
        let [n_out, n_in] = linear.weight.dims();
        let rank = linear.lora.as_ref().map_or(0, |lora| lora.a.dims()[0]);
        let extents = [tokens, n_in, n_out, rank].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        // Activations are as the weights are; what joins the residual stream goes out as f32, and its gradient comes in as f32.
        let weight = Element::from(linear.weight.dtype());
        [(weight, weight), (weight, Element::F32), (Element::F32, weight)]
            .map(|(lhs, out)| Kind::of_linear(extents, Elements { lhs, rhs: weight, out }))
    });
    all.flatten().filter(|kind| seen.insert(*kind)).collect()
}

/// Lets the device's products follow timings, those of earlier runs and, where some are missing and a run of `steps` steps would
/// gain from them, new ones. `note` is told what is not as it should be.
pub(super) fn tune(choice: &DeviceChoice, kinds: &[Kind], steps: usize, note: impl Fn(String)) {
    let DeviceChoice::Wgpu { device, adapter } = choice else { return };
    // A step takes each product once a layer at least, forward or backward; one layer's are enough to tell small runs from others.
    let flops: f64 = kinds.iter().map(|kind| kind.flops()).sum::<f64>() * steps as f64;
    if flops < LEAST_FLOPS {
        return;
    }
    let path = folder().map(|folder| folder.join(file_name(adapter)));
    let mut timings = match &path {
        Some(path) => read(path, adapter).unwrap_or_else(|reason| {
            note(format!("{} is left alone: {reason}", path.display()));
            Vec::new()
        }),
        None => Vec::new(),
    };
    tune::install(device, &timings);
    let new = tune::tune(device, kinds, BUDGET);
    if new.is_empty() {
        return;
    }
    timings.extend(new);
    if let Some(path) = path
        && let Err(reason) = write(&path, &Cache { of: identity(adapter), timings })
    {
        note(format!("timings are not kept in {}: {reason}", path.display()));
    }
}

fn identity(adapter: &Adapter) -> [String; 3] {
    [adapter.name.clone(), adapter.driver.clone(), format!("{:016x}", products_revision())]
}

fn folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("orpo-wgpu"))
}

fn file_name(adapter: &Adapter) -> String {
    format!("tune-{:04x}-{:04x}.json", adapter.vendor_id, adapter.device_id)
}

/// The timings of earlier runs; none where there is no file, or it is of another adapter or driver, or of other kernels.
fn read(path: &Path, adapter: &Adapter) -> Result<Vec<Timing>, String> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|error| error.to_string())?,
    };
    let cache: Cache = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    Ok(if cache.of == identity(adapter) { cache.timings } else { Vec::new() })
}

/// Written beside the file and renamed, so that runs side by side never read half of one.
fn write(path: &Path, cache: &Cache) -> std::io::Result<()> {
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
    use crate::ops::kernel::{Cut, Layout, Tile};
    use crate::ops::tune::Choice;

    fn adapter(name: &str) -> Adapter {
        let mut adapter = Adapter::unknown();
        adapter.name = name.to_owned();
        adapter
    }

    fn timings() -> Vec<Timing> {
        let kind = Kind::new(Layout::RowsRows, [1000, 4096, 4096, 8], Elements::F32);
        let own = Timing { kind, choice: Choice::Own(Cut::Registers(Tile::ALL[0])), ms: 1.5 };
        let backward = Kind { layout: Layout::RowsColumns, ..kind };
        vec![own, Timing { kind: backward, choice: Choice::Burn, ms: 2.5 }]
    }

    #[test]
    fn timings_come_back_for_the_same_adapter_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/tune.json");
        assert_eq!(read(&path, &adapter("a")), Ok(Vec::new()));
        write(&path, &Cache { of: identity(&adapter("a")), timings: timings() }).unwrap();
        assert_eq!(read(&path, &adapter("a")), Ok(timings()));
        assert_eq!(read(&path, &adapter("b")), Ok(Vec::new()));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_damaged_file_is_a_note() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tune.json");
        fs::write(&path, "{\"of\": [").unwrap();
        assert!(read(&path, &adapter("a")).is_err());
    }
}
