//! A drafting head for [`HashModel`], which watches over what it is given. What it drafts follows from the
//! features that its target left, so a head handed another text's features is wrong at once; that alone would
//! show in no answer. So each pass looks back: every row of the head's cache must have been made of the features
//! that are there now, and those of the text itself. Whatever a head computed from a guess of its own must be
//! gone as soon as the target has put its features there.

use std::sync::{Arc, Mutex, PoisonError};

use tandem_engine::TokenId;
use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError};

use super::model::{Fault, FaultKind, HashModel, Recipe, VOCAB_SIZE, slot_of};

/// What makes a head.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct HeadRecipe {
    pub(crate) recipe: Recipe,
    /// It has outputs for the first so many tokens.
    pub(crate) num_outputs: usize,
    /// The target leaves its features after this many layers: 2 or 3.
    pub(crate) features_after: usize,
    pub(crate) fault: Option<Fault>,
}

/// The first thing that a head was given and should not have been.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watch(Arc<Mutex<Option<String>>>);

impl Watch {
    fn note(&self, wrong: String) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(wrong);
    }

    /// What was seen since the last call.
    pub(crate) fn take(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What lies in a slot beside keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Feature {
    state: u64,
    is_guess: bool,
}

/// A row of the head's cache.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    token: TokenId,
    made_of: Feature,
}

/// A target with its head.
pub(crate) struct HeadedModel {
    target: HashModel,
    features_after: usize,
    head: HashHead,
}

struct HashHead {
    config: DecoderConfig,
    recipe: Recipe,
    fault: Option<Fault>,
    num_outputs: usize,
    short_head: usize,
    block_size: usize,
    features: Vec<Feature>,
    rows: Vec<Row>,
    batch: ForwardBatch,
    is_done: bool,
    logits: Vec<f32>,
    watch: Watch,
}

impl HeadedModel {
    pub(crate) fn new(target: HashModel, recipe: HeadRecipe, watch: Watch) -> Self {
        let head = HashHead {
            config: target.config().clone(),
            recipe: recipe.recipe,
            fault: recipe.fault,
            num_outputs: recipe.num_outputs,
            short_head: 0,
            block_size: 0,
            features: Vec::new(),
            rows: Vec::new(),
            batch: ForwardBatch::new(),
            is_done: true,
            logits: Vec::new(),
            watch,
        };
        HeadedModel { target, features_after: recipe.features_after, head }
    }
}

impl Model for HeadedModel {
    fn config(&self) -> &DecoderConfig {
        self.target.config()
    }

    fn kv_bytes_per_token(&self) -> usize {
        self.target.kv_bytes_per_token()
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.head.allocate_kv_cache(num_blocks, block_size)?;
        self.target.allocate_kv_cache(num_blocks, block_size)
    }

    fn drafting_head(&mut self) -> Option<&mut dyn Model> {
        Some(&mut self.head)
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        self.target.begin(batch)
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        let has_advanced = self.target.advance()?;
        if has_advanced && self.target.num_layers_done == self.features_after {
            for &slot in &self.target.batch.slot_mapping {
                let state = self.target.states[slot as usize];
                self.head.features[slot as usize] = Feature { state, is_guess: false };
            }
        }
        Ok(has_advanced)
    }

    fn hidden_states(&mut self, hidden: &mut Vec<f32>) -> Result<(), ModelError> {
        self.target.hidden_states(hidden)
    }

    fn finish(&mut self, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        self.target.finish(logits)
    }
}

impl HashHead {
    fn feature_before(&self, seq: usize, position: usize) -> Feature {
        let before = position.checked_sub(1);
        before.map_or(Feature::default(), |before| {
            self.features[slot_of(&self.batch, self.block_size, seq, before)]
        })
    }

    fn write(&mut self) {
        for seq in 0..self.batch.num_seqs() {
            for row in self.batch.cu_seqlens_q[seq] as usize..self.batch.cu_seqlens_q[seq + 1] as usize {
                let made_of = self.feature_before(seq, self.batch.positions[row] as usize);
                let slot = self.batch.slot_mapping[row] as usize;
                self.rows[slot] = Row { token: self.batch.token_ids[row], made_of };
            }
        }
    }

