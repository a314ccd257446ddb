//! A model that says what the test wants: its logits ask for the next token of a script, and it computes
//! nothing. Where the context ends with the beginning of an answer, the answer goes on.

use std::sync::{Arc, Mutex};

use tandem_models::outputs::WholeRows;
use tandem_models::{DecoderConfig, ForwardBatch, Model, ModelError, Outputs, Tokenizer};

/// As Qwen's, in what matters: tools first, calls as JSON between tags.
pub(crate) const HERMES: &str = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}\
    {% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content or '' }}\
    {% for call in message.tool_calls or [] %}<tool_call>\n\
    {\"name\": \"{{ call.function.name }}\", \"arguments\": {{ call.function.arguments | tojson }}}\n\
    </tool_call>{% endfor %}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}\
    <think>\n\n</think>\n\n{% endif %}{% endif %}";

/// The control tokens that answers to [`HERMES`] have besides.
pub(crate) const HERMES_TOKENS: &[&str] = &["<think>", "</think>"];

/// An answer, and what a prompt has to hold for it.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    pub(crate) when: Vec<String>,
    /// The last of them ends the answer.
    pub(crate) tokens: Vec<u32>,
}

/// Answers; the first that fits a prompt is said.
#[derive(Clone, Default)]
pub(crate) struct Script(Arc<Mutex<Vec<Line>>>);

impl Script {
    pub(crate) fn set(&self, lines: Vec<Line>) {
        *self.0.lock().expect("no holder panics") = lines;
    }

    fn lines(&self) -> Vec<Line> {
        self.0.lock().expect("no holder panics").clone()
    }
}

pub(crate) struct ScriptedModel {
    /// Lends its shape.
    inner: Box<dyn Model>,
    tokenizer: Arc<Tokenizer>,
    script: Script,
    block_size: usize,
    /// The cache: a token for every slot.
    tokens: Vec<u32>,
    batch: ForwardBatch,
    rows: WholeRows,
}

impl ScriptedModel {
    pub(crate) fn new(inner: Box<dyn Model>, tokenizer: Arc<Tokenizer>, script: Script) -> Self {
        ScriptedModel {
            inner,
            tokenizer,
            script,
            block_size: 0,
            tokens: Vec::new(),
            batch: ForwardBatch::new(),
            rows: WholeRows::default(),
        }
    }

    fn context(&self, seq: usize, row: u32) -> Vec<u32> {
        let batch = &self.batch;
        let blocks = &batch.block_tables[batch.block_table_offsets[seq] as usize..];
        let slot = |position: usize| {
            blocks[position / self.block_size] as usize * self.block_size + position % self.block_size
        };
        (0..=batch.positions[row as usize] as usize).map(|position| self.tokens[slot(position)]).collect()
    }

    /// The answer to what stands before the last turn's beginning.
    fn answer<'a>(&self, lines: &'a [Line], context: &[u32]) -> Option<&'a [u32]> {
        let start = self.tokenizer.token_to_id("<|im_start|>");
        let end = context.iter().rposition(|id| Some(*id) == start).unwrap_or(context.len());
        let mut prompt = None;
        let fits = |line: &&Line| {
            if line.when.is_empty() {
                return true;
            }
            let prompt = prompt.get_or_insert_with(|| {
                let bytes: Vec<u8> =
                    context[..end].iter().flat_map(|id| self.tokenizer.token_bytes(*id)).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            });
            line.when.iter().all(|needle| prompt.contains(needle))
        };
        lines.iter().find(fits).map(|line| line.tokens.as_slice())
    }
}

impl Model for ScriptedModel {
    fn config(&self) -> &DecoderConfig {
        self.inner.config()
    }

    fn kv_bytes_per_token(&self) -> usize {
        self.inner.kv_bytes_per_token()
    }

    fn allocate_kv_cache(&mut self, num_blocks: usize, block_size: usize) -> Result<(), ModelError> {
        self.tokens = vec![0; num_blocks * block_size];
        self.block_size = block_size;
        Ok(())
    }

    fn begin(&mut self, batch: &ForwardBatch) -> Result<(), ModelError> {
        self.batch.clone_from(batch);
        for (&token, &slot) in batch.token_ids.iter().zip(&batch.slot_mapping) {
            self.tokens[slot as usize] = token;
        }
        Ok(())
    }

    fn advance(&mut self) -> Result<bool, ModelError> {
        Ok(false)
    }

    fn finish(&mut self) -> Result<Outputs<'_>, ModelError> {
        let vocab_size = self.inner.config().vocab_size;
        let mut rows = std::mem::take(&mut self.rows);
        let (batch, logits) = (&self.batch, &mut rows.logits);
        logits.clear();
        logits.resize(batch.logits_rows.len() * vocab_size, 0.0);
        let lines = self.script.lines();
        let seq_of =
            |row: u32| (0..batch.num_seqs()).find(|&seq| row < batch.cu_seqlens_q[seq + 1]).expect("a row");
        for (i, &row) in batch.logits_rows.iter().enumerate() {
            let context = self.context(seq_of(row), row);
            let Some(answer) = self.answer(&lines, &context) else { continue };
            let said = (0..answer.len()).rev().find(|&n| context.ends_with(&answer[..n])).unwrap_or(0);
            logits[i * vocab_size..][answer[said] as usize] = 1e4;
        }
        self.rows = rows;
        Ok(self.rows.outputs(&self.batch.wanted, self.batch.num_token_ids))
    }
}
