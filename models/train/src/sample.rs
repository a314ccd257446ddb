//! Training samples: windows of files, fill-in-the-middle, small chats; packed into rows.
//!
//! A row is a pure function of (corpus, options, seed, step, row number).

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::chat::{ChatExample, chat_examples};
use crate::corpus::{Corpus, floor_boundary};
use crate::tokenizer::Text;
use crate::{SampleMix, TrainError};

/// Bytes a token is assumed to stand for, when a window is cut to a number of tokens.
const BYTES_PER_TOKEN: f64 = 3.6;
/// A middle longer than this teaches little that a shorter one does not.
const MAX_MIDDLE: usize = 400;

/// Cuts samples from a corpus.
pub(crate) struct Sampler<'a> {
    corpus: &'a Corpus,
    text: &'a Text,
    mix: SampleMix,
    /// Running total of file lengths: a file is drawn in proportion to its length.
    ends: Vec<u64>,
    chats: Vec<ChatExample<'a>>,
}

impl<'a> Sampler<'a> {
    pub(crate) fn new(corpus: &'a Corpus, text: &'a Text, mix: &SampleMix) -> Self {
        let mut total = 0;
        let ends = corpus
            .train
            .iter()
            .map(|document| {
                total += document.text.len() as u64;
                total
            })
            .collect();
        let chats = if mix.chat_rate > 0.0 && text.special.chat.is_some() {
            chat_examples(&corpus.train)
        } else {
            Vec::new()
        };
        Self { corpus, text, mix: mix.clone(), ends, chats }
    }

    /// `length` tokens of samples, one after the other; the last is cut.
    pub(crate) fn row(&self, rng: &mut ChaCha8Rng, length: usize) -> Result<Vec<u32>, TrainError> {
        let mut row = Vec::with_capacity(length + length / 2);
        while row.len() < length {
            self.append(rng, &mut row, length)?;
        }
        row.truncate(length);
        Ok(row)
    }

    /// The first `length` tokens of plain windows: what a target is prompted with.
    pub(crate) fn prompt(&self, rng: &mut ChaCha8Rng, length: usize) -> Result<Vec<u32>, TrainError> {
        let mut row = Vec::with_capacity(2 * length);
        while row.len() < length {
            row.push(self.text.special.end_of_text);
            row.extend(self.text.encode(self.window(rng, length * 8))?);
        }
        row.truncate(length);
        Ok(row)
    }

    fn append(&self, rng: &mut ChaCha8Rng, row: &mut Vec<u32>, length: usize) -> Result<(), TrainError> {
        let special = &self.text.special;
        if let (Some(chat), false) = (special.chat, self.chats.is_empty())
            && rng.random_bool(self.mix.chat_rate)
        {
            self.append_chat(rng, row, chat)?;
        } else if let (Some(fim), true) = (special.fim, rng.random_bool(self.mix.fim_rate)) {
            let most = ((length as f64 * BYTES_PER_TOKEN * 0.7) as usize).max(160);
            let bytes = rng_between(rng, most.min(300) / 2, most);
            let window = self.window(rng, bytes);
            self.append_fim(rng, row, window, fim)?;
        } else {
            let window = self.window(rng, (length as f64 * BYTES_PER_TOKEN) as usize);
            row.extend(self.text.encode(window)?);
        }
        row.push(special.end_of_text);
        Ok(())
    }

    /// At most `bytes` of a file: from its start now and then, else from the start of a line, half
    /// of the time moved on to one that opens a definition.
    fn window(&self, rng: &mut ChaCha8Rng, bytes: usize) -> &'a str {
        let total = *self.ends.last().expect("a corpus has a file");
        let at = rng.random_range(0..total);
        let text = &self.corpus.train[self.ends.partition_point(|&end| end <= at)].text;
        if text.len() <= bytes {
            return text;
        }
        let mut start = 0;
        if !rng.random_bool(0.15) {
            let place = rng_between(rng, 0, text.len().saturating_sub(bytes / 2));
            let at = floor_boundary(text, place);
            start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
            if rng.random_bool(0.5) {
                start = definition_after(text, start).unwrap_or(start);
            }
        }
        &text[start..floor_boundary(text, start + bytes)]
    }

    fn append_fim(
        &self,
        rng: &mut ChaCha8Rng,
        row: &mut Vec<u32>,
        window: &str,
        [prefix, middle, suffix]: [u32; 3],
    ) -> Result<(), TrainError> {
        let (from, to) = middle_span(rng, window);
        let (before, inside, after) = (&window[..from], &window[from..to], &window[to..]);
        let encode = |text: &str| self.text.encode(text);
        row.push(prefix);
        if rng.random_bool(self.mix.spm_rate) {
            // Suffix first; prefix and middle are then one stretch of text.
            row.push(suffix);
            row.extend(encode(after)?);
            row.push(middle);
            row.extend(encode(&window[..to])?);
        } else {
            row.extend(encode(before)?);
            row.push(suffix);
            row.extend(encode(after)?);
            row.push(middle);
            row.extend(encode(inside)?);
        }
        Ok(())
    }

    fn append_chat(
        &self,
        rng: &mut ChaCha8Rng,
        row: &mut Vec<u32>,
        [start, end]: [u32; 2],
    ) -> Result<(), TrainError> {
        let example = &self.chats[rng.random_range(0..self.chats.len())];
        let newline = self.text.encode("\n")?;
        row.push(start);
        row.extend(self.text.encode(&format!("user\n{}", example.question(rng)))?);
        row.push(end);
        row.extend(&newline);
        row.push(start);
        row.extend(self.text.encode(&format!("assistant\n```python\n{}\n```", example.code))?);
        row.push(end);
        row.extend(&newline);
        Ok(())
    }
}

