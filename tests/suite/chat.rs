//! The chat, a single prompt and files of prompts: what is typed or piped, and what is seen of it.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_flex::Flex;
use orpo_wgpu::data::prompts::read_prompts;
use orpo_wgpu::data::template::Template;
use orpo_wgpu::data::tokenize::TextTokenizer;
use orpo_wgpu::infer::chat::{self, Chat, Manner};
use orpo_wgpu::infer::generate::{GenerationConfig, StopReason};
use orpo_wgpu::infer::prompts::{answer_prompts, answerable};
use orpo_wgpu::infer::results::Results;
use orpo_wgpu::infer::sample::SamplingConfig;
use orpo_wgpu::infer::talk::{self, Line, Lines, Piped};
use orpo_wgpu::model::Llama;
use serde_json::Value;

use crate::infer::load;
use crate::workplace::fixture;

/// Lines as somebody types them, `^C` where they press Ctrl-C, and the prompts that they see.
struct Typed<'a> {
    lines: Piped<&'a [u8]>,
    prompts: String,
}

impl Lines for Typed<'_> {
    fn read(&mut self, prompt: &str) -> orpo_wgpu::error::Result<Line> {
        self.prompts.push_str(prompt);
        Ok(match self.lines.read(prompt)? {
            Line::Text(line) if line.ends_with("^C") => Line::Dropped,
            other => other,
        })
    }
}

struct Talk {
    model: Llama<Flex>,
    tokenizer: TextTokenizer,
}

impl Talk {
    fn new() -> Self {
        let folder = fixture("history_system/model");
        let tokenizer = TextTokenizer::from_folder(&folder).unwrap();
        Self { model: load::<Flex>(&folder, &Default::default()), tokenizer }
    }

    fn chat(&self, system: Option<&str>, config: &GenerationConfig) -> Chat<'_, Flex> {
        let system = system.map(str::to_owned);
        Chat::new(&self.model, &self.tokenizer, Template::Llama3, system, config).unwrap()
    }

    /// What the chat writes to its output, what it prompts and notes, and the history that it ends with.
    fn run(&self, input: &[u8], manner: Manner) -> (String, String, Vec<(String, String)>) {
        let (mut output, mut notes) = (Vec::new(), Vec::new());
        let mut chat = self.chat(Some("Be brief."), &GenerationConfig::greedy(8));
        let mut typed = Typed { lines: Piped(input), prompts: String::new() };
        let lines: &mut dyn Lines = if manner.is_terminal { &mut typed } else { &mut Piped(input) };
        talk::run(&mut chat, lines, &mut output, &mut notes, manner).unwrap();
        let notes = typed.prompts + std::str::from_utf8(&notes).unwrap();
        (String::from_utf8(output).unwrap(), notes, chat.history().to_vec())
    }

    /// The answer that the model gives in this situation.
    fn answer(&self, system: Option<&str>, history: &[(String, String)], query: &str) -> String {
        let prompt = self.tokenizer.encode_prompt(Template::Llama3, system, history, query).unwrap();
        let config = GenerationConfig::greedy(8);
        orpo_wgpu::infer::generate::answer(&self.model, &self.tokenizer, &prompt, &config).unwrap()
    }
}

const PIPE: Manner = Manner { is_terminal: false, verbose: false };
const TERMINAL: Manner = Manner { is_terminal: true, verbose: false };

#[test]
fn a_chat_keeps_its_history_and_a_pipe_gets_answers_alone() {
    let talk = Talk::new();
    let (output, notes, history) = talk.run("hello\r\n\n你好\n".as_bytes(), PIPE);
    let first = talk.answer(Some("Be brief."), &[], "hello");
    let said = [("hello".to_owned(), first.clone())];
    let second = talk.answer(Some("Be brief."), &said, "你好");
    assert_eq!(history, [said[0].clone(), ("你好".to_owned(), second.clone())]);
    assert_eq!((output, notes.as_str()), (format!("{first}\n{second}\n"), ""));
}

