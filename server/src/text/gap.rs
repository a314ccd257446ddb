//! Where an answer that fills a gap in code has met what follows the gap.
//!
//! Models that fill in the middle are trained to stop there, and small or cut-off ones go on: they close
//! brackets that the text after the gap closes, or write that text once more. The rules, for an answer
//! between `before` and `after`:
//!
//! - It ends before a bracket that closes nothing that the answer opened, where `after` closes all that `before` left
//!   open. Text between quotes on one line is passed over.
//! - It ends where it repeats how `after` begins: whole lines with eight letters or digits in all
//!   ([`repetition`], for a [`StopMatcher`](super::StopMatcher)).
//! - It ends before a line that is indented by less than `min_indent` characters, if that is asked for.
//!
//! The end depends on the text alone, never on how it was cut into pieces. White space is held back until it is known
//! what follows. Cost: O(before + after) once, O(1) a character of answer.

use std::sync::Arc;

/// The text around a gap, and what is asked of the lines that fill it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GapRules {
    /// The text before it, or the end of it.
    pub before: Arc<str>,
    /// The text after it, or the beginning of it.
    pub after: Arc<str>,
    /// White space that each further line of the answer begins with, in characters.
    pub min_indent: usize,
}

/// Fewest letters and digits that are no coincidence.
const MIN_SUBSTANCE: usize = 8;
/// Longest repetition that is waited for.
const MAX_REPETITION: usize = 400;

/// The beginning of `after` that an answer is not to repeat: as many lines as hold some substance. `None` if there is
/// too little in it.
pub fn repetition(after: &str) -> Option<&str> {
    let mut substance = 0;
    for (at, c) in after.char_indices() {
        substance += usize::from(c.is_alphanumeric());
        if at > MAX_REPETITION {
            return None;
        }
        if c == '\n' && substance >= MIN_SUBSTANCE {
            return Some(after[..at].trim_end());
        }
    }
    (substance >= MIN_SUBSTANCE).then(|| after.trim_end())
}

/// The kinds of brackets.
const BRACKETS: [(char, char); 3] = [('(', ')'), ('[', ']'), ('{', '}')];

/// Brackets of each kind that a text leaves open, and those that it closes without having opened them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Balance {
    open: [usize; 3],
    closed: [usize; 3],
}

impl Balance {
    fn of(text: &str) -> Balance {
        let (mut balance, mut quotes) = (Balance::default(), Quotes::default());
        for c in text.chars() {
            if !quotes.hide(c) {
                balance.step(c);
            }
        }
        balance
    }

    /// The kind of a bracket that closes what this text did not open.
    fn step(&mut self, c: char) -> Option<usize> {
        if let Some(kind) = BRACKETS.iter().position(|bracket| bracket.0 == c) {
            self.open[kind] += 1;
            return None;
        }
        let kind = BRACKETS.iter().position(|bracket| bracket.1 == c)?;
        if self.open[kind] > 0 {
            self.open[kind] -= 1;
            return None;
        }
        self.closed[kind] += 1;
        Some(kind)
    }
}

/// Text between quotes, which end with the line at the latest. A single quote in a word (`don't`) or of a lifetime
/// (`&'a str`, `<'a>`) opens nothing; the letter before `b'x'` and its like is no word.
#[derive(Clone, Copy, Debug, Default)]
struct Quotes {
    within: Option<char>,
    is_escaped: bool,
    last: [char; 2],
    /// A name has followed a single quote so far.
    is_name: bool,
}

