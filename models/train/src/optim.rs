//! AdamW and Muon, gradient clipping and the learning-rate schedules.
//!
//! Muon (Jordan et al. 2024): the momentum of a hidden matrix is replaced by the nearest
//! semi-orthogonal matrix, found by five Newton-Schulz steps; embeddings, norms and biases take
//! AdamW. State is f32 and saved exactly.

use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

use crate::model::{Parameter, Role};
use crate::ops::simd::{dot, vectorized};
use crate::{OptimizerKind, RunOptions, Schedule, TrainError};

const BETA1: f32 = 0.9;
const BETA2: f32 = 0.95;
const EPS: f32 = 1e-8;
const MUON_MOMENTUM: f32 = 0.95;
/// Elements that one task updates.
const SPAN: usize = 16_384;

/// The share of the peak learning rate at a step (from 0) of a run.
pub(crate) fn schedule_factor(run: &RunOptions, step: u64) -> f64 {
    const FLOOR: f64 = 0.01;
    const FLAT: f64 = 0.3;
    let warm =
        if run.warmup_steps == 0 { 1.0 } else { ((step + 1) as f64 / run.warmup_steps as f64).min(1.0) };
    let done = step as f64 / run.total_steps() as f64;
    let decay = match run.schedule {
        Schedule::Cosine => FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        Schedule::Linear => ((1.0 - done) / (1.0 - FLAT)).clamp(FLOOR, 1.0),
    };
    warm * decay
}

/// Moments of one parameter.
pub(crate) struct State {
    /// Mean of the gradient, or Muon's momentum.
    pub(crate) first: Vec<f32>,
    /// Mean of its square; empty under Muon.
    pub(crate) second: Vec<f32>,
}

/// The optimiser of a model's parameters, in their order.
pub(crate) struct Optimizer {
    kind: OptimizerKind,
    lr: f64,
    muon_lr: f64,
    weight_decay: f64,
    clip_norm: f64,
    /// Steps taken.
    pub(crate) steps: u64,
    pub(crate) states: Vec<State>,
}

impl Optimizer {
    pub(crate) fn new(run: &RunOptions, parameters: &[Parameter]) -> Self {
        let states = parameters
            .iter()
            .map(|parameter| {
                let count = parameter.var.elem_count();
                let second = if orthogonal(run.optimizer, parameter.role) { 0 } else { count };
                State { first: vec![0.0; count], second: vec![0.0; second] }
            })
            .collect();
        Self {
            kind: run.optimizer,
            lr: run.lr,
            muon_lr: run.muon_lr,
            weight_decay: run.weight_decay,
            clip_norm: run.clip_norm,
            steps: 0,
            states,
        }
    }

    /// One update at `factor` of the peak learning rate. Returns the gradients' global norm; where
    /// that is not finite, nothing is changed.
    pub(crate) fn step(
        &mut self,
        parameters: &[Parameter],
        mut grads: GradStore,
        factor: f64,
    ) -> Result<f64, TrainError> {
        let mut gradients = Vec::with_capacity(parameters.len());
        for parameter in parameters {
            let gradient = match grads.remove(parameter.var.as_tensor()) {
                Some(gradient) => gradient.flatten_all()?.to_vec1::<f32>()?,
                None => vec![0.0; parameter.var.elem_count()],
            };
            gradients.push(gradient);
        }
        let norm = gradients.iter().map(|gradient| squares(gradient)).sum::<f64>().sqrt();
        if !norm.is_finite() {
            return Ok(norm);
        }
        self.steps += 1;
        let clip =
            if self.clip_norm > 0.0 && norm > self.clip_norm { (self.clip_norm / norm) as f32 } else { 1.0 };
        // One task a parameter: Newton-Schulz multiplies matrices too small to share among threads.
        let settings = Settings { factor, clip, ..Settings::of(self) };
        (parameters, &mut self.states, &gradients)
            .into_par_iter()
            .try_for_each(|(parameter, state, gradient)| settings.update(parameter, state, gradient))?;
        Ok(norm)
    }
}

/// What one step's updates share.
struct Settings {
    kind: OptimizerKind,
    lr: f64,
    muon_lr: f64,
    weight_decay: f64,
    steps: u64,
    factor: f64,
    clip: f32,
}

impl Settings {
    fn of(optimizer: &Optimizer) -> Self {
        let &Optimizer { kind, lr, muon_lr, weight_decay, steps, .. } = optimizer;
        Self { kind, lr, muon_lr, weight_decay, steps, factor: 1.0, clip: 1.0 }
    }

    fn update(&self, parameter: &Parameter, state: &mut State, gradient: &[f32]) -> Result<(), TrainError> {
        let gradient: Vec<f32> = gradient.iter().map(|g| g * self.clip).collect();
        if orthogonal(self.kind, parameter.role) {
            self.muon(parameter, state, &gradient)
        } else {
            self.adamw(parameter, state, &gradient)
        }
    }