fn rng_between(rng: &mut ChaCha8Rng, low: usize, high: usize) -> usize {
    if high > low { rng.random_range(low..high) } else { low }
}

/// The next line that opens a definition, within a screen or so.
fn definition_after(text: &str, start: usize) -> Option<usize> {
    const OPENERS: [&str; 9] =
        ["def ", "class ", "pub ", "fn ", "impl ", "@", "func ", "function ", "export "];
    let mut at = start;
    for line in text[start..].split_inclusive('\n') {
        if at > start + 1200 {
            return None;
        }
        if OPENERS.iter().any(|opener| line.trim_start().starts_with(opener)) {
            return Some(at);
        }
        at += line.len();
    }
    None
}

/// Which bytes of a window are the middle: often up to the end of a line, as an editor asks;
/// sometimes whole lines; else a length with a long tail.
fn middle_span(rng: &mut ChaCha8Rng, window: &str) -> (usize, usize) {
    let length = window.len();
    let mut from = rng_between(rng, length / 6, length.saturating_sub(10).max(length / 6 + 1));
    let line_end =
        |at: usize| window.as_bytes()[at..].iter().position(|&byte| byte == b'\n').map(|offset| at + offset);
    let last = length.saturating_sub(8);
    let kind: f64 = rng.random();
    let mut to = if kind < 0.45 {
        line_end(from).filter(|&end| end <= from + 160).unwrap_or(last)
    } else if kind < 0.6 {
        from = window.as_bytes()[..from].iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        let least = from + rng.random_range(20..300);
        line_end(least.min(length.saturating_sub(1))).unwrap_or(last)
    } else {
        // Pareto with exponent 0.7.
        from + ((1.0 - rng.random::<f64>()).powf(-1.0 / 0.7) * 12.0).min(MAX_MIDDLE as f64) as usize
    };
    to = to.clamp(from, (from + MAX_MIDDLE).min(length));
    let from = floor_boundary(window, from);
    (from, floor_boundary(window, to).max(from))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::corpus::Document;
    use crate::random::{Purpose, stream};

    fn corpus() -> Corpus {
        let text = "def add(first, second):\n    \"\"\"Return the sum of both numbers.\"\"\"\n    total = first + second\n    return total\n\n\n".repeat(40);
        let train = vec![
            Document { path: "a.py".into(), text },
            Document {
                path: "b.rs".into(),
                text: "fn caf\u{e9}() -> u32 {\n    41 + 1 // \u{1f600}\n}\n".repeat(60),
            },
        ];
        Corpus { train, held_out: Vec::new(), skipped: 0 }
    }

    #[test]
    fn rows_are_full_and_repeat() {
        let corpus = corpus();
        let text = Text::train(&corpus, 300).expect("tokenizer");
        let sampler = Sampler::new(&corpus, &text, &SampleMix { chat_rate: 0.3, ..Default::default() });
        assert!(!sampler.chats.is_empty());
        let row = |step| sampler.row(&mut stream(3, Purpose::Samples, step, 0), 200).expect("row");
        let mut kinds = [false; 3];
        for step in 0..60 {
            let tokens = row(step);
            assert_eq!(tokens.len(), 200);
            assert_eq!(tokens, row(step));
            let [_, middle, _] = text.special.fim.expect("fim");
            let [start, _] = text.special.chat.expect("chat");
            kinds[0] |= tokens.contains(&middle);
            kinds[1] |= tokens.contains(&start);
            kinds[2] |= tokens.contains(&text.special.end_of_text);
        }
        assert_eq!(kinds, [true; 3]);
    }

    #[test]
    fn a_middle_put_back_gives_the_window() {
        let corpus = corpus();
        let text = Text::train(&corpus, 300).expect("tokenizer");
        for (spm_rate, seed) in [(0.0, 1), (1.0, 2)] {
            let mix = SampleMix { spm_rate, ..Default::default() };
            let sampler = Sampler::new(&corpus, &text, &mix);
            for step in 0..40 {
                let mut rng = stream(seed, Purpose::Samples, step, 0);
                let window = sampler.window(&mut rng, 300);
                let mut row = Vec::new();
                let fim = text.special.fim.expect("fim");
                sampler.append_fim(&mut rng, &mut row, window, fim).expect("fim");
                let place = |id| row.iter().position(|&token| token == id).expect("marker");
                let [prefix, middle, suffix] = fim.map(place);
                let decode = |ids: &[u32]| text.tokenizer.decode(ids, true).expect("decode");
                let end = decode(&row[suffix + 1..middle]);
                let start = decode(&row[prefix + 1..suffix]) + &decode(&row[middle + 1..]);
                assert_eq!(start + &end, window);
            }
        }
    }

    #[test]
    fn short_windows_have_a_middle() {
        for window in ["", "a", "ab\n", "\u{1f600}\u{1f600}"] {
            for step in 0..50 {
                let (from, to) = middle_span(&mut stream(1, Purpose::Samples, step, 0), window);
                assert!(from <= to && window.get(from..to).is_some());
            }
        }
    }
}