impl Quotes {
    /// True if this character is no code.
    fn hide(&mut self, c: char) -> bool {
        let [before_last, last] = self.last;
        self.last = [last, c];
        let Some(quote) = self.within else {
            let is_prefix = "bBfFrRuU".contains(last) && !before_last.is_alphanumeric();
            let is_apostrophe = "&<".contains(last) || (last.is_alphanumeric() && !is_prefix);
            let opens = c == '"' || c == '`' || (c == '\'' && !is_apostrophe);
            if opens {
                self.within = Some(c);
                self.is_escaped = false;
                self.is_name = c == '\'';
            }
            return opens;
        };
        if c == '\n' {
            self.within = None;
            return false;
        }
        let is_name = c.is_alphanumeric() || c == '_';
        let ends_name = self.is_name && last != '\'' && !is_name && c != quote && c != ' ' && c != '\\';
        if ends_name {
            // A lifetime or a label.
            self.within = None;
            return false;
        }
        self.is_name &= is_name;
        if self.is_escaped {
            self.is_escaped = false;
        } else if c == '\\' {
            self.is_escaped = true;
        } else if c == quote {
            self.within = None;
        }
        true
    }
}

/// Reads an answer and finds its end by brackets and indentation.
#[derive(Clone, Debug)]
pub struct GapMatcher {
    /// Brackets of each kind that the answer may close although it did not open them.
    spare: [usize; 3],
    begins_with_space: bool,
    min_indent: usize,
    balance: Balance,
    quotes: Quotes,
    /// White space that the answer may end before.
    held: String,
    has_ended: bool,
}

impl GapMatcher {
    /// A matcher for the answer that fills this gap.
    pub fn new(gap: &GapRules) -> GapMatcher {
        let (open, closed) = (Balance::of(&gap.before).open, Balance::of(&gap.after).closed);
        GapMatcher {
            spare: std::array::from_fn(|kind| open[kind].saturating_sub(closed[kind])),
            begins_with_space: gap.after.starts_with(char::is_whitespace),
            min_indent: gap.min_indent,
            balance: Balance::default(),
            quotes: Quotes::default(),
            held: String::new(),
            has_ended: false,
        }
    }

