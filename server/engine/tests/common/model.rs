//! A model whose logits are a hash of the whole context *as read back through the block table*: any
//! error in slots, tables, rollback, caching or scheduling changes the tokens or their
//! log-probabilities.
//!
//! Its three layers mimic what matters of a real one. The first stores each token, the second a state
//! that depends on everything before it (so a block is worth nothing behind another prefix), the third
//! reads all of it. A pass that ends between two layers leaves its cache half written.

use tandem_engine::TokenId;
use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError};

pub(crate) const VOCAB_SIZE: usize = 48;
pub(crate) const STOP: TokenId = 7;

/// From a context to logits, without any cache.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Recipe {
    /// How far these logits stray from the shared ones: 0 is a perfect draft, 100 a useless one.
    pub(crate) stray: f32,
    /// If there, the likeliest tokens follow from this many last tokens, so that greedy text repeats
    /// itself; the exact logits still depend on everything.
    pub(crate) memory: Option<usize>,
}

impl Recipe {
    /// The state after one more token; 0 is the state before the first.
    pub(crate) fn extend(state: u64, token: TokenId) -> u64 {
        mix(state ^ u64::from(token).wrapping_add(0x9E37_79B9_7F4A_7C15))
    }

    /// The logits after `context`, whose state is `state`.
    pub(crate) fn logits(&self, context: &[TokenId], state: u64) -> impl Iterator<Item = f32> {
        let Recipe { stray, memory } = *self;
        let recent = memory.map(|length| {
            context[context.len().saturating_sub(length)..].iter().fold(1, |hash, &t| Self::extend(hash, t))
        });
        (1..=VOCAB_SIZE as u64).map(move |id| {
            let own = unit(mix(state ^ id.wrapping_mul(0x9E37_79B9)));
            let shared = match recent {
                Some(recent) => 6.0 * unit(mix(recent ^ id.wrapping_mul(0x9E37_79B9))) + 0.1 * own,
                None => 6.0 * own,
            };
            shared + if stray == 0.0 { 0.0 } else { stray * unit(mix(state ^ id.wrapping_mul(0x1234_5671))) }
        })
    }
}

/// The last hidden state of a token, from the state after it.
pub(crate) fn hidden_state(state: u64) -> impl Iterator<Item = f32> {
    (1..=HIDDEN_SIZE as u64).map(move |channel| unit(mix(state ^ channel)) - 0.5)
}

/// What a text's embedding is.
pub(crate) fn mean_hidden_state(text: &[TokenId]) -> Vec<f32> {
    let mut sum = [0f64; HIDDEN_SIZE];
    let mut state = 0;
    for &token in text {
        state = Recipe::extend(state, token);
        sum.iter_mut().zip(hidden_state(state)).for_each(|(sum, value)| *sum += f64::from(value));
    }
    sum.map(|sum| (sum / text.len() as f64) as f32).to_vec()
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 24) as f32
}

/// What goes wrong in a pass that computes a certain token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) token: TokenId,
    pub(crate) kind: FaultKind,
}

/// How.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// The token's hidden state and the logits after it are not numbers.
    Poison,
    /// The pass returns an error before this layer (3: at its end).
    Error(usize),
    /// The pass panics there.
    Panic(usize),
}

pub(crate) const NUM_LAYERS: usize = 3;

pub(crate) struct HashModel {
    config: DecoderConfig,
    recipe: Recipe,
    pub(crate) fault: Option<Fault>,
    /// Rows of padding after the vocabulary, with the greatest logits of all.
    padding: usize,
    /// Tokens of the short head.
    short_head: usize,
    block_size: usize,
    /// The cache: what the first and the second layer wrote.
    tokens: Vec<TokenId>,
    pub(super) states: Vec<u64>,
    /// The pass that is under way, its layers done so far, and its logits.
    pub(super) batch: ForwardBatch,
    pub(super) num_layers_done: usize,
    logits: Vec<f32>,
    hidden: Vec<f32>,
    context: Vec<TokenId>,
}

pub(crate) const HIDDEN_SIZE: usize = 8;

impl HashModel {
    pub(crate) fn new(stray: f32) -> Self {
        HashModel::with_recipe(Recipe { stray, memory: None })
    }

    pub(crate) fn with_recipe(recipe: Recipe) -> Self {
        let config = DecoderConfig {
            vocab_size: VOCAB_SIZE,
            hidden_size: HIDDEN_SIZE,
            intermediate_size: 8,
            num_layers: NUM_LAYERS,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 8,
            max_position_embeddings: 4096,
            tie_word_embeddings: true,
            ..DecoderConfig::default()
        };
        HashModel {
            config,
            recipe,
            fault: None,
            padding: 0,
            short_head: 0,
            block_size: 0,
            tokens: Vec::new(),
            states: Vec::new(),
            batch: ForwardBatch::new(),
            num_layers_done: 0,
            logits: Vec::new(),
            hidden: Vec::new(),
            context: Vec::new(),
        }
    }

    pub(crate) fn padded(stray: f32, padding: usize) -> Option<Box<dyn Model>> {
        let mut model = HashModel::new(stray);
        model.padding = padding;
        model.config.vocab_size += padding;
        Some(Box::new(model))
    }

