//! What a pass gives: of every row that was asked for its logits, or the one token that is chosen of them.

pub use tandem_kernels::matmul::head::Wanted;
pub use tandem_kernels::sampling::choice::{Change, Choice, Chosen, Keep, Race, Report};
pub use tandem_kernels::sampling::noise::Noise;
pub use tandem_kernels::sampling::{RowRoom, choose, choose_in};

/// The outputs of a pass, in the order of [`crate::ForwardBatch::logits_rows`]; lent by the model until its next pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outputs<'a> {
    /// `[rows wanted whole, vocab_size]`, row-major; rows of a short head are as long as that.
    pub logits: &'a [f32],
    /// Of each of the other rows.
    pub chosen: &'a [Chosen],
    /// The likeliest tokens of those that report any, likeliest first, one row's after the other's: as many as its
    /// [`Report`] says, with their bare logits.
    pub top: &'a [(u32, f32)],
}

/// The outputs of a model that computes all rows whole, whatever is wanted; buffers that are used again and again.
#[derive(Clone, Debug, Default)]
pub struct WholeRows {
    /// `[rows, row_width]`
    pub logits: Vec<f32>,
    chosen: Vec<Chosen>,
    top: Vec<(u32, f32)>,
    room: RowRoom,
}

impl WholeRows {
    /// What is wanted of each of the rows; tokens are chosen among the first `num_token_ids`. Leaves in `logits` the
    /// rows that were wanted whole.
    ///
    /// # Panics
    /// If `logits` is not `wanted.len()` rows.
    pub fn outputs(&mut self, wanted: &[Wanted], num_token_ids: usize) -> Outputs<'_> {
        let width = self.logits.len() / wanted.len().max(1);
        assert!(
            self.logits.len() == wanted.len() * width,
            "{} logits of {} rows",
            self.logits.len(),
            wanted.len()
        );
        self.chosen.clear();
        self.top.clear();
        let mut num_whole = 0;
        for (row, wanted) in wanted.iter().enumerate() {
            match wanted {
                Wanted::Whole => {
                    self.logits.copy_within(row * width..(row + 1) * width, num_whole * width);
                    num_whole += 1;
                }
                Wanted::Token(choice) => {
                    let tokens = &self.logits[row * width..][..width.min(num_token_ids)];
                    self.chosen.push(choose_in(tokens, choice, &mut self.room));
                    self.top.extend_from_slice(self.room.top());
                }
            }
        }
        self.logits.truncate(num_whole * width);
        Outputs { logits: &self.logits, chosen: &self.chosen, top: &self.top }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_rows_stay_and_others_give_a_token_that_is_no_padding() {
        let token = |report| Wanted::Token(Choice { report, ..Choice::default() });
        let logits = vec![1.0, 2.0, 9.0, 3.0, 4.0, 9.0, 6.0, 5.0, 9.0];
        let mut rows = WholeRows { logits, ..WholeRows::default() };
        let Outputs { logits, chosen, top } =
            rows.outputs(&[token(Some(1)), Wanted::Whole, token(Some(3))], 2);
        assert_eq!(logits, [3.0, 4.0, 9.0]);
        assert_eq!(top, [(1, 2.0), (0, 6.0), (1, 5.0)]);
        assert_eq!(chosen.iter().map(|chosen| chosen.token).collect::<Vec<_>>(), [1, 0]);
        rows.logits.clear();
        assert_eq!(rows.outputs(&[], 2), Outputs::default());
    }
}
