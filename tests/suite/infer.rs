//! Generation and chat: against transformers' and llama2.c's figures on a trained model, and against the model's own forward pass.

use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::DType;
use burn_flex::Flex;
use burn_wgpu::Wgpu;
use orpo_wgpu::data::prompts::read_prompts;
use orpo_wgpu::data::template::Template;
use orpo_wgpu::data::tokenize::TextTokenizer;
use orpo_wgpu::infer::chat::{self, Chat, Manner};
use orpo_wgpu::infer::generate::{Generation, GenerationConfig, Session, StopReason, generate};
use orpo_wgpu::infer::prompts::answer_prompts;
use orpo_wgpu::infer::sample::SamplingConfig;
use orpo_wgpu::infer::talk::{self, Line, Lines, Piped};
use orpo_wgpu::lora;
use orpo_wgpu::model::attention::AttentionLayout;
use orpo_wgpu::model::load::{Checkpoint, load_llama};
use orpo_wgpu::model::{Llama, LlamaConfig, Precision};
use orpo_wgpu::ops::Kernels;
use orpo_wgpu::ops::token_logps::{Expected, ScoredToken, token_logps};
use serde_json::Value;

use crate::support::{adapter, assert_close, left_out};
use crate::workplace::fixture;

/// The folder of data that is not part of the repository; without it a test is left out, which is said.
fn shared() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data");
    if folder.is_dir() {
        return Some(folder);
    }
    left_out(&format!("there is no {}", folder.display()));
    None
}

