//! Dynamic loss scaling for training in fp16 (arXiv:1710.03740, section 3.2), as `torch.amp.GradScaler` does it.
//!
//! The smallest gradients of a model are below what `f16` holds, 6e-8. The loss is multiplied with a scale before backward, so that
//! they are not, and the adapter's gradients, which are `f32`, are divided by it before they are clipped. A step whose gradient has
//! overflowed is skipped and the scale lowered; after many that have not, it is raised. Torch's scale knows neither a floor nor a
//! ceiling.

use serde::{Deserialize, Serialize};

/// How the scale moves; names and defaults as `torch.amp.GradScaler` has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LossScaleConfig {
    /// The first scale.
    pub init_scale: f64,
    /// The scale is multiplied with this after `growth_interval` steps in a row with a finite gradient.
    pub growth_factor: f64,
    /// The scale is multiplied with this after a step with a gradient that is not finite.
    pub backoff_factor: f64,
    /// See `growth_factor`.
    pub growth_interval: usize,
}

impl Default for LossScaleConfig {
    fn default() -> Self {
        Self { init_scale: 65_536.0, growth_factor: 2.0, backoff_factor: 0.5, growth_interval: 2000 }
    }
}

/// A scale below this has fallen to nothing: gradients that overflow even so are no matter of scale.
pub const MIN_SCALE: f64 = 1.0 / 1024.0;
/// The scale grows no further than this.
pub const MAX_SCALE: f64 = 16_777_216.0;

/// The scale of a run, and what a checkpoint keeps of it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// What the next step's loss is multiplied with.
    pub scale: f64,
    /// Steps with a finite gradient since the scale last moved.
    pub growth_tracker: usize,
    /// Steps that were skipped so far.
    pub n_skipped: usize,
}

impl LossScale {
    /// The scale of a run's first step.
    pub fn new(config: &LossScaleConfig) -> Self {
        Self { scale: config.init_scale, growth_tracker: 0, n_skipped: 0 }
    }

    /// Takes note of a step, and whether its gradient was finite.
    pub fn update(&mut self, config: &LossScaleConfig, is_finite: bool) {
        if !is_finite {
            self.scale *= config.backoff_factor;
            self.growth_tracker = 0;
            self.n_skipped += 1;
            return;
        }
        self.growth_tracker += 1;
        if self.growth_tracker >= config.growth_interval {
            self.scale = (self.scale * config.growth_factor).min(MAX_SCALE);
            self.growth_tracker = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_falls_at_once_and_grows_after_a_while() {
        let config = LossScaleConfig { growth_interval: 3, ..LossScaleConfig::default() };
        let mut scale = LossScale::new(&config);
        let mut after = |is_finite: &[bool]| {
            is_finite.iter().for_each(|&is_finite| scale.update(&config, is_finite));
            (scale.scale, scale.n_skipped)
        };
        assert_eq!(after(&[false, false]), (16_384.0, 2));
        assert_eq!(after(&[true, true]), (16_384.0, 2));
        assert_eq!(after(&[true]), (32_768.0, 2));
        assert_eq!(after(&[true, true, false]), (16_384.0, 3), "and counts anew from there");
        assert_eq!(after(&[true, true]), (16_384.0, 3));
        assert_eq!(after(&[true; 100]).0, 16_777_216.0, "no further than that");
    }
}
