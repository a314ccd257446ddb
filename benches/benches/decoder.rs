//! Time of one forward pass of the demo pair on the CPU backend: decode passes of several rows (one
//! sequence verifying drafts, or several sequences decoding) behind a context, and a prefill.
//!
//! ```text
//! cargo bench -p tandem-benches --bench decoder
//! TANDEM_BENCH_PAIR=/path/to/folder/with/target/and/draft cargo bench -p tandem-benches --bench decoder
//! ```
//!
//! Prints the fastest and the median of many passes: on a shared machine only the first is the code's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tandem_kernels::ThreadPool;
use tandem_models::backend::BackendKind;
use tandem_models::{Checkpoint, ForwardBatch, Model};

const CONTEXT_LEN: usize = 200;
const PREFILL_LEN: usize = 512;
const BLOCK_SIZE: usize = 16;
const ROWS: [usize; 7] = [1, 2, 3, 4, 5, 6, 9];
const THREADS: [usize; 2] = [1, 2];
const TIME_PER_CASE: Duration = Duration::from_millis(400);

fn main() -> Result<()> {
    let pair = std::env::var_os("TANDEM_BENCH_PAIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/demo"), PathBuf::from);
    println!("{:8} {:>7} {:20} {:>10} {:>10}", "model", "threads", "pass", "best us", "median us");
    for threads in THREADS {
        let pool = Arc::new(ThreadPool::new(threads));
        for name in ["draft", "target"] {
            let dir = pair.join(name);
            let checkpoint =
                Checkpoint::open(&dir).with_context(|| format!("no {name} in {}", pair.display()))?;
            let mut model = tandem_models::load(&checkpoint, BackendKind::Cpu, Arc::clone(&pool))?;
            let report = |pass: String, (best, median): (f64, f64)| {
                println!("{name:8} {threads:>7} {pass:20} {best:>10.1} {median:>10.1}");
            };
            for rows in ROWS {
                report(format!("verify {rows}"), time(model.as_mut(), &[(CONTEXT_LEN, rows)], true)?);
            }
            for sequences in [4, 8] {
                report(
                    format!("decode {sequences} x 1"),
                    time(model.as_mut(), &vec![(CONTEXT_LEN, 1); sequences], true)?,
                );
            }
            report(format!("prefill {PREFILL_LEN}"), time(model.as_mut(), &[(0, PREFILL_LEN)], false)?);
        }
    }
    Ok(())
}

/// Best and median microseconds of a pass over sequences of (context before the pass, rows).
fn time(model: &mut dyn Model, sequences: &[(usize, usize)], all_logits: bool) -> Result<(f64, f64)> {
    let blocks_each = (CONTEXT_LEN + PREFILL_LEN).div_ceil(BLOCK_SIZE);
    model.allocate_kv_cache(blocks_each * sequences.len(), BLOCK_SIZE)?;
    let vocab_size = model.config().vocab_size as u32;
    let tables: Vec<Vec<u32>> = (0..sequences.len())
        .map(|i| ((i * blocks_each) as u32..((i + 1) * blocks_each) as u32).collect())
        .collect();
    let token = |position: usize| (position as u32 * 7919 + 13) % vocab_size;
    let (mut batch, mut logits) = (ForwardBatch::new(), Vec::new());
    for (&(context, _), table) in sequences.iter().zip(&tables) {
        let tokens: Vec<u32> = (0..context).map(token).collect();
        batch.push_sequence(&tokens, 0, table, BLOCK_SIZE, 0);
    }
    model.forward(&batch, &mut logits)?;
    batch.clear();
    for (&(context, rows), table) in sequences.iter().zip(&tables) {
        let tokens: Vec<u32> = (context..context + rows).map(token).collect();
        batch.push_sequence(&tokens, context, table, BLOCK_SIZE, if all_logits { rows } else { 1 });
    }
    model.forward(&batch, &mut logits)?;

    let begin = Instant::now();
    let mut micros = Vec::new();
    while begin.elapsed() < TIME_PER_CASE || micros.len() < 5 {
        let pass = Instant::now();
        model.forward(&batch, &mut logits)?;
        micros.push(pass.elapsed().as_secs_f64() * 1e6);
    }
    micros.sort_by(f64::total_cmp);
    Ok((micros[0], micros[micros.len() / 2]))
}