    pub(crate) fn boxed(stray: f32) -> Option<Box<dyn Model>> {
        Some(Box::new(HashModel::new(stray)))
    }

    pub(crate) fn faulty(stray: f32, token: TokenId, kind: FaultKind) -> Option<Box<dyn Model>> {
        let mut model = HashModel::new(stray);
        model.fault = Some(Fault { token, kind });
        Some(Box::new(model))
    }

    /// Errs or panics if this is the batch and the place for it.
    fn check_fault(&self, layer: usize) -> Result<(), ModelError> {
        let Some(Fault { token, kind }) = self.fault else { return Ok(()) };
        if !self.batch.token_ids.contains(&token) {
            return Ok(());
        }
        match kind {
            FaultKind::Error(at) if at == layer => {
                let reason = format!("token {token} breaks it");
                Err(ModelError::Backend { context: "the test's model", reason })
            }
            // Not `panic!`, whose message would be printed although somebody catches it.
            FaultKind::Panic(at) if at == layer => {
                std::panic::resume_unwind(Box::new("this token breaks the pass".to_owned()))
            }
            _ => Ok(()),
        }
    }

    fn write_tokens(&mut self) {
        for (&token, &slot) in self.batch.token_ids.iter().zip(&self.batch.slot_mapping) {
            self.tokens[slot as usize] = token;
        }
    }

    /// Every state follows from the one before it in the cache, whoever wrote that.
    fn write_states(&mut self) {
        for seq in 0..self.batch.num_seqs() {
            for row in self.batch.cu_seqlens_q[seq]..self.batch.cu_seqlens_q[seq + 1] {
                let position = self.batch.positions[row as usize] as usize;
                let before = match position.checked_sub(1) {
                    Some(before) => self.states[slot_of(&self.batch, self.block_size, seq, before)],
                    None => 0,
                };
                let slot = self.batch.slot_mapping[row as usize] as usize;
                self.states[slot] = Recipe::extend(before, self.tokens[slot]);
            }
        }
    }

    /// The whole context goes into the logits, as the block table shows it.
    fn read(&mut self) {
        let HashModel { batch, context, logits, hidden, .. } = self;
        let mut wanted = batch.logits_rows.iter().peekable();
        let mut wanted_hidden = batch.hidden_rows.iter().peekable();
        for seq in 0..batch.num_seqs() {
            context.clear();
            let mut state = 0;
            let mut is_whole = true;
            for row in batch.cu_seqlens_q[seq]..batch.cu_seqlens_q[seq + 1] {
                while context.len() <= batch.positions[row as usize] as usize {
                    let slot = slot_of(batch, self.block_size, seq, context.len());
                    context.push(self.tokens[slot]);
                    state = Recipe::extend(state, self.tokens[slot]);
                    is_whole &= self.states[slot] == state;
                }
                let poison = Fault { token: batch.token_ids[row as usize], kind: FaultKind::Poison };
                let nan = if self.fault == Some(poison) { f32::NAN } else { 0.0 };
                // A cache that contradicts itself gives other logits than the context it claims to hold.
                let state = if is_whole { state } else { !state };
                if wanted_hidden.next_if(|&&w| w == row).is_some() {
                    hidden.extend(hidden_state(state).map(|value| value + nan));
                }
                if wanted.next_if(|&&w| w == row).is_none() {
                    continue;
                }
                let row = self.recipe.logits(context, state).map(|logit| logit + nan);
                if batch.short_head {
                    logits.extend(row.take(self.short_head));
                } else {
                    logits.extend(row);
                    logits.extend(std::iter::repeat_n(1e3, self.padding));
                }
            }
        }
    }
}

/// Where the token at `position` of the pass's sequence `seq` lies.
pub(super) fn slot_of(batch: &ForwardBatch, block_size: usize, seq: usize, position: usize) -> usize {
    let block = batch.block_tables[batch.block_table_offsets[seq] as usize + position / block_size];
    block as usize * block_size + position % block_size
}

impl Model for HashModel {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn kv_bytes_per_token(&self) -> usize {
        12
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.tokens = vec![TokenId::MAX; num_blocks * block_size];
        self.states = vec![0; num_blocks * block_size];
        self.block_size = block_size;
        Ok(())
    }

    fn set_short_head(&mut self, num_tokens: usize) -> Result<bool, ModelError> {
        self.short_head = num_tokens;
        Ok(true)
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        self.batch.clone_from(batch);
        self.num_layers_done = 0;
        self.logits.clear();
        self.hidden.clear();
        Ok(())
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        if self.num_layers_done == NUM_LAYERS {
            return Ok(false);
        }
        self.check_fault(self.num_layers_done)?;
        match self.num_layers_done {
            0 => self.write_tokens(),
            1 => self.write_states(),
            _ => self.read(),
        }
        self.num_layers_done += 1;
        Ok(true)
    }

    fn hidden_states(&mut self, hidden: &mut Vec<f32>) -> Result<(), ModelError> {
        assert_eq!(self.num_layers_done, NUM_LAYERS, "the pass is not complete");
        hidden.clone_from(&self.hidden);
        Ok(())
    }

    fn finish(&mut self, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        assert_eq!(self.num_layers_done, NUM_LAYERS, "the pass is not complete");
        self.check_fault(NUM_LAYERS)?;
        logits.clone_from(&self.logits);
        Ok(())
    }
}
