//! Middles, ends and percentiles of measured numbers.

use serde::Serialize;

/// The middle and the ends of some numbers.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// `None` of no numbers.
    pub(super) fn of(values: impl Iterator<Item = f64>) -> Option<Spread> {
        let values: Vec<f64> = values.collect();
        if values.is_empty() {
            return None;
        }
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(Spread { median: median(values), min, max })
    }
}

/// How long the usual, the slow and the slowest took.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
}

impl Percentiles {
    /// `None` of no numbers.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Percentiles> {
        values.sort_by(f64::total_cmp);
        let at = |share| percentile(&values, share);
        Some(Percentiles { p50: at(0.5)?, p90: at(0.9)?, p99: at(0.99)? })
    }
}

/// The smallest of the `sorted` values that at least `share` of them do not exceed (nearest rank:
/// always a value that was measured, never one in between).
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The middle value, or the mean of the two middle ones.
///
/// # Panics
/// If there is none.
pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_one() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(vec![7.0]), 7.0);
        assert!(Spread::of(std::iter::empty()).is_none());
    }

    #[test]
    fn percentiles_are_measured_values() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(Percentiles::of(hundred), Some(Percentiles { p50: 50.0, p90: 90.0, p99: 99.0 }));
        // One slow request of 200 is within the slowest hundredth; of 50 it is the p99.
        let with_outlier = |len: usize| {
            let mut values = vec![1.0; len - 1];
            values.push(9.0);
            Percentiles::of(values).expect("some")
        };
        assert_eq!(with_outlier(200).p99, 1.0);
        assert_eq!(with_outlier(50).p99, 9.0);
    }

    #[test]
    fn percentiles_of_one_and_of_none() {
        assert_eq!(Percentiles::of(vec![7.0]), Some(Percentiles { p50: 7.0, p90: 7.0, p99: 7.0 }));
        assert_eq!(Percentiles::of(Vec::new()), None);
    }
}