#[test]
fn chat_commands_do_what_they_say() {
    let talk = Talk::new();
    let (_, _, history) = talk.run(b"one\n Clear \ntwo\n", PIPE);
    assert_eq!(history, [("two".to_owned(), talk.answer(Some("Be brief."), &[], "two"))]);
    let (_, _, history) = talk.run(b"one\nreset-system\nBe long.\ntwo\nexit\nthree\n", PIPE);
    assert_eq!(history, [("two".to_owned(), talk.answer(Some("Be long."), &[], "two"))]);
    let (_, _, history) = talk.run(b"reset-system\n\ntwo\nQUIT\n", PIPE);
    assert_eq!(history, [("two".to_owned(), talk.answer(None, &[], "two"))]);
    let (_, _, history) = talk.run(b"multi-line\na\n\n b\n#\nsingle-line\nc\nmulti-line\nd\ne", PIPE);
    let questions: Vec<&str> = history.iter().map(|(question, _)| question.as_str()).collect();
    assert_eq!(questions, ["a\n\n b", "c", "d\ne"]);
}

#[test]
fn a_command_that_there_is_not_is_not_a_question_to_the_model() {
    let talk = Talk::new();
    let (output, notes, history) = talk.run(b"one\n/clear\n/nope\n/reset all\n/exit\ntwo\n", TERMINAL);
    assert_eq!(output, format!("{}\n", talk.answer(Some("Be brief."), &[], "one")));
    for says in ["`/nope` is no command; these are:\nclear ", "`/reset all` is no command; "] {
        assert!(notes.contains(says) && history.is_empty(), "{notes}");
    }
    let (_, notes, history) = talk.run(b"multi-line\n/nope\n /clear\n\n/b\n#\n", TERMINAL);
    assert_eq!(history[0].0, "/clear\n\n/b", "a space before the slash, or lines before it");
    assert!(notes.contains("`/nope` is no command"), "{notes}");
    assert!(notes.contains("a line with only # ends a message, and single-line this mode"), "{notes}");
    let (_, _, history) = talk.run(b" /nope\n/etc/hosts is what?\n/ 2\n", TERMINAL);
    let questions: Vec<&str> = history.iter().map(|(question, _)| question.as_str()).collect();
    assert_eq!(questions, ["/nope", "/etc/hosts is what?", "/ 2"]);
    let (_, _, history) = talk.run(b"multi-line\nreset-system\n/nope\nBe long.\n#\ntwo\n#\n", TERMINAL);
    assert_eq!(history, [("two".to_owned(), talk.answer(Some("/nope\nBe long."), &[], "two"))]);
    let (_, _, history) = talk.run(b"one\n /clear\n", PIPE);
    assert!(history.is_empty(), "a pipe's spaces hide no command");
    let (_, _, history) = talk.run(b"/nope\n", PIPE);
    assert_eq!(history.len(), 1, "a pipe's lines are messages");
    let (output, notes, history) = talk.run(b"/help\n", PIPE);
    assert!(output.is_empty() && notes.starts_with("clear ") && history.is_empty(), "asked for: {notes}");
}

#[test]
fn a_terminal_is_prompted_and_survives_a_question_that_is_too_long() {
    let talk = Talk::new();
    let long = "word ".repeat(2 * talk.model.config.max_position_embeddings);
    let (output, notes, history) = talk.run(format!("/help\n{long}\nhello\n").as_bytes(), TERMINAL);
    assert_eq!(output, format!("{}\n", talk.answer(Some("Be brief."), &[], "hello")));
    assert_eq!(history.len(), 1);
    for text in [">>> ", "reset-system", "the model's context takes", "`clear` forgets"] {
        assert!(notes.contains(text), "{text:?} is not in {notes}");
    }
    let (_, notes, _) = talk.run(b"hello\n", Manner { is_terminal: false, verbose: true });
    assert!(notes.contains("tokens/s"), "{notes}");
}