    fn adamw(&self, parameter: &Parameter, state: &mut State, gradient: &[f32]) -> Result<(), TrainError> {
        let lr = self.lr * self.factor;
        let decay = if parameter.role == Role::Matrix { (1.0 - lr * self.weight_decay) as f32 } else { 1.0 };
        let unbias1 = (1.0 / (1.0 - f64::from(BETA1).powf(self.steps as f64))) as f32;
        let unbias2 = (1.0 / (1.0 - f64::from(BETA2).powf(self.steps as f64))) as f32;
        let lr = lr as f32;
        let State { first, second } = state;
        let mut values = parameter.var.flatten_all()?.to_vec1::<f32>()?;
        let tasks = (
            values.par_chunks_mut(SPAN),
            first.par_chunks_mut(SPAN),
            second.par_chunks_mut(SPAN),
            gradient.par_chunks(SPAN),
        );
        tasks.into_par_iter().for_each(|(values, first, second, gradient)| {
            vectorized(|| {
                let moments = first.iter_mut().zip(second);
                for ((value, (first, second)), &g) in values.iter_mut().zip(moments).zip(gradient) {
                    *first = BETA1 * *first + (1.0 - BETA1) * g;
                    *second = BETA2 * *second + (1.0 - BETA2) * g * g;
                    let direction = *first * unbias1 / ((*second * unbias2).sqrt() + EPS);
                    *value = *value * decay - lr * direction;
                }
            });
        });
        Ok(parameter.var.set(&Tensor::from_vec(values, parameter.var.shape(), &Device::Cpu)?)?)
    }

    fn muon(&self, parameter: &Parameter, state: &mut State, gradient: &[f32]) -> Result<(), TrainError> {
        let mut update = Vec::with_capacity(gradient.len());
        for (m, &g) in state.first.iter_mut().zip(gradient) {
            *m = MUON_MOMENTUM * *m + g;
            update.push(g + MUON_MOMENTUM * *m);
        }
        let update = Tensor::from_vec(update, parameter.var.shape(), &Device::Cpu)?;
        let (rows, columns) = update.dims2()?;
        let lr = self.muon_lr * self.factor;
        // A tall matrix spreads its unit singular values over more rows.
        let gain = (rows as f64 / columns as f64).max(1.0).sqrt();
        let kept = (parameter.var.as_tensor().detach() * (1.0 - lr * self.weight_decay))?;
        Ok(parameter.var.set(&(kept - (orthogonalize(&update)? * (lr * gain))?)?)?)
    }
}

fn orthogonal(kind: OptimizerKind, role: Role) -> bool {
    kind == OptimizerKind::Muon && role == Role::Matrix
}

/// Sum of squares in fixed spans, so that threads do not decide the order.
fn squares(values: &[f32]) -> f64 {
    let parts: Vec<f64> =
        values.par_chunks(SPAN).map(|chunk| f64::from(vectorized(|| dot(chunk, chunk)))).collect();
    parts.iter().sum()
}

/// The semi-orthogonal matrix near `x`: five steps of a quintic whose slope at zero is large, so
/// that small singular values rise to about 1 quickly (coefficients of Jordan et al.).
fn orthogonalize(x: &Tensor) -> candle_core::Result<Tensor> {
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let (rows, columns) = x.dims2()?;
    let tall = rows > columns;
    let x = if tall { x.t()?.contiguous()? } else { x.clone() };
    let norm = squares(&x.flatten_all()?.to_vec1::<f32>()?).sqrt();
    let mut x = (x / (norm + 1e-7))?;
    for _ in 0..5 {
        let a = x.matmul(&x.t()?)?;
        let b = ((&a * B)? + (a.matmul(&a)? * C)?)?;
        x = ((&x * A)? + b.matmul(&x)?)?;
    }
    if tall { x.t()?.contiguous() } else { Ok(x) }
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::Budget;
    use crate::random::{Purpose, normal, stream};

    #[test]
    fn schedules_rise_and_fall() {
        let mut run = RunOptions { budget: Budget::Steps(1000), warmup_steps: 100, ..Default::default() };
        for schedule in [Schedule::Cosine, Schedule::Linear] {
            run.schedule = schedule;
            assert!(schedule_factor(&run, 0) <= 0.01);
            assert!(schedule_factor(&run, 99) > 0.97);
            assert!(schedule_factor(&run, 999) < 0.02);
            assert!((100..999).all(|step| schedule_factor(&run, step + 1) <= schedule_factor(&run, step)));
        }
    }

    #[test]
    fn orthogonalize_levels_singular_values() {
        for shape in [(6, 10), (10, 6)] {
            let values = normal(&mut stream(1, Purpose::Samples, 0, 0), 60, 3.0);
            let x = Tensor::from_vec(values, shape, &Device::Cpu).expect("tensor");
            let u = orthogonalize(&x).expect("orthogonalize");
            assert_eq!(u.dims2().expect("matrix"), shape);
            // The sum of squared singular values: each ends between about 0.7 and 1.2.
            let total = squares(&u.flatten_all().and_then(|t| t.to_vec1()).expect("values"));
            assert!((6.0 * 0.45..6.0 * 1.5).contains(&total), "{total}");
        }
    }

    #[test]
    fn both_optimizers_descend_a_quadratic() {
        for kind in [OptimizerKind::Muon, OptimizerKind::AdamW] {
            let run = RunOptions {
                optimizer: kind,
                lr: 0.05,
                muon_lr: 0.2,
                weight_decay: 0.0,
                ..Default::default()
            };
            let var =
                Var::from_tensor(&Tensor::ones((3, 4), candle_core::DType::F32, &Device::Cpu).expect("ones"))
                    .expect("var");
            let parameters = [Parameter { name: "w".into(), role: Role::Matrix, var: var.clone() }];
            let mut optimizer = Optimizer::new(&run, &parameters);
            let loss = || var.sqr().and_then(|t| t.sum_all()).expect("loss");
            let before = loss().to_scalar::<f32>().expect("scalar");
            for _ in 0..20 {
                optimizer.step(&parameters, loss().backward().expect("grads"), 1.0).expect("step");
            }
            let after = loss().to_scalar::<f32>().expect("scalar");
            assert!(after < before / 2.0, "{kind:?}: {before} to {after}");
        }
    }
}
