//! The loop that pretraining and distillation share: schedule, update, progress, checkpoints.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use candle_core::Tensor;
use indicatif::{HumanDuration, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};

use crate::folder::{Progress, RunFolder};
use crate::model::Decoder;
use crate::optim::{Optimizer, schedule_factor};
use crate::{Budget, CorpusSummary, ModelShape, RunOptions, SampleMix, TrainError};

/// Weight of a new loss in the running mean.
const SMOOTHING: f32 = 0.02;
/// Time between lines where no bar can be drawn.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// What a finished loop reports.
pub(crate) struct Outcome {
    pub(crate) steps: u64,
    pub(crate) loss: f32,
    pub(crate) tokens_per_second: f64,
}

/// The work that differs between kinds of run.
pub(crate) trait Task {
    /// The loss of a step's batch, as a scalar with its graph.
    fn loss(&mut self, decoder: &Decoder, step: u64) -> Result<Tensor, TrainError>;

    /// One line about held-out text; `None` where there is none.
    fn evaluate(&mut self, decoder: &Decoder) -> Result<Option<String>, TrainError>;
}

/// Runs all steps, from the folder's checkpoint where it resumes.
pub(crate) fn drive(
    run: &RunOptions,
    folder: &RunFolder,
    decoder: &Decoder,
    fingerprint: &Map<String, Value>,
    task: &mut dyn Task,
) -> Result<Outcome, TrainError> {
    let mut optimizer = Optimizer::new(run, &decoder.parameters);
    let mut progress = Progress { step: 0, loss: 0.0 };
    let mut saved = None;
    if folder.resumes() {
        progress = folder.restore(decoder, &mut optimizer, fingerprint)?;
        saved = Some(progress.step);
    }
    let (total, first) = (run.total_steps(), progress.step);
    let tokens = (run.seq_len * run.batch) as u64;
    let bar = progress_bar(run, total * tokens, first * tokens);
    let started = Instant::now();
    let mut log = PlainLog { on: run.progress && bar.is_hidden(), last: started };
    while progress.step < total {
        let step = progress.step;
        let loss = task.loss(decoder, step)?;
        let value = loss.to_scalar::<f32>()?;
        let diverged = |loss| TrainError::Diverged {
            step: step + 1,
            loss,
            last_good: saved.map_or("none written yet".to_owned(), |step| format!("after step {step}")),
        };
        if !value.is_finite() {
            return Err(diverged(value));
        }
        let norm = optimizer.step(&decoder.parameters, loss.backward()?, schedule_factor(run, step))?;
        if !norm.is_finite() {
            return Err(diverged(norm as f32));
        }
        progress.step += 1;
        progress.loss += (value - progress.loss) * SMOOTHING.max(1.0 / progress.step as f32);
        let done = progress.step;
        bar.inc(tokens);
        bar.set_message(format!("step {done} of {total}, loss {:.3}", progress.loss));
        log.tick(|| {
            let rate = ((done - first) * tokens) as f64 / started.elapsed().as_secs_f64();
            let left = HumanDuration(Duration::from_secs_f64(((total - done) * tokens) as f64 / rate));
            format!("step {done} of {total}, loss {:.3}, {rate:.0} tokens/s, {left} left", progress.loss)
        });
        let evaluates = run.eval_interval > 0 && done.is_multiple_of(run.eval_interval) && done < total;
        if evaluates && let Some(line) = task.evaluate(decoder)? {
            let line = format!("step {done}: {line}");
            if bar.is_hidden() { log.line(&line) } else { bar.println(line) }
        }
        let stopped = run.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
        let due = run.checkpoint_interval > 0 && done.is_multiple_of(run.checkpoint_interval);
        if due || stopped || done == total {
            folder.save(decoder, &optimizer, progress, fingerprint)?;
            saved = Some(done);
        }
        if stopped && done < total {
            bar.abandon();
            return Err(TrainError::Interrupted { step: done, dir: folder.dir().to_owned() });
        }
    }
    bar.finish();
    let seconds = started.elapsed().as_secs_f64().max(1e-9);
    let tokens_per_second = ((total - first) * tokens) as f64 / seconds;
    Ok(Outcome { steps: total, loss: progress.loss, tokens_per_second })
}

fn progress_bar(run: &RunOptions, total: u64, done: u64) -> ProgressBar {
    let target = if run.progress { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total), target);
    let template = "{wide_bar} {msg}, {per_sec}, {eta} left";
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.set_style(style.with_key(
        "per_sec",
        |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
            // A terminal that refuses a write has nothing left to show an error on.
            let _ = write!(out, "{:.0} tokens/s", state.per_sec());
        },
    ));
    bar.set_position(done);
    bar.reset_eta();
    if run.progress {
        bar.enable_steady_tick(Duration::from_millis(500));
    }
    bar
}

/// Lines on standard error where there is no terminal for a bar: a run of hours is often started in
/// the background, its output in a file.
struct PlainLog {
    on: bool,
    last: Instant,
}

impl PlainLog {
    fn tick(&mut self, line: impl FnOnce() -> String) {
        if self.on && self.last.elapsed() >= LOG_INTERVAL {
            self.last = Instant::now();
            self.line(&line());
        }
    }

    fn line(&self, line: &str) {
        if self.on {
            eprintln!("{line}");
        }
    }
}

/// Every option that the weights depend on; a resumed run must have equal ones.
pub(crate) fn fingerprint(
    run: &RunOptions,
    shape: &ModelShape,
    mix: &SampleMix,
    corpus: &CorpusSummary,
) -> Map<String, Value> {
    let budget = match run.budget {
        Budget::Steps(steps) => steps,
        Budget::Tokens(_) => run.total_steps(),
    };
    let entries = [
        ("shape", json!(format!("{shape:?}"))),
        ("mix", json!(format!("{mix:?}"))),
        ("corpus", json!(format!("{corpus:?}"))),
        ("seq_len", json!(run.seq_len)),
        ("batch", json!(run.batch)),
        ("steps", json!(budget)),
        ("lr", json!(run.lr)),
        ("muon_lr", json!(run.muon_lr)),
        ("weight_decay", json!(run.weight_decay)),
        ("clip_norm", json!(run.clip_norm)),
        ("optimizer", json!(format!("{:?}", run.optimizer))),
        ("schedule", json!(format!("{:?}", run.schedule))),
        ("warmup_steps", json!(run.warmup_steps)),
        ("seed", json!(run.seed)),
    ];
    entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect()
}
