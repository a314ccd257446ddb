//! Mixture of experts: which experts compute a row, and the sum of what they answer.
//!
//! A row's *picks* are its `num_picks` experts with the largest scores, the largest first, ties to the lower
//! number; their weights are those scores, or shares of them. [`group`] orders the picks of all rows by expert, so
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

/// How experts are chosen, and what their answers weigh.
#[derive(Clone, Copy, Debug)]
pub struct Router<'a> {
    /// Experts of a layer.
    pub num_experts: usize,
    /// How many of them compute a row.
    pub num_picks: usize,
    /// What makes scores of logits.
    pub scoring: Scoring,
    /// `[num_experts]`: added to the scores by which experts are chosen, and not to what they weigh.
    pub choice_bias: Option<&'a [f32]>,
    /// Only the experts of some groups are chosen.
    pub groups: Option<Groups>,
    /// Weights are shares of the picks' scores alone.
    pub renormalise: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// What makes scores of the router's logits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scoring {
    /// The softmax over all experts.
    #[default]
    Softmax,
    /// Each by itself: `1 / (1 + exp(-x))`.
    Sigmoid,
}

/// Groups of neighbouring experts, of which the best are chosen before experts are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Groups {
    /// Divides the number of experts.
    pub num_groups: usize,
    /// Groups that stay in the choice.
    pub num_picked: usize,
    /// How good a group is: its best score, or the sum of the two best.
    pub two_best: bool,
}

/// Chooses the experts of every row of `logits: [rows, num_experts]`: `picks` and `weights` become
/// `[rows, num_picks]`. A NaN counts as the smallest score. `scratch` may hold anything.
///
/// # Panics
/// If a length does not fit, `num_picks` is 0 or more than the experts of the picked groups, or groups do
/// not divide the experts.
pub fn route(
    logits: &[f32],
    router: &Router<'_>,
    scratch: &mut Vec<f32>,
    picks: &mut [u32],
    weights: &mut [f32],
) {
    let Router { num_experts, num_picks, choice_bias, groups, .. } = *router;
    let in_choice = groups.map_or(num_experts, |groups| num_experts / groups.num_groups * groups.num_picked);
    assert!((1..=in_choice).contains(&num_picks), "route: {num_picks} of {in_choice} experts");
    assert!(
        groups
            .is_none_or(|groups| num_experts.is_multiple_of(groups.num_groups)
                && groups.num_picked <= groups.num_groups),
        "route: {groups:?} of {num_experts} experts"
    );
    assert!(
        logits.len().is_multiple_of(num_experts)
            && picks.len() == logits.len() / num_experts * num_picks
            && weights.len() == picks.len()
            && choice_bias.is_none_or(|bias| bias.len() == num_experts),
        "route: {} logits of {num_experts} experts, {} picks, {} weights",
        logits.len(),
        picks.len(),
        weights.len()
    );
    let rows = logits.chunks_exact(num_experts);
    for ((logits, picks), weights) in
        rows.zip(picks.chunks_exact_mut(num_picks)).zip(weights.chunks_exact_mut(num_picks))
    {
        choices(logits, router, scratch);
        pick(scratch, picks);
        weigh(logits, router, picks, weights);
    }
}

/// `by` becomes what a row's experts are chosen by.
fn choices(logits: &[f32], router: &Router<'_>, by: &mut Vec<f32>) {
    by.clear();
    match (router.scoring, router.choice_bias) {
        // A softmax keeps the order.
        (Scoring::Softmax, None) => by.extend_from_slice(logits),
        (Scoring::Softmax, Some(_)) => {
            let max = largest(logits);
            let sum = logits.iter().map(|logit| exp(logit - max)).sum::<f32>();
            by.extend(logits.iter().map(|logit| exp(logit - max) / sum));
        }
        (Scoring::Sigmoid, _) => by.extend(logits.iter().copied().map(sigmoid)),
    }
    for (by, bias) in by.iter_mut().zip(router.choice_bias.into_iter().flatten()) {
        *by += bias;
    }
    let Some(Groups { num_groups, num_picked, two_best }) = router.groups else { return };
    let size = router.num_experts / num_groups;
    // Behind the experts: the groups' own scores, then the experts of a group that falls out.
    for group in 0..num_groups {
        let score = group_score(&by[group * size..(group + 1) * size], two_best);
        by.push(score);
    }
    let (experts, scores) = by.split_at_mut(router.num_experts);
    for group in 0..num_groups {
        // Ties go to the lower number, as among experts.
        let better =
            |other: usize| scores[other] > scores[group] || scores[other] == scores[group] && other < group;
        if (0..num_groups).filter(|&other| better(other)).count() >= num_picked {
            experts[group * size..(group + 1) * size].fill(f32::NEG_INFINITY);
        }
    }
    by.truncate(router.num_experts);
}

fn group_score(scores: &[f32], two_best: bool) -> f32 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &score in scores {
        if score > best {
            (best, second) = (score, best);
        } else if score > second {
            second = score;
        }
    }
    if two_best { best + second } else { best }
}

