//! `orpo-wgpu export`: a merged model is the model with its adapter.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use burn::tensor::DType;
use burn_flex::Flex;
use half::{bf16, f16};
use orpo_wgpu::model::load::{Checkpoint, load_llama};
use orpo_wgpu::model::{LlamaConfig, Precision};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

use crate::goldens::{CASES, Case};
use crate::workplace::{Workplace, fixture, orpo_wgpu, stderr, stdout};

fn export(folder: &Path, flags: &[&str]) -> Output {
    orpo_wgpu(&[&["export"], flags].concat()).current_dir(folder).output().unwrap()
}

fn exported(folder: &Path, flags: &[&str]) -> String {
    let output = export(folder, flags);
    assert!(output.status.success(), "{flags:?}: {}", stderr(&output));
    stdout(&output)
}

fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Some models are in one file and some in several, one is tied.
#[test]
fn a_merged_model_computes_what_transformers_does_with_the_adapter() {
    let folder = tempfile::tempdir().unwrap();
    for name in CASES {
        let case = Case::open(name);
        let (model, merged) = (case.folder.join("model"), folder.path().join(name));
        let paths = [model.clone(), case.folder.join("adapter"), merged.clone()]
            .map(|path| path.display().to_string());
        let [from, adapter, to] = &paths;
        exported(folder.path(), &["--model_id_or_path", from, "--adapters", adapter, "--output_dir", to]);
        assert_eq!(names(&merged), names(&model));
        let config = LlamaConfig::read(&merged.join("config.json")).unwrap();
        let checkpoint = Checkpoint::open_folder(&merged).unwrap();
        let precision = Precision::dense(DType::F32);
        let merged =
            load_llama::<Flex>(&checkpoint, &config, precision, 1 << 20, &Default::default()).unwrap();
        // Sums are stored with 24, 11 or 8 bits. The adapter itself changes log-probabilities by up to 1 to 4.
        let atol = match checkpoint.dtype("model.norm.weight") {
            Dtype::F16 => 5e-3,
            Dtype::BF16 => 3e-2,
            _ => 2e-5,
        };
        case.check_forward("adapter", &merged, atol);
    }
    assert_eq!(names(folder.path()).len(), CASES.len(), "nothing is left beside them");
}

