// What orpo_loss.wgsl and orpo_loss_backward.wgsl of src/ops/orpo_loss.rs share; it stands before their text.

// `PairSpan` of src/ops/orpo_loss.rs.
struct Span {
    nll_start: u32,
    chosen_start: u32,
    rejected_start: u32,
    end: u32,
    nll_weight: f32,
    unused_0: u32,
    unused_1: u32,
    unused_2: u32,
}

const LN_2 = 0.6931471805599453;

// 2 atanh(z) = log((1 + z) / (1 − z)) for |z| ≤ 1/3.
fn atanh_twice(z: f32) -> f32 {
    let q = z * z;
    let tail = 1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + q / 13.0));
    return 2.0 * z * (1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * tail)));
}

// (eˣ − 1) / x for −ln 2 < x < 0, where eˣ − 1 itself would cancel.
fn expm1_ratio(x: f32) -> f32 {
    let tail = 1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0)));
    return 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * tail)));
}

// log(1 − eˣ) for x < 0. Series on both sides of −ln 2: WGSL has neither expm1 nor log1p.
fn log1mexp(x: f32) -> f32 {
    if (x > -LN_2) {
        return log(-x * expm1_ratio(x));
    }
    let u = exp(x);
    return -atanh_twice(u / (2.0 - u));
}

// log σ(x).
fn log_sigmoid(x: f32) -> f32 {
    let u = exp(-abs(x));
    return min(x, 0.0) - atanh_twice(u / (2.0 + u));
}

