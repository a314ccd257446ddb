//! Log-probabilities of the model's own distribution: log-softmax of the untouched logits.

use tandem_kernels::sampling::log_sum_exp;

use super::candidates::Ranking;
use crate::api::{TokenId, TokenLogprobs};

/// Scratch for picking the likeliest tokens.
#[derive(Debug, Default)]
pub(crate) struct LogprobScratch {
    ranking: Ranking,
}

impl LogprobScratch {
    /// The log-probability of `chosen` and of the `num_top` likeliest tokens.
    pub(crate) fn compute(&mut self, logits: &[f32], chosen: TokenId, num_top: usize) -> TokenLogprobs {
        let log_sum = log_sum_exp(logits);
        let logprob = |logit: f32| (f64::from(logit) - log_sum) as f32;
        let top = self.ranking.top(logits, num_top);
        let top = top.iter().map(|&(id, logit)| (id, logprob(logit))).collect();
        TokenLogprobs { logprob: logprob(logits[chosen as usize]), top }
    }
}

/// The greatest of `logits` less the next one; 0 if there is only one.
pub(crate) fn margin(logits: &[f32]) -> f32 {
    let (mut best, mut next) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit > best {
            (best, next) = (logit, best);
        } else if logit > next {
            next = logit;
        }
    }
    if next == f32::NEG_INFINITY { 0.0 } else { best - next }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_margin_is_between_the_two_greatest() {
        assert_eq!(margin(&[1.0, 4.0, 2.5]), 1.5);
        assert_eq!(margin(&[2.5, 1.0, 4.0]), 1.5);
        assert_eq!(margin(&[3.0, 3.0]), 0.0);
        assert_eq!(margin(&[3.0]), 0.0);
    }

    #[test]
    fn probabilities_sum_to_one_and_are_ranked() {
        let logits = [0.5, 2.0, -1.0, 2.0, 0.0];
        let got = LogprobScratch::default().compute(&logits, 2, 5);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 0, 4, 2]);
        let sum: f64 = got.top.iter().map(|t| f64::from(t.1).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
        assert_eq!(got.logprob, got.top[4].1);
    }
}