/// The `gqa` case's model with its values stored in another type.
fn stored_as(workplace: &Workplace, dtype: Dtype) -> PathBuf {
    let checkpoint = Checkpoint::open_folder(&workplace.path("model")).unwrap();
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = checkpoint
        .names()
        .map(|name| {
            let bytes = checkpoint.floats(name).into_iter().flat_map(|value| match dtype {
                Dtype::F16 => f16::from_f32(value).to_le_bytes(),
                _ => bf16::from_f32(value).to_le_bytes(),
            });
            (name.to_owned(), checkpoint.shape(name).unwrap().to_vec(), bytes.collect())
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| (name, TensorView::new(dtype, shape.clone(), bytes).unwrap()));
    let path = workplace.path("model/model.safetensors");
    fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    path
}

/// The `gqa` case's adapter, with these settings over its own, as `adapter`.
fn copy_adapter(workplace: &Workplace, settings: &Value) {
    let (from, to) = (fixture("gqa/adapter"), workplace.path("adapter"));
    fs::create_dir(&to).unwrap();
    fs::copy(from.join("adapter_model.safetensors"), to.join("adapter_model.safetensors")).unwrap();
    let text = fs::read_to_string(from.join("adapter_config.json")).unwrap();
    let mut written: Map<String, Value> = serde_json::from_str(&text).unwrap();
    assert_eq!((&written["r"], &written["lora_alpha"]), (&json!(8), &json!(32)));
    written.extend(settings.as_object().unwrap().clone());
    fs::write(to.join("adapter_config.json"), Value::from(written).to_string()).unwrap();
}

#[test]
fn a_sum_is_rounded_once_to_the_type_of_the_file() {
    let adapter = Checkpoint::open_file(&fixture("gqa/adapter/adapter_model.safetensors")).unwrap();
    let config = LlamaConfig::read(&fixture("gqa/model/config.json")).unwrap();
    let is_own = |name: &str| name.starts_with("model.layers.1.mlp.down_proj.");
    for (dtype, digits, settings) in [
        (Dtype::F16, 11, json!({})),
        (Dtype::BF16, 8, json!({})),
        // Rank-stabilised: by the root of the rank, which is 8.
        (Dtype::F16, 11, json!({"use_rslora": true, "alpha_pattern": {"model.layers.1.mlp.down_proj": 64}})),
    ] {
        let workplace = Workplace::new();
        copy_adapter(&workplace, &settings);
        let before = Checkpoint::open_file(&stored_as(&workplace, dtype)).unwrap();
        exported(
            workplace.0.path(),
            &["--model_id_or_path", "model", "--adapters", "adapter", "--output_dir", "merged"],
        );
        let after = Checkpoint::open_folder(&workplace.path("merged")).unwrap();
        assert_eq!(before.names().collect::<Vec<_>>(), after.names().collect::<Vec<_>>());
        let mut n_changed = 0;
        for name in before.names() {
            assert_eq!((after.dtype(name), after.shape(name)), (dtype, before.shape(name)), "{name}");
            let part = |part: &str| name.replace(".weight", &format!(".{part}.weight"));
            let [a, b] = ["lora_A", "lora_B"].map(|of| format!("base_model.model.{}", part(of)));
            let Some(&[r, n_in]) = adapter.shape(&a) else {
                assert_eq!(after.bytes(name), before.bytes(name), "{name}");
                continue;
            };
            n_changed += 1;
            let scale = match settings["use_rslora"].as_bool() {
                Some(true) if is_own(name) => 64.0 / 8f64.sqrt(),
                Some(true) => 32.0 / 8f64.sqrt(),
                _ => 4.0,
            };
            let (a, b) = (adapter.floats(&a), adapter.floats(&b));
            let (was, is) = (before.floats(name), after.floats(name));
            for (i, (was, is)) in was.into_iter().zip(is).enumerate() {
                let (row, column) = (i / n_in, i % n_in);
                let part = |k| scale * f64::from(b[row * r + k]) * f64::from(a[k * n_in + column]);
                let sum = f64::from(was) + (0..r).map(part).sum::<f64>();
                let size = f64::from(was).abs() + (0..r).map(|k| part(k).abs()).sum::<f64>();
                // Half of the last digit, and what f32 adds to it.
                let spacing = 2f64.powi(sum.abs().log2().floor().max(-14.0) as i32 + 1 - digits);
                let off = (f64::from(is) - sum).abs();
                assert!(off <= 0.5 * spacing + 1e-6 * size, "{dtype:?} {name} {i}: {is} for {sum}");
            }
        }
        assert_eq!(n_changed, 7 * config.num_hidden_layers);
    }
}

#[test]
fn the_demo_answers_as_with_its_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = orpo_wgpu(args).current_dir(folder.path()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        stdout(&output)
    };
    let output = export(folder.path(), &[]);
    let says = "orpo-wgpu: invalid configuration: there is no adapter below output/demo\nhint: --adapters takes a run, ";
    assert!(output.status.code() == Some(2) && stderr(&output).starts_with(says), "{}", stderr(&output));
    run(&[
        "train",
        "--device",
        "cpu",
        "--max_steps",
        "30",
        "--dataset_test_ratio",
        "0",
        "--system",
        "Be kind.",
    ]);
    let says = exported(folder.path(), &[]);
    let command = says.lines().last().unwrap().strip_prefix("talk to it: ").unwrap();
    let merged = command.split_once("--model_id_or_path ").unwrap().1;
    let (merged, system) = merged.split_once(' ').unwrap();
    assert!(merged.ends_with("/checkpoint-30-merged") && system == "--system 'Be kind.'", "{says}");
    let ask = |flags: &[&str]| {
        let asked = ["infer", "What is the capital of France?", "--device", "cpu", "--temperature", "0"];
        run(&[&asked, flags].concat())
    };
    let (merged, adapted, plain) =
        (ask(&["--model_id_or_path", merged]), ask(&[]), ask(&["--adapters", "none"]));
    assert_eq!(merged, adapted);
    assert_ne!(merged, plain, "the adapter changes nothing");
}

#[test]
fn what_cannot_be_merged_is_told_and_nothing_is_written() {
    let workplace = Workplace::new();
    copy_adapter(&workplace, &json!({"lora_alpha": 1e9}));
    fs::create_dir(workplace.path("full")).unwrap();
    fs::write(workplace.path("full/notes.txt"), "mine").unwrap();
    stored_as(&workplace, Dtype::F16);
    let before = names(workplace.0.path());
    let adapter = fixture("gqa/adapter").display().to_string();
    let other = fixture("odd/adapter").display().to_string();
    let model = ["--model_id_or_path", "model"];
    for (flags, code, says) in [
        (&[][..], 2, "orpo-wgpu: invalid configuration: no adapter is named\nhint: --adapters takes a run, "),
        (&["--adapters", "none"], 2, "orpo-wgpu: invalid configuration: no adapter is named\n"),
        (&["--adapters", "nowhere"], 1, "nowhere: is not an adapter folder: there is no such folder\n"),
        (&["--adapters", &other], 1, "of its tensors do not fit:"),
        (&["--adapters", &adapter, "--output_dir", "full"], 1, "orpo-wgpu: full: is there already\nhint: "),
        (&["--adapters", &adapter, "--output_dir", "model"], 1, "orpo-wgpu: model: is there already\nhint: "),
        (&["--adapters", &adapter, "--output_dir", ".."], 1, "orpo-wgpu: ..: is there already\nhint: "),
        (&["--adapters", &adapter, "--output_dir", "pairs.jsonl/x"], 1, "cannot create pairs.jsonl/x: "),
        (&["--adapters", "adapter"], 1, " are no finite numbers of F16 any more\nhint: "),
    ] {
        let output = export(workplace.0.path(), &[&model, flags].concat());
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{flags:?}: {message}");
        assert!(message.contains(says), "{flags:?}: {message}");
        assert_eq!(names(workplace.0.path()), before, "{flags:?}");
    }
    assert_eq!(names(&workplace.path("full")).len(), 1);
}