/// What the answers of a row's picks weigh.
fn weigh(logits: &[f32], router: &Router<'_>, picks: &[u32], weights: &mut [f32]) {
    for (weight, &expert) in weights.iter_mut().zip(picks) {
        *weight = logits[expert as usize];
    }
    match router.scoring {
        Scoring::Softmax => {
            let max = largest(logits);
            let sum = match router.renormalise {
                true => weights.iter().map(|weight| exp(weight - max)).sum::<f32>(),
                false => logits.iter().map(|logit| exp(logit - max)).sum::<f32>(),
            };
            weights.iter_mut().for_each(|weight| *weight = exp(*weight - max) / sum);
        }
        Scoring::Sigmoid => {
            weights.iter_mut().for_each(|weight| *weight = sigmoid(*weight));
            if router.renormalise {
                // As DeepSeek's: no division by zero.
                let sum = weights.iter().sum::<f32>() + 1e-20;
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
        }
    }
    if router.scale != 1.0 {
        weights.iter_mut().for_each(|weight| *weight *= router.scale);
    }
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
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

    const PLAIN: Router<'_> = Router {
        num_experts: 0,
        num_picks: 2,
        scoring: Scoring::Softmax,
        choice_bias: None,
        groups: None,
        renormalise: true,
        scale: 1.0,
    };

    /// Picks and weights of all rows.
    fn routed(logits: &[f32], router: Router<'_>) -> (Vec<u32>, Vec<f32>) {
        let len = logits.len() / router.num_experts * router.num_picks;
        let (mut picks, mut weights) = (vec![0; len], vec![0.0; len]);
        route(logits, &router, &mut vec![7.0; 3], &mut picks, &mut weights);
        (picks, weights)
    }

    #[test]
    fn the_largest_are_chosen_in_order_and_ties_go_to_the_lower() {
        let logits = [0.0, 2.0, f32::NAN, 2.0, 1.0, f32::NAN, f32::NAN, f32::NAN, f32::NAN, 0.5];
        let (picks, weights) = routed(&logits, Router { num_experts: 5, ..PLAIN });
        assert_eq!(picks, [1, 3, 4, 0]);
        assert_eq!(weights[..2], [0.5, 0.5]);
    }

    #[test]
    fn weights_are_shares_of_the_picks_or_of_all() {
        let logits = [1.0, 2.0, 3.0];
        let router = Router { num_experts: 3, ..PLAIN };
        let (_, weights) = routed(&logits, router);
        assert!((weights[0] - 0.731_058_6).abs() < 1e-6 && (weights[0] + weights[1] - 1.0).abs() < 1e-6);
        let (picks, weights) = routed(&logits, Router { renormalise: false, ..router });
        assert_eq!(picks, [2, 1]);
        assert!((weights[0] - 0.665_240_96).abs() < 1e-6 && (weights[1] - 0.244_728_47).abs() < 1e-6);
    }

    #[test]
    fn a_bias_chooses_and_does_not_weigh() {
        let router = Router { num_experts: 3, choice_bias: Some(&[0.0, 5.0, 1.0]), scale: 2.0, ..PLAIN };
        let sigmoid = Router { scoring: Scoring::Sigmoid, ..router };
        let (picks, weights) = routed(&[0.0, -1.0, -1.0], sigmoid);
        assert_eq!((picks, weights), (vec![1, 2], vec![1.0, 1.0]));
        let (_, weights) = routed(&[0.0, 0.0, 0.0], Router { renormalise: false, ..sigmoid });
        assert_eq!(weights, [1.0, 1.0]);
        assert_eq!(routed(&[9.0, 0.0, 0.0], router).0, [1, 2]);
    }

    #[test]
    fn only_the_best_groups_are_in_the_choice() {
        let groups = |two_best| Some(Groups { num_groups: 3, num_picked: 1, two_best });
        let router = Router { num_experts: 6, num_picks: 1, ..PLAIN };
        // The best expert; the best two together; a tie.
        let logits = [9.0, 0.0, 5.0, 5.0, 0.0, 0.0];
        assert_eq!(routed(&logits, Router { groups: groups(false), ..router }).0, [0]);
        assert_eq!(routed(&logits, Router { groups: groups(true), ..router }).0, [2]);
        let picks = routed(&[0.0; 6], Router { num_picks: 2, groups: groups(true), ..router }).0;
        assert_eq!(picks, [0, 1]);
        let spoilt = [f32::NAN, 1.0, f32::NAN, f32::NAN, 0.0, 0.0];
        assert_eq!(routed(&spoilt, Router { groups: groups(false), ..router }).0, [1]);
    }

    #[test]
    fn groups_hold_every_pick_once_and_only_experts_in_use() {
        let (mut order, mut groups) = (Vec::new(), Vec::new());
        group(&[7, 2, 2, 9, 7, 2], &mut order, &mut groups);
        assert_eq!(order, [1, 2, 5, 0, 4, 3]);
        assert_eq!(groups, [(2, 0..3), (7, 3..5), (9, 5..6)]);
    }
}
