//! `orpo-wgpu plan`, and what `train` does with the same prediction: refuse, try the longest pair first, say what to do.

use std::path::Path;
use std::process::{Output, Stdio};

use burn_flex::Flex;
use orpo_wgpu::cli::progress::Progress;
use orpo_wgpu::data::batch::LossCompat;
use orpo_wgpu::data::dataset::{self, Location, Strictness};
use orpo_wgpu::data::draw::Shuffle;
use orpo_wgpu::data::template::Template;
use orpo_wgpu::data::tokenize::{TextTokenizer, TokenizedPair, TruncationStrategy, tokenize_rows};
use orpo_wgpu::device::{self, DeviceChoice};
use orpo_wgpu::error::{Error, Result};
use orpo_wgpu::lora::{self, LoraConfig};
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::model::load::{Checkpoint, load_llama};
use orpo_wgpu::model::{LlamaConfig, Precision};
use orpo_wgpu::train::checkpoints::newest_checkpoint;
use orpo_wgpu::train::metrics::StepMetrics;
use orpo_wgpu::train::optim::AdamWConfig;
use orpo_wgpu::train::plan::Plan;
use orpo_wgpu::train::run_folder::{CheckpointTexts, RunFolder, Tracker};
use orpo_wgpu::train::schedule::{LrSchedulerType, Schedule};
use orpo_wgpu::train::{Observer, TrainData, TrainSettings, train};
use serde_json::{Map, Value};

use crate::support::adapter;
use crate::workplace::{fixture, orpo_wgpu, stderr, stdout};

/// Runs `plan` with these flags in an empty folder, which stays empty.
fn plan(flags: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let output = orpo_wgpu(&[&["plan"], flags].concat()).current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{flags:?}: {}", stderr(&output));
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "plan writes nothing");
    stdout(&output)
}

/// The cells of the row of the table that these flags head, on however many lines they are.
fn row(printed: &str, flags: &str) -> Vec<String> {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for line in printed.lines().filter(|line| line.starts_with('│')) {
        let inner = line.trim_matches('│').trim();
        let cells = inner.split("   ").map(str::trim).filter(|cell| !cell.is_empty());
        let cells: Vec<String> = cells.map(str::to_owned).collect();
        match (cells.as_slice(), rows.last_mut()) {
            ([rest], Some(row)) => row[0] = format!("{} {rest}", row[0]),
            _ => rows.push(cells),
        }
    }
    rows.into_iter()
        .find(|cells| cells[0] == flags)
        .unwrap_or_else(|| panic!("no row `{flags}` in {printed}"))
}

