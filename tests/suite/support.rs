//! Shared helpers.

/// Asserts `|got − want| ≤ atol + rtol · |want|` everywhere; a NaN in only one of the two is a failure.
pub(crate) fn assert_close(got: &[f32], want: &[f32], atol: f32, rtol: f32, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: number of values");
    let bad = |(g, w): (f32, f32)| g.is_nan() != w.is_nan() || (g - w).abs() > atol + rtol * w.abs();
    let n = got.iter().zip(want).filter(|&(&g, &w)| bad((g, w))).count();
    let worst = (0..got.len()).max_by(|&i, &j| (got[i] - want[i]).abs().total_cmp(&(got[j] - want[j]).abs()));
    if let (true, Some(i)) = (n > 0, worst) {
        panic!("{what}: {n} of {} differ, worst at {i}: {} against {} (atol {atol}, rtol {rtol})", got.len(), got[i], want[i]);
    }
}