/// What is in a folder is the user's, whatever it is called, and so is what a link or an index leads to.
#[test]
fn nothing_of_the_users_is_replaced() {
    let workplace = Workplace::new();
    copy_adapter(&workplace, &json!({}));
    fs::create_dir_all(workplace.path(".merged.partial")).unwrap();
    fs::write(workplace.path(".merged.partial/notes.txt"), "mine").unwrap();
    let model = workplace.path("model");
    let merge = ["--model_id_or_path", "model", "--adapters", "adapter", "--output_dir"];
    exported(workplace.0.path(), &[&merge[..], &["merged"]].concat());
    assert_eq!(names(&workplace.path(".merged.partial")).len(), 1);
    fs::create_dir(workplace.path("empty")).unwrap();
    let mut there = vec!["merged", "empty"];
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("nowhere", workplace.path("link")).unwrap();
        there.push("link");
    }
    let before = names(workplace.0.path());
    for place in there {
        let output = export(workplace.0.path(), &[&merge[..], &[place]].concat());
        assert!(stderr(&output).contains(&format!("{place}: is there already")), "{}", stderr(&output));
    }
    let weights = fs::read(model.join("model.safetensors")).unwrap();
    let absolute = model.join("model.safetensors").display().to_string();
    for name in [absolute.as_str(), "../model/model.safetensors"] {
        let tensors = Checkpoint::open_file(&model.join("model.safetensors")).unwrap();
        let map: Map<String, Value> =
            tensors.names().map(|tensor| (tensor.to_owned(), name.into())).collect();
        fs::write(model.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string())
            .unwrap();
        let output = export(workplace.0.path(), &[&merge[..], &["other"]].concat());
        let says = format!("names `{name}` for weights, which is no file within its folder");
        assert!(stderr(&output).contains(&says), "{}", stderr(&output));
        assert_eq!(fs::read(model.join("model.safetensors")).unwrap(), weights);
        assert_eq!(names(workplace.0.path()), before);
    }
    // Within the folder it may be where it likes.
    fs::create_dir(model.join("weights")).unwrap();
    fs::rename(model.join("model.safetensors"), model.join("weights/all.safetensors")).unwrap();
    let index = fs::read_to_string(model.join("model.safetensors.index.json")).unwrap();
    let index = index.replace("../model/model.safetensors", "weights/all.safetensors");
    fs::write(model.join("model.safetensors.index.json"), index).unwrap();
    exported(workplace.0.path(), &[&merge[..], &["other"]].concat());
    assert!(workplace.path("other/weights/all.safetensors").exists());
}

#[test]
fn weights_that_are_no_numbers_are_the_models() {
    let workplace = Workplace::new();
    copy_adapter(&workplace, &json!({}));
    let path = workplace.path("model/model.safetensors");
    let checkpoint = Checkpoint::open_file(&path).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    let tensors: Vec<(&str, Vec<u8>)> = checkpoint
        .names()
        .map(|tensor| {
            let mut bytes = checkpoint.bytes(tensor).to_vec();
            if tensor == name {
                bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
            }
            (tensor, bytes)
        })
        .collect();
    let views = tensors.iter().map(|(name, bytes)| {
        (*name, TensorView::new(Dtype::F32, checkpoint.shape(name).unwrap().to_vec(), bytes).unwrap())
    });
    let bytes = safetensors::serialize(views, None).unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, bytes).unwrap();
    let output = export(workplace.0.path(), &["--model_id_or_path", "model", "--adapters", "adapter"]);
    let says =
        format!("model.safetensors: 1 values of `{name}` are no finite numbers\nhint: the model's weights");
    assert!(stderr(&output).contains(&says), "{}", stderr(&output));
    assert!(!workplace.path("adapter-merged").exists());
}
