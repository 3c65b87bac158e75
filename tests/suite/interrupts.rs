//! Runs that end before their end, and go on.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

#[cfg(unix)]
use crate::workplace::orpo_wgpu;
use crate::workplace::{Workplace, stderr};

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
    let done = [&flags[..], &["--resume_from_checkpoint", "out", "--output_dir", "done"]].concat();
    let output = workplace.train(&done);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("6 of 6 steps are done already"), "{}", stderr(&output));
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
    assert!(message.last().unwrap().ends_with("--config out/args.json --resume_from_checkpoint out"));
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

#[cfg(unix)]
#[test]
fn answers_to_a_file_that_are_interrupted_stay_and_are_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("prompts.txt"), "What is the capital of France?\n".repeat(20_000)).unwrap();
    let mut infer = orpo_wgpu(&["infer", "--device", "cpu", "--prompts", "prompts.txt", "--verbose"]);
    infer.args(["--result_file", "answers.jsonl"]).current_dir(folder.path());
    let mut child = infer.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("2/20000: ")), "it answers");
    signal(&child, "-INT");
    let message: Vec<String> = lines.collect();
    let message = &message[message.len().saturating_sub(3)..];
    assert_eq!(child.wait().unwrap().code(), Some(130), "{message:?}");
    let n = fs::read_to_string(folder.path().join("answers.jsonl")).unwrap().lines().count();
    let says = format!("orpo-wgpu: interrupted after answer {n} of 20000");
    assert!(n >= 2 && message.contains(&says), "{n}: {message:?}");
    assert!(message.contains(&"hint: --append goes on with answers.jsonl".to_owned()), "{message:?}");
}
