//! `orpo-wgpu devices`: what there is to compute on, and what `--device auto` takes.

use std::num::NonZero;

use comfy_table::{ContentArrangement, Table, presets};
use serde_json::json;

use super::words::{new_table, paragraph};
use crate::device::{self, Adapter, CudaGpu, DeviceChoice, DeviceRequest, DeviceType, Selected, size};
use crate::error::Result;
use crate::words::counted;

/// What `orpo-wgpu devices` is told.
#[derive(Debug, Clone, clap::Args)]
pub struct DevicesArgs {
    /// Print JSON, with sizes in bytes
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
///
/// # Errors
/// None: a machine without adapters has the CPU.
pub fn run(args: &DevicesArgs) -> Result<()> {
    let adapters = device::adapters();
    let gpus = device::gpus();
    let selected = device::select_from(DeviceRequest::Auto, &gpus, &adapters)?;
    if args.json {
        say!(
            "{:#}",
            json!({
                "adapters": adapters,
                "cuda": gpus.unwrap_or_default(),
                "cpu": { "threads": threads(), "memory_bytes": DeviceChoice::Cpu.total_memory() },
                "auto": selected.choice.to_string(),
            })
        );
        return Ok(());
    }
    if adapters.is_empty() {
        say!("no adapter with a {} driver was found", device::api());
        say!("{}\n", paragraph(&format!("hint: {}", device::NO_ADAPTER)));
    } else {
        say!("{}\n", table(&adapters));
        if adapters.iter().all(|adapter| adapter.device_type == DeviceType::Software) {
            let hint = format!(
                "hint: a GPU that is not listed lacks its driver, or that driver's {} part",
                device::api()
            );
            say!("{}\n", paragraph(&hint));
        }
    }
    match &gpus {
        Ok(gpus) => say!("{}\n", cuda_table(gpus)),
        Err(missing) => {
            say!("{}", paragraph(&format!("no CUDA: {}", missing.problem)));
            say!("{}\n", paragraph(&format!("hint: {}", missing.hint)));
        }
    }
    say!("{}\n", cpu_table());
    say!("{}", paragraph(&auto(&selected)));
    Ok(())
}

/// Those that the CPU computes with.
fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

fn cpu_table() -> Table {
    let mut table = new_table();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["--device", "name", "memory", "kernels"]);
    let memory = DeviceChoice::Cpu.total_memory().map_or_else(|| "unknown".to_owned(), |n| size(n) + " free");
    let name = format!("the CPU, {}", counted(threads(), "thread"));
    table.add_row(["cpu".to_owned(), name, memory, "f32, also of weights in fp16".to_owned()]);
    table
}

fn auto(Selected { choice, note }: &Selected) -> String {
    match note {
        None => format!("--device auto takes {choice} ({})", choice.describe()),
        Some(note) => format!("--device auto takes {note}"),
    }
}

fn cuda_table(gpus: &[CudaGpu]) -> Table {
    let mut table = new_table();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["--device", "name", "memory", "largest tensor", "kernels"]);
    for gpu in gpus {
        let (major, minor) = gpu.compute_capability;
        let types = [(gpu.computes_f16(), "f16"), (gpu.computes_bf16(), "bf16")];
        let types =
            types.iter().filter(|(has, _)| *has).map(|(_, name)| format!(", {name}")).collect::<String>();
        table.add_row([
            format!("cuda:{}", gpu.index),
            gpu.name.clone(),
            size(gpu.memory_bytes),
            size(gpu.shard_bytes()),
            format!("compute capability {major}.{minor}{types}"),
        ]);
    }
    table
}

fn table(adapters: &[Adapter]) -> Table {
    let mut table = new_table();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["--device", "name", "kind", "driver", "memory", "largest tensor", "kernels"]);
    for adapter in adapters {
        let ids = format!("{:04x}:{:04x}", adapter.vendor_id, adapter.device_id);
        table.add_row([
            format!("wgpu:{}", adapter.index),
            format!("{}\n{ids}", adapter.name),
            adapter.device_type.to_string(),
            format!("{}\n{}", adapter.api, adapter.driver),
            adapter.memory_bytes.map_or_else(|| "unknown".to_owned(), size),
            format!(
                "{}\nbuffer {}\nbinding {}",
                size(adapter.shard_bytes()),
                size(adapter.max_buffer_size),
                size(adapter.max_storage_buffer_binding_size)
            ),
            kernels(adapter),
        ]);
    }
    table
}

fn kernels(adapter: &Adapter) -> String {
    let f16 = if adapter.f16 { "f16" } else { "no f16" };
    let subgroups = match adapter.subgroups {
        Some((min, max)) if min == max => format!("subgroups of {min}"),
        Some((min, max)) => format!("subgroups of {min} to {max}"),
        None => "no subgroups".to_owned(),
    };
    let matrices = match adapter.cooperative_matrices.is_empty() {
        true => "no cooperative matrices".to_owned(),
        false => format!("cooperative matrices {}", adapter.cooperative_matrices.join(", ")),
    };
    [f16.to_owned(), subgroups, matrices].join("\n")
}
