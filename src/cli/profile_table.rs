//! The table of kernels that `bench` and `train --profile` print.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use super::limits::Limits;
use super::words::new_table;
use crate::ops::profile::Entry;

/// Why kernels can exceed the limits that were measured.
pub const WHY_EXCEEDED: &str = "over 100 %: the limits are those of one square product and one long addition, by the clock; other \
                                shapes, and data that a cache still holds, can be faster, and a device that times kernels itself \
                                leaves their launch out";

/// Whether a kernel did more than the limits.
pub fn exceed(entries: &[Entry], limits: Limits) -> bool {
    entries.iter().any(|entry| {
        entry.flops as f64 > limits.product.flops * entry.seconds
            || entry.bytes as f64 > limits.bytes * entry.seconds
    })
}

/// What a step took, in seconds.
#[derive(Debug, Clone, Copy)]
pub enum Step {
    /// Another one like it, whose kernels nobody measured.
    Timed(f64),
    /// The one whose kernels were measured one by one, which makes it slower.
    Profiled(f64),
}

impl Step {
    /// Of which step kernels' shares are told: the timed one, which is as fast as others are, unless they took longer than all of it, as
    /// happens on a machine with other work.
    pub fn of(entries: &[Entry], timed_s: f64, profiled_s: f64) -> Self {
        let kernels_s: f64 = entries.iter().map(|entry| entry.seconds).sum();
        if kernels_s > timed_s { Self::Profiled(profiled_s) } else { Self::Timed(timed_s) }
    }
}

/// Lays the kernels of a step out by time, with the share of the device's limits where they are known.
pub fn table(entries: &[Entry], step: Step, limits: Option<Limits>) -> Table {
    let (step_s, the_step, of_the_step) = match step {
        Step::Timed(seconds) => (seconds, "the step", "of the step"),
        Step::Profiled(seconds) => (seconds, "the profiled step", "of the profiled step"),
    };
    let mut table = new_table();
    table.load_style(presets::UTF8_BORDERS_ONLY).set_content_arrangement(ContentArrangement::Dynamic);
    let mut header = vec!["kernel", "calls", "ms", of_the_step, "GFLOP/s", "GB/s"];
    if limits.is_some() {
        header.extend(["of the best product", "of the bandwidth"]);
    }
    let n_columns = header.len();
    table.set_header(header);
    let share = |value: f64, of: f64| format!("{:.0} %", 100.0 * value / of);
    let mut seen_s = 0.0;
    for entry in entries {
        seen_s += entry.seconds;
        let (flops, bytes) = (entry.flops as f64 / entry.seconds, entry.bytes as f64 / entry.seconds);
        let mut row = vec![
            entry.name.to_owned(),
            entry.calls.to_string(),
            format!("{:.2}", 1e3 * entry.seconds),
            share(entry.seconds, step_s),
            format!("{:.2}", flops / 1e9),
            format!("{:.2}", bytes / 1e9),
        ];
        row.extend(
            limits
                .into_iter()
                .flat_map(|limits| [share(flops, limits.product.flops), share(bytes, limits.bytes)]),
        );
        table.add_row(row);
    }
    let rest = (step_s - seen_s).max(0.0);
    for (name, seconds) in [("everything else, the host included", rest), (the_step, step_s)] {
        let mut row =
            vec![name.to_owned(), String::new(), format!("{:.2}", 1e3 * seconds), share(seconds, step_s)];
        row.resize(n_columns, String::new());
        table.add_row(row);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::limits::Product;

    #[test]
    fn shares_are_of_the_step_that_they_are_said_to_be_of() {
        let entry = Entry { name: "kernel", calls: 1, seconds: 0.5, flops: 1, bytes: 1 };
        for (step, name, ms, share) in [
            (Step::Timed(1.0), "the step", "1000.00", "50 %"),
            (Step::Profiled(2.0), "the profiled step", "2000.00", "25 %"),
        ] {
            let printed = table(std::slice::from_ref(&entry), step, None).to_string();
            assert!(printed.contains(&format!("of {name}")) && printed.contains(share), "{printed}");
            let has_total = |line: &str| [name, ms, "100 %"].iter().all(|cell| line.contains(cell));
            assert!(printed.lines().any(has_total), "{printed}");
        }
    }

    #[test]
    fn kernels_that_took_longer_than_the_timed_step_are_told_of_their_own() {
        let entry = Entry { name: "kernel", calls: 1, seconds: 1.5, flops: 1, bytes: 1 };
        for (timed_s, profiled_s, share) in [(1.0, 2.0, "75 %"), (3.0, 2.0, "50 %")] {
            let step = Step::of(std::slice::from_ref(&entry), timed_s, profiled_s);
            let printed = table(std::slice::from_ref(&entry), step, None).to_string();
            assert!(printed.contains(share), "{printed}");
        }
    }

    #[test]
    fn a_kernel_exceeds_either_limit() {
        let product = Product { flops: 10.0, by: "burn's" };
        let limits = Limits { product, bytes: 20.0 };
        let exceeds = |flops, bytes, seconds| {
            let entry = Entry { name: "kernel", calls: 1, seconds, flops, bytes };
            let within = Entry { name: "another", calls: 1, seconds: 1.0, flops: 1, bytes: 1 };
            exceed(&[within, entry], limits)
        };
        assert!(!exceeds(20, 40, 2.0), "both limits are reached");
        assert!(exceeds(21, 0, 2.0) && exceeds(0, 41, 2.0));
        assert!(!exceeds(21, 41, f64::NAN), "the device did not measure it");
    }
}
