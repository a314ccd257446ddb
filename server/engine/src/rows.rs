//! What a sequence asks a pass for, row by row, and what it gets: one token with what is to be said of it, of a row
//! that then is never written to memory; else all its logits.

use tandem_models::outputs::{Choice, Chosen};
use tandem_models::{Outputs, Wanted};

use crate::api::TokenId;
use crate::sequence::Sequence;

/// What is to be said of a row's token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    /// How likely it was.
    pub(crate) share: bool,
    /// The bare logits, with so many of the likeliest tokens'.
    pub(crate) num_top: Option<u32>,
}

impl Asked {
    /// Of the row that says what follows a sequence's first `num_provisional` draft tokens: to verify and commit, or
    /// only to propose.
    pub(crate) fn of(sequence: &Sequence, num_provisional: usize, proposes: bool) -> Self {
        if proposes {
            return Asked { share: sequence.drafting.is_adaptive, num_top: None };
        }
        let params = &sequence.params;
        let is_watched = sequence.num_output_tokens() + num_provisional < params.num_margins as usize;
        // A margin is between two.
        let num_top = params.logprobs.map(u32::from).max(is_watched.then_some(2));
        Asked { share: false, num_top }
    }
}

/// What a sequence needs of such a row.
pub(crate) fn wanted(sequence: &mut Sequence, num_provisional: usize, proposes: bool) -> Wanted {
    if !proposes && sequence.scores_prompt() {
        return Wanted::Whole;
    }
    let asked = Asked::of(sequence, num_provisional, proposes);
    let mut drafted = sequence.draft_tokens()[..num_provisional].iter();
    if sequence.is_constrained() && drafted.any(|id| sequence.params.stop_token_ids.contains(id)) {
        // The output ends before this row, or takes another way: its form has nothing to say here.
        return Wanted::Token(Choice::default());
    }
    match sequence.draw_after(num_provisional) {
        Ok(draw) => Wanted::Token(draw.choice(asked)),
        // Who reaches this row asks again, and fails.
        Err(_) => Wanted::Whole,
    }
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Row<'a> {
    /// All its logits; those of tokens, then padding.
    Whole(&'a [f32]),
    /// What the model has chosen of them, and the likeliest tokens that it reports.
    Chosen(Chosen, &'a [(TokenId, f32)]),
}

impl<'a> Row<'a> {
    /// Without padding.
    pub(crate) fn first(self, num_token_ids: usize) -> Self {
        match self {
            Row::Whole(logits) => Row::Whole(&logits[..num_token_ids]),
            chosen @ Row::Chosen(..) => chosen,
        }
    }

    /// The logits of a row that was asked for whole.
    pub(crate) fn logits(self) -> &'a [f32] {
        match self {
            Row::Whole(logits) => logits,
            Row::Chosen(chosen, _) => unreachable!("logits of a row that gave {chosen:?}: this is a bug"),
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
        let num_whole = wanted.iter().filter(|wanted| wanted.is_whole()).count();
        let (logits, rest_logits) = self.outputs.logits.split_at(num_whole * self.width);
        let (chosen, rest_chosen) = self.outputs.chosen.split_at(num_rows - num_whole);
        let num_top =
            chosen.iter().filter_map(|chosen| chosen.report).map(|report| report.num_top as usize).sum();
        let (top, rest_top) = self.outputs.top.split_at(num_top);
        self.wanted = rest;
        self.outputs = Outputs { logits: rest_logits, chosen: rest_chosen, top: rest_top };
        Rows { wanted, outputs: Outputs { logits, chosen, top }, ..*self }
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
            [chosen, ..] => Row::Chosen(*chosen, row.outputs.top),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tandem_models::outputs::Report;

    #[test]
    fn rows_come_in_order_whatever_was_wanted() {
        let report = |num_top| Some(Report { logit: 0.0, log_sum: 0.0, num_top });
        let chosen = [(7, report(2)), (8, None), (9, report(1))].map(|(token, report)| Chosen {
            token,
            share: 0.0,
            is_finite: true,
            report,
        });
        let token = || Wanted::Token(Choice::default());
        let wanted = [token(), Wanted::Whole, Wanted::Whole, token(), token()];
        let top = [(70, 0.0), (71, 0.0), (90, 0.0)];
        let outputs = Outputs { logits: &[1.0, 2.0, 3.0, 4.0], chosen: &chosen, top: &top };
        let mut rows = Rows { wanted: &wanted, outputs, width: 2 };
        let read = |rows: Rows<'_>| -> Vec<String> {
            let text = |row| match row {
                Row::Whole(logits) => format!("{logits:?}"),
                Row::Chosen(chosen, top) => {
                    format!("{} {:?}", chosen.token, top.iter().map(|top| top.0).collect::<Vec<_>>())
                }
            };
            rows.map(text).collect()
        };
        assert_eq!(read(rows), ["7 [70, 71]", "[1.0, 2.0]", "[3.0, 4.0]", "8 []", "9 [90]"]);
        assert_eq!(read(rows.split_off(2)), ["7 [70, 71]", "[1.0, 2.0]"]);
        assert_eq!(read(rows), ["[3.0, 4.0]", "8 []", "9 [90]"]);
        assert!(read(rows.split_off(3)).len() == 3 && rows.is_empty());
    }
}
