//! Text that is still to be read, in pieces that end anywhere.
//!
//! What cannot yet be told apart from the beginning of a marker stays; everything else is taken at
//! once, so that little is ever held and each byte is looked at a bounded number of times.

/// A queue of text.
#[derive(Debug, Default)]
pub(super) struct Input {
    buffer: String,
    /// Bytes of `buffer` that were taken.
    taken: usize,
    /// Nothing follows.
    pub(super) is_last: bool,
}

/// Whether the text begins with something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    Yes,
    No,
    /// It may, when more is there.
    Maybe,
}

impl Input {
    pub(super) fn push(&mut self, text: &str) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.push_str(text);
    }

    pub(super) fn rest(&self) -> &str {
        &self.buffer[self.taken..]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.taken == self.buffer.len()
    }

    /// Takes so many bytes.
    pub(super) fn take(&mut self, num_bytes: usize) -> &str {
        let start = self.taken;
        self.taken += num_bytes;
        &self.buffer[start..self.taken]
    }

    /// Takes white space; true if something else follows.
    pub(super) fn skip_space(&mut self) -> bool {
        let rest = self.rest();
        self.taken += rest.len() - rest.trim_start().len();
        !self.is_empty()
    }

    pub(super) fn begins_with(&self, marker: &str) -> Begins {
        let rest = self.rest();
        if rest.starts_with(marker) {
            Begins::Yes
        } else if !self.is_last && marker.starts_with(rest) {
            Begins::Maybe
        } else {
            Begins::No
        }
    }

    /// Takes the text before the first of `markers`, and that marker if it is there.
    pub(super) fn until(&mut self, markers: &[&str]) -> (&str, Option<usize>) {
        self.text_before(markers, self.is_last)
    }

    /// The same, but the beginning of a marker that an answer breaks off with is left: inside of
    /// arguments it is none of them.
    pub(super) fn until_certainly(&mut self, markers: &[&str]) -> (&str, Option<usize>) {
        self.text_before(markers, false)
    }

    fn text_before(&mut self, markers: &[&str], takes_all: bool) -> (&str, Option<usize>) {
        let rest = self.rest();
        let found = markers
            .iter()
            .enumerate()
            .filter_map(|(i, marker)| rest.find(marker).map(|at| (at, std::cmp::Reverse(marker.len()), i)))
            .min();
        let start = self.taken;
        match found {
            Some((at, _, i)) => {
                self.taken += at + markers[i].len();
                (&self.buffer[start..start + at], Some(i))
            }
            None => {
                let held = if takes_all { 0 } else { held_back(rest, markers) };
                self.taken += rest.len() - held;
                (&self.buffer[start..self.taken], None)
            }
        }
    }
}

/// Bytes at the end of `text` that a marker may begin with.
fn held_back(text: &str, markers: &[&str]) -> usize {
    let longest = markers.iter().map(|marker| marker.len()).max().unwrap_or(0);
    let from = text.len().saturating_sub(longest.saturating_sub(1));
    (from..text.len())
        .filter(|&at| text.is_char_boundary(at))
        .find(|&at| {
            markers.iter().any(|marker| marker.len() > text.len() - at && marker.starts_with(&text[at..]))
        })
        .map_or(0, |at| text.len() - at)
}
