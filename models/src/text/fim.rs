//! Fill-in-the-middle: the control tokens under which code models were trained to write what belongs
//! between a prefix and a suffix (Bavarian et al., arXiv 2207.14255).

use super::Tokenizer;

/// The control tokens of a model that fills in the middle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FimTokens {
    /// Stands before the text before the gap.
    pub prefix: String,
    /// Stands before the text after the gap.
    pub suffix: String,
    /// Stands before the answer.
    pub middle: String,
    order: Order,
}

/// Which token opens a prompt and which one stands at the gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// `<prefix>P<suffix>S<middle>`
    PrefixSuffixMiddle,
    /// `<prefix>P<hole>S<end>`: DeepSeek's begin, hole and end are the same three places by other names.
    Hole,
}

/// Spelling of (prefix, suffix, middle). Qwen2.5-Coder and our own; StarCoder, SantaCoder, Granite;
/// CodeLlama; CodeGemma is spelled as Qwen; DeepSeek-Coder; Codestral's order differs and is not here.
const SPELLINGS: &[(&str, &str, &str, Order)] = &[
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", Order::PrefixSuffixMiddle),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", Order::PrefixSuffixMiddle),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>", Order::PrefixSuffixMiddle),
    ("▁<PRE>", "▁<SUF>", "▁<MID>", Order::PrefixSuffixMiddle),
    ("<PRE>", "<SUF>", "<MID>", Order::PrefixSuffixMiddle),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>", Order::Hole),
];

impl FimTokens {
    /// Finds the tokens in `tokenizer`; `None` if the model was not trained to fill in.
    pub fn detect(tokenizer: &Tokenizer) -> Option<FimTokens> {
        let known = |token: &str| tokenizer.token_to_id(token).is_some();
        SPELLINGS
            .iter()
            .find(|(prefix, suffix, middle, _)| known(prefix) && known(suffix) && known(middle))
            .map(|&(prefix, suffix, middle, order)| FimTokens {
                prefix: prefix.to_owned(),
                suffix: suffix.to_owned(),
                middle: middle.to_owned(),
                order,
            })
    }

    /// The prompt in the order prefix, suffix, middle: the one every such model knows.
    pub fn psm(&self, prefix: &str, suffix: &str) -> String {
        format!("{}{prefix}{}{suffix}{}", self.prefix, self.suffix, self.middle)
    }

    /// The prompt in the order suffix, prefix, middle, whose end is the text at the cursor; `None`
    /// for models that were not trained on it.
    pub fn spm(&self, prefix: &str, suffix: &str) -> Option<String> {
        match self.order {
            Order::PrefixSuffixMiddle => {
                Some(format!("{}{}{suffix}{}{prefix}", self.prefix, self.suffix, self.middle))
            }
            Order::Hole => None,
        }
    }

    /// The prompt in the order prefix, suffix, middle as token ids. Text from the client cannot become
    /// a control token. `None` if one of the three tokens is not in `tokenizer`.
    ///
    /// # Errors
    /// If the text cannot be encoded.
    pub fn encode_psm(
        &self,
        tokenizer: &Tokenizer,
        prefix: &str,
        suffix: &str,
    ) -> Result<Option<Vec<u32>>, crate::ModelError> {
        let ids = [&self.prefix, &self.suffix, &self.middle].map(|token| tokenizer.token_to_id(token));
        let [Some(prefix_id), Some(suffix_id), Some(middle_id)] = ids else { return Ok(None) };
        // What the model wants around every input (a beginning-of-sequence token) comes first.
        let mut prompt = tokenizer.encode_text("", true)?;
        prompt.push(prefix_id);
        prompt.extend(tokenizer.encode_text(prefix, false)?);
        prompt.push(suffix_id);
        prompt.extend(tokenizer.encode_text(suffix, false)?);
        prompt.push(middle_id);
        Ok(Some(prompt))
    }
}