/// What is printed, whatever the lines that it is cut into.
fn unwrapped(printed: &str) -> String {
    printed.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// `14.0 GiB` in bytes.
fn bytes(size: &str) -> f64 {
    let (number, unit) = size.split_once(' ').unwrap();
    let power = ["B", "KiB", "MiB", "GiB"].iter().position(|name| *name == unit).unwrap();
    number.parse::<f64>().unwrap() * 1024f64.powi(power as i32)
}

#[test]
fn the_demo_is_planned_without_a_file() {
    let printed = plan(&["--device", "cpu"]);
    for says in [
        "429 pairs to train on, 4 to evaluate on, 0 rows left out",
        "26 to 54 tokens for prompt + longer answer, which --max_length counts; 31 to 72 for prompt + both answers",
        "54 optimizer steps of 8 pairs, 1.00 epochs of ",
        "time about ",
        "evaluations and saves: a micro-batch of 344 tokens, with random weights, took ",
    ] {
        assert!(unwrapped(&printed).contains(says), "no `{says}` in {printed}");
    }
    let too_wide = printed.lines().find(|line| line.chars().count() > 80);
    assert_eq!(too_wide, None, "a terminal has 80 columns");
    let chosen = row(&printed, "as chosen");
    let total = bytes(&chosen[2]);
    let parts = printed.lines().skip_while(|line| !line.starts_with("memory")).skip(1);
    let parts = parts.take_while(|line| line.starts_with("  "));
    let parts: Vec<_> = parts.map(|line| bytes(line.trim().split("  ").next().unwrap())).collect();
    assert!((parts.iter().sum::<f64>() / total - 1.0).abs() < 0.03, "the parts make the total: {parts:?}");
    assert!(
        parts.len() > 2 && parts.iter().all(|bytes| *bytes > 0.0),
        "what takes nothing is not listed: {parts:?}"
    );
    assert!(printed.contains("kept for backward (layers run again in backward)"), "{printed}");
    let others = [&chosen, &row(&printed, "--gradient_checkpointing false")].map(|row| row[3..].concat());
    assert_eq!(others, ["4yes", "0yes"], "layers that run again");
    assert!(bytes(&row(&printed, "--gradient_checkpointing false")[2]) > total);
    assert!(bytes(&row(&printed, "--batch_size 1 --gradient_accumulation_steps 8")[2]) < total);
}

#[test]
fn the_demo_s_pairs_are_data_like_others() {
    let flags = ["--dataset", "demo#5", "--val_dataset", "demo", "--device", "cpu"];
    let printed = plan(&flags);
    assert!(printed.contains("5 pairs to train on, 30 to evaluate on, 0 rows left out"), "{printed}");
    let shape = ["--model_type", "llama3-8b-instruct", "--max_memory", "80GB", "--device", "auto"];
    let printed = plan(&[&flags[..4], &shape].concat());
    assert!(printed.contains("1 optimizer step of 5 pairs, 1.00 epochs of "), "{printed}");
}

#[test]
fn shapes_are_listed() {
    let printed = plan(&["--model_type", "list"]);
    assert!(printed.contains("llama3-8b-instruct"), "{printed}");
}

#[test]
fn llama_3_8b_is_planned_by_its_name_alone_for_a_card_that_is_not_here() {
    let flags =
        ["--model_type", "llama3-8b-instruct", "--max_length", "2048", "--device", "auto", "--max_memory"];
    let printed = plan(&[&flags[..], &["12GB"]].concat());
    assert!(printed.contains("8.03 billion weights"), "{printed}");
    assert!(unwrapped(&printed).contains("two sequences of 2,048 tokens"), "{printed}");
    assert!(unwrapped(&printed).contains("11.2 GiB by --max_memory 12GB"), "{printed}");
    assert!(printed.lines().all(|line| line.chars().count() <= 80), "a terminal has 80 columns: {printed}");
    let fits = |flags: &str| row(&printed, flags).last().unwrap().clone();
    assert_eq!(fits("as chosen"), "no");
    assert_eq!(fits("--quantization_bit 8"), "no");
    assert_eq!(fits("--quantization_bit 4"), "yes");
    assert!(printed.contains("nearest  --quantization_bit 4 fits, with"), "{printed}");
    let small = plan(&[&flags[..], &["2GiB"]].concat());
    assert!(small.contains("nearest  no settings fit: "), "{small}");
    let large = plan(&[&flags[..], &["80GB"]].concat());
    assert!(!large.contains("nearest") && row(&large, "as chosen").last().unwrap() == "yes", "{large}");
    let steps = plan(&[&flags[..], &["80GB", "--max_steps", "10"]].concat());
    // Of a pair 2 x 2,048 tokens but for the shared one and both last ones.
    let says = "10 optimizer steps of 16 pairs, 654,880 tokens: ";
    assert!(unwrapped(&steps).contains(says), "how many epochs that is, nobody knows: {steps}");
}

#[test]
fn the_readme_s_table_of_memory_is_what_plan_predicts() {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(readme).unwrap();
    for (name, model_type, max_length) in [
        ("Llama-3-8B", "llama3-8b-instruct", "2048"),
        ("Llama-3-8B", "llama3-8b-instruct", "1024"),
        ("Llama-3.2-3B", "llama3_2-3b-instruct", "2048"),
        ("Llama-3.2-1B", "llama3_2-1b-instruct", "2048"),
    ] {
        let model = ["--model_type", model_type, "--dtype", "fp16", "--max_length", max_length];
        // Too small for anything to be kept for speed.
        let printed = plan(&[&model[..], &["--device", "auto", "--max_memory", "2GiB"]].concat());
        let settings = [
            "as chosen",
            "--quantization_bit 8",
            "--quantization_bit 4",
            "--quantization_bit 4 --quantize_lm_head true",
        ];
        let totals = settings.map(|flags| row(&printed, flags)[2].clone());
        let line = format!("| {name}, 2 x {max_length} tokens | {} |", totals.join(" | "));
        assert!(readme.contains(&line), "no `{line}`");
    }
}

#[test]
fn a_folder_needs_no_weights_and_its_rows_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(fixture("gqa/model").join(name), folder.path().join(name)).unwrap();
    }
    let pairs = fixture("gqa/pairs.jsonl");
    let flags = ["plan", "--model_id_or_path", ".", "--device", "cpu", "--max_length", "60", "--dataset"];
    let output = orpo_wgpu(&[&flags[..], &[pairs.to_str().unwrap()]].concat())
        .current_dir(folder.path())
        .output()
        .unwrap();
    let printed = stdout(&output);
    assert!(output.status.success(), "{}", stderr(&output));
    let left_out = stderr(&output).matches("left out: ").count();
    let says =
        format!("data     {} pairs to train on, 0 to evaluate on, {left_out} rows left out", 7 - left_out);
    assert!(left_out > 0 && printed.contains(&says), "{printed}");
    let lost = format!("note: {left_out} of 7 rows are left out, which is most of them");
    assert!(stderr(&output).contains(&lost), "{}", stderr(&output));
}

