//! `orpo-wgpu bench` and `train --profile` as a user meets them.

use crate::support::adapter;
use crate::workplace::{fixture, orpo_wgpu, stderr, stdout};

/// One layer, short sequences: what is looked at is what it says.
fn bench(flags: &[&str]) -> String {
    let small =
        ["bench", "--num_hidden_layers", "1", "--max_length", "24", "--max_steps", "1", "--batch_size", "2"];
    let output = orpo_wgpu(&[&small, flags].concat()).output().unwrap();
    assert!(output.status.success(), "{flags:?}: {}", stderr(&output));
    stdout(&output)
}

/// The number before `what`.
fn figure(output: &str, what: &str) -> f64 {
    let before = output.split(what).next().unwrap_or_default();
    assert!(before.len() < output.len(), "no `{what}` in {output}");
    before.split_whitespace().next_back().unwrap().trim_start_matches('(').parse().unwrap()
}

#[test]
fn the_cpu_is_measured() {
    let output = bench(&["--device", "cpu"]);
    assert!(figure(&output, " tokens/s (") > 0.0, "{output}");
    assert!(output.contains("2 x 2 x 24 tokens, of which 68 are computed"), "{output}");
    assert!(figure(&output, " % of the best product") > 0.0, "{output}");
    assert!(!output.contains("compiled"), "the CPU compiles nothing: {output}");
    let fastest = ["product found, burn's, ", "product found, this program's own, "];
    assert!(fastest.iter().any(|says| output.contains(says)), "{output}");
}

/// Bytes of `62.5 MiB` before `what`.
fn bytes(output: &str, what: &str) -> f64 {
    let before = output.split(what).next().unwrap_or_default();
    assert!(before.len() < output.len(), "no `{what}` in {output}");
    let mut words = before.split_whitespace().rev();
    let unit = words.next().unwrap();
    let power = ["B", "KiB", "MiB", "GiB"].iter().position(|name| *name == unit).unwrap();
    words.next().unwrap().parse::<f64>().unwrap() * 1024f64.powi(power as i32)
}

/// Of a short step weights and the embedding are nearly all, of a long one the MLP's activations half.
#[cfg(target_os = "linux")]
#[test]
fn the_cpu_takes_what_is_predicted_and_the_program_itself() {
    for flags in [["--max_length", "24"], ["--max_length", "768"]] {
        let output = bench(&[&["--device", "cpu", "--gradient_checkpointing", "true"], &flags[..]].concat());
        let predicted = bytes(&output, " of memory predicted");
        let itself = bytes(&output, " resident at the fullest") - predicted;
        let mib = f64::from(1 << 20);
        assert!((0.0..50.0 * mib).contains(&itself), "{flags:?}: {} MiB: {output}", itself / mib);
    }
}

#[test]
fn the_adapter_is_measured_kernel_by_kernel_and_its_memory_predicted() {
    if adapter().is_none() {
        return;
    }
    for (dtype, bits, head) in [("fp32", "0", "false"), ("fp16", "0", "false"), ("fp16", "4", "true")] {
        let quantization = ["--quantization_bit", bits, "--quantize_lm_head", head];
        let output = bench(&[&["--device", "wgpu", "--dtype", dtype], &quantization[..]].concat());
        assert!(figure(&output, " tokens/s (") > 0.0, "{output}");
        let off = figure(&output, " %); ");
        assert!(off.abs() < 10.0, "memory is predicted within 10 %: {output}");
        let kernels = [
            "lora_linear forward",
            "token_logps products",
            "attention backward",
            "rms_norm forward",
            "adamw",
        ];
        for kernel in kernels {
            assert!(output.contains(kernel), "{dtype}: {kernel} is in the table: {output}");
        }
        assert_eq!(output.contains("dequantize"), bits == "4", "{output}");
        assert!(figure(&output, " TFLOP/s in the best") > 0.0, "{output}");
    }
}

#[test]
fn a_bad_setting_is_an_error() {
    for (flags, says) in [
        (["--model_type", "llama9"], "--model_type `llama9`"),
        (["--dtype", "fp13"], "--dtype is `fp13`"),
        (["--max_length", "2"], "--max_length is 2, expected at least 4"),
        (["--device", "wgpu:99"], "wgpu:99"),
    ] {
        let output = orpo_wgpu(&["bench", flags[0], flags[1]]).output().unwrap();
        assert!(!output.status.success(), "{flags:?} is taken");
        assert!(stderr(&output).contains(says), "{flags:?}: {}", stderr(&output));
    }
}

#[test]
fn train_profiles_a_step_when_asked() {
    if adapter().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let flags = ["train", "--profile", "--device", "wgpu", "--dtype", "fp16", "--max_steps", "2"];
    let mut command = orpo_wgpu(&flags);
    command.arg("--output_dir").arg(folder.path());
    command.arg("--model_id_or_path").arg(fixture("gqa/model"));
    let output = command.arg("--dataset").arg(fixture("gqa/pairs.jsonl")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let printed = stdout(&output);
    assert!(printed.contains("kernels of step 2") && printed.contains("lora_linear forward"), "{printed}");
    let said = stderr(&output);
    assert!(said.contains(" in fp16 on wgpu"), "{said}");
}
