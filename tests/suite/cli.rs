//! The binary as a user meets it: bad input, output files, adapters that come and go.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

/// A command line of the binary, on the CPU: what is tested here is not the device.
fn orpo_wgpu(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_orpo-wgpu"));
    command.args(args);
    command
}

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/goldens").join(path)
}

/// A folder with a copy of the `gqa` case's model and pairs, to be spoiled.
struct Workplace(TempDir);

impl Workplace {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("model")).unwrap();
        for entry in fs::read_dir(fixture("gqa/model")).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, folder.path().join("model").join(from.file_name().unwrap())).unwrap();
        }
        fs::copy(fixture("gqa/pairs.jsonl"), folder.path().join("pairs.jsonl")).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs `train` for two steps on the model and the pairs of this folder, with these flags on top.
    fn train(&self, flags: &[&str]) -> Output {
        self.train_command(flags).output().unwrap()
    }

    fn train_command(&self, flags: &[&str]) -> Command {
        let mut command = orpo_wgpu(&["train"]);
        let base = [
            ("--model_id_or_path", "model"),
            ("--dataset", "pairs.jsonl"),
            ("--device", "cpu"),
            ("--output_dir", "out"),
            ("--add_output_dir_suffix", "false"),
            ("--max_steps", "2"),
            ("--warmup_ratio", "0"),
        ];
        for (flag, value) in base {
            if !flags.contains(&flag) {
                command.args([flag, value]);
            }
        }
        command.args(flags).current_dir(self.0.path());
        command
    }

    /// Everything below the output folder.
    fn written(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut folders = vec![self.path("out")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                if entry.path().is_dir() {
                    folders.push(entry.path());
                }
                files.push(entry.path().strip_prefix(self.path("out")).unwrap().display().to_string());
            }
        }
        files.sort();
        files
    }
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A spoiled input, the flags it is given with, and what the run must say and end with.
struct Case {
    name: &'static str,
    spoil: fn(&Workplace),
    flags: &'static [&'static str],
    code: i32,
    says: &'static [&'static str],
}

/// Changes the header of the model's weights.
fn edit_weights(workplace: &Workplace, edit: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let path = workplace.path("model/model.safetensors");
    let bytes = edit(fs::read(&path).unwrap());
    fs::write(path, bytes).unwrap();
}

fn write_pairs(workplace: &Workplace, text: &str) {
    fs::write(workplace.path("pairs.jsonl"), text).unwrap();
}

