//! Where an answer ends before its last token: at a client's stop string, or where it has filled its gap.

use super::gap::{self, GapMatcher, GapRules};
use super::stop::StopMatcher;

/// Finds the end of one answer. Cheap where nothing is looked for.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    stop: StopMatcher,
    /// The client's; a pattern behind them is the repetition of what follows a gap.
    num_stops: usize,
    gap: Option<GapMatcher>,
    /// What stands before any stop string, on its way through `gap`.
    passed: String,
}

impl Ending {
    /// For these stop strings, of which empty ones are left out, and this gap.
    pub fn new(stops: &[String], gap: Option<&GapRules>) -> Ending {
        let mut patterns: Vec<&str> = stops.iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
        let num_stops = patterns.len();
        patterns.extend(gap.and_then(|gap| gap::repetition(&gap.after)));
        Ending {
            stop: StopMatcher::new(&patterns),
            num_stops,
            gap: gap.map(GapMatcher::new),
            passed: String::new(),
        }
    }

    /// Takes the next piece of text and appends to `out` what stands before the end for certain. Later text
    /// than the end is ignored.
    pub fn push(&mut self, text: &str, out: &mut String) {
        if self.has_ended() {
            return;
        }
        let Some(gap) = &mut self.gap else {
            self.stop.push(text, out);
            return;
        };
        self.passed.clear();
        self.stop.push(text, &mut self.passed);
        if gap.push(&self.passed, out) || self.stop.stopped() {
            gap.finish(out);
        }
    }

    /// The answer ended by itself: appends what was held back.
    pub fn finish(&mut self, out: &mut String) {
        if self.has_ended() {
            return;
        }
        let Some(gap) = &mut self.gap else { return self.stop.finish(out) };
        self.passed.clear();
        self.stop.finish(&mut self.passed);
        gap.push(&self.passed, out);
        gap.finish(out);
    }

    /// True once the end was found.
    pub fn has_ended(&self) -> bool {
        self.stop.stopped() || self.gap.as_ref().is_some_and(GapMatcher::has_ended)
    }

    /// The client's stop string that ended the answer, if one did.
    pub fn stop_string(&self) -> Option<&str> {
        self.stop.stopped_by().filter(|(index, _)| *index < self.num_stops).map(|(_, text)| text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(stops: &[&str], gap: Option<&GapRules>, text: &str) -> (String, bool, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let (mut ending, mut out) = (Ending::new(&stops, gap), String::new());
        for c in text.chars() {
            ending.push(c.encode_utf8(&mut [0; 4]), &mut out);
        }
        ending.finish(&mut out);
        (out, ending.has_ended(), ending.stop_string().map(str::to_owned))
    }

    #[test]
    fn a_stop_string_is_named_and_a_repetition_is_not() {
        let gap = GapRules { before: "a".into(), after: "\n    return value\n".into(), min_indent: 0 };
        let text = " = 1\n    return value\n\nEND";
        assert_eq!(read(&[], Some(&gap), text), (" = 1".into(), true, None));
        assert_eq!(read(&["", " 1"], Some(&gap), text), (" =".into(), true, Some(" 1".into())));
        assert_eq!(read(&["END"], None, text), (text[..text.len() - 3].into(), true, Some("END".into())));
        assert_eq!(read(&[], None, text), (text.into(), false, None));
    }

    #[test]
    fn what_is_held_back_is_part_of_an_answer_that_ends_by_itself() {
        let gap = GapRules { before: "a".into(), after: "\n    return value\n".into(), min_indent: 0 };
        assert_eq!(read(&[], Some(&gap), "x\n    return v"), ("x\n    return v".into(), false, None));
        assert_eq!(read(&["stop"], Some(&gap), "x \nst"), ("x \nst".into(), false, None));
    }
}