    /// Looks back from each row that gives logits; then leaves the guesses.
    fn read(&mut self) {
        let mut guesses = Vec::new();
        let mut logits = std::mem::take(&mut self.logits);
        let mut context = Vec::new();
        for seq in 0..self.batch.num_seqs() {
            let rows = self.batch.cu_seqlens_q[seq]..self.batch.cu_seqlens_q[seq + 1];
            for row in rows.filter(|row| self.batch.logits_rows.contains(row)) {
                let position = self.batch.positions[row as usize] as usize;
                context.clear();
                let state = match self.look_back(seq, position, &mut context) {
                    Ok(state) => state,
                    Err(wrong) => {
                        self.watch.note(format!("a head's row at position {position}: {wrong}"));
                        0
                    }
                };
                let poison = Fault { token: self.batch.token_ids[row as usize], kind: FaultKind::Poison };
                let nan = if self.fault == Some(poison) { f32::NAN } else { 0.0 };
                let num_logits = if self.batch.short_head { self.short_head } else { VOCAB_SIZE };
                let row_logits = self.recipe.logits(&context, state).take(num_logits).enumerate();
                logits.extend(
                    row_logits.map(|(id, logit)| if id < self.num_outputs { logit + nan } else { -1e30 }),
                );
                guesses.push((self.batch.slot_mapping[row as usize], Feature { state, is_guess: true }));
            }
        }
        self.logits = logits;
        for (slot, guess) in guesses {
            self.features[slot as usize] = guess;
        }
    }

    /// The state after the tokens up to `position`, which are put into `context`.
    fn look_back(&self, seq: usize, position: usize, context: &mut Vec<TokenId>) -> Result<u64, String> {
        if position == 0 {
            return Err("there is nothing before it to draft from".to_owned());
        }
        let mut state = 0;
        for at in 0..=position {
            let row = self.rows[slot_of(&self.batch, self.block_size, seq, at)];
            let there = self.feature_before(seq, at);
            // A first token has no features before it, and nobody attends to its key.
            if at > 0 && there.state != state {
                return Err(format!("the features before position {at} are not this text's"));
            }
            if at > 0 && row.made_of != there {
                return Err(format!("its key at {at} is made of {:?}, and there is {there:?}", row.made_of));
            }
            context.push(row.token);
            state = Recipe::extend(state, row.token);
        }
        Ok(state)
    }

    fn check_fault(&self, is_end: bool) -> Result<(), ModelError> {
        let Some(Fault { token, kind }) = self.fault else { return Ok(()) };
        let is_here = |layer: usize| (layer > 0) == is_end && self.batch.token_ids.contains(&token);
        match kind {
            FaultKind::Error(layer) if is_here(layer) => {
                let reason = format!("token {token} breaks it");
                Err(ModelError::Backend { context: "the test's head", reason })
            }
            // Not `panic!`, whose message would be printed although somebody catches it.
            FaultKind::Panic(layer) if is_here(layer) => {
                std::panic::resume_unwind(Box::new("this token breaks the head's pass".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

impl Model for HashHead {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn kv_bytes_per_token(&self) -> usize {
        0
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.features = vec![Feature::default(); num_blocks * block_size];
        self.rows = vec![Row::default(); num_blocks * block_size];
        self.block_size = block_size;
        Ok(())
    }

    fn set_short_head(&mut self, num_tokens: usize) -> Result<bool, ModelError> {
        // One with a vocabulary of its own has no use for it.
        self.short_head = num_tokens;
        Ok(self.num_outputs == VOCAB_SIZE)
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        self.batch.clone_from(batch);
        self.is_done = false;
        self.logits.clear();
        Ok(())
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        if self.is_done {
            return Ok(false);
        }
        self.check_fault(false)?;
        self.write();
        self.read();
        self.is_done = true;
        Ok(true)
    }

    fn finish(&mut self, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        assert!(self.is_done, "the pass is not complete");
        self.check_fault(true)?;
        logits.clone_from(&self.logits);
        Ok(())
    }
}
