//! Stop strings over streamed text.
//!
//! The output ends where the first stop string *ends* (several that end together: the longest), and
//! the text before its start is kept. That place depends on the text alone, never on how it was cut
//! into pieces. While text streams, exactly the longest suffix that could still grow into a stop
//! string is held back.
//!
//! One Knuth-Morris-Pratt state a stop string: a byte costs amortised O(1) per stop string, and the
//! largest state *is* the number of bytes to hold back.

/// Matches stop strings incrementally. Cheap when there are none.
#[derive(Clone, Debug, Default)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    /// Text that was pushed and not yet released.
    held: String,
    stopped: bool,
    /// The pattern that was completed.
    stopped_by: Option<usize>,
}

#[derive(Clone, Debug)]
struct Pattern {
    bytes: Box<[u8]>,
    /// `failure[k]`: length of the longest proper prefix of `bytes[..=k]` that is also its suffix.
    failure: Box<[usize]>,
    /// How many bytes of the pattern the text seen so far ends with.
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut failure = vec![0; bytes.len()];
        let mut length = 0;
        for k in 1..bytes.len() {
            while length > 0 && bytes[k] != bytes[length] {
                length = failure[length - 1];
            }
            if bytes[k] == bytes[length] {
                length += 1;
            }
            failure[k] = length;
        }
        Pattern { bytes: bytes.into(), failure: failure.into(), matched: 0 }
    }

    /// Takes one byte of text; true if the pattern ends with it.
    fn step(&mut self, byte: u8) -> bool {
        while self.matched > 0 && self.bytes[self.matched] != byte {
            self.matched = self.failure[self.matched - 1];
        }
        if self.bytes[self.matched] == byte {
            self.matched += 1;
        }
        self.matched == self.bytes.len()
    }
}

impl StopMatcher {
    /// A matcher for these strings. Empty ones are left out: they would match everywhere.
    pub fn new<S: AsRef<str>>(stops: &[S]) -> Self {
        let patterns =
            stops.iter().map(AsRef::as_ref).filter(|stop| !stop.is_empty()).map(Pattern::new).collect();
        StopMatcher { patterns, held: String::new(), stopped: false, stopped_by: None }
    }

    /// Takes the next piece of text and appends to `out` what is now certain to stand before any
    /// stop string. Returns true if a stop string was completed; later text is ignored.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        if self.patterns.is_empty() {
            out.push_str(text);
            return false;
        }
        let held_before = self.held.len();
        self.held.push_str(text);
        for (i, byte) in text.bytes().enumerate() {
            let mut longest = None;
            for (i, pattern) in self.patterns.iter_mut().enumerate() {
                if pattern.step(byte) {
                    longest = longest.max(Some((pattern.bytes.len(), i)));
                }
            }
            if let Some((length, by)) = longest {
                self.stopped_by = Some(by);
                self.held.truncate(held_before + i + 1 - length);
                out.push_str(&self.held);
                self.held.clear();
                self.stopped = true;
                return true;
            }
        }
        let hold_back = self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or(0);
        let release = self.held.len() - hold_back;
        out.push_str(&self.held[..release]);
        self.held.drain(..release);
        false
    }

    /// The output ended by itself: appends what was held back.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The stop string that was completed, and its place among those that are not empty.
    pub fn stopped_by(&self) -> Option<(usize, &str)> {
        let index = self.stopped_by?;
        let text = std::str::from_utf8(&self.patterns[index].bytes);
        Some((index, text.expect("it was made of a string: this is a bug")))
    }

    /// True once a stop string was completed.
    pub fn stopped(&self) -> bool {
        self.stopped
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::StopMatcher;

    /// The specification: the first end of any stop string, cut at the earliest start of those that
    /// end there.
    fn naive(text: &str, stops: &[String]) -> Option<usize> {
        (0..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
            stops
                .iter()
                .filter(|stop| text[..end].ends_with(stop.as_str()))
                .map(|stop| end - stop.len())
                .min()
        })
    }

    /// The longest suffix of `text` that is a proper prefix of a stop string.
    fn naive_hold_back(text: &str, stops: &[String]) -> usize {
        let candidates = text.char_indices().map(|(start, _)| start);
        candidates
            .map(|start| text.len() - start)
            .filter(|&length| {
                stops.iter().any(|stop| {
                    stop.len() > length && stop.as_bytes()[..length] == text.as_bytes()[text.len() - length..]
                })
            })
            .max()
            .unwrap_or(0)
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

        #[test]
        fn agrees_with_a_search_over_the_whole_text(
            pieces in prop::collection::vec("[ab\u{e9}\u{4e16}]{0,4}", 0..12),
            stops in prop::collection::vec("[ab\u{e9}\u{4e16}]{1,4}", 0..4),
        ) {
            let text = pieces.concat();
            let mut matcher = StopMatcher::new(&stops);
            let mut out = String::new();
            let mut seen = String::new();
            for piece in &pieces {
                seen.push_str(piece);
                if matcher.push(piece, &mut out) {
                    break;
                }
                prop_assert_eq!(seen.len() - out.len(), naive_hold_back(&seen, &stops), "held back in {:?}", seen);
            }
            match naive(&text, &stops) {
                Some(start) => {
                    prop_assert!(matcher.stopped());
                    prop_assert_eq!(out, &text[..start]);
                }
                None => {
                    prop_assert!(!matcher.stopped());
                    matcher.finish(&mut out);
                    prop_assert_eq!(out, text);
                }
            }
        }
    }

    #[test]
    fn the_stop_that_ends_first_wins_however_the_text_is_cut() {
        for pieces in [vec!["xabcd"], vec!["x", "a", "b", "c", "d"], vec!["xab", "cd"]] {
            let mut matcher = StopMatcher::new(&["abcd", "bc"]);
            let mut out = String::new();
            assert!(pieces.iter().any(|piece| matcher.push(piece, &mut out)));
            assert_eq!(out, "xa", "cut as {pieces:?}");
        }
    }

    #[test]
    fn text_that_only_began_like_a_stop_is_not_lost() {
        let mut matcher = StopMatcher::new(&["\n\n"]);
        let mut out = String::new();
        assert!(!matcher.push("a\n", &mut out));
        assert_eq!(out, "a");
        assert!(!matcher.push("b\n", &mut out));
        assert_eq!(out, "a\nb");
        matcher.finish(&mut out);
        assert_eq!(out, "a\nb\n");
    }

    #[test]
    fn nothing_follows_a_stop() {
        let mut matcher = StopMatcher::new(&["END"]);
        let mut out = String::new();
        assert!(matcher.push("one END two", &mut out));
        assert!(matcher.push("three", &mut out));
        matcher.finish(&mut out);
        assert_eq!(out, "one ");
    }
}
