//! Whether a draft can propose for a target, and how: directly if both mean the same by every token id,
//! else through a [`VocabMap`].

use std::collections::HashMap;
use std::fmt;

use crate::text::Tokenizer;
use crate::{Checkpoint, ModelError};

/// What two vocabularies have in common, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// Tokens of target and draft: one more than the highest id.
    pub num_tokens: [usize; 2],
    /// Ids that do not mean the same token in both.
    pub num_different: usize,
    /// The first of them.
    pub first_difference: Option<Difference>,
    /// The tokens that begin and end a sequence where they differ, as `(role, target's, draft's)`.
    pub special: Vec<(&'static str, Option<String>, Option<String>)>,
}

/// An id that means two things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The id.
    pub id: u32,
    /// What it is in the target.
    pub target: Option<String>,
    /// What it is in the draft.
    pub draft: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let spell = |token: &Option<String>| {
            token.as_ref().map_or("nothing".to_owned(), |token| format!("{token:?}"))
        };
        let (target, draft) = (spell(&self.target), spell(&self.draft));
        write!(f, "token {} is {target} in the target and {draft} in the draft", self.id)
    }
}

impl Comparison {
    /// Compares two tokenizers, id by id.
    pub fn of(target: &Tokenizer, draft: &Tokenizer) -> Self {
        let num_tokens = [target.vocab_size(), draft.vocab_size()];
        let (mut num_different, mut first_difference) = (0, None);
        for id in 0..num_tokens[0].max(num_tokens[1]) as u32 {
            let (theirs, ours) = (target.id_to_token(id), draft.id_to_token(id));
            if theirs != ours {
                num_different += 1;
                first_difference.get_or_insert(Difference { id, target: theirs, draft: ours });
            }
        }
        let roles = [
            ("begin", target.bos_token(), draft.bos_token()),
            ("end", target.eos_token(), draft.eos_token()),
        ];
        let special = roles.into_iter().filter(|(_, target, draft)| target != draft);
        let special =
            special.map(|(role, t, d)| (role, t.map(str::to_owned), d.map(str::to_owned))).collect();
        Comparison { num_tokens, num_different, first_difference, special }
    }

    /// True if both mean the same by every id.
    pub fn is_same(&self) -> bool {
        self.num_different == 0
    }
}

/// Tokens that two vocabularies must share at least: with fewer hardly a proposal could be made.
const LEAST_SHARED: usize = 32;

/// Checks that `draft` can propose for `target`: `None` if it speaks the target's vocabulary, else how its
/// tokens are translated. Embedding rows beyond the tokenizer's last token are padding and may differ in
/// number: the models of one family are often padded differently.
///
/// # Errors
/// [`ModelError::Pair`] if a model has fewer embedding rows than its tokenizer has tokens, or if the
/// vocabularies share next to nothing.
pub fn check_pair(
    target: (&Checkpoint, &Tokenizer),
    draft: (&Checkpoint, &Tokenizer),
) -> Result<Option<VocabMap>, ModelError> {
    let error = |reason: String| {
        Err(ModelError::Pair { target: target.0.name.clone(), draft: draft.0.name.clone(), reason })
    };
    for (role, (checkpoint, tokenizer)) in [("target", target), ("draft", draft)] {
        if checkpoint.config.vocab_size < tokenizer.vocab_size() {
            return error(format!(
                "the {role}'s `vocab_size` is {}, less than the {} tokens of its tokenizer.json",
                checkpoint.config.vocab_size,
                tokenizer.vocab_size()
            ));
        }
    }
    let comparison = Comparison::of(target.1, draft.1);
    let Some(difference) = &comparison.first_difference else { return Ok(None) };
    let map = VocabMap::between(target.1, draft.1);
    if map.num_shared() < LEAST_SHARED {
        return error(format!(
            "their vocabularies have {} and {} tokens, of which {} are the same text, too few to propose \
             from; {difference}",
            comparison.num_tokens[0],
            comparison.num_tokens[1],
            map.num_shared()
        ));
    }
    Ok(Some(map))
}

/// From the tokens of one vocabulary to those of another with the same bytes.
///
/// A draft of another vocabulary reads each token of the target as one of its own: the same text where it
/// has such a token, else a *stand-in*, the last of the tokens that it would write that text with. So
/// positions, and with them the blocks of the KV cache, stay those of the target, and what the draft sees
/// is not quite the text; that costs acceptance, never correctness, because proposals are verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VocabMap {
    /// `[target's ids]`
    to_draft: Vec<u32>,
    /// `[draft's ids]`
    to_target: Vec<Option<u32>>,
}