/// What a terminal hands on of a paste is several lines at once.
#[test]
fn what_is_pasted_is_one_message_unless_a_line_ends_messages() {
    struct Pasted(Vec<&'static str>);
    impl Lines for Pasted {
        fn read(&mut self, _: &str) -> orpo_wgpu::error::Result<Line> {
            Ok(self.0.pop().map_or(Line::End, |text| Line::Text(text.to_owned())))
        }
    }
    let talk = Talk::new();
    let mut chat = talk.chat(None, &GenerationConfig::greedy(2));
    let mut lines = Pasted(vec!["c\n#\nd\n#", "multi-line", "a\nb"]);
    talk::run(&mut chat, &mut lines, &mut Vec::new(), &mut Vec::new(), TERMINAL).unwrap();
    let questions: Vec<&str> = chat.history().iter().map(|(question, _)| question.as_str()).collect();
    assert_eq!(questions, ["a\nb", "c", "d"]);
}

#[test]
fn ctrl_c_drops_what_is_typed_and_ends_an_answer() {
    let talk = Talk::new();
    let (_, notes, history) = talk.run(b"one^C\nmulti-line\ntwo\nthree^C\nfour\n#\n", TERMINAL);
    assert_eq!(history, [("four".to_owned(), talk.answer(Some("Be brief."), &[], "four"))]);
    assert_eq!(notes.matches("Ctrl-D or /exit ends the chat").count(), 2, "{notes}");
    let (_, notes, history) = talk.run(b"reset-system\nBe long.^C\none\n", TERMINAL);
    assert_eq!(history, [("one".to_owned(), talk.answer(Some("Be brief."), &[], "one"))]);
    assert!(notes.contains("the system prompt is as before"), "{notes}");

    /// Presses Ctrl-C at the first text.
    struct Impatient(Arc<AtomicBool>, String);
    impl Write for Impatient {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.store(true, Ordering::Relaxed);
            self.1.push_str(std::str::from_utf8(bytes).map_err(std::io::Error::other)?);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut chat = talk.chat(Some("Be brief."), &GenerationConfig::greedy(8));
    let whole = chat.ask("one", &mut Vec::new()).unwrap();
    chat.clear();
    let flag = Arc::new(AtomicBool::new(false));
    chat.interrupted_by(flag.clone());
    let mut output = Impatient(flag, String::new());
    let cut = chat.ask("one", &mut output).unwrap();
    assert_eq!((cut.stop_reason, cut.tokens.len() < whole.tokens.len()), (StopReason::Interrupted, true));
    assert_eq!(chat.history(), [("one".to_owned(), output.1)], "what was said remains");
    let said = chat.history().to_vec();
    chat.ask("two", &mut Vec::new()).unwrap();
    assert_eq!(chat.history()[1].1, talk.answer(Some("Be brief."), &said, "two"), "the next one is whole");
}

#[test]
fn ctrl_c_between_answers_ends_a_file_s_and_no_chat_s() {
    let talk = Talk::new();
    let folder = tempfile::tempdir().unwrap();
    let (file, results) = (folder.path().join("prompts.txt"), folder.path().join("results.jsonl"));
    std::fs::write(&file, "one\ntwo\n").unwrap();
    let prompts: Vec<_> = read_prompts(&file).unwrap().into_iter().map(Result::unwrap).collect();
    let mut chat = talk.chat(Some("Be brief."), &GenerationConfig::greedy(8));
    let flag = Arc::new(AtomicBool::new(true));
    chat.interrupted_by(flag.clone());
    let (mut output, mut notes) = (Vec::new(), Vec::new());
    let to_file = Some(Results::create(&results).unwrap());
    let error = answer_prompts(&mut chat, &prompts, to_file, &mut output, &mut notes, PIPE).unwrap_err();
    assert_eq!(error.to_string(), "interrupted after answer 0 of 2");
    assert_eq!(std::fs::read_to_string(&results).unwrap(), "");

    chat.begin(Some("Be brief.".to_owned()), Vec::new());
    flag.store(true, Ordering::Relaxed);
    let mut typed = Typed { lines: Piped(b"one\n"), prompts: String::new() };
    talk::run(&mut chat, &mut typed, &mut output, &mut notes, TERMINAL).unwrap();
    assert_eq!(chat.history(), [("one".to_owned(), talk.answer(Some("Be brief."), &[], "one"))]);
}

/// A writer that fails with the first part that is not whole characters, and counts its parts.
#[derive(Default)]
struct Whole {
    text: String,
    n_parts: usize,
}

impl Write for Whole {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.text.push_str(std::str::from_utf8(bytes).map_err(std::io::Error::other)?);
        self.n_parts += 1;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn answers_are_streamed_in_whole_characters() {
    let talk = Talk::new();
    // At a high temperature an untrained model draws single bytes of all kinds.
    let sampling = SamplingConfig { temperature: 100.0, top_k: 0, top_p: 1.0, ..SamplingConfig::default() };
    let config = GenerationConfig { max_new_tokens: 200, sampling };
    let mut output = Whole::default();
    let mut chat = talk.chat(None, &config);
    let generation = chat.ask("hello", &mut output).unwrap();
    assert_eq!(output.text, talk.tokenizer.decode(&generation.tokens).unwrap());
    assert_eq!(chat.history()[0].1, output.text);
    assert!(output.n_parts > generation.tokens.len() / 2, "{} parts are no stream", output.n_parts);
}

#[test]
fn prompts_of_a_file_are_answered_each_on_its_own() {
    let talk = Talk::new();
    let folder = tempfile::tempdir().unwrap();
    let (file, results) = (folder.path().join("prompts.jsonl"), folder.path().join("results.jsonl"));
    let rows = concat!(
        "{\"query\": \"one\", \"response\": \"1\"}\n",
        "{\"question\": \"two\", \"system\": \"Be long.\", \"history\": [[\"a\", \"b\"]]}\n",
        "{\"query\": \"one\"}\n"
    );
    std::fs::write(&file, rows).unwrap();
    let prompts: Vec<_> = read_prompts(&file).unwrap().into_iter().map(Result::unwrap).collect();
    let sampling = SamplingConfig { temperature: 1.0, ..SamplingConfig::default() };
    let mut chat = talk.chat(None, &GenerationConfig { max_new_tokens: 8, sampling });
    let (mut output, mut notes) = (Vec::new(), Vec::new());
    answer_prompts(
        &mut chat,
        &prompts,
        Some(Results::create(&results).unwrap()),
        &mut output,
        &mut notes,
        PIPE,
    )
    .unwrap();
    assert!(output.is_empty(), "everything is in the file");
    let notes_of_file = String::from_utf8(std::mem::take(&mut notes)).unwrap();
    assert_eq!(notes_of_file, format!("3 answers written to {}\n", results.display()));
    let rows: Vec<Value> = std::fs::read_to_string(&results)
        .unwrap()
        .lines()
        .map(|row| serde_json::from_str(row).unwrap())
        .collect();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["response"], rows[2]["response"], "every row has the same draws");
    assert_eq!((&rows[0]["labels"], &rows[1]["question"]), (&Value::from("1"), &Value::from("two")));

    answer_prompts(&mut chat, &prompts, None, &mut output, &mut notes, PIPE).unwrap();
    let answers: Vec<&str> = rows.iter().map(|row| row["response"].as_str().unwrap()).collect();
    let expected = format!(">>> one\n{}\n\n>>> two\n{}\n\n>>> one\n{}\n", answers[0], answers[1], answers[2]);
    assert_eq!(String::from_utf8(output).unwrap(), expected);
}

#[test]
fn what_an_interrupted_run_left_is_added_to_when_asked() {
    use crate::workplace::{orpo_wgpu, stderr};

    let folder = tempfile::tempdir().unwrap();
    let results = folder.path().join("answers.jsonl");
    std::fs::write(folder.path().join("prompts.txt"), "one\ntwo\nthree\n").unwrap();
    let answer = |flags: &[&str]| {
        let mut infer =
            orpo_wgpu(&["infer", "--device", "cpu", "--max_new_tokens", "4", "--prompts", "prompts.txt"]);
        let output = infer.args(["--result_file", "answers.jsonl"]).args(flags).current_dir(folder.path());
        let output = output.output().unwrap();
        (output.status.code(), stderr(&output), std::fs::read_to_string(&results).unwrap())
    };
    let (code, said, all) = answer(&[]);
    assert_eq!((code, all.lines().count()), (Some(0), 3), "{said}");
    let first = all.split_inclusive('\n').next().unwrap();
    std::fs::write(&results, first).unwrap();
    let (code, said, left) = answer(&[]);
    assert_eq!((code, &*left), (Some(1), first), "{said}");
    assert!(said.contains("answers.jsonl: is there already") && said.contains("--append"), "{said}");
    let (code, said, added) = answer(&["--append"]);
    assert_eq!((code, &added), (Some(0), &all), "{said}");
    assert!(said.contains("answers.jsonl has 1 answer, to which the others are added"), "{said}");
    let (code, said, same) = answer(&["--append"]);
    assert_eq!((code, &same), (Some(0), &all), "{said}");
    assert!(said.contains("has 3 answers, and no prompt is left"), "{said}");
}

#[test]
fn prompts_that_cannot_be_answered_are_left_out_and_told_of() {
    let talk = Talk::new();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompts.jsonl");
    let too_long = serde_json::json!({ "query": "word ".repeat(1000) });
    std::fs::write(&file, format!("{too_long}\n\n{{\"query\": \"hello\"}}\n{{\"text\": 1}}\n")).unwrap();
    let mut chat = talk.chat(Some("Be kind."), &GenerationConfig::greedy(8));
    let mut notes = Vec::new();
    let prompts = answerable(&mut chat, read_prompts(&file).unwrap(), &mut notes).unwrap();
    assert_eq!(prompts.iter().map(|prompt| prompt.query.as_str()).collect::<Vec<_>>(), ["hello"]);
    assert_eq!((chat.system(), chat.history().len()), (Some("Be kind."), 0));
    let notes = String::from_utf8(notes).unwrap();
    for says in [
        "2 of 3 prompts cannot be answered and are left out:\n",
        "prompts.jsonl:1: the prompt has",
        "prompts.jsonl:4: no column `query`",
    ] {
        assert!(notes.contains(says), "no `{says}` in {notes}");
    }
    assert!(notes.find("jsonl:1:") < notes.find("jsonl:4:"), "in order: {notes}");

    let text = folder.path().join("prompts.txt");
    std::fs::write(&text, "word ".repeat(1000)).unwrap();
    let error = answerable(&mut chat, read_prompts(&text).unwrap(), &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("prompts.txt:1: the prompt has"), "{error}");
}

#[test]
fn a_reader_that_is_gone_ends_the_answer_and_is_no_error() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let talk = Talk::new();
    let mut chat = talk.chat(None, &GenerationConfig::greedy(8));
    chat::one_shot(&mut chat, "hello", &mut Closed, &mut Vec::new(), PIPE).unwrap();
    assert_eq!(chat.history(), []);
}

/// By `script`, which has a terminal for what it runs, and types what it reads.
#[cfg(target_os = "linux")]
#[test]
fn a_terminal_is_typed_on_with_the_keys_of_a_shell() {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use crate::workplace::{orpo_wgpu, quoted};

    let folder = tempfile::tempdir().unwrap();
    let infer =
        quoted(&orpo_wgpu(&["infer", "--device", "cpu", "--temperature", "0", "--max_new_tokens", "4"]));
    let mut script = Command::new("timeout");
    script
        .args(["60", "script", "-qec", &infer, "/dev/null"])
        .current_dir(folder.path())
        .env("TERM", "xterm");
    let script = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut script = script.expect("`script` of util-linux runs");
    let (mut keys, mut screen) = (script.stdin.take().unwrap(), script.stdout.take().unwrap());
    let mut wait_for = |text: &str| {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(text.as_bytes()) {
            assert!(
                screen.read(&mut byte).unwrap() == 1,
                "no `{text}` in {}",
                String::from_utf8_lossy(&seen)
            );
            seen.push(byte[0]);
        }
        String::from_utf8_lossy(&seen).into_owned()
    };
    let mut press = |text: &str| keys.write_all(text.as_bytes()).unwrap();
    wait_for(">>> ");
    // A letter too many, taken back; one letter back, the missing one.
    press("reset-systenx\x7f\x7f\x7fem\x1b[D\r");
    wait_for("system prompt> ");
    press("Be long.\x03");
    wait_for("the system prompt is as before");
    wait_for(">>> ");
    press("\x03");
    wait_for("Ctrl-D or /exit ends the chat");
    wait_for(">>> ");
    keys.write_all(b"h\xe4llo\r").unwrap();
    wait_for("what is no UTF-8 is not read");
    wait_for(">>> ");
    let mut press = |text: &str| keys.write_all(text.as_bytes()).unwrap();
    // The line before.
    press("\x1b[A\r");
    wait_for("system prompt> ");
    press("\x04");
    assert!(script.wait().unwrap().success());
}