#[test]
fn bad_input_gives_a_clear_error_and_writes_nothing() {
    let cases = [
        Case {
            name: "no such model folder",
            spoil: |_| {},
            flags: &["--model_id_or_path", "nowhere"],
            code: 1,
            says: &["nowhere", "there is no such folder", "hint:"],
        },
        Case {
            name: "model folder without weights",
            spoil: |w| fs::remove_file(w.path("model/model.safetensors")).unwrap(),
            flags: &[],
            code: 1,
            says: &["model.safetensors", "hint:"],
        },
        Case {
            name: "no such data file",
            spoil: |_| {},
            flags: &["--dataset", "nothing.jsonl"],
            code: 2,
            says: &["nothing.jsonl", "hint:"],
        },
        Case {
            name: "truncated safetensors",
            spoil: |w| edit_weights(w, |bytes| bytes[..bytes.len() - 1000].to_vec()),
            flags: &[],
            code: 1,
            says: &["model/model.safetensors", "truncated", "bytes", "hint:"],
        },
        Case {
            name: "safetensors cut within its header",
            spoil: |w| edit_weights(w, |bytes| bytes[..100].to_vec()),
            flags: &[],
            code: 1,
            says: &["model/model.safetensors", "truncated", "100"],
        },
        Case {
            name: "config.json of another shape",
            spoil: |w| {
                let path = w.path("model/config.json");
                let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
                config["intermediate_size"] = 96.into();
                config["num_hidden_layers"] = 1.into();
                fs::write(path, config.to_string()).unwrap();
            },
            flags: &[],
            code: 1,
            says: &[
                "model.layers.0.mlp.up_proj.weight",
                "expected [96, 64]",
                "model.layers.1.",
                "is not part of the model",
            ],
        },
        Case {
            name: "biases",
            spoil: |w| {
                let path = w.path("model/config.json");
                let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
                config["attention_bias"] = true.into();
                fs::write(path, config.to_string()).unwrap();
            },
            flags: &[],
            code: 1,
            says: &["model/config.json", "attention_bias"],
        },
        Case {
            name: "not JSON on line 7",
            spoil: |w| {
                let row = "{\"query\":\"q\",\"response\":\"a\",\"rejected_response\":\"b\"}\n";
                write_pairs(w, &format!("{}not json\n{row}", row.repeat(6)));
            },
            flags: &[],
            code: 1,
            says: &["pairs.jsonl:7", "JSON"],
        },
        Case {
            name: "empty data set",
            spoil: |w| write_pairs(w, ""),
            flags: &[],
            code: 1,
            says: &["pairs.jsonl", "no rows"],
        },
        Case {
            name: "all rows unusable",
            spoil: |w| {
                write_pairs(
                    w,
                    "{\"query\":\"q\",\"response\":\"a\",\"rejected_response\":\"a\"}\n{\"query\":\"q\"}\n",
                );
            },
            flags: &[],
            code: 1,
            says: &["pairs.jsonl", "none of its 2 rows can be used", "equal"],
        },
        Case {
            name: "columns by other names",
            spoil: |w| {
                write_pairs(w, "{\"system\":\"s\",\"question\":\"q\",\"chosen\":\"a\",\"rejected\":\"b\"}\n");
            },
            flags: &[],
            code: 1,
            says: &["no column `prompt`", "hint: --columns '{\"question\":\"prompt\"}' reads these rows"],
        },
        Case {
            name: "rows for supervised fine-tuning",
            spoil: |w| write_pairs(w, "{\"instruction\":\"q\",\"output\":\"a\"}\n"),
            flags: &["--strict", "true"],
            code: 1,
            says: &[
                "pairs.jsonl:1: unknown form",
                "hint: these rows have one answer each",
                "'{\"output\":\"chosen\"}'",
            ],
        },
        Case {
            name: "all rows too long",
            spoil: |_| {},
            flags: &["--max_length", "3"],
            code: 1,
            says: &["pairs.jsonl:1:", "--max_length is 3", "hint:"],
        },
        Case {
            name: "strict",
            spoil: |w| {
                let text = fs::read_to_string(w.path("pairs.jsonl")).unwrap();
                write_pairs(
                    w,
                    &format!("{text}{{\"query\":\"q\",\"response\":\"a\",\"rejected_response\":\"a\"}}\n"),
                );
            },
            flags: &["--strict", "true"],
            code: 1,
            says: &["pairs.jsonl:8", "equal"],
        },
        Case {
            name: "unknown flag",
            spoil: |_| {},
            flags: &["--betta", "1"],
            code: 2,
            says: &["--betta", "--beta"],
        },
        Case {
            name: "values out of range",
            spoil: |_| {},
            flags: &["--batch_size", "0", "--warmup_ratio", "1.5", "--lora_dropout", "0.1"],
            code: 2,
            says: &["--batch_size", "--warmup_ratio", "--lora_dropout"],
        },
        Case {
            name: "a value that is no number",
            spoil: |_| {},
            flags: &["--learning_rate", "nan", "--beta", "inf"],
            code: 2,
            says: &["--learning_rate is no finite number", "--beta is no finite number"],
        },
        Case {
            name: "unknown module",
            spoil: |_| {},
            flags: &["--lora_target_modules", "q_proj,query"],
            code: 2,
            says: &["`query`", "v_proj"],
        },
        Case {
            name: "no such adapter",
            spoil: |_| {},
            flags: &["--adapters", "missing"],
            code: 1,
            says: &["missing", "adapter_config.json"],
        },
        Case {
            name: "no such device",
            spoil: |_| {},
            flags: &["--device", "wgpu:99"],
            code: 1,
            says: &["wgpu:99", "hint:"],
        },
        Case { name: "unknown device", spoil: |_| {}, flags: &["--device", "tpu"], code: 2, says: &["tpu"] },
        Case {
            name: "a learning rate of 0",
            spoil: |_| {},
            flags: &["--learning_rate", "0"],
            code: 2,
            says: &["--learning_rate is 0"],
        },
        Case { name: "dtype", spoil: |_| {}, flags: &["--dtype", "fp8"], code: 2, says: &["fp8", "fp32"] },
        Case {
            name: "dtype of the device",
            spoil: |_| {},
            flags: &["--dtype", "bf16", "--device", "cpu"],
            code: 2,
            says: &["--dtype bf16: cpu does not compute in bf16", "the CPU can do fp16"],
        },
        Case {
            name: "bits",
            spoil: |_| {},
            flags: &["--quantization_bit", "3"],
            code: 2,
            says: &["--quantization_bit is 3, expected 0, 4 or 8"],
        },
        Case {
            name: "a head quantised alone",
            spoil: |_| {},
            flags: &["--quantize_lm_head", "true"],
            code: 2,
            says: &["--quantize_lm_head is true", "--quantization_bit 8 or 4"],
        },
        Case {
            name: "loss scale",
            spoil: |_| {},
            flags: &["--fp16_init_scale", "0"],
            code: 2,
            says: &["--fp16_init_scale is 0"],
        },
        Case {
            name: "a typo in a configuration file",
            spoil: |w| fs::write(w.path("run.toml"), "betta = 0.1\n").unwrap(),
            flags: &["--config", "run.toml"],
            code: 2,
            says: &["run.toml", "betta", "beta"],
        },
        Case {
            name: "a setting of another trainer",
            spoil: |w| fs::write(w.path("run.toml"), "per_device_train_batch_size = 4\n").unwrap(),
            flags: &["--config", "run.toml"],
            code: 2,
            says: &["hint: `per_device_train_batch_size` is batch_size here"],
        },
        Case {
            name: "values of two settings in a configuration file",
            spoil: |w| fs::write(w.path("run.json"), r#"{"columns": "query", "batch_size": "x"}"#).unwrap(),
            flags: &["--config", "run.json"],
            code: 2,
            says: &[
                "run.json: `columns` is \"query\": expected a JSON object",
                "run.json: `batch_size` is \"x\"",
            ],
        },
        Case {
            name: "a configuration file in YAML",
            spoil: |w| fs::write(w.path("run.yaml"), "beta: 0.1\n").unwrap(),
            flags: &["--config", "run.yaml"],
            code: 2,
            says: &["run.yaml: YAML is not read", "hint: `beta: 0.1` is `beta = 0.1` in TOML", "> run.json"],
        },
        Case {
            name: "a model name without a folder",
            spoil: |w| fs::write(w.path("run.toml"), "model_type = \"llama3-8b-instruct\"\n").unwrap(),
            flags: &[
                "--adapters",
                "missing",
                "--model_type",
                "llama3-8b-instruct",
                "--model_id_or_path",
                "llama3",
            ],
            code: 1,
            says: &["llama3", "nothing is downloaded"],
        },
    ];
    let mut failures = Vec::new();
    for case in cases {
        let workplace = Workplace::new();
        (case.spoil)(&workplace);
        let output = workplace.train(case.flags);
        let message = stderr(&output);
        let mut wrong = Vec::new();
        if output.status.code() != Some(case.code) {
            wrong.push(format!("exit code {:?}, expected {}", output.status.code(), case.code));
        }
        wrong.extend(
            case.says.iter().filter(|s| !message.contains(**s)).map(|s| format!("does not say `{s}`")),
        );
        if message.contains("panicked") || message.contains("RUST_BACKTRACE") {
            wrong.push("panicked".to_owned());
        }
        if !workplace.written().is_empty() {
            wrong.push(format!("wrote {:?}", workplace.written()));
        }
        if !wrong.is_empty() {
            failures.push(format!("{}: {}\n{message}", case.name, wrong.join(", ")));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_run_writes_the_files_that_it_promises() {
    let workplace = Workplace::new();
    let output = workplace.train(&["--logging_steps", "1", "--save_steps", "1", "--save_total_limit", "1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let written = workplace.written();
    let checkpoint = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "args.json",
        "optimizer.safetensors",
        "trainer_state.json",
    ];
    for file in checkpoint {
        assert!(written.contains(&format!("checkpoint-2/{file}")), "{file} is missing in {written:?}");
    }
    assert!(!written.iter().any(|f| f.contains("checkpoint-1") || f.contains("partial")), "{written:?}");
    let log = fs::read_to_string(workplace.path("out/logging.jsonl")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2]);
    for key in [
        "epoch",
        "loss",
        "nll_loss",
        "log_odds_ratio",
        "log_odds_chosen",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
        "grad_norm",
        "learning_rate",
        "tokens_per_second",
        "memory_bytes",
    ] {
        assert!(lines[0][key].is_number(), "{key} is missing in {}", lines[0]);
    }
    // What PEFT reads: the tensors' names are those of an adapter that PEFT wrote, and so are the settings that matter to it.
    let names = |path: &Path| -> Vec<String> {
        let checkpoint = orpo_wgpu::model::load::Checkpoint::open_file(path).unwrap();
        checkpoint.names().map(str::to_owned).collect()
    };
    let (ours, theirs) = (workplace.path("out/checkpoint-2"), fixture("gqa/adapter"));
    assert_eq!(
        names(&ours.join("adapter_model.safetensors")),
        names(&theirs.join("adapter_model.safetensors"))
    );
    let config = |folder: &Path| -> Value {
        serde_json::from_str(&fs::read_to_string(folder.join("adapter_config.json")).unwrap()).unwrap()
    };
    let (ours, theirs) = (config(&ours), config(&theirs));
    for key in
        ["peft_type", "task_type", "r", "bias", "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save"]
    {
        assert_eq!(ours[key], theirs[key], "{key} of adapter_config.json");
    }
    // The summary's last line is the command to talk to the result.
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        stdout.contains("orpo-wgpu infer --model_id_or_path model --adapters out/checkpoint-2"),
        "{stdout}"
    );
    // The run stands for its newest checkpoint.
    let flags = ["--model_id_or_path", "model", "--adapters", "out", "--max_new_tokens", "1"];
    let mut infer = orpo_wgpu(&["infer", "--device", "cpu", "hi"]);
    let output = infer.args(flags).current_dir(workplace.0.path()).output().unwrap();
    assert!(stderr(&output).contains("model with out/checkpoint-2"), "{}", stderr(&output));
}

#[test]
fn args_json_repeats_the_run() {
    let workplace = Workplace::new();
    let flags = [
        "--logging_steps",
        "1",
        "--learning-rate",
        "3e-3",
        "--beta",
        "0.4",
        "--lora_target_modules",
        "q_proj,down_proj",
    ];
    assert!(workplace.train(&flags).status.success());
    // From another folder, where no path is what it was.
    let (args, again) = (workplace.path("out/args.json"), workplace.path("again"));
    let mut train = orpo_wgpu(&["train", "--config", args.to_str().unwrap(), "--output_dir"]);
    let output = train.arg(again).current_dir(workplace.path("model")).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let figures = |folder: &str| -> Vec<(f64, f64)> {
        let log = fs::read_to_string(workplace.path(folder).join("logging.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.map(|l| (l["loss"].as_f64().unwrap(), l["grad_norm"].as_f64().unwrap())).collect()
    };
    assert_eq!(figures("out"), figures("again"), "same settings, same seed, same device, same bits");
}

#[test]
fn a_configuration_file_takes_what_flags_take() {
    let workplace = Workplace::new();
    let run = r#"{"dataset": "pairs.jsonl,pairs.jsonl#2", "lora_target_modules": "q_proj,v_proj", "columns": "{\"query\": \"query\"}"}"#;
    fs::write(workplace.path("run.json"), run).unwrap();
    let flags = ["train", "--config", "run.json", "--model_id_or_path", "model", "--device", "cpu"];
    let output = ["--max_steps", "1", "--output_dir", "out", "--add_output_dir_suffix", "false"];
    let mut train = orpo_wgpu(&[&flags[..], &output].concat());
    let output = train.current_dir(workplace.0.path()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let resolved = fs::read_to_string(workplace.path("out/args.json")).unwrap();
    let resolved: Value = serde_json::from_str(&resolved).unwrap();
    let pairs = workplace.path("pairs.jsonl").display().to_string();
    assert_eq!(resolved["dataset"], json!([pairs, pairs + "#2"]));
    assert_eq!(resolved["lora_target_modules"], json!(["q_proj", "v_proj"]));
    assert_eq!(resolved["columns"], json!({"query": "query"}));
}

#[test]
fn a_resumed_run_equals_one_that_was_not_interrupted() {
    let workplace = Workplace::new();
    let flags = [
        "--max_steps",
        "6",
        "--logging_steps",
        "1",
        "--save_steps",
        "3",
        "--batch_size",
        "2",
        "--gradient_accumulation_steps",
        "2",
    ];
    assert!(workplace.train(&flags).status.success());
    let resumed =
        [&flags[..], &["--resume_from_checkpoint", "out/checkpoint-3", "--output_dir", "resumed"]].concat();
    let output = workplace.train(&resumed);
    assert!(output.status.success(), "{}", stderr(&output));
    let says = "resume   after step 3 of 6, from out/checkpoint-3";
    let resolved = fs::read_to_string(workplace.path("resumed/args.json")).unwrap();
    assert!(resolved.contains("out/checkpoint-3"), "{resolved}");
    assert!(stderr(&output).contains(says), "{}", stderr(&output));
    let read = |file: &str| fs::read(workplace.path(file)).unwrap();
    assert_eq!(
        read("out/checkpoint-6/adapter_model.safetensors"),
        read("resumed/checkpoint-6/adapter_model.safetensors"),
        "the resumed adapter, bit for bit"
    );
    assert_eq!(
        read("out/checkpoint-6/optimizer.safetensors"),
        read("resumed/checkpoint-6/optimizer.safetensors")
    );
    let other = [
        "--max_steps",
        "6",
        "--batch_size",
        "1",
        "--resume_from_checkpoint",
        "out/checkpoint-3",
        "--output_dir",
        "other",
    ];
    let output = workplace.train(&other);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("batch_size was 2 and is 1"), "{}", stderr(&output));
    fs::create_dir(workplace.path("unsaved")).unwrap();
    for (folder, says) in
        [("unsaved", "unsaved: holds no checkpoint"), ("nowhere", "nowhere: there is no such folder")]
    {
        let output = workplace.train(&["--resume_from_checkpoint", folder]);
        assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
        assert!(stderr(&output).contains(says), "{}", stderr(&output));
    }
    let rank = ["--max_steps", "6", "--lora_rank", "4", "--resume_from_checkpoint", "out/checkpoint-3"];
    let output = workplace.train(&rank);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let says = "checkpoint-3: the adapter has a rank of 8, and --lora_rank is 4";
    assert!(stderr(&output).contains(says), "{}", stderr(&output));
    let done = [&flags[..], &["--resume_from_checkpoint", "out", "--output_dir", "done"]].concat();
    let output = workplace.train(&done);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("6 of 6 steps are done already"), "{}", stderr(&output));
}

#[test]
fn the_first_step_is_told_of_before_the_log_has_a_line() {
    let workplace = Workplace::new();
    let steps = |flags: &[&str]| -> Vec<String> {
        let message = stderr(&workplace.train(flags));
        message.lines().filter(|line| line.starts_with("step ")).map(str::to_owned).collect()
    };
    let lines = steps(&["--max_steps", "4", "--logging_steps", "3"]);
    assert!(lines[0].starts_with("step 1/4  loss "), "{lines:?}");
    assert!(lines[0].ends_with(" s left; the next line comes after step 3"), "{lines:?}");
    let numbers: Vec<_> = lines.iter().map(|line| line.split("  ").next().unwrap()).collect();
    assert_eq!(numbers, ["step 1/4", "step 3/4", "step 4/4"]);
    let lines = steps(&["--max_steps", "2", "--logging_steps", "50"]);
    assert!(lines[0].ends_with("; the next line comes after step 2") && lines.len() == 2, "{lines:?}");
    assert_eq!(steps(&["--max_steps", "2", "--logging_steps", "1"]).len(), 2);
}

#[test]
fn one_row_and_one_step_are_counted_as_one() {
    let workplace = Workplace::new();
    let first = fs::read_to_string(workplace.path("pairs.jsonl")).unwrap().lines().next().unwrap().to_owned();
    write_pairs(&workplace, &format!("{first}\n{{\"query\":\"q\"}}\n"));
    let flags = ["--max_steps", "1", "--gradient_accumulation_steps", "1", "--max_memory", "1TB"];
    let output = workplace.train(&flags);
    let message = stderr(&output);
    for says in [
        "\ndata     1 row to train on, 0 to evaluate on, 1 left out; ",
        "\ntraining 1 step of 1 pair, loss swift ",
        "\nleft out: the row is in out/left_out.txt",
    ] {
        assert!(message.contains(says), "no `{says}` in {message}");
    }
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(printed.contains("\n1 step in "), "{printed}");
}

#[test]
fn an_error_stands_apart_from_what_was_said_before() {
    let workplace = Workplace::new();
    let pairs = fs::read_to_string(workplace.path("pairs.jsonl")).unwrap();
    write_pairs(&workplace, &format!("{pairs}{}", "{\"query\":\"q\"}\n".repeat(7)));
    let message = stderr(&workplace.train(&["--max_memory", "500KB"]));
    assert!(message.contains("\nleft out: and 2 more\n"), "{message}");
    assert!(message.contains("\n\norpo-wgpu: invalid configuration: the longest step"), "{message}");
    write_pairs(&workplace, &pairs);
    let message = stderr(&workplace.train(&["--max_length", "3"]));
    assert!(message.starts_with("orpo-wgpu: pairs.jsonl: none of its rows can be trained on"), "{message}");
}

#[test]
fn one_step_trains_whatever_the_warm_up() {
    let workplace = Workplace::new();
    let output = workplace.train(&["--max_steps", "1", "--warmup_ratio", "0.05", "--learning_rate", "1e-4"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let log = fs::read_to_string(workplace.path("out/logging.jsonl")).unwrap();
    let line: Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    assert_eq!(line["learning_rate"], 1e-4);
}

#[test]
fn a_short_run_says_that_its_warm_up_begins_at_a_rate_of_0() {
    let workplace = Workplace::new();
    let says = |flags: &[&str]| {
        let output = workplace.train(flags);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output).contains("the first of 2 steps has a learning rate of 0")
    };
    assert_eq!([says(&["--warmup_ratio", "0.05"]), says(&[])], [true, false]);
}

#[test]
fn one_line_of_the_log_is_summed_up_once() {
    let workplace = Workplace::new();
    let header = |logging_steps: &str| {
        let output = workplace.train(&["--logging_steps", logging_steps]);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        let header = printed.lines().find(|line| line.contains("training rows")).expect(&printed);
        header
            .split("  ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(header("2"), ["training rows", "all steps"]);
    assert_eq!(header("1"), ["training rows", "first logged steps", "last logged steps"]);
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_is_saved_and_can_go_on() {
    let workplace = Workplace::new();
    let mut command = workplace.train_command(&["--max_steps", "100000", "--logging_steps", "1"]);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("step 2/100000")), "it trains");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let message: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{message:?}");
    let said = |text: &str| message.iter().any(|line| line.starts_with(text));
    assert!(said("interrupted: the step under way is finished and saved"), "{message:?}");
    assert!(said("the last checkpoint stays: out/checkpoint-"), "{message:?}");
    assert!(message.last().unwrap().ends_with("--config out/args.json --resume_from_checkpoint out goes on"));
    assert!(workplace.path("out/images/train_loss.png").exists());

    let ended =
        message.iter().find_map(|line| line.strip_prefix("orpo-wgpu: interrupted after step ")).unwrap();
    let step: usize = ended.strip_suffix(" of 100000").unwrap().parse().unwrap();
    let max_steps = (step + 1).to_string();
    let output = workplace.train(&["--max_steps", &max_steps, "--resume_from_checkpoint", "out"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(
        stderr(&output).contains(&format!("resume   after step {step} of {max_steps}")),
        "{}",
        stderr(&output)
    );
}

/// Starts a long run through a shell, `exec` and its words last, and gives it once it trains, with the lines that it says from there on.
#[cfg(unix)]
fn start(workplace: &Workplace, before: &str) -> (std::process::Child, impl Iterator<Item = String>) {
    use std::os::unix::process::CommandExt;

    let command = workplace.train_command(&["--max_steps", "100000", "--logging_steps", "1"]);
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
    let words: Vec<_> = words.iter().map(|word| format!("'{}'", word.to_string_lossy())).collect();
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("{before} exec {}", words.join(" "))]).current_dir(workplace.0.path());
    // A shell cannot take back that signals are ignored, as below a `nohup` that these tests were started with.
    let listen = || {
        #[expect(unsafe_code, reason = "the standard library has no signals")]
        // SAFETY: it may be called between fork and exec.
        unsafe {
            libc::signal(libc::SIGHUP, libc::SIG_DFL);
        }
        Ok(())
    };
    #[expect(unsafe_code, reason = "the child has a disposition of its own")]
    // SAFETY: nothing but the above runs there.
    let shell = unsafe { shell.pre_exec(listen) };
    let mut child = shell.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("step 2/100000")), "it trains");
    (child, lines)
}

#[cfg(unix)]
fn signal(child: &std::process::Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

#[cfg(unix)]
#[test]
fn a_run_that_is_told_to_end_is_saved() {
    for name in ["-TERM", "-HUP"] {
        let workplace = Workplace::new();
        let (mut child, lines) = start(&workplace, "");
        // As `timeout` sends it, to the program and to its group.
        signal(&child, name);
        signal(&child, name);
        let message: Vec<String> = lines.collect();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{name}: {message:?}");
        let said = |text: &str| message.iter().filter(|line| line.starts_with(text)).count();
        assert_eq!(said("interrupted: the step under way is finished and saved"), 1, "{name}: {message:?}");
        assert_eq!(said("the last checkpoint stays: out/checkpoint-"), 1, "{name}: {message:?}");
    }
}

#[cfg(unix)]
#[test]
fn a_run_below_nohup_does_not_end_with_its_terminal() {
    let workplace = Workplace::new();
    let (mut child, mut lines) = start(&workplace, "trap '' HUP;");
    signal(&child, "-HUP");
    // The first lines may be older than the signal.
    let hung_up = std::time::Instant::now();
    while hung_up.elapsed() < std::time::Duration::from_secs(2) {
        let line = lines.next().expect("it goes on");
        assert!(line.starts_with("step "), "{line}");
    }
    signal(&child, "-TERM");
    let message: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{message:?}");
    assert!(message.iter().any(|line| line.starts_with("the last checkpoint stays: ")), "{message:?}");
}

#[test]
fn a_run_goes_on_when_nobody_reads_what_it_says() {
    let workplace = Workplace::new();
    let mut command = workplace.train_command(&["--logging_steps", "1"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait().unwrap().success());
    assert!(workplace.path("out/checkpoint-2/adapter_model.safetensors").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_is_an_error() {
    for args in [&["bench", "--model_type", "list"][..], &["--version"], &["train", "--help"]] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = orpo_wgpu(args).stdout(full).output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {message}");
        assert!(message.contains("cannot write standard output: No space left"), "{args:?}: {message}");
    }
}

#[cfg(unix)]
#[test]
fn a_save_that_fails_leaves_the_last_checkpoint_and_nothing_half_written() {
    let workplace = Workplace::new();
    assert!(workplace.train(&["--save_steps", "1", "--report_to", "none"]).status.success());
    let before = workplace.written();
    // Files may not grow beyond 16 blocks: the adapter does not fit, as on a disk that is full.
    let command = workplace.train_command(&[
        "--max_steps",
        "4",
        "--adapters",
        "out/checkpoint-2",
        "--report_to",
        "none",
    ]);
    let words: Vec<String> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| format!("'{}'", word.to_string_lossy()))
        .collect();
    let script = format!("trap '' XFSZ; ulimit -f 16; exec {}", words.join(" "));
    let output = Command::new("sh").args(["-c", &script]).current_dir(workplace.0.path()).output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot write") && message.contains("adapter_model.safetensors"), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    assert_eq!(workplace.written(), before, "what was there stays, and nothing is added");
}
