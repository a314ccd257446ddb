//! Mixture of experts: which experts compute a row, and the sum of what they answer.
//!
//! A row's *picks* are its `num_picks` experts with the largest router logits, the largest first, ties to
//! the lower number; their weights are a softmax. [`group`] orders the picks of all rows by expert, so
//! that an expert's weights are read once for all rows that chose it, and those of an expert that none
//! chose not at all. The sum runs over a row's picks in their own order: which rows share an expert
//! never shows in a result.

pub(crate) mod scalar;
pub(crate) mod vector;

use std::ops::Range;

use crate::math::exp;
use crate::pool::ThreadPool;
use crate::shared_out::SharedOut;

/// Elements in a nanosecond on one core, about.
const ELEMENTS_PER_NS: usize = 4;

/// Chooses the experts of every row of `logits: [rows, num_experts]`: `picks` and `weights` become
/// `[rows, num_picks]`. With `renormalise` a row's weights are the softmax over its picks, else their
/// shares of the softmax over all experts. A NaN counts as the smallest logit.
///
/// # Panics
/// If a length does not fit, or `num_picks` is 0 or more than `num_experts`.
pub fn route(
    logits: &[f32],
    num_experts: usize,
    num_picks: usize,
    renormalise: bool,
    picks: &mut [u32],
    weights: &mut [f32],
) {
    assert!((1..=num_experts).contains(&num_picks), "route: {num_picks} of {num_experts} experts");
    assert!(
        logits.len().is_multiple_of(num_experts)
            && picks.len() == logits.len() / num_experts * num_picks
            && weights.len() == picks.len(),
        "route: {} logits of {num_experts} experts, {} picks, {} weights",
        logits.len(),
        picks.len(),
        weights.len()
    );
    let rows = logits.chunks_exact(num_experts);
    for ((logits, picks), weights) in
        rows.zip(picks.chunks_exact_mut(num_picks)).zip(weights.chunks_exact_mut(num_picks))
    {
        pick(logits, picks);
        for (weight, &expert) in weights.iter_mut().zip(&*picks) {
            *weight = logits[expert as usize];
        }
        let max = weights[0];
        let sum = match renormalise {
            true => weights.iter().map(|weight| exp(weight - max)).sum::<f32>(),
            false => logits.iter().map(|logit| exp(logit - max)).sum::<f32>(),
        };
        weights.iter_mut().for_each(|weight| *weight = exp(*weight - max) / sum);
    }
}

/// Fills `picks` with the experts of the largest logits, the largest first.
fn pick(logits: &[f32], picks: &mut [u32]) {
    for i in 0..picks.len() {
        let mut best: Option<(u32, f32)> = None;
        for (expert, &logit) in (0u32..).zip(logits) {
            let logit = if logit.is_nan() { f32::NEG_INFINITY } else { logit };
            if best.is_none_or(|(_, most)| logit > most) && !picks[..i].contains(&expert) {
                best = Some((expert, logit));
            }
        }
        picks[i] = best.expect("fewer picks than experts: checked by the caller").0;
    }
}

/// Orders picks by expert: `order` becomes the indices of `picks`, those of the lowest expert first,
/// within one expert ascending, and `groups` one entry for each expert in use: its number and its range
/// of `order`.
pub fn group(picks: &[u32], order: &mut Vec<u32>, groups: &mut Vec<(u32, Range<usize>)>) {
    order.clear();
    order.extend(0..picks.len() as u32);
    order.sort_unstable_by_key(|&pick| (picks[pick as usize], pick));
    groups.clear();
    for (i, &pick) in order.iter().enumerate() {
        let expert = picks[pick as usize];
        match groups.last_mut() {
            Some((last, range)) if *last == expert => range.end = i + 1,
            _ => groups.push((expert, i..i + 1)),
        }
    }
}

/// `out[row]` = the sum over the row's picks, in order, of `weight * x[pick]`: a chain of fused
/// multiply-adds from 0. `x: [rows, num_picks, width]`, `weights: [rows, num_picks]`,
/// `out: [rows, width]`.
///
/// # Panics
/// If `width` is 0 or a length does not fit.
pub fn combine(pool: &ThreadPool, x: &[f32], weights: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        width > 0 && out.len().is_multiple_of(width) && x.len() == weights.len() * width,
        "combine: {} elements, {} weights, out of {} for rows of width {width}",
        x.len(),
        weights.len(),
        out.len()
    );
    let rows = out.len() / width;
    if rows == 0 {
        return;
    }
    assert!(weights.len().is_multiple_of(rows), "combine: {} weights for {rows} rows", weights.len());
    let num_picks = weights.len() / rows;
    let tasks = pool.num_tasks(rows, 1 + num_picks * width / ELEMENTS_PER_NS);
    let out = SharedOut::new(out);
    pool.run(tasks, &|i| {
        for row in i * rows / tasks..(i + 1) * rows / tasks {
            // SAFETY: a row belongs to one task.
            let sum = unsafe { out.part(row * width, width) };
            sum.fill(0.0);
            for pick in row * num_picks..(row + 1) * num_picks {
                let x = &x[pick * width..(pick + 1) * width];
                // SAFETY: lengths are equal.
                unsafe { (pool.kernels().add_scaled)(sum, x, weights[pick]) };
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_are_chosen_in_order_and_ties_go_to_the_lower() {
        let logits = [0.0, 2.0, f32::NAN, 2.0, 1.0, f32::NAN, f32::NAN, f32::NAN, f32::NAN, 0.5];
        let (mut picks, mut weights) = ([0; 4], [0.0; 4]);
        route(&logits, 5, 2, true, &mut picks, &mut weights);
        assert_eq!(picks, [1, 3, 4, 0]);
        assert_eq!(weights[..2], [0.5, 0.5]);
    }

    #[test]
    fn weights_are_shares_of_the_picks_or_of_all() {
        let logits = [1.0, 2.0, 3.0];
        let (mut picks, mut weights) = ([0; 2], [0.0; 2]);
        route(&logits, 3, 2, true, &mut picks, &mut weights);
        assert!((weights[0] - 0.731_058_6).abs() < 1e-6 && (weights[0] + weights[1] - 1.0).abs() < 1e-6);
        route(&logits, 3, 2, false, &mut picks, &mut weights);
        assert_eq!(picks, [2, 1]);
        assert!((weights[0] - 0.665_240_96).abs() < 1e-6 && (weights[1] - 0.244_728_47).abs() < 1e-6);
    }

    #[test]
    fn groups_hold_every_pick_once_and_only_experts_in_use() {
        let (mut order, mut groups) = (Vec::new(), Vec::new());
        group(&[7, 2, 2, 9, 7, 2], &mut order, &mut groups);
        assert_eq!(order, [1, 2, 5, 0, 4, 3]);
        assert_eq!(groups, [(2, 0..3), (7, 3..5), (9, 5..6)]);
    }
}
