//! Bad input on the command line: what is wrong is said clearly, and nothing is written.

use std::fs;

use serde_json::Value;

use crate::workplace::{Workplace, orpo_wgpu, stderr, write_pairs};

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
            name: "rows to evaluate on that are too long",
            spoil: |w| {
                let row = "{\"query\":\"q\",\"response\":\"a LONG\",\"rejected_response\":\"b\"}\n";
                fs::write(w.path("val.jsonl"), row.replace("LONG", &"long ".repeat(300))).unwrap();
            },
            flags: &["--val_dataset", "val.jsonl", "--max_length", "150"],
            code: 1,
            says: &["val.jsonl: none of its rows can be evaluated on: val.jsonl:1: ", "--max_length"],
        },
        Case {
            name: "calls of tools",
            spoil: |w| {
                let call = "{\"role\":\"assistant\",\"content\":\"\",\"tool_calls\":[{\"id\":\"1\"}]}";
                let user = "{\"role\":\"user\",\"content\":\"q\"}";
                let answer = "{\"role\":\"assistant\",\"content\":\"a\"}";
                write_pairs(
                    w,
                    &format!(
                        "{{\"messages\":[{user},{call},{user},{answer}],\"rejected_response\":\"b\"}}\n"
                    ),
                );
            },
            flags: &[],
            code: 1,
            says: &["pairs.jsonl:1: `messages[1]` has `tool_calls`, without which"],
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
        Case {
            name: "no such device, and no rows either",
            spoil: |w| write_pairs(w, "not json\n"),
            flags: &["--device", "wgpu:99"],
            code: 1,
            says: &["wgpu:99"],
        },
        Case { name: "unknown device", spoil: |_| {}, flags: &["--device", "tpu"], code: 2, says: &["tpu"] },
        Case {
            name: "words that say nothing, of a model that is not there",
            spoil: |_| {},
            flags: &[
                "--model_id_or_path",
                "nowhere",
                "--loss_compat",
                "tlr",
                "--device",
                "tpu",
                "--truncation_strategy",
                "left",
                "--template_type",
                "chatml",
                "--lora_target_modules",
                "query",
                "--learning_rate",
                "0",
                "--quantize_lm_head",
                "true",
            ],
            code: 2,
            says: &[
                "--loss_compat `tlr`: expected swift",
                "--device `tpu`: expected auto",
                "--truncation_strategy `left`: expected delete",
                "--template_type `chatml`: expected AUTO",
                "--lora_target_modules: no module named `query`",
                "--learning_rate is 0, expected more than 0",
                "--quantize_lm_head is true",
                "hint: ",
            ],
        },
        Case {
            name: "a learning rate without its minus",
            spoil: |_| {},
            flags: &["--learning_rate", "1e4"],
            code: 2,
            says: &["--learning_rate is 10000, expected more than 0 and less than 1"],
        },
        Case {
            name: "an epsilon that a GPU takes for 0",
            spoil: |_| (),
            flags: &["--adam_epsilon", "1e-50"],
            code: 2,
            says: &["--adam_epsilon is 1e-50, expected at least 1.1754944e-38"],
        },
        Case { name: "dtype", spoil: |_| {}, flags: &["--dtype", "fp8"], code: 2, says: &["fp8", "fp32"] },
        Case {
            name: "dtype of the device, before the rows",
            spoil: |w| write_pairs(w, "not json\n"),
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
            says: &["`per_device_train_batch_size` is no setting (here it is batch_size)"],
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
fn a_model_s_name_alone_is_no_model_to_train() {
    let workplace = Workplace::new();
    fs::write(workplace.path("run.toml"), "model_type = 'llama3-8b-instruct'\n").unwrap();
    for name in [["--model_type", "llama3-8b-instruct"], ["--config", "run.toml"]] {
        let flags = [&["train", "--device", "cpu", "--output_dir", "out"], &name[..]].concat();
        let output = orpo_wgpu(&flags).current_dir(workplace.0.path()).output().unwrap();
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{message}");
        for says in [
            "--model_type `llama3-8b-instruct` names a model, and nothing is downloaded",
            "hint: fetch the model and pass its folder as --model_id_or_path",
        ] {
            assert!(message.contains(says), "no `{says}` in {message}");
        }
        assert_eq!(workplace.written(), Vec::<String>::new());
    }
}

/// On a machine whose GPU is taken there is nothing to explain.
#[test]
fn why_it_is_the_cpu_is_said_before_what_the_cpu_does_not_do() {
    let workplace = Workplace::new();
    let mut command = workplace.train_command(&["--device", "auto", "--dtype", "bf16"]);
    let message = stderr(&command.env("VK_DRIVER_FILES", "nowhere").output().unwrap());
    if message.starts_with("device   the CPU, since ") {
        assert!(message.contains("cpu does not compute in bf16"), "{message}");
    } else {
        // A GPU was taken, whether it has bf16 or not.
        assert!(!message.contains("cpu"), "{message}");
    }
}

#[test]
fn an_error_stands_apart_from_what_was_said_before() {
    let workplace = Workplace::new();
    let pairs = fs::read_to_string(workplace.path("pairs.jsonl")).unwrap();
    write_pairs(&workplace, &format!("{pairs}{}", "{\"query\":\"q\"}\n".repeat(7)));
    let message = stderr(&workplace.train(&["--max_memory", "500KB"]));
    assert!(message.contains("\nleft out: and 2 more\n"), "{message}");
    assert!(message.contains("\n\norpo-wgpu: does not fit the device: the longest step"), "{message}");
    write_pairs(&workplace, &pairs);
    let message = stderr(&workplace.train(&["--max_length", "3"]));
    assert!(message.starts_with("orpo-wgpu: pairs.jsonl: none of its rows can be trained on"), "{message}");
}