/// A logit that is never drawn, and still a number.
const NEVER: f32 = -1e30;

impl VocabMap {
    /// Maps tokens that stand for the same bytes, and special tokens of the same name or role.
    pub fn between(target: &Tokenizer, draft: &Tokenizer) -> Self {
        let drafts = ids_by_bytes(draft);
        let role = |id: u32| {
            let is = |token: Option<&str>| token.and_then(|token| target.token_to_id(token)) == Some(id);
            let same_role = match () {
                () if is(target.eos_token()) => draft.eos_token(),
                () if is(target.bos_token()) => draft.bos_token(),
                () => None,
            };
            same_role.and_then(|token| draft.token_to_id(token))
        };
        let mut to_target = vec![None; draft.vocab_size()];
        let mut to_draft = Vec::with_capacity(target.vocab_size());
        for id in 0..target.vocab_size() as u32 {
            let exact = if target.is_special(id) {
                let named = target.id_to_token(id).and_then(|token| draft.token_to_id(&token));
                named.filter(|&id| draft.is_special(id)).or_else(|| role(id))
            } else {
                drafts.get(&target.token_bytes(id)).copied()
            };
            if let Some(exact) = exact {
                to_target[exact as usize].get_or_insert(id);
            }
            to_draft.push(exact.unwrap_or_else(|| stand_in(target, draft, id)));
        }
        VocabMap { to_draft, to_target }
    }

    /// From both directions; for tests.
    ///
    /// # Panics
    /// If an id leads out of the other vocabulary.
    pub fn from_parts(to_draft: Vec<u32>, to_target: Vec<Option<u32>>) -> Self {
        assert!(to_draft.iter().all(|&id| (id as usize) < to_target.len()), "a draft id out of range");
        assert!(
            to_target.iter().flatten().all(|&id| (id as usize) < to_draft.len()),
            "a target id out of range"
        );
        VocabMap { to_draft, to_target }
    }

    /// Tokens of the target's vocabulary.
    pub fn num_target_ids(&self) -> usize {
        self.to_draft.len()
    }

    /// Tokens of the draft's vocabulary.
    pub fn num_draft_ids(&self) -> usize {
        self.to_target.len()
    }

    /// Tokens of the draft that are one of the target's: those it can propose.
    pub fn num_shared(&self) -> usize {
        self.to_target.iter().flatten().count()
    }

    /// What the draft reads a token of the target as.
    ///
    /// # Panics
    /// If `id` is not in the target's vocabulary.
    pub fn to_draft(&self, id: u32) -> u32 {
        self.to_draft[id as usize]
    }

    /// A row of the draft's logits, `[num_draft_ids]` or longer, as one of the target's, `[num_target_ids]`:
    /// what the draft cannot say is never drawn.
    pub fn translate(&self, logits: &[f32], out: &mut Vec<f32>) {
        out.clear();
        out.resize(self.to_draft.len(), NEVER);
        for (id, &logit) in self.to_target.iter().zip(logits) {
            if let Some(id) = id {
                out[*id as usize] = logit;
            }
        }
    }
}

/// Ids of text tokens by what they stand for; of equals the first that is not merely a byte's fallback.
fn ids_by_bytes(tokenizer: &Tokenizer) -> HashMap<Vec<u8>, u32> {
    let mut ids = HashMap::with_capacity(tokenizer.vocab_size());
    let is_fallback = |id| tokenizer.id_to_token(id).is_some_and(|token| token.starts_with("<0x"));
    for fallback in [false, true] {
        for id in (0..tokenizer.vocab_size() as u32).filter(|&id| is_fallback(id) == fallback) {
            let bytes = tokenizer.token_bytes(id);
            if !bytes.is_empty() && !tokenizer.is_special(id) {
                ids.entry(bytes).or_insert(id);
            }
        }
    }
    ids
}

/// The last token that the draft would write the target's token `id` with; its first one if it cannot.
fn stand_in(target: &Tokenizer, draft: &Tokenizer, id: u32) -> u32 {
    let bytes = target.token_bytes(id);
    let text = String::from_utf8_lossy(&bytes);
    let last = draft.encode_text(&text, false).ok().and_then(|ids| ids.last().copied());
    last.filter(|&id| (id as usize) < draft.vocab_size()).unwrap_or(0)
}
