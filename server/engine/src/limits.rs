//! What a request is checked against before it is queued, on its caller's thread: a bad one never reaches the engine's.

use crate::api::{EngineError, Lane, SubmitRequest, TokenId};
use crate::engine::{EngineConfig, Models};

/// What the models and the caches hold.
pub(crate) struct Limits {
    /// By [`Lane`].
    pub(crate) num_token_ids: [usize; 2],
    /// By [`Lane`]; 0 of a lane that is not there.
    pub(crate) hidden_size: [usize; 2],
    pub(crate) max_model_len: usize,
    pub(crate) max_waiting: usize,
    pub(crate) max_num_seqs: usize,
    pub(crate) block_size: usize,
    pub(crate) num_blocks: usize,
    pub(crate) has_fast: bool,
    pub(crate) has_deep: bool,
}

impl Limits {
    pub(crate) fn new(config: &EngineConfig, models: &Models) -> Self {
        Limits {
            num_token_ids: config.num_token_ids_by_lane(),
            hidden_size: [&models.draft, &models.target]
                .map(|model| model.as_ref().map_or(0, |model| model.config().hidden_size)),
            max_model_len: config.max_model_len,
            max_waiting: config.max_waiting,
            max_num_seqs: config.max_num_seqs,
            block_size: config.block_size,
            num_blocks: config.num_blocks,
            has_fast: models.has(Lane::Fast),
            has_deep: models.has(Lane::Deep),
        }
    }

    /// Checks a request and limits `max_tokens` to what the context holds.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn check(&self, request: &mut SubmitRequest) -> Result<(), EngineError> {
        self.check_lane(request.lane)?;
        let num_token_ids = self.num_token_ids[request.lane as usize];
        request.params.validate(num_token_ids)?;
        self.check_tokens(request.lane, &request.prompt)?;
        check_ids(&request.speculation.prediction, num_token_ids)?;
        let num_prompt_tokens = request.prompt.len();
        let room = self.max_model_len - num_prompt_tokens;
        if room == 0 && request.params.max_tokens > 0 {
            return Err(EngineError::PromptTooLong { num_prompt_tokens, max_model_len: self.max_model_len });
        }
        request.params.max_tokens = request.params.max_tokens.min(u32::try_from(room).unwrap_or(u32::MAX));
        self.check_blocks(num_prompt_tokens + request.params.max_tokens as usize)
    }

    /// Checks what is to be computed.
    ///
    /// # Errors
    /// What is wrong with the tokens.
    pub(crate) fn check_tokens(&self, lane: Lane, tokens: &[TokenId]) -> Result<(), EngineError> {
        self.check_lane(lane)?;
        if tokens.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        check_ids(tokens, self.num_token_ids[lane as usize])?;
        if tokens.len() > self.max_model_len {
            let max_model_len = self.max_model_len;
            return Err(EngineError::PromptTooLong { num_prompt_tokens: tokens.len(), max_model_len });
        }
        Ok(())
    }

    fn check_lane(&self, lane: Lane) -> Result<(), EngineError> {
        let has_lane = match lane {
            Lane::Fast => self.has_fast,
            Lane::Deep => self.has_deep,
        };
        if has_lane { Ok(()) } else { Err(EngineError::LaneUnavailable(lane)) }
    }

    /// Checks that so many tokens fit the caches, if alone.
    ///
    /// # Errors
    /// Says how much room they lack.
    pub(crate) fn check_blocks(&self, num_tokens: usize) -> Result<(), EngineError> {
        let needed_blocks = num_tokens.div_ceil(self.block_size);
        if needed_blocks > self.num_blocks {
            return Err(EngineError::KvCacheTooSmall { needed_blocks, total_blocks: self.num_blocks });
        }
        Ok(())
    }
}

fn check_ids(ids: &[TokenId], vocab_size: usize) -> Result<(), EngineError> {
    match ids.iter().find(|&&id| id as usize >= vocab_size) {
        Some(&id) => Err(EngineError::TokenOutOfRange { id, vocab_size }),
        None => Ok(()),
    }
}
