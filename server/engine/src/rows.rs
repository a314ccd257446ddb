//! What a sequence asks a pass for, row by row, and what it gets: one token where nothing else is made of the row's
//! logits, which then are never written to memory, else all of them.

use tandem_models::outputs::{Choice, Chosen};
use tandem_models::{Outputs, Wanted};

use crate::sampler::choice;
use crate::sequence::Sequence;

/// What a sequence needs of the row that says what follows its first `num_provisional` draft tokens: to verify and
/// commit, or only to propose.
pub(crate) fn wanted(sequence: &Sequence, num_provisional: usize, proposes: bool) -> Wanted {
    let params = &sequence.params;
    let num_output_tokens = sequence.num_output_tokens() + num_provisional;
    let changes_logits = sequence.is_constrained()
        || sequence.counts.is_some()
        || (num_output_tokens < params.min_tokens as usize && !params.stop_token_ids.is_empty());
    let reports = !proposes
        && (params.logprobs.is_some()
            || num_output_tokens < params.num_margins as usize
            || sequence.scores_prompt());
    let share = proposes && sequence.drafting.is_adaptive;
    match choice(params, sequence.num_tokens() + num_provisional) {
        Some(choice) if !changes_logits && !reports => Wanted::Token(Choice { share, ..choice }),
        _ => Wanted::Whole,
    }
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row<'a> {
    /// All its logits; those of tokens, then padding.
    Whole(&'a [f32]),
    /// What the model has chosen of them.
    Chosen(Chosen),
}

impl<'a> Row<'a> {
    /// Without padding.
    pub(crate) fn first(self, num_token_ids: usize) -> Self {
        match self {
            Row::Whole(logits) => Row::Whole(&logits[..num_token_ids]),
            chosen @ Row::Chosen(_) => chosen,
        }
    }

    /// The logits of a row that was asked for whole.
    pub(crate) fn logits(self) -> &'a [f32] {
        match self {
            Row::Whole(logits) => logits,
            Row::Chosen(chosen) => unreachable!("logits of a row that gave {chosen:?}: this is a bug"),
        }
    }
}

/// The rows of a pass that have not been handed out yet.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows<'a> {
    pub(crate) wanted: &'a [Wanted],
    pub(crate) outputs: Outputs<'a>,
    /// Logits of a whole row.
    pub(crate) width: usize,
}

impl<'a> Rows<'a> {
    /// The first `num_rows` of them.
    pub(crate) fn split_off(&mut self, num_rows: usize) -> Rows<'a> {
        let (wanted, rest) = self.wanted.split_at(num_rows);
        let num_whole = wanted.iter().filter(|wanted| **wanted == Wanted::Whole).count();
        let (logits, rest_logits) = self.outputs.logits.split_at(num_whole * self.width);
        let (chosen, rest_chosen) = self.outputs.chosen.split_at(num_rows - num_whole);
        self.wanted = rest;
        self.outputs = Outputs { logits: rest_logits, chosen: rest_chosen };
        Rows { wanted, outputs: Outputs { logits, chosen }, ..*self }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }
}

impl<'a> Iterator for Rows<'a> {
    type Item = Row<'a>;

    fn next(&mut self) -> Option<Row<'a>> {
        if self.is_empty() {
            return None;
        }
        let row = self.split_off(1);
        Some(match row.outputs.chosen {
            [] => Row::Whole(row.outputs.logits),
            [chosen, ..] => Row::Chosen(*chosen),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_in_order_whatever_was_wanted() {
        let chosen = [7, 8].map(|token| Chosen { token, share: 0.0, is_finite: true });
        let token = Wanted::Token(Choice::default());
        let wanted = [token, Wanted::Whole, Wanted::Whole, token];
        let outputs = Outputs { logits: &[1.0, 2.0, 3.0, 4.0], chosen: &chosen };
        let mut rows = Rows { wanted: &wanted, outputs, width: 2 };
        let read = |rows: Rows<'_>| -> Vec<String> {
            let text = |row| match row {
                Row::Whole(logits) => format!("{logits:?}"),
                Row::Chosen(chosen) => chosen.token.to_string(),
            };
            rows.map(text).collect()
        };
        assert_eq!(read(rows), ["7", "[1.0, 2.0]", "[3.0, 4.0]", "8"]);
        assert_eq!(read(rows.split_off(2)), ["7", "[1.0, 2.0]"]);
        assert_eq!(read(rows), ["[3.0, 4.0]", "8"]);
        assert!(read(rows.split_off(2)).len() == 2 && rows.is_empty());
    }
}
