//! The table of kernels that `bench` and `train --profile` print.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::ops::profile::Entry;

/// What a device can do at most.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Floating-point operations a second in a matrix product.
    pub flops: f64,
    /// Bytes a second between memory and kernels.
    pub bytes: f64,
}

/// Lays the kernels of a step of `step_s` seconds out by time, with the share of the device's limits where they are known.
pub fn table(entries: &[Entry], step_s: f64, limits: Option<Limits>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header([
        "kernel",
        "calls",
        "ms",
        "of the step",
        "GFLOP/s",
        "of the best",
        "GB/s",
        "of the best",
    ]);
    let share = |value: f64, of: Option<f64>| {
        of.map_or_else(String::new, |of| format!("{:.0} %", 100.0 * value / of))
    };
    let mut seen_s = 0.0;
    for entry in entries {
        seen_s += entry.seconds;
        let (flops, bytes) = (entry.flops as f64 / entry.seconds, entry.bytes as f64 / entry.seconds);
        table.add_row([
            entry.name.to_owned(),
            entry.calls.to_string(),
            format!("{:.2}", 1e3 * entry.seconds),
            share(entry.seconds, Some(step_s)),
            format!("{:.1}", flops / 1e9),
            share(flops, limits.map(|limits| limits.flops)),
            format!("{:.1}", bytes / 1e9),
            share(bytes, limits.map(|limits| limits.bytes)),
        ]);
    }
    let rest = (step_s - seen_s).max(0.0);
    let empty = String::new;
    table.add_row([
        "everything else, the host included".to_owned(),
        empty(),
        format!("{:.2}", 1e3 * rest),
        share(rest, Some(step_s)),
        empty(),
        empty(),
        empty(),
        empty(),
    ]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
