//! What a run writes and says: its files, its first and last words, and output that goes nowhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::workplace::{Workplace, fixture, orpo_wgpu, stderr, stdout, write_pairs};

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
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;

        let mode =
            |file| fs::metadata(workplace.path("out/checkpoint-2").join(file)).unwrap().permissions().mode();
        assert_eq!(
            mode("adapter_model.safetensors"),
            mode("args.json"),
            "whoever may read one may read the other"
        );
    }
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
    let printed = stdout(&output);
    assert!(
        printed.contains("orpo-wgpu infer --model_id_or_path model --device cpu --adapters out/checkpoint-2"),
        "{printed}"
    );
    // The run stands for its newest checkpoint.
    let flags = ["--model_id_or_path", "model", "--adapters", "out", "--max_new_tokens", "1"];
    let mut infer = orpo_wgpu(&["infer", "--device", "cpu", "hi"]);
    let output = infer.args(flags).current_dir(workplace.0.path()).output().unwrap();
    assert!(stderr(&output).contains("model with out/checkpoint-2"), "{}", stderr(&output));
}

#[test]
fn a_folder_that_cannot_be_written_is_told_before_anything_is_loaded() {
    let workplace = Workplace::new();
    let before = workplace.written();
    // The rows would be told of first: there are none.
    let told = |output_dir: &str| {
        stderr(&workplace.train(&["--output_dir", output_dir, "--dataset", "nowhere.jsonl"]))
    };
    for output_dir in ["model/config.json", "model/config.json/out"] {
        let message = told(output_dir);
        let cannot = "orpo-wgpu: cannot write into model/config.json: Not a directory";
        assert!(message.contains(cannot), "{output_dir}: {message}");
    }
    // What can be is tried and left as it was.
    let message = told("model/new/out");
    assert!(message.contains("nowhere.jsonl"), "{message}");
    assert_eq!((workplace.written(), workplace.path("model/new").exists()), (before, false));
}

#[test]
fn a_run_is_not_written_over_without_a_word() {
    let workplace = Workplace::new();
    let train = |flags: &[&str]| {
        let output =
            workplace.train(&[&["--overwrite_output_dir", "false", "--save_steps", "1"], flags].concat());
        (output.status.code(), stderr(&output))
    };
    let steps = || fs::read_to_string(workplace.path("out/logging.jsonl")).unwrap().lines().count();
    assert_eq!(train(&["--logging_steps", "1"]).0, Some(0));
    let before = workplace.written();
    // Before anything is loaded: there is no such model.
    let (code, message) = train(&["--model_id_or_path", "nowhere"]);
    assert_eq!(code, Some(2), "{message}");
    for says in [
        "--output_dir out holds a run, whose files would be replaced",
        "hint: --resume_from_checkpoint out goes on from it with the same flags, another --output_dir or --add_output_dir_suffix true leaves",
        "--overwrite_output_dir true writes over it",
    ] {
        assert!(message.contains(says), "no `{says}` in {message}");
    }
    let other = ["--output_dir", "other"];
    assert_eq!(train(&other).0, Some(0));
    let resume = ["--max_steps", "3", "--logging_steps", "1", "--resume_from_checkpoint"];
    assert_eq!(train(&[&resume[..], &["other/checkpoint-2"]].concat()).0, Some(2), "another run");
    assert_eq!((workplace.written(), steps()), (before, 2));

    let (code, message) = train(&[&resume[..], &["out/checkpoint-2"]].concat());
    assert_eq!((code, steps()), (Some(0), 3), "{message}");
    let args = fs::read_to_string(workplace.path("out/args.json")).unwrap();
    assert!(args.contains("\"resume_from_checkpoint\": null"), "its record would write over it: {args}");
    // An evaluation that the next run has not, and a picture that is nobody's.
    let [stale, foreign] =
        ["eval_loss", "eval_plot"].map(|name| workplace.path(&format!("out/images/{name}.png")));
    for picture in [&stale, &foreign] {
        fs::write(picture, "").unwrap();
    }
    let log = workplace.path("out/logging.jsonl");
    let lines = fs::read_to_string(&log).unwrap() + "{\"step\": 3, \"eval_loss\": 1.0}\n";
    fs::write(&log, lines).unwrap();
    let again = ["--overwrite_output_dir", "true", "--logging_steps", "1"];
    assert!(workplace.train(&again).status.success());
    assert!(!stale.exists() && foreign.exists() && workplace.path("out/images/train_loss.png").exists());
    assert_eq!(steps(), 2);
    let args = fs::read_to_string(workplace.path("out/args.json")).unwrap();
    assert!(args.contains("\"overwrite_output_dir\": false"), "the record writes over nothing: {args}");
    let beside = workplace.train(&["--add_output_dir_suffix", "true"]);
    let message = stderr(&beside);
    assert!(
        message.contains("--overwrite_output_dir true does nothing: each run has a folder of its own"),
        "{message}"
    );
    assert!(!stderr(&workplace.train(&again)).contains("does nothing"));
}

