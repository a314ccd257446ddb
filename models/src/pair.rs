//! Whether a draft can propose for a target: both must mean the same by every token id.

use crate::text::Tokenizer;
use crate::{Checkpoint, ModelError};

/// Checks that `draft` speaks `target`'s vocabulary. Embedding rows beyond the tokenizer's last token
/// are padding and may differ in number: the models of one family are often padded differently.
///
/// # Errors
/// [`ModelError::Pair`], which names both sizes and the first token that differs.
pub fn check_pair(
    target: (&Checkpoint, &Tokenizer),
    draft: (&Checkpoint, &Tokenizer),
) -> Result<(), ModelError> {
    let (target, target_tokenizer) = target;
    let (draft, draft_tokenizer) = draft;
    let error = |reason: String| {
        Err(ModelError::Pair { target: target.name.clone(), draft: draft.name.clone(), reason })
    };
    let sizes = format!(
        "their vocabularies have {} and {} tokens",
        target_tokenizer.vocab_size(),
        draft_tokenizer.vocab_size()
    );
    let last = target_tokenizer.vocab_size().max(draft_tokenizer.vocab_size()) as u32;
    for id in 0..last {
        let theirs = (target_tokenizer.id_to_token(id), draft_tokenizer.id_to_token(id));
        if theirs.0 != theirs.1 {
            let spell =
                |token: Option<String>| token.map_or("nothing".to_owned(), |token| format!("{token:?}"));
            return error(format!(
                "{sizes}, and token {id} is {} in the target but {} in the draft; wanted a draft trained \
                 with the target's own tokenizer.json",
                spell(theirs.0),
                spell(theirs.1)
            ));
        }
    }
    for (role, checkpoint, tokenizer) in
        [("target", target, target_tokenizer), ("draft", draft, draft_tokenizer)]
    {
        if checkpoint.config.vocab_size < tokenizer.vocab_size() {
            return error(format!(
                "the {role}'s `vocab_size` is {}, less than the {} tokens of its tokenizer.json",
                checkpoint.config.vocab_size,
                tokenizer.vocab_size()
            ));
        }
    }
    Ok(())
}