/// Without a tokenizer rows are counted, and those that cannot be used are no less named.
#[test]
fn rows_that_cannot_be_used_are_named_without_a_model_s_folder() {
    let folder = tempfile::tempdir().unwrap();
    let rows = r#"{"query": "q", "response": "c", "rejected_response": "r"}
{"query": "q", "response": "c", "rejected_response": "c"}
"#;
    std::fs::write(folder.path().join("rows.jsonl"), rows).unwrap();
    let flags = ["plan", "--model_type", "llama3-8b-instruct", "--device", "cpu", "--dataset", "rows.jsonl"];
    let output = orpo_wgpu(&flags).current_dir(folder.path()).output().unwrap();
    assert!(stdout(&output).contains(" of 1 pair"), "{}", stdout(&output));
    let says = "left out: rows.jsonl:2: the chosen and the rejected answer are equal";
    assert!(stderr(&output).contains(says), "{}", stderr(&output));
}

#[test]
fn a_folder_is_planned_without_data_for_the_longest_pairs() {
    let model = fixture("gqa/model");
    let flags = ["--model_id_or_path", model.to_str().unwrap(), "--device", "cpu", "--max_length", "64"];
    let printed = unwrapped(&plan(&flags));
    for says in [
        "two sequences of 64 tokens with nothing in common",
        "without a --dataset nothing shorter is known",
        "1,000 pairs, as neither --dataset nor --max_steps says how many",
    ] {
        assert!(printed.contains(says), "no `{says}` in {printed}");
    }
}

#[test]
fn sequences_that_the_model_was_not_made_for_are_told() {
    let (model, folder) = (fixture("gqa/model"), tempfile::tempdir().unwrap());
    let notes = |max_length: &str| {
        let model = ["--model_id_or_path", model.to_str().unwrap(), "--device", "cpu"];
        let output = orpo_wgpu(&[&["plan", "--max_length", max_length], &model[..]].concat())
            .current_dir(folder.path())
            .output()
            .unwrap();
        stderr(&output)
    };
    assert!(notes("600").contains("has 600 tokens, the model was made for 512"), "{}", notes("600"));
    assert_eq!(notes("512"), "");
}