fn load<B: Kernels>(folder: &Path, device: &B::Device) -> Llama<B> {
    let config = LlamaConfig::read(&folder.join("config.json")).unwrap();
    load_llama(
        &Checkpoint::open_folder(folder).unwrap(),
        &config,
        Precision::dense(DType::F32),
        1 << 27,
        device,
    )
    .unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn greedy<B: Kernels>(model: &Llama<B>, prompt: &[u32], max_new_tokens: usize) -> Generation {
    let config = GenerationConfig::greedy(max_new_tokens);
    generate(model, prompt, &[], &config, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// The logits that follow each of the tokens, `[tokens · vocab]`, from one pass without a cache.
fn logits<B: Kernels>(model: &Llama<B>, tokens: &[u32]) -> Vec<f32> {
    let layout = AttentionLayout::causal(&model.config, 0, tokens.len(), &model.device());
    model.lm_head.logits(model.forward(tokens, &layout)).into_data().to_vec().unwrap()
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best }).unwrap() as u32
}

#[test]
fn two_hundred_greedy_tokens_equal_llama2_c() {
    let Some(shared) = shared() else { return };
    let model = load::<Flex>(&shared.join("stories260K-hf"), &Default::default());
    let trace = json(&shared.join("vectors/stories260K_greedy.json"));
    let (prompt, expected) = (ids(&trace["prompt_ids"]), ids(&trace["greedy_ids"]));
    let generation = greedy(&model, &prompt, expected.len() - prompt.len());
    assert_eq!(generation.tokens, expected[prompt.len()..]);
    assert_eq!(generation.stop_reason, StopReason::MaxNewTokens);
    let tokenizer = TextTokenizer::from_folder(shared.join("stories260K-hf")).unwrap();
    assert_eq!(tokenizer.decode(&generation.tokens).unwrap(), trace["text"].as_str().unwrap());
}

#[test]
fn greedy_tokens_on_the_adapter_equal_llama2_c() {
    let (Some(shared), Some(device)) = (shared(), adapter()) else { return };
    let model = load::<Wgpu>(&shared.join("stories260K-hf"), &device);
    let expected = ids(&json(&shared.join("vectors/stories260K_greedy.json"))["greedy_ids"]);
    assert_eq!(greedy(&model, &expected[..9], 16).tokens, expected[9..25]);
}

#[test]
fn logits_and_log_probabilities_equal_transformers() {
    let Some(shared) = shared() else { return };
    let model = load::<Flex>(&shared.join("stories260K-hf"), &Default::default());
    check_forward(&model, &json(&shared.join("vectors/stories260K-hf_fwd.json")));
    if let Some(device) = adapter() {
        let model = load::<Wgpu>(&shared.join("stories260K-hf"), &device);
        check_forward(&model, &json(&shared.join("vectors/stories260K-hf_fwd.json")));
    }
}

fn check_forward<B: Kernels>(model: &Llama<B>, vectors: &Value) {
    let tokens = ids(&vectors["input_ids"]);
    let all = logits(model, &tokens);
    let last = &all[all.len() - model.config.vocab_size..];
    assert_close(last, &floats(&vectors["logits_last"]), 1e-4, 1e-4, "logits");
    let layout = AttentionLayout::causal(&model.config, 0, tokens.len(), &model.device());
    let hidden = model.forward(&tokens, &layout);
    let scored: Vec<ScoredToken> =
        (1..tokens.len()).map(|row| ScoredToken { row_idx: row as u32 - 1, target: tokens[row] }).collect();
    let logps = token_logps(hidden, &model.lm_head, &scored, Expected::Skip).logps;
    let logps = logps.into_data().to_vec::<f32>().unwrap();
    assert_close(&logps, &floats(&vectors["token_logprobs"]), 1e-5, 1e-4, "log-probabilities");
}

/// Every case's model with its adapter: what is generated with a cache is what whole passes without one would choose.
fn check_cached_equals_uncached<B: Kernels>(case: &str, n_new: usize, device: &B::Device) {
    let mut model = load::<B>(&fixture(case).join("model"), device);
    lora::load(&mut model, &fixture(case).join("adapter")).unwrap();
    let prompt: Vec<u32> = (0..11).map(|i| i * 37 % 300).collect();
    let mut tokens = prompt.clone();
    for _ in 0..n_new {
        let all = logits(&model, &tokens);
        tokens.push(argmax(&all[all.len() - model.config.vocab_size..]));
    }
    assert_eq!(greedy(&model, &prompt, n_new).tokens, tokens[prompt.len()..], "{case}");
}

#[test]
fn cached_equals_uncached() {
    for case in ["gqa", "tied_rope", "odd", "history_system"] {
        check_cached_equals_uncached::<Flex>(case, 24, &Default::default());
    }
}

#[test]
fn cached_equals_uncached_on_the_adapter() {
    let Some(device) = adapter() else { return };
    check_cached_equals_uncached::<Wgpu>("odd", 4, &device);
}

#[test]
fn a_prompt_in_chunks_gives_the_logits_of_one_pass() {
    let model = load::<Flex>(&fixture("gqa/model"), &Default::default());
    let tokens: Vec<u32> = (0..40).map(|i| i * 53 % 300).collect();
    let mut cache = model.new_cache();
    let parts = [&tokens[..17], &tokens[17..18], &tokens[18..]];
    let chunked: Vec<f32> = parts
        .iter()
        .flat_map(|part| {
            let hidden = model.forward_cached(part, &mut cache);
            model.lm_head.logits(hidden).into_data().to_vec::<f32>().unwrap()
        })
        .collect();
    assert_close(&chunked, &logits(&model, &tokens), 1e-5, 1e-4, "logits");
}

#[test]
fn generation_says_why_it_ends() {
    let model = load::<Flex>(&fixture("gqa/model"), &Default::default());
    let context = model.config.max_position_embeddings;
    let free = greedy(&model, &[1, 2, 3], 6);
    assert_eq!((free.tokens.len(), free.stop_reason, free.n_prefilled), (6, StopReason::MaxNewTokens, 3));

    let stop = free.tokens[3];
    let n_before = free.tokens.iter().position(|token| *token == stop).unwrap();
    let mut streamed = Vec::new();
    let config = GenerationConfig::greedy(6);
    let stopped = generate(&model, &[1, 2, 3], &[stop], &config, &mut |token| {
        streamed.push(token);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(stopped.stop_reason, StopReason::StopToken);
    assert_eq!((&stopped.tokens, &streamed[..]), (&streamed, &free.tokens[..n_before]));

    let interrupted = generate(&model, &[1, 2, 3], &[], &config, &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!((interrupted.tokens.len(), interrupted.stop_reason), (1, StopReason::Interrupted));

    let long: Vec<u32> = (0..context as u32 - 2).map(|i| i % 300).collect();
    let full = greedy(&model, &long, 50);
    assert_eq!((full.tokens.len(), full.stop_reason), (2, StopReason::ContextEnd));
}

#[test]
fn a_prompt_that_cannot_be_read_is_an_error() {
    let model = load::<Flex>(&fixture("gqa/model"), &Default::default());
    let (context, vocab_size) = (model.config.max_position_embeddings, model.config.vocab_size);
    let error = |prompt: &[u32], config: GenerationConfig| {
        let result = generate(&model, prompt, &[], &config, &mut |_| ControlFlow::Continue(()));
        result.unwrap_err().to_string()
    };
    let config = GenerationConfig::greedy(4);
    assert!(error(&[], config).contains("the prompt is empty"), "no row to go on from");
    assert!(
        error(&vec![1; context], config).contains(&format!("the prompt has {context} tokens")),
        "too long"
    );
    assert!(error(&[vocab_size as u32], config).contains("vocab_size"), "outside the vocabulary");
    assert!(
        error(&[1], GenerationConfig::greedy(0)).contains("--max_new_tokens"),
        "settings are checked too"
    );
}

#[test]
fn a_session_goes_on_from_what_it_has_read() {
    let model = load::<Flex>(&fixture("gqa/model"), &Default::default());
    let config = GenerationConfig::greedy(5);
    let mut session = Session::new(&model, &config);
    let mut ask = |prompt: &[u32]| session.generate(prompt, &[], &mut |_| ControlFlow::Continue(())).unwrap();
    let first = ask(&[1, 2, 3, 4]);
    // The last token was never read.
    let next = [&[1, 2, 3, 4], &first.tokens[..], &[7, 8]].concat();
    let second = ask(&next);
    assert_eq!((first.n_prefilled, second.n_prefilled), (4, 3));
    assert_eq!(second.tokens, greedy(&model, &next, 5).tokens);
    for other in [&[9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9][..], &[9, 9]] {
        let third = ask(other);
        assert_eq!(third.n_prefilled, other.len());
        assert_eq!(third.tokens, greedy(&model, other, 5).tokens);
    }
}

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
    let prompts = read_prompts(&file).unwrap();
    let sampling = SamplingConfig { temperature: 1.0, ..SamplingConfig::default() };
    let mut chat = talk.chat(None, &GenerationConfig { max_new_tokens: 8, sampling });
    let (mut output, mut notes) = (Vec::new(), Vec::new());
    answer_prompts(&mut chat, &prompts, Some(&results), &mut output, &mut notes, PIPE).unwrap();
    assert!(output.is_empty(), "everything is in the file");
    let notes_of_file = String::from_utf8(std::mem::take(&mut notes)).unwrap();
    assert_eq!(notes_of_file, format!("3 answers are in {}\n", results.display()));
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
fn a_prompt_that_is_too_long_is_named_before_anything_is_answered() {
    let talk = Talk::new();
    let folder = tempfile::tempdir().unwrap();
    let (file, results) = (folder.path().join("prompts.txt"), folder.path().join("results.jsonl"));
    std::fs::write(&file, format!("hello\n\n{}\n", "word ".repeat(1000))).unwrap();
    let mut chat = talk.chat(None, &GenerationConfig::greedy(8));
    let prompts = read_prompts(&file).unwrap();
    let (mut output, mut notes) = (Vec::new(), Vec::new());
    let error =
        answer_prompts(&mut chat, &prompts, Some(&results), &mut output, &mut notes, PIPE).unwrap_err();
    assert!(error.to_string().contains("prompts.txt:3: the prompt has"), "{error}");
    assert!(!results.exists(), "nothing was answered");
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
