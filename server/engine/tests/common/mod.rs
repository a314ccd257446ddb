//! A model for tests, a collector for events, and a driver for the synchronous engine.
#![allow(dead_code)] // Each test file uses its own part.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use tandem_engine::{
    DraftTokens, Engine, EngineConfig, EngineError, Event, Finished, Lane, Models, OutputToken,
    SamplingParams, SequenceId, SubmitRequest, TokenId, TokenLogprobs,
};
use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError, RopeScaling};

/// Logits are a hash of the whole context *as read back through the block table*: any error in
/// slots, tables, rollback or scheduling changes the tokens.
pub(crate) struct HashModel {
    config: DecoderConfig,
    slots: Vec<u32>,
    block_size: usize,
    /// How far these logits stray from the shared ones: 0 is a perfect draft, 100 a useless one.
    stray: f32,
    pub(crate) poison: Option<TokenId>,
    /// Rows of padding after the vocabulary, with the greatest logits of all.
    padding: usize,
}

pub(crate) const VOCAB_SIZE: usize = 48;
pub(crate) const STOP: TokenId = 7;

impl HashModel {
    pub(crate) fn new(stray: f32) -> Self {
        let config = DecoderConfig {
            vocab_size: VOCAB_SIZE,
            hidden_size: 8,
            intermediate_size: 8,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 8,
            rms_norm_eps: 1e-6,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::None,
            max_position_embeddings: 4096,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
        };
        HashModel { config, slots: Vec::new(), block_size: 0, stray, poison: None, padding: 0 }
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
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

fn unit(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1u64 << 24) as f32
}

impl Model for HashModel {
    fn config(&self) -> &DecoderConfig {
        &self.config
    }

    fn kv_bytes_per_token(&self) -> usize {
        4
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.slots = vec![u32::MAX; num_blocks * block_size];
        self.block_size = block_size;
        Ok(())
    }

    fn forward(&mut self, batch: &ForwardBatch, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        logits.clear();
        for (&token, &slot) in batch.token_ids.iter().zip(&batch.slot_mapping) {
            self.slots[slot as usize] = token;
        }
        let mut wanted = batch.logits_rows.iter().peekable();
        for seq in 0..batch.num_seqs() {
            let table = &batch.block_tables
                [batch.block_table_offsets[seq] as usize..batch.block_table_offsets[seq + 1] as usize];
            let rows = batch.cu_seqlens_q[seq]..batch.cu_seqlens_q[seq + 1];
            let mut hash = 0u64;
            let mut position = 0;
            for row in rows {
                while position <= batch.positions[row as usize] {
                    let p = position as usize;
                    let token = self.slots
                        [table[p / self.block_size] as usize * self.block_size + p % self.block_size];
                    hash = mix(hash ^ u64::from(token).wrapping_add(0x9E37_79B9_7F4A_7C15));
                    position += 1;
                }
                if wanted.next_if(|&&w| w == row).is_none() {
                    continue;
                }
                let poisoned = self.poison == Some(batch.token_ids[row as usize]);
                logits.extend((0..VOCAB_SIZE as u64).map(|id| {
                    let own = unit(mix(hash ^ (id + 1).wrapping_mul(0x9E37_79B9)));
                    let other = unit(mix(hash ^ (id + 1).wrapping_mul(0x1234_5671)));
                    if poisoned { f32::NAN } else { 6.0 * own + self.stray * other }
                }));
                logits.extend(std::iter::repeat_n(1e3, self.padding));
            }
        }
        Ok(())
    }
}

/// Everything a client saw of one sequence.
#[derive(Debug, Default, PartialEq, Clone)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) drafted: usize,
    pub(crate) logprobs: Vec<TokenLogprobs>,
    pub(crate) prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    pub(crate) finished: Option<Finished>,
    pub(crate) failed: Option<EngineError>,
}

/// What must be equal whatever the batch, chunking and speculation.
pub(crate) type Invariant =
    (Vec<TokenId>, Vec<TokenLogprobs>, Option<Vec<Option<TokenLogprobs>>>, Option<String>);

impl Answer {
    pub(crate) fn take(&mut self, event: Event) {
        assert!(self.finished.is_none() && self.failed.is_none(), "an event after the last one");
        match event {
            Event::PromptLogprobs(logprobs) => {
                assert!(self.tokens.is_empty() && self.prompt_logprobs.is_none());
                self.prompt_logprobs = Some(logprobs);
            }
            Event::Tokens(chunk) => {
                assert!(!chunk.tokens.is_empty());
                self.drafted += chunk.tokens.iter().filter(|t: &&OutputToken| t.drafted).count();
                self.tokens.extend(chunk.tokens.iter().map(|t| t.id));
                self.logprobs.extend(chunk.logprobs);
            }
            Event::Finished(finished) => self.finished = Some(finished),
            Event::Failed(error) => self.failed = Some(error),
        }
    }

    pub(crate) fn invariant(&self) -> Invariant {
        (
            self.tokens.clone(),
            self.logprobs.clone(),
            self.prompt_logprobs.clone(),
            self.finished.map(|f| format!("{:?}", f.reason)),
        )
    }
}

pub(crate) fn config(draft_tokens: DraftTokens) -> EngineConfig {
    EngineConfig {
        block_size: 4,
        num_blocks: 512,
        max_num_seqs: 64,
        max_num_batched_tokens: 2048,
        max_waiting: 1024,
        max_model_len: 1024,
        num_token_ids: VOCAB_SIZE,
        draft_tokens,
    }
}

pub(crate) fn hash_pair(draft_stray: f32) -> Models {
    Models { target: HashModel::boxed(0.0), draft: HashModel::boxed(draft_stray) }
}

pub(crate) fn request(
    id: u64,
    lane: Lane,
    prompt: &[TokenId],
    params: SamplingParams,
    capacity: usize,
) -> (SubmitRequest, Receiver<Event>) {
    let (sender, receiver) = sync_channel(capacity);
    let events = Box::new(sender);
    let prompt: Arc<[TokenId]> = prompt.into();
    (SubmitRequest { id: SequenceId(id), lane, prompt, params, max_draft_tokens: None, events }, receiver)
}

/// A clock that ticks a microsecond a reading.
pub(crate) fn clock() -> impl Fn() -> Duration {
    let ticks = Cell::new(0);
    move || {
        ticks.set(ticks.get() + 1);
        Duration::from_micros(ticks.get())
    }
}

/// Runs all requests together on one synchronous engine and returns their answers.
pub(crate) fn run(
    config: &EngineConfig,
    models: Models,
    requests: &[(Lane, Vec<TokenId>, SamplingParams)],
) -> Vec<Answer> {
    let clock = clock();
    let mut engine = Engine::new(config, models).expect("the engine starts");
    let mut receivers = Vec::new();
    for (id, (lane, prompt, params)) in requests.iter().enumerate() {
        let (request, receiver) = request(id as u64, *lane, prompt, params.clone(), 4);
        engine.submit(request, clock());
        receivers.push(receiver);
    }
    let mut answers = vec![Answer::default(); requests.len()];
    for _ in 0..100_000 {
        engine.step(&clock);
        for (answer, receiver) in answers.iter_mut().zip(&receivers) {
            receiver.try_iter().for_each(|event| answer.take(event));
        }
        if engine.is_idle() && engine.is_delivered() {
            assert_eq!(engine.stats().num_free_blocks, engine.stats().num_total_blocks, "blocks leaked");
            return answers;
        }
    }
    panic!("the engine did not finish");
}