#[test]
fn train_predicts_for_the_cpu_what_plan_does() {
    let folder = tempfile::tempdir().unwrap();
    let (model, pairs) = (fixture("gqa/model"), fixture("gqa/pairs.jsonl"));
    let paths = [model.to_str().unwrap(), pairs.to_str().unwrap()];
    let printed = plan(&[
        "--device",
        "cpu",
        "--model_id_or_path",
        paths[0],
        "--dataset",
        paths[1],
        "--warmup_ratio",
        "0",
    ]);
    assert!(printed.contains("  the embedding, as it is stored"), "{printed}");
    let trained = train_gqa(folder.path(), &["--device", "cpu", "--max_steps", "1"]);
    let message = stderr(&trained);
    let total = &row(&printed, "as chosen")[2];
    assert!(message.contains(&format!("memory   {total} of ")), "no {total} in {message}");
}

/// As behind `| head`.
#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child =
        orpo_wgpu(&["plan"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("it starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
}

#[test]
fn bad_flags_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    for (flags, code, says) in [
        (["--max_memory", "much"], 2, "`much` is no size: expected 24GiB"),
        (["--model_type", "llama9"], 2, "expected one of llama3-8b-instruct"),
        (["--dtype", "fp8"], 2, "--dtype is `fp8`"),
        (["--model_id_or_path", "nowhere"], 1, "there is no such folder"),
    ] {
        let output = orpo_wgpu(&["plan", flags[0], flags[1]]).current_dir(folder.path()).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{flags:?}");
        assert!(stderr(&output).contains(says), "{flags:?}: {}", stderr(&output));
    }
}

/// Trains the `gqa` case's model in a folder of its own.
fn train_gqa(folder: &Path, flags: &[&str]) -> Output {
    let (model, pairs) = (fixture("gqa/model"), fixture("gqa/pairs.jsonl"));
    let mut command = orpo_wgpu(&["train", "--model_id_or_path"]);
    command.arg(model).arg("--dataset").arg(pairs);
    command.args(["--output_dir", "out", "--add_output_dir_suffix", "false", "--overwrite_output_dir"]);
    command.args(["--warmup_ratio", "0"]);
    command.args(flags).current_dir(folder).output().unwrap()
}

#[test]
fn train_refuses_what_does_not_fit_and_the_flags_that_it_names_fit() {
    let folder = tempfile::tempdir().unwrap();
    let base = ["--device", "cpu", "--max_steps", "1", "--max_memory", "2300KB", "--batch_size", "4"];
    let refused = train_gqa(folder.path(), &base);
    let message = stderr(&refused);
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(message.contains("is predicted to take ") && message.contains("(85 % of 2.2 MiB)"), "{message}");
    assert!(!folder.path().join("out").exists(), "nothing is written");
    let hint = message.split("hint: ").nth(1).unwrap();
    let flags: Vec<&str> = hint.split(" fits, with ").next().unwrap().split_whitespace().collect();
    assert!(flags.contains(&"--batch_size"), "{message}");
    let flags = [&base[..6], &flags].concat();
    let taken = train_gqa(folder.path(), &flags);
    assert!(taken.status.success(), "{flags:?}: {}", stderr(&taken));
    // A device that is said to have more is believed.
    let more =
        train_gqa(folder.path(), &[&base[..4], &["--batch_size", "4", "--max_memory", "1GB"]].concat());
    assert!(more.status.success(), "{}", stderr(&more));
}

#[test]
fn the_longest_row_is_tried_first_and_changes_nothing() {
    let run = |max_memory: &str| {
        let folder = tempfile::tempdir().unwrap();
        let flags =
            ["--device", "cpu", "--max_steps", "2", "--logging_steps", "1", "--max_memory", max_memory];
        let output = train_gqa(folder.path(), &flags);
        let message = stderr(&output);
        assert!(output.status.success(), "{message}");
        let log = std::fs::read_to_string(folder.path().join("out/logging.jsonl")).unwrap();
        let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let figures = |line: &Value| (line["loss"].as_f64().unwrap(), line["grad_norm"].as_f64().unwrap());
        (message, lines.iter().map(figures).collect::<Vec<_>>())
    };
    // The CPU tries it where its memory is in sight.
    let (message, tried) = run("3MB");
    let line = |start: &str| message.lines().position(|line| line.starts_with(start));
    assert!(message.contains("pairs.jsonl:2 (122 tokens) fits, "), "{message}");
    assert!(line("longest  row ").is_some() && line("longest  row ") < line("step "), "{message}");
    let (message, untried) = run("1GB");
    assert!(!message.contains("longest  "), "{message}");
    assert_eq!(tried, untried, "the run's figures with and without the trial");
}

#[test]
fn the_adapter_s_trial_says_how_far_the_prediction_was_off() {
    if adapter().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = train_gqa(folder.path(), &["--device", "wgpu", "--max_steps", "1", "--dtype", "fp32"]);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    let line = message.lines().find(|line| line.starts_with("longest  row ")).expect(&message);
    let off: f64 = line.split(" predicted (").nth(1).unwrap().split(" %").next().unwrap().parse().unwrap();
    assert!(off.abs() < 10.0, "{line}");
}

/// Watches a run and, before a step, lets a thread by the name of the device's own fail as wgpu does when a buffer does not fit.
struct FullDevice {
    step: usize,
    thread: String,
}

impl Observer for FullDevice {
    fn before_step(&mut self, step: usize, rows: &[&Location]) {
        device::doing(format!("step {step} ({})", rows[0]));
        if step == self.step {
            let thread = std::thread::Builder::new().name(self.thread.clone());
            // The text is that of wgpu 29's default handler of errors.
            thread.spawn(|| panic!("wgpu error: Out of Memory\n")).unwrap().join().unwrap_err();
            panic!("the device's thread is gone");
        }
    }
    fn before_evaluation(&mut self, _step: usize) {}
    fn on_step(&mut self, _step: usize, _metrics: &StepMetrics, _tokens_per_second: f64) {}
    fn on_skip(&mut self, _step: usize, _scale: f64) {}
    fn on_log(&mut self, _line: &Map<String, Value>) {}
    fn memory_bytes(&self) -> u64 {
        0
    }
}

/// Runs the `gqa` case's rows, edited, for six steps on a device that fails before the end, with a checkpoint every two.
fn train_until_failure(
    folder: &Path,
    choice: &DeviceChoice,
    observer: &mut dyn Observer,
    edit: impl FnOnce(&mut [TokenizedPair]),
) -> Result<()> {
    let model_folder = fixture("gqa/model");
    let tokenizer = TextTokenizer::from_folder(&model_folder)?;
    let specs = [fixture("gqa/pairs.jsonl").display().to_string()];
    let rows = dataset::load(&specs, &Default::default(), Strictness::Strict, 1)?.rows;
    let (cut, strict) = (TruncationStrategy::Delete, Strictness::Strict);
    let (mut rows, _) = tokenize_rows(&rows, &tokenizer, Template::Llama3, 512, cut, None, strict)?;
    edit(&mut rows);
    let config = LlamaConfig::read(&model_folder.join("config.json"))?;
    let precision = Precision::dense(burn::tensor::DType::F32);
    let checkpoint = Checkpoint::open_folder(&model_folder)?;
    let mut model = load_llama::<Flex>(&checkpoint, &config, precision, 1 << 30, &Default::default())?;
    let lora_config =
        LoraConfig { r: 4, lora_alpha: 8.0, target_modules: lora::target_modules(&["ALL".to_owned()])? };
    lora::attach(&mut model, &lora_config, 1);
    let settings = TrainSettings {
        plan: Plan {
            n_rows: rows.len(),
            batch_size: 1,
            gradient_accumulation_steps: 1,
            shuffle: Shuffle::Off,
        },
        beta: 0.1,
        loss_compat: LossCompat::Swift,
        schedule: Schedule {
            learning_rate: 1e-3,
            kind: LrSchedulerType::Constant,
            warmup_steps: 0,
            max_steps: 6,
        },
        adamw: AdamWConfig {
            adam_beta1: 0.9,
            adam_beta2: 0.95,
            adam_epsilon: 1e-8,
            weight_decay: 0.1,
            max_grad_norm: 1.0,
        },
        loss_scale: None,
        keep: Keep::Input.into(),
        logging_steps: 1,
        eval_steps: 10,
        save_steps: 2,
    };
    let texts = CheckpointTexts { base_model: "gqa".to_owned(), args: "{}".to_owned(), card: String::new() };
    let mut run = RunFolder::create(folder, texts, 2, Vec::new(), Tracker::None)?;
    let data = TrainData { train: &rows, val: &[] };
    device::guard("training", choice, || {
        train(&mut model, &lora_config, data, &settings, &mut run, None, observer).map(drop)
    })
}

#[test]
fn a_device_that_runs_out_of_memory_is_an_error_and_the_last_checkpoint_stays() {
    // The device's own thread is known by its name, which is all that has to be the device's here.
    let memory = 8 << 30;
    let choice = DeviceChoice::elsewhere(memory);
    let DeviceChoice::Wgpu { device, .. } = &choice else { panic!("it is a GPU") };
    let id = burn::tensor::backend::DeviceOps::id(device);
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().join("run");
    let thread = format!("DSD-{}-{}", id.type_id, id.index_id);
    let mut full = FullDevice { step: 4, thread };
    let error = train_until_failure(&run, &choice, &mut full, |_| ()).unwrap_err();
    assert!(matches!(error, Error::OutOfMemory { .. }), "{error}");
    assert_eq!(error.exit_code(), 1);
    let message = error.to_string();
    for says in ["is out of memory in step 4 (", "pairs.jsonl:4", "could not be allocated", " of 8 GiB"] {
        assert!(message.contains(says), "no `{says}` in {message}");
    }
    assert!(error.hint().is_some_and(|hint| hint.contains("--quantization_bit")), "{:?}", error.hint());
    let checkpoint = newest_checkpoint([run]).unwrap();
    assert!(checkpoint.ends_with("checkpoint-2"), "{}", checkpoint.display());
    let model_folder = fixture("gqa/model");
    let config = LlamaConfig::read(&model_folder.join("config.json")).unwrap();
    let weights = Checkpoint::open_folder(&model_folder).unwrap();
    let precision = Precision::dense(burn::tensor::DType::F32);
    let mut model = load_llama::<Flex>(&weights, &config, precision, 1 << 30, &Default::default()).unwrap();
    lora::load(&mut model, &checkpoint).unwrap();
}

/// While a step is computed the next one's rows are looked up and sent.
#[test]
fn what_fails_ahead_of_its_step_is_told_of_by_its_own_number_and_rows() {
    let folder = tempfile::tempdir().unwrap();
    let mut progress = Progress::new(6, 0, 1, false, &|| 0);
    // A token that the embedding has no row for.
    let edit = |rows: &mut [TokenizedPair]| rows[3].chosen[0] = 1 << 20;
    let error = train_until_failure(&folder.path().join("run"), &DeviceChoice::Cpu, &mut progress, edit);
    let message = error.unwrap_err().to_string();
    assert!(
        message.contains("device cpu: step 4 (") && message.contains("pairs.jsonl:4), sent ahead failed: "),
        "{message}"
    );
}

#[test]
fn rows_of_which_none_is_left_to_train_on_are_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let row = "{\"query\": \"q\", \"response\": \"c\", \"rejected_response\": \"r\"}\n";
    std::fs::write(folder.path().join("twice.jsonl"), row.repeat(2)).unwrap();
    let flags = [
        "--model_type",
        "small",
        "--dataset",
        "twice.jsonl",
        "--dataset_test_ratio",
        "0.5",
        "--device",
        "cpu",
    ];
    let output = orpo_wgpu(&[&["plan"], &flags[..]].concat()).current_dir(folder.path()).output().unwrap();
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("twice.jsonl: none of its rows is left to train on"), "{message}");
}
