//! Layers of experts on the CPU: whose rows go to which expert, brought together so that each expert's weights are read
//! once a pass. Buffers grow to the largest pass and stay.

use std::ops::Range;

use tandem_kernels::{PackedMatrix, ThreadPool, experts, matmul};

use crate::backend::{ExpertLinear, Share};
use crate::config::Experts;

/// Which experts compute which rows, and room to bring an expert's rows together.
#[derive(Debug)]
pub struct Routing {
    picks_per_row: usize,
    /// By which a row's experts are chosen; room for those of groups, too.
    scores: Vec<f32>,
    /// `[picks]`
    picks: Vec<u32>,
    /// `[picks]`
    weights: Vec<f32>,
    /// Of [`experts::group`].
    order: Vec<u32>,
    groups: Vec<(u32, Range<usize>)>,
    gathered: Vec<f32>,
    projected: Vec<f32>,
}

impl Routing {
    pub(super) fn new(max_rows: usize, experts: &Experts) -> Self {
        let picks = max_rows * experts.num_experts_per_token;
        Routing {
            picks_per_row: experts.num_experts_per_token,
            scores: Vec::with_capacity(2 * experts.num_experts),
            picks: Vec::with_capacity(picks),
            weights: Vec::with_capacity(picks),
            order: Vec::with_capacity(picks),
            groups: Vec::with_capacity(picks.min(experts.num_experts)),
            gathered: Vec::new(),
            projected: Vec::new(),
        }
    }

    /// See [`route`](crate::backend::Backend::route).
    pub(super) fn route(
        &mut self,
        rows: usize,
        config: &Experts,
        choice_bias: Option<&[f32]>,
        logits: &[f32],
    ) {
        let router = experts::Router {
            num_experts: config.num_experts,
            num_picks: config.num_experts_per_token,
            scoring: config.scoring,
            choice_bias,
            groups: config.groups,
            renormalise: config.renormalise,
            scale: config.weight_scale,
        };
        self.picks.resize(rows * router.num_picks, 0);
        self.weights.resize(rows * router.num_picks, 0.0);
        let Routing { scores, picks, weights, order, groups, .. } = self;
        experts::route(&logits[..rows * router.num_experts], &router, scores, picks, weights);
        experts::group(picks, order, groups);
    }

    /// See [`expert_matmul`](crate::backend::Backend::expert_matmul).
    pub(super) fn project(
        &mut self,
        pool: &ThreadPool,
        x: &[f32],
        share: Share,
        linear: &ExpertLinear<'_, PackedMatrix, Vec<f32>>,
        out: &mut [f32],
    ) {
        let (inp, outp) = (linear.weights[0].in_features(), linear.weights[0].out_features());
        let Routing { picks_per_row, order, groups, gathered, projected, .. } = self;
        for (expert, range) in groups.iter() {
            let picks = &order[range.clone()];
            gathered.clear();
            for &pick in picks {
                let row = match share {
                    Share::Row => pick as usize / *picks_per_row,
                    Share::Pick => pick as usize,
                };
                gathered.extend_from_slice(&x[row * inp..(row + 1) * inp]);
            }
            projected.resize(projected.len().max(picks.len() * outp), 0.0);
            let projected = &mut projected[..picks.len() * outp];
            let bias = linear.biases.map(|biases| biases[*expert as usize].as_slice());
            matmul::matmul(pool, gathered, &linear.weights[*expert as usize], bias, projected);
            for (&pick, row) in picks.iter().zip(projected.chunks_exact(outp)) {
                out[pick as usize * outp..(pick as usize + 1) * outp].copy_from_slice(row);
            }
        }
    }

    /// See [`combine`](crate::backend::Backend::combine).
    pub(super) fn combine(&self, pool: &ThreadPool, x: &[f32], width: usize, out: &mut [f32]) {
        experts::combine(pool, &x[..self.weights.len() * width], &self.weights, width, out);
    }
}
