//! Generation: against transformers' and llama2.c's figures on a trained model, and against the model's own forward pass.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use burn_flex::Flex;
use burn_wgpu::Wgpu;
use orpo_wgpu::data::tokenize::TextTokenizer;
use orpo_wgpu::infer::generate::{Generation, GenerationConfig, Session, StopReason, generate};
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

/// A model in `f32`.
pub(crate) fn load<B: Kernels>(folder: &Path, device: &B::Device) -> Llama<B> {
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
fn a_prompt_longer_than_what_is_read_at_a_time_is_answered_as_in_one_pass() {
    let mut model = load::<Flex>(&fixture("gqa/model"), &Default::default());
    model.config.max_position_embeddings = 2048;
    let mut tokens: Vec<u32> = (0..1100).map(|i| i * i % 307 % 300).collect();
    let prompt = tokens.clone();
    for _ in 0..2 {
        let all = logits(&model, &tokens);
        tokens.push(argmax(&all[all.len() - model.config.vocab_size..]));
    }
    assert_eq!(greedy(&model, &prompt, 2).tokens, tokens[prompt.len()..]);
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
