//! One model by itself, or its drafting head, and one sequence whose context is computed: what a pass costs,
//! without a server.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use tandem_kernels::ThreadPool;
use tandem_kernels::kv::KvType;
use tandem_models::{BackendKind, Checkpoint, ForwardBatch, Head, Model};

const BLOCK_SIZE: usize = 16;

/// A pass is repeated for this long, and at least [`LEAST_PASSES`] times.
const TIME_A_PASS: Duration = Duration::from_millis(300);
pub(super) const LEAST_PASSES: usize = 3;

/// Prompts are computed in pieces of this many tokens, as llama.cpp's default is.
const PREFILL_CHUNK: usize = 512;

/// See the file's header.
pub(super) struct Passes {
    model: Box<dyn Model>,
    /// Passes are those of the model's head.
    by_head: bool,
    context: usize,
    table: Vec<u32>,
    batch: ForwardBatch,
    logits: Vec<f32>,
}

impl Passes {
    /// Loads the model of a folder or a GGUF file, keys and values in f16, and computes a context, behind
    /// which there is room for passes over `most` tokens.
    ///
    /// # Errors
    /// If the model cannot be loaded, or has not so many positions.
    pub(super) fn load(
        dir: &Path,
        pool: Arc<ThreadPool>,
        context: usize,
        most: usize,
    ) -> anyhow::Result<Self> {
        let checkpoint = Checkpoint::open(dir)?;
        let model = tandem_models::load_with(&checkpoint, BackendKind::Cpu, KvType::F16, pool)?;
        Self::of(model, context, most)
    }

    /// The same of a model with a head; [`Passes::of_head`] goes over to that.
    ///
    /// # Errors
    /// As [`Passes::load`].
    pub(super) fn load_with_head(
        target: &Checkpoint,
        head: &Head,
        pool: Arc<ThreadPool>,
        context: usize,
        most: usize,
    ) -> anyhow::Result<Self> {
        let model = tandem_models::load_with_head(target, head, BackendKind::Cpu, KvType::F16, pool)?;
        Self::of(model, context, most)
    }

    /// Passes of the model's head from here on.
    ///
    /// # Errors
    /// If a pass fails.
    pub(super) fn of_head(mut self) -> anyhow::Result<Self> {
        self.by_head = true;
        self.compute_context()?;
        Ok(self)
    }

    fn of(mut model: Box<dyn Model>, context: usize, most: usize) -> anyhow::Result<Self> {
        let most_positions = model.config().max_position_embeddings;
        if context + most > most_positions {
            bail!(
                "a context of {context} and a pass of {most} tokens are more than the model's {most_positions} \
                 positions; choose a shorter context or shorter passes"
            );
        }
        let num_blocks = (context + most).div_ceil(BLOCK_SIZE);
        model.allocate_kv_cache(num_blocks, BLOCK_SIZE)?;
        let table = (0..num_blocks).map(|block| block as u32).collect();
        let (batch, logits) = (ForwardBatch::new(), Vec::new());
        let mut passes = Passes { model, by_head: false, context, table, batch, logits };
        passes.compute_context()?;
        Ok(passes)
    }

    fn compute_context(&mut self) -> anyhow::Result<()> {
        for start in (0..self.context).step_by(PREFILL_CHUNK) {
            self.pass(start, PREFILL_CHUNK.min(self.context - start), 0)?;
        }
        Ok(())
    }

    fn pass(&mut self, start: usize, rows: usize, num_logits: usize) -> anyhow::Result<()> {
        let vocab_size = self.model.config().vocab_size;
        // Any tokens will do; neighbours differ, so that experts do.
        let tokens: Vec<u32> = (start..start + rows).map(|i| ((i * 7919 + 13) % vocab_size) as u32).collect();
        self.batch.clear();
        self.batch.push_sequence(&tokens, start, &self.table, BLOCK_SIZE, num_logits);
        let model = match self.by_head {
            true => self.model.drafting_head().expect("loaded with one: this is a bug"),
            false => &mut *self.model,
        };
        Ok(model.forward(&self.batch, &mut self.logits)?)
    }

    /// Milliseconds of passes over `rows` tokens and the logits of the last `num_logits`.
    ///
    /// # Errors
    /// If a pass fails.
    pub(super) fn times_ms(&mut self, rows: usize, num_logits: usize) -> anyhow::Result<Vec<f64>> {
        self.pass(self.context, rows, num_logits)?;
        let begin = Instant::now();
        let mut times = Vec::new();
        while begin.elapsed() < TIME_A_PASS || times.len() < LEAST_PASSES {
            let pass = Instant::now();
            self.pass(self.context, rows, num_logits)?;
            times.push(pass.elapsed().as_secs_f64() * 1e3);
        }
        Ok(times)
    }
}
