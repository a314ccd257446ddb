//! Held-out figures: bits per byte, and how well a draft follows its target.

use crate::corpus::Corpus;
use crate::model::Decoder;
use crate::ops::score;
use crate::tokenizer::Text;
use crate::{PairReport, TrainError};

/// Tokens drafted per verification in the report.
const DRAFTED: usize = 4;

/// The start of one held-out file.
pub(crate) struct EvalRow {
    /// End of text, then all tokens but the last.
    ids: Vec<u32>,
    /// The tokens.
    labels: Vec<u32>,
    /// Bytes that the labels stand for.
    bytes: usize,
}

/// Up to `seq_len` tokens of each held-out file, in path order, `max_tokens` in all.
pub(crate) fn eval_rows(
    corpus: &Corpus,
    text: &Text,
    seq_len: usize,
    max_tokens: usize,
) -> Result<Vec<EvalRow>, TrainError> {
    let mut rows = Vec::new();
    let mut left = max_tokens;
    for document in &corpus.held_out {
        let (labels, bytes) = text.encode_start(&document.text, seq_len.min(left))?;
        if labels.is_empty() {
            break;
        }
        left -= labels.len();
        let mut ids = vec![text.special.end_of_text];
        ids.extend(&labels[..labels.len() - 1]);
        rows.push(EvalRow { ids, labels, bytes });
    }
    Ok(rows)
}

/// Minus log probability and choice at every position of a row.
fn row_scores(decoder: &Decoder, row: &EvalRow) -> Result<Vec<(f32, u32)>, TrainError> {
    let hidden = decoder.hidden(&row.ids, row.ids.len())?.detach();
    Ok(score(&hidden, &decoder.head, &row.labels)?)
}

/// Mean bits a byte; `None` without rows.
pub(crate) fn bits_per_byte(decoder: &Decoder, rows: &[EvalRow]) -> Result<Option<f64>, TrainError> {
    let (mut nats, mut bytes) = (0.0, 0);
    for row in rows {
        nats += row_scores(decoder, row)?.iter().map(|&(nats, _)| f64::from(nats)).sum::<f64>();
        bytes += row.bytes;
    }
    Ok((bytes > 0).then(|| nats / std::f64::consts::LN_2 / bytes as f64))
}

/// Both models on the same rows; `None` without rows.
pub(crate) fn compare(
    target: &Decoder,
    draft: &Decoder,
    rows: &[EvalRow],
) -> Result<Option<PairReport>, TrainError> {
    let (mut target_nats, mut draft_nats, mut bytes) = (0.0, 0.0, 0);
    let (mut agreed, mut positions, mut verifications) = (0, 0, 0);
    for row in rows {
        let target_scores = row_scores(target, row)?;
        let draft_scores = row_scores(draft, row)?;
        target_nats += target_scores.iter().map(|&(nats, _)| f64::from(nats)).sum::<f64>();
        draft_nats += draft_scores.iter().map(|&(nats, _)| f64::from(nats)).sum::<f64>();
        bytes += row.bytes;
        let same: Vec<bool> = target_scores.iter().zip(&draft_scores).map(|(a, b)| a.1 == b.1).collect();
        agreed += same.iter().filter(|&&same| same).count();
        positions += same.len();
        verifications += count_verifications(&same);
    }
    if bytes == 0 {
        return Ok(None);
    }
    let bits = |nats: f64| nats / std::f64::consts::LN_2 / bytes as f64;
    Ok(Some(PairReport {
        target_bits_per_byte: bits(target_nats),
        draft_bits_per_byte: bits(draft_nats),
        greedy_agreement: agreed as f64 / positions as f64,
        mean_accepted_length: positions as f64 / verifications as f64,
        positions,
    }))
}

/// Verification passes that a text takes when drafted tokens are accepted up to the first
/// disagreement and the target adds one of its own.
fn count_verifications(same: &[bool]) -> usize {
    let (mut at, mut passes) = (0, 0);
    while at < same.len() {
        let accepted = same[at..].iter().take(DRAFTED).take_while(|&&same| same).count();
        at += accepted + 1;
        passes += 1;
    }
    passes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verifications_by_hand() {
        assert_eq!(count_verifications(&[false; 6]), 6);
        // Four accepted and one more a pass.
        assert_eq!(count_verifications(&[true; 10]), 2);
        // Two accepted and the disagreement replaced, then three accepted.
        assert_eq!(count_verifications(&[true, true, false, true, true, true]), 2);
        assert_eq!(count_verifications(&[]), 0);
    }
}