#[test]
fn an_adapter_of_another_system_prompt_or_chat_format_is_noted() {
    let workplace = Workplace::new();
    let asked = ["--system", "Be brief.", "--template_type", "default-generation"];
    assert!(workplace.train(&asked).status.success());
    let told = |flags: &[&str]| {
        let mut infer = orpo_wgpu(&["infer", "hi", "--device", "cpu", "--max_new_tokens", "1"]);
        infer.args(["--model_id_or_path", "model", "--adapters", "out"]).args(flags);
        stderr(&infer.current_dir(workplace.path("")).output().unwrap())
    };
    let system = "adapter  it was trained with --system 'Be brief.', which is not given here";
    let message = told(&asked[2..]);
    assert!(message.contains(system), "{message}");
    let message = told(&asked);
    assert!(!message.contains("it was trained with"), "{message}");
    // An empty one is none.
    let record = workplace.path("out/checkpoint-2/args.json");
    let args = fs::read_to_string(&record).unwrap();
    fs::write(&record, args.replace("\"Be brief.\"", "\"\"")).unwrap();
    let message = told(&[]);
    assert!(message.contains("trained with --template_type 'default-generation', which"), "{message}");
}

#[test]
fn an_adapter_that_names_another_model_is_noted() {
    let workplace = Workplace::new();
    assert!(workplace.train(&[]).status.success());
    let again = || stderr(&workplace.train(&["--adapters", "out/checkpoint-2", "--output_dir", "again"]));
    assert!(!again().contains("as its model"), "{}", again());
    let path = workplace.path("out/checkpoint-2/adapter_config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    config["base_model_name_or_path"] = "meta-llama/Meta-Llama-3-8B".into();
    fs::write(&path, config.to_string()).unwrap();
    let message = again();
    assert!(
        message.contains("it names `meta-llama/Meta-Llama-3-8B` as its model, and is used with model"),
        "{message}"
    );
}

/// What repeats a run begins where it began: at an adapter, at nothing, or at another run's checkpoint, and never at one of its own.
#[test]
fn a_record_tells_where_the_run_began() {
    let workplace = Workplace::new();
    let began = |flags: &[&str]| {
        let output = workplace.train(flags);
        assert!(output.status.success(), "{}", stderr(&output));
        let adapter =
            stdout(&output).lines().find_map(|line| line.strip_prefix("adapter: ").map(str::to_owned));
        let record = fs::read_to_string(workplace.path(&adapter.unwrap()).join("args.json")).unwrap();
        let record: Value = serde_json::from_str(&record).unwrap();
        ["adapters", "resume_from_checkpoint"].map(|name| {
            let path = record[name].as_str().map(Path::new);
            path.map(|path| path.strip_prefix(workplace.path("").canonicalize().unwrap()).unwrap().to_owned())
        })
    };
    let checkpoint = |path: &str| Some(PathBuf::from(path));
    assert_eq!(began(&[]), [None, None]);
    let second = ["--output_dir", "second"];
    assert_eq!(
        began(&[&second[..], &["--adapters", "out"]].concat()),
        [checkpoint("out/checkpoint-2"), None]
    );
    let on = ["--max_steps", "3", "--resume_from_checkpoint"];
    let goes_on = began(&[&second[..], &on, &["second"]].concat());
    assert_eq!(goes_on, [checkpoint("out/checkpoint-2"), None]);
    let below = ["--add_output_dir_suffix", "true"];
    assert_eq!(began(&[&below[..], &on, &["out"]].concat()), [None, checkpoint("out/checkpoint-2")]);
}

#[test]
fn a_run_that_goes_on_in_its_folder_keeps_as_many_checkpoints_as_before() {
    let workplace = Workplace::new();
    let kept = |flags: &[&str]| -> Vec<String> {
        let output = workplace.train(&[&["--save_steps", "1", "--save_total_limit", "2"], flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let names = fs::read_dir(workplace.path("out")).unwrap().map(|e| e.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.retain(|name| name.starts_with("checkpoint-"));
        names.sort();
        names
    };
    assert_eq!(kept(&["--max_steps", "3"]), ["checkpoint-2", "checkpoint-3"]);
    fs::create_dir(workplace.path("out/checkpoint-1")).unwrap();
    let resume = ["--max_steps", "4", "--resume_from_checkpoint", "out/checkpoint-3"];
    assert_eq!(kept(&resume), ["checkpoint-1", "checkpoint-3", "checkpoint-4"], "another run's stays");
}

/// As many rows are not the same rows.
#[test]
fn a_run_goes_on_with_its_own_rows_alone() {
    let workplace = Workplace::new();
    assert!(workplace.train(&["--max_steps", "1"]).status.success());
    let resume = |checkpoint: &'static str| {
        workplace.train(&["--resume_from_checkpoint", checkpoint, "--output_dir", "next"])
    };
    let pairs = fs::read_to_string(workplace.path("pairs.jsonl")).unwrap();
    let mut lines: Vec<_> = pairs.lines().collect();
    lines.swap(0, 1);
    fs::write(workplace.path("pairs.jsonl"), lines.join("\n")).unwrap();
    let output = resume("out/checkpoint-1");
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    for says in [
        "belongs to another run: its rows were others",
        "hint: --config out/checkpoint-1/args.json --resume_from_checkpoint out/checkpoint-1 goes on",
    ] {
        assert!(stderr(&output).contains(says), "no `{says}` in {}", stderr(&output));
    }
    let n_rows = lines.len();
    fs::write(workplace.path("pairs.jsonl"), lines[1..].join("\n")).unwrap();
    let message = stderr(&resume("out/checkpoint-1"));
    let differs = format!("the number of rows was {n_rows} and is {}", n_rows - 1);
    assert!(message.contains(&differs), "{message}");
    fs::write(workplace.path("pairs.jsonl"), lines.join("\n")).unwrap();
    // What an earlier version wrote says nothing of its rows.
    let state = workplace.path("out/checkpoint-1/trainer_state.json");
    let mut older: Value = serde_json::from_str(&fs::read_to_string(&state).unwrap()).unwrap();
    for name in ["rows", "checkpoints"] {
        assert!(older.as_object_mut().unwrap().remove(name).is_some(), "{name} is written");
    }
    fs::write(&state, older.to_string()).unwrap();
    assert!(resume("out/checkpoint-1").status.success());
    fs::remove_file(&state).unwrap();
    let message = stderr(&resume("out/checkpoint-1"));
    assert!(message.contains("is an adapter without a trainer_state.json"), "{message}");
}

#[test]
fn rows_that_are_no_longer_whole_or_there_twice_are_told_of() {
    let workplace = Workplace::new();
    let says = |flags: &[&str]| {
        let output = workplace.train(flags);
        assert!(output.status.success(), "{}", stderr(&output));
        stderr(&output)
    };
    let sampled = says(&["--dataset", "pairs.jsonl#21", "--dataset_test_ratio", "0.05"]);
    assert!(sampled.contains("note: 2 rows not trained on, as a copy is held out"), "{sampled}");
    let cut = says(&["--max_length", "60", "--truncation_strategy", "truncation_right"]);
    assert!(cut.contains("note: answers of ") && cut.contains(" cut to --max_length 60"), "{cut}");
    let whole = says(&[]);
    assert!(!whole.contains("note: answers of ") && !whole.contains("not trained on"), "{whole}");
}

/// The evaluation after the last step comes after its save.
#[test]
fn a_run_that_goes_on_has_every_evaluation_once() {
    let workplace = Workplace::new();
    let evaluated = |flags: &[&str]| -> Vec<u64> {
        let held_out = ["--dataset_test_ratio", "0.3", "--eval_steps", "2", "--logging_steps", "1"];
        let output = workplace.train(&[&held_out[..], flags].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        let log = fs::read_to_string(workplace.path("out/logging.jsonl")).unwrap();
        let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines
            .filter(|line| line.get("eval_loss").is_some())
            .map(|line| line["step"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(evaluated(&["--max_steps", "3"]), [0, 2, 3]);
    assert_eq!(evaluated(&["--max_steps", "5", "--resume_from_checkpoint", "out"]), [0, 2, 3, 4, 5]);
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

/// By `script`, which has a terminal for what it runs.
#[cfg(target_os = "linux")]
#[test]
fn a_terminal_sees_the_lines_of_the_log_as_well() {
    let workplace = Workplace::new();
    let flags = ["--logging_steps", "1", "--dataset_test_ratio", "0.3"];
    let train = crate::workplace::quoted(&workplace.train_command(&flags));
    let mut script = Command::new("script");
    let output = script.args(["-qec", &train, "/dev/null"]).current_dir(workplace.0.path()).output();
    let output = output.expect("`script` of util-linux runs");
    let seen = stdout(&output);
    assert!(output.status.success(), "{seen}");
    for says in ["step 1/2  loss ", "step 2/2  loss ", "step 2/2  eval_loss "] {
        assert_eq!(seen.matches(says).count(), 1, "`{says}` in {seen}");
    }
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
    let printed = stdout(&output);
    assert!(printed.contains("\n1 step in "), "{printed}");
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
        let printed = stdout(&output);
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
    let checkpoints = || {
        let written = workplace.written();
        let files = written.into_iter().filter(|file| file.contains("checkpoint-"));
        let contents = files.map(|file| (fs::read(workplace.path("out").join(&file)).ok(), file));
        contents.collect::<Vec<_>>()
    };
    let before = checkpoints();
    assert!(before.len() > 6, "{} files and folders", before.len());
    // Files may not grow beyond 16 blocks: the adapter does not fit, as on a disk that is full.
    let command = workplace.train_command(&[
        "--max_steps",
        "4",
        "--adapters",
        "out/checkpoint-2",
        "--report_to",
        "none",
    ]);
    let script = format!("trap '' XFSZ; ulimit -f 16; exec {}", crate::workplace::quoted(&command));
    let output = Command::new("sh").args(["-c", &script]).current_dir(workplace.0.path()).output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("cannot write") && message.contains("adapter_model.safetensors"), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    assert!(checkpoints() == before, "what was there stays, and nothing is added: {:?}", workplace.written());
}

#[test]
fn pictures_that_cannot_be_drawn_end_no_run() {
    let workplace = Workplace::new();
    fs::create_dir(workplace.path("out")).unwrap();
    fs::write(workplace.path("out/images"), "no folder").unwrap();
    let output = workplace.train(&["--logging_steps", "1"]);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("images"), "{message}");
    assert!(workplace.path("out/checkpoint-2/adapter_model.safetensors").exists());
    assert!(stdout(&output).contains("training rows"), "the summary: {}", stdout(&output));
}

#[test]
fn a_run_that_cannot_begin_leaves_none() {
    let workplace = Workplace::new();
    fs::create_dir(workplace.path("out")).unwrap();
    fs::write(workplace.path("out/runs"), "no folder").unwrap();
    let output = workplace.train(&["--overwrite_output_dir", "false"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot create out/runs"), "{}", stderr(&output));
    assert_eq!(workplace.written(), ["runs"]);
}
