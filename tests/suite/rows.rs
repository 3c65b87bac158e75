//! What a user is told of the rows of a run.

use std::fs;
use std::path::Path;
use std::process::Output;

use crate::workplace::{fixture, orpo_wgpu, stderr, stdout};

/// Runs a subcommand on the `gqa` case's model and the `pairs.jsonl` of a folder.
fn run(subcommand: &str, folder: &Path, flags: &[&str]) -> Output {
    let mut command = orpo_wgpu(&[subcommand, "--model_id_or_path"]);
    command.arg(fixture("gqa/model"));
    command.args(["--dataset", "pairs.jsonl", "--device", "cpu"]).args(flags).current_dir(folder);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{flags:?}: {}", stderr(&output));
    output
}

#[test]
fn the_first_rows_that_are_left_out_are_named_and_the_run_s_folder_lists_all() {
    let folder = tempfile::tempdir().unwrap();
    // Of the seven pairs, four have more than 60 tokens.
    let pairs = fs::read_to_string(fixture("gqa/pairs.jsonl")).unwrap().repeat(3);
    fs::write(folder.path().join("pairs.jsonl"), pairs).unwrap();
    let list = folder.path().join("out/left_out.txt");
    let flags = ["--output_dir", "out", "--add_output_dir_suffix", "false", "--overwrite_output_dir"];
    let train = |max_length: &str| {
        let flags =
            [&flags[..], &["--max_steps", "1", "--warmup_ratio", "0", "--max_length", max_length]].concat();
        let message = stderr(&run("train", folder.path(), &flags));
        message.lines().filter_map(|line| line.strip_prefix("left out: ")).map(str::to_owned).collect()
    };

    let said: Vec<String> = train("60");
    let listed = fs::read_to_string(&list).unwrap();
    let listed: Vec<&str> = listed.lines().collect();
    assert_eq!((said.len(), listed.len()), (7, 12), "{said:?} {listed:?}");
    assert_eq!(said[..5], listed[..5]);
    let list_of = Path::new("out").join("left_out.txt");
    assert_eq!(said[5..], ["and 7 more".to_owned(), format!("all 12 rows are in {}", list_of.display())]);
    assert!(listed[11].starts_with("pairs.jsonl:21: 106 tokens "), "{listed:?}");

    assert_eq!(train("512"), Vec::<String>::new());
    assert!(!list.exists(), "the list of the run before");
}

#[test]
fn train_and_plan_say_lengths_and_steps_alike_and_name_what_max_length_counts() {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(fixture("gqa/pairs.jsonl"), folder.path().join("pairs.jsonl")).unwrap();
    let planned = run("plan", folder.path(), &["--max_length", "121"]);
    let trained =
        run("train", folder.path(), &["--max_length", "121", "--max_steps", "1", "--warmup_ratio", "0"]);
    let says = "\nlengths  38 to 121 tokens for prompt + longer answer, which --max_length counts;\n         \
                38 to 122 for prompt + both answers, which a step computes (median 68,\n         90 % up to 108)\n";
    let planned = stdout(&planned);
    assert!(
        planned.contains(says)
            && planned.contains("data     7 pairs to train on, 0 to evaluate on, 0 rows left out"),
        "{planned}"
    );
    assert!(planned.contains("run      1 optimizer step of 7 pairs, "), "{planned}");
    assert!(stderr(&trained).contains("training 1 step of 7 pairs, "), "{}", stderr(&trained));
    let says_none = "note: nothing is evaluated, as a share of 0.01 of 7 rows is no whole row; ";
    assert!(stderr(&trained).contains(says_none), "{}", stderr(&trained));
    // No terminal is there to cut the line for.
    let says = says.replace("\n         ", " ");
    assert!(stderr(&trained).contains(&says), "{}", stderr(&trained));
}
