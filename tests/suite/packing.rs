//! The packed batch against the two-sequence form: every answer with its prompt as a sequence of its own, whole logits, plain
//! autodiff through the whole model. Loss and every gradient must be equal.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};
use burn_autodiff::Autodiff;
use burn_flex::Flex;
use orpo_wgpu::data::batch::{LossCompat, pack};
use orpo_wgpu::data::tokenize::TokenizedPair;
use orpo_wgpu::lora;
use orpo_wgpu::model::attention::AttentionLayout;
use orpo_wgpu::model::llama::Keep;
use orpo_wgpu::model::{DecoderLayer, Llama};
use orpo_wgpu::ops::read::read;
use orpo_wgpu::train::metrics::StepMetrics;
use orpo_wgpu::train::step::{DeviceBatch, forward_backward};

use crate::goldens::Case;
use crate::plain;
use crate::support::{alone, assert_close};

type Tracked = Autodiff<Flex>;

const BETA: f32 = 0.3;

/// Log-probabilities of a sequence's tokens after the first, `[tokens - 1]`.
fn sequence_logps(model: &Llama<Flex>, layers: &[DecoderLayer<Tracked>], ids: &[u32]) -> Tensor<Tracked, 1> {
    let n = ids.len();
    let layout = AttentionLayout::<Flex>::causal(&model.config, 0, n, &model.device());
    let hidden = plain::forward(model, layers, ids, &layout);
    let logits = model.lm_head.shards.iter().map(|w| {
        let w = Tensor::<Tracked, 2>::from_inner(w.to_dense());
        hidden.clone().matmul(w.transpose())
    });
    let logps = log_softmax(Tensor::cat(logits.collect(), 1), 1).slice(0..n - 1);
    let targets: Vec<i64> = ids[1..].iter().map(|&id| i64::from(id)).collect();
    let targets = Tensor::<Tracked, 2, Int>::from_data(TensorData::new(targets, [n - 1, 1]), &model.device());
    logps.gather(1, targets).squeeze_dim(1)
}

/// TRL's `concatenated_forward` and `odds_ratio_loss`, written out: `log(1 - e^x)` as it stands, which serves here because no mean
/// log-probability is near zero.
fn two_sequence_loss(
    model: &Llama<Flex>,
    layers: &[DecoderLayer<Tracked>],
    pairs: &[&TokenizedPair],
    compat: LossCompat,
) -> Tensor<Tracked, 1> {
    let mut nll_sums = Vec::new();
    let mut nll_counts = Vec::new();
    let mut ratios = Vec::new();
    for pair in pairs {
        let chosen = sequence_logps(model, layers, &[pair.prompt.as_slice(), &pair.chosen].concat());
        let rejected = sequence_logps(model, layers, &[pair.prompt.as_slice(), &pair.rejected].concat());
        let response = |t: &Tensor<Tracked, 1>| t.clone().slice(pair.prompt.len() - 1..t.dims()[0]);
        let (w, l) = (response(&chosen).mean(), response(&rejected).mean());
        let scored = if compat == LossCompat::Trl { chosen.clone() } else { response(&chosen) };
        nll_counts.push(scored.dims()[0] as f32);
        nll_sums.push(-scored.sum());
        let log_odds = w.clone() - l.clone() - ((-w.exp() + 1.0).log() - (-l.exp() + 1.0).log());
        ratios.push(((-log_odds).exp() + 1.0).log());
    }
    let n_pairs = pairs.len() as f32;
    let nll = match compat {
        LossCompat::LlamaFactory => {
            let means = nll_sums.into_iter().zip(&nll_counts).map(|(sum, n)| sum / *n / n_pairs);
            Tensor::cat(means.collect(), 0).sum()
        }
        _ => Tensor::cat(nll_sums, 0).sum() / nll_counts.iter().sum::<f32>(),
    };
    nll + Tensor::cat(ratios, 0).sum() * (BETA / n_pairs)
}

#[test]
fn packed_batch_equals_two_sequences_in_loss_and_every_gradient() {
    alone("packing::loss_and_every_gradient");
}

#[test]
#[ignore = "the test above starts it, in a process of its own"]
fn loss_and_every_gradient() {
    // `history_system` has long prompts, `tied_rope` batches whose answers share their first words or are one another's beginning.
    for name in ["history_system", "tied_rope", "odd"] {
        let case = Case::open(name);
        let (model, _) = case.adapted::<Flex>(&Default::default());
        for compat in LossCompat::ALL {
            for pairs in case.pairs.chunks(3) {
                let pairs: Vec<&TokenizedPair> = pairs.iter().collect();
                let layers: Vec<_> = model.layers.iter().map(plain::track).collect();
                let loss = two_sequence_loss(&model, &layers, &pairs, compat);
                let grads = loss.backward();
                let got = forward_backward(
                    &model,
                    DeviceBatch::new(&model, &pack(&pairs, compat)),
                    BETA,
                    1.0,
                    Keep::Input,
                );
                let metrics = StepMetrics::from_stats(&read(got.stats).unwrap(), BETA);
                let want = loss.into_scalar();
                assert_close(&[metrics.loss as f32], &[want], 0.0, 1e-5, &format!("{name} {compat} loss"));
                let adapters =
                    layers.iter().flat_map(|layer| layer.linears()).filter_map(|(_, l)| l.lora.as_ref());
                let want = adapters.flat_map(|lora| [&lora.a, &lora.b]).map(|t| t.grad(&grads).unwrap());
                for (((tensor, _), got), want) in lora::tensors(&model).iter().zip(got.lora).zip(want) {
                    let flat = |t: Tensor<Flex, 2>| t.into_data().to_vec::<f32>().unwrap();
                    let (got, want) = (flat(got), flat(want));
                    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
                    assert_close(&got, &want, 1e-5 * largest, 1e-4, &format!("{name} {compat} {tensor}"));
                }
            }
        }
    }
}