    /// Takes the next piece of text and appends to `out` what stands before the end for certain. True if the
    /// end was found; later text is ignored.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        for c in text.chars() {
            if self.has_ended {
                break;
            }
            if c.is_whitespace() {
                self.quotes.hide(c);
                self.held.push(c);
            } else if self.is_end(c) {
                self.has_ended = true;
            } else {
                out.push_str(&self.held);
                self.held.clear();
                out.push(c);
            }
        }
        self.has_ended
    }

    /// True if the answer ends before this character, of which `held` is the white space before it.
    fn is_end(&mut self, c: char) -> bool {
        if let Some(line) = self.held.rfind('\n')
            && self.held[line + 1..].chars().count() < self.min_indent
        {
            self.held.clear();
            return true;
        }
        if self.quotes.hide(c) {
            return false;
        }
        let Some(kind) = self.balance.step(c) else { return false };
        if self.balance.closed[kind] <= self.spare[kind] {
            return false;
        }
        // The white space before the bracket is the text's after the gap, if that has some.
        if self.begins_with_space {
            self.held.clear();
        }
        true
    }

    /// The answer ended: appends what was held back and is part of it.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// True once the end was found.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn gap(before: &str, after: &str) -> GapRules {
        GapRules { before: before.into(), after: after.into(), min_indent: 0 }
    }

    fn fill_in_pieces(gap: &GapRules, pieces: &[&str]) -> String {
        let (mut matcher, mut out) = (GapMatcher::new(gap), String::new());
        for piece in pieces {
            matcher.push(piece, &mut out);
        }
        matcher.finish(&mut out);
        out
    }

    fn fill(before: &str, answer: &str, after: &str) -> String {
        fill_in_pieces(&gap(before, after), &[answer])
    }

    #[test]
    fn an_answer_ends_before_a_bracket_that_is_closed_behind_the_gap() {
        assert_eq!(fill("print(", "a, b)\nprint(c)", ")\n"), "a, b");
        assert_eq!(fill("fn f() {\n", "    g();\n}\n\nfn h() {", "\n}\n"), "    g();");
        assert_eq!(fill("x = [", "1, 2]\n", "]"), "1, 2");
        // The block is closed although more of it follows.
        assert_eq!(fill("fn f() {\n", "    g();\n}\nfn h() {}", "\n    i();\n}\n"), "    g();");
    }

    #[test]
    fn brackets_of_its_own_and_those_left_to_it_do_not_end_an_answer() {
        assert_eq!(fill("print(", "f(a), g[0]", ")\n"), "f(a), g[0]");
        assert_eq!(fill("f(g(", "x), y", ")\n"), "x), y");
        assert_eq!(fill("f(g(", "x), y), z", ")\n"), "x), y");
        // Nothing follows the gap, so the answer closes what is open.
        assert_eq!(fill("fn f() {\n    g(", "a);\n}\n", ""), "a);\n}\n");
        assert_eq!(fill("a", ")", ""), "");
    }

    #[test]
    fn brackets_in_texts_do_not_count() {
        assert_eq!(fill("print(", "\":)\", x", ")"), "\":)\", x");
        assert_eq!(fill("print(", "':)', x) # (", ")"), "':)', x");
        assert_eq!(fill("f(", "\"\\\")\")", ")"), "\"\\\")\"");
        assert_eq!(fill("f(", "b')')", ")"), "b')'");
    }

    #[test]
    fn apostrophes_hide_no_brackets() {
        assert_eq!(fill("fn f(", "a: &'a str) {}", ") {"), "a: &'a str");
        assert_eq!(fill("fn f<'a>(", "a: Cow<'a, str>) {}", ") {"), "a: Cow<'a, str>");
        assert_eq!(fill("f(", "1) # don't", ") # can't ("), "1");
        // A line's end ends every quote.
        assert_eq!(fill("f(", "x, ' y\n)", "\n)"), "x, ' y");
    }

    #[test]
    fn white_space_before_the_bracket_stays_if_none_follows_the_gap() {
        assert_eq!(fill("f(", "\n    a,\n)", ")"), "\n    a,\n");
        assert_eq!(fill("f(", "\n    a,\n)", "\n)"), "\n    a,");
    }

    #[test]
    fn a_line_with_less_indentation_ends_an_answer() {
        let gap = GapRules { min_indent: 4, ..gap("def f():\n    ", "") };
        assert_eq!(fill_in_pieces(&gap, &["a = 1\n    b\n\n    c\n", "  d"]), "a = 1\n    b\n\n    c");
        assert_eq!(fill_in_pieces(&gap, &["a\n"]), "a\n");
        assert_eq!(fill_in_pieces(&gap, &["a\n        b\ndef g"]), "a\n        b");
    }

    #[test]
    fn a_repetition_has_substance_and_whole_lines() {
        assert_eq!(repetition("\n    return result\n\n"), Some("\n    return result"));
        assert_eq!(repetition(");\n    next(value);\n}"), Some(");\n    next(value);"));
        assert_eq!(repetition("\n}\n"), None);
        assert_eq!(repetition(""), None);
        assert_eq!(repetition("\n    a\n    b\n    cdefgh\n    i"), Some("\n    a\n    b\n    cdefgh"));
        assert_eq!(repetition(&format!("\n{}abcdefgh\n", " ".repeat(1000))), None);
    }

    proptest! {
        /// However the text is cut into pieces, the answer is the same, and the beginning of the text.
        #[test]
        fn pieces_do_not_matter(
            before in "[(){}a'\" \n]{0,12}",
            after in "[(){}a'\" \n]{0,12}",
            text in "[(){}a'\"\\\\ \n\u{e4}]{0,40}",
            cuts in proptest::collection::vec(0usize..40, 0..6),
            min_indent in 0usize..3,
        ) {
            let gap = GapRules { min_indent, ..gap(&before, &after) };
            let whole = fill_in_pieces(&gap, &[&text]);
            prop_assert!(text.starts_with(&whole));
            let chars: Vec<char> = text.chars().collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(chars.len())).collect();
            cuts.extend([0, chars.len()]);
            cuts.sort_unstable();
            let pieces: Vec<String> =
                cuts.windows(2).map(|cut| chars[cut[0]..cut[1]].iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(fill_in_pieces(&gap, &pieces), whole);
        }
    }
}
