//! llama.cpp's GBNF, translated to llguidance's Lark.
//!
//! Lark tells terminals, which its lexer reads greedily, from rules; GBNF does not. What refers to no
//! recursion becomes a terminal, with everything of the kind beside it, and the rest becomes rules. Where a
//! terminal could also be the beginning of what follows it across such a border, the translation allows
//! less than the original; it never allows more.
//!
//! O(length); nesting is bounded.

use std::collections::HashMap;

use super::GrammarError;
use super::format::literal;

/// Groups inside of groups.
const MAX_DEPTH: usize = 100;

/// `*`, `+`, `?` and `{m,n}` one after another: each is a group around what stands before it.
const MAX_REPETITIONS: usize = 4;

/// Alternatives, each a sequence.
type Choice = Vec<Vec<Item>>;

/// Something, so many times.
struct Item {
    atom: Atom,
    min: u32,
    max: Option<u32>,
}

enum Atom {
    Text(String),
    /// A regular expression for one character.
    Class(String),
    Rule(usize),
    Group(Choice),
}

/// Translates a grammar, whose answer is the rule `root`.
///
/// # Errors
/// If it is not GBNF; says where.
pub(super) fn gbnf_to_lark(text: &str) -> Result<String, GrammarError> {
    let mut parser = Parser { rest: text, text, names: HashMap::new(), rules: Vec::new() };
    parser.grammar()?;
    let Some(&root) = parser.names.get("root") else {
        return Err(GrammarError::Unsupported("the grammar has no rule \"root\"".to_owned()));
    };
    let mut names = vec![""; parser.rules.len()];
    parser.names.iter().for_each(|(name, &index)| names[index] = name);
    let mut rules = Vec::new();
    for (name, rule) in names.into_iter().zip(parser.rules) {
        let undefined = || GrammarError::Unsupported(format!("the rule {name:?} is used and not defined"));
        rules.push(rule.ok_or_else(undefined)?);
    }
    Ok(Writer::new(&rules).write(root))
}

struct Parser<'a> {
    rest: &'a str,
    text: &'a str,
    names: HashMap<&'a str, usize>,
    rules: Vec<Option<Choice>>,
}

impl<'a> Parser<'a> {
    fn grammar(&mut self) -> Result<(), GrammarError> {
        self.skip();
        while !self.rest.is_empty() {
            let name = self.name();
            self.skip();
            let Some(rest) = self.rest.strip_prefix("::=").filter(|_| !name.is_empty()) else {
                return Err(self.fault("a rule, NAME ::= ..., is expected"));
            };
            self.rest = rest;
            let index = self.index_of(name);
            let choice = self.choice(0)?;
            if self.rules[index].replace(choice).is_some() {
                return Err(self.fault(&format!("the rule {name:?} is defined twice")));
            }
        }
        Ok(())
    }

    fn fault(&self, what: &str) -> GrammarError {
        let line = self.text[..self.text.len() - self.rest.len()].lines().count().max(1);
        GrammarError::Unsupported(format!("GBNF, line {line}: {what}"))
    }

    /// White space and comments.
    fn skip(&mut self) {
        loop {
            self.rest = self.rest.trim_start();
            if !self.rest.starts_with('#') {
                return;
            }
            self.rest = self.rest.find('\n').map_or("", |end| &self.rest[end..]);
        }
    }

    fn name(&mut self) -> &'a str {
        let is_part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let end = self.rest.find(|c| !is_part(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        name
    }

    fn index_of(&mut self, name: &'a str) -> usize {
        let next = self.rules.len();
        let index = *self.names.entry(name).or_insert(next);
        if index == next {
            self.rules.push(None);
        }
        index
    }

    fn choice(&mut self, depth: usize) -> Result<Choice, GrammarError> {
        if depth > MAX_DEPTH {
            return Err(self.fault(&format!("more than {MAX_DEPTH} groups inside each other")));
        }
        let mut choice = vec![self.sequence(depth)?];
        while let Some(rest) = self.rest.strip_prefix('|') {
            self.rest = rest;
            choice.push(self.sequence(depth)?);
        }
        Ok(choice)
    }

    fn sequence(&mut self, depth: usize) -> Result<Vec<Item>, GrammarError> {
        let mut items = Vec::new();
        loop {
            self.skip();
            let before = self.rest;
            let atom = match self.rest.chars().next() {
                None | Some('|' | ')') => return Ok(items),
                Some('"') => Atom::Text(self.quoted()?),
                Some('[') => Atom::Class(self.class()?),
                Some('.') => {
                    self.rest = &self.rest[1..];
                    Atom::Class("(?s:.)".to_owned())
                }
                Some('(') => {
                    self.rest = &self.rest[1..];
                    let choice = self.choice(depth + 1)?;
                    let Some(rest) = self.rest.strip_prefix(')') else {
                        return Err(self.fault("\")\" is missing"));
                    };
                    self.rest = rest;
                    Atom::Group(choice)
                }
                Some(_) => {
                    let name = self.name();
                    if name.is_empty() {
                        return Err(
                            self.fault("a text, [characters], (a group) or a rule's name is expected")
                        );
                    }
                    self.skip();
                    if self.rest.starts_with("::=") {
                        // The next rule begins.
                        self.rest = before;
                        return Ok(items);
                    }
                    Atom::Rule(self.index_of(name))
                }
            };
            items.push(self.repeated(atom)?);
        }
    }

    fn repeated(&mut self, atom: Atom) -> Result<Item, GrammarError> {
        let mut item = Item { atom, min: 1, max: Some(1) };
        for _ in 0..=MAX_REPETITIONS {
            self.skip();
            let (min, max) = match self.rest.chars().next() {
                Some('*') => (0, None),
                Some('+') => (1, None),
                Some('?') => (0, Some(1)),
                Some('{') => {
                    let Some(end) = self.rest.find('}') else { return Err(self.fault("\"}\" is missing")) };
                    let inner = &self.rest[1..end];
                    let number = |text: &str| text.trim().parse::<u32>().ok();
                    let bounds = match inner.split_once(',') {
                        None => number(inner).map(|n| (n, Some(n))),
                        Some((min, "")) => number(min).map(|min| (min, None)),
                        Some((min, max)) => number(min).zip(number(max)).map(|(min, max)| (min, Some(max))),
                    };
                    let bounds = bounds.filter(|(min, max)| max.is_none_or(|max| *min <= max));
                    let Some(bounds) = bounds else {
                        return Err(self.fault("{m}, {m,} or {m,n} is expected"));
                    };
                    self.rest = &self.rest[end..];
                    bounds
                }
                _ => return Ok(item),
            };
            self.rest = &self.rest[1..];
            if (item.min, item.max) != (1, Some(1)) {
                item = Item { atom: Atom::Group(vec![vec![item]]), min: 1, max: Some(1) };
            }
            (item.min, item.max) = (min, max);
        }
        Err(self.fault(&format!("more than {MAX_REPETITIONS} repetitions of one another")))
    }

    fn quoted(&mut self) -> Result<String, GrammarError> {
        self.rest = &self.rest[1..];
        let mut text = String::new();
        loop {
            match self.rest.chars().next() {
                None | Some('\n') => return Err(self.fault("\" is missing at the end of a text")),
                Some('"') => {
                    self.rest = &self.rest[1..];
                    return Ok(text);
                }
                Some(_) => text.push(self.character()?),
            }
        }
    }

    fn class(&mut self) -> Result<String, GrammarError> {
        self.rest = &self.rest[1..];
        let mut class = "[".to_owned();
        if let Some(rest) = self.rest.strip_prefix('^') {
            self.rest = rest;
            class.push('^');
        }
        let mut is_empty = true;
        loop {
            match self.rest.chars().next() {
                None | Some('\n') => return Err(self.fault("\"]\" is missing")),
                Some(']') if is_empty => return Err(self.fault("[] holds no character")),
                Some(']') => {
                    self.rest = &self.rest[1..];
                    class.push(']');
                    return Ok(class);
                }
                Some(_) => {}
            }
            is_empty = false;
            let first = self.character()?;
            let is_range = self.rest.starts_with('-') && !self.rest.starts_with("-]");
            if is_range {
                self.rest = &self.rest[1..];
            }
            let last = if is_range { self.character()? } else { first };
            if last < first {
                return Err(self.fault("a range of characters ends before it begins"));
            }
            class.push_str(&format!("\\u{{{:x}}}-\\u{{{:x}}}", u32::from(first), u32::from(last)));
        }
    }

    /// A character, which may be escaped.
    fn character(&mut self) -> Result<char, GrammarError> {
        let mut chars = self.rest.chars();
        let first = chars.next().ok_or_else(|| self.fault("a character is missing"))?;
        if first != '\\' {
            self.rest = chars.as_str();
            return Ok(first);
        }
        let escaped = chars.next().ok_or_else(|| self.fault("a character is missing after \"\\\""))?;
        self.rest = chars.as_str();
        let num_digits = match escaped {
            'n' => return Ok('\n'),
            'r' => return Ok('\r'),
            't' => return Ok('\t'),
            'x' => 2,
            'u' => 4,
            'U' => 8,
            other => return Ok(other),
        };
        let digits = self.rest.get(..num_digits).and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let Some(character) = digits.and_then(char::from_u32) else {
            return Err(self.fault("an escape does not name a character"));
        };
        self.rest = &self.rest[num_digits..];
        Ok(character)
    }
}

/// Writes rules as Lark.
struct Writer<'a> {
    rules: &'a [Choice],
    /// Rules that lead to no recursion.
    is_regular: Vec<bool>,
    /// Of those, whether nothing at all is one.
    is_nullable: Vec<bool>,
    terminals: Vec<String>,
}

impl<'a> Writer<'a> {
    fn new(rules: &'a [Choice]) -> Self {
        // A rule is regular once all that it refers to is. What never becomes so leads to recursion.
        let mut users: Vec<Vec<usize>> = vec![Vec::new(); rules.len()];
        let mut num_open = vec![0usize; rules.len()];
        for (index, rule) in rules.iter().enumerate() {
            for_each_reference(rule, &mut |used| {
                users[used].push(index);
                num_open[index] += 1;
            });
        }
        let mut ready: Vec<usize> = (0..rules.len()).filter(|&index| num_open[index] == 0).collect();
        let mut writer = Writer {
            rules,
            is_regular: vec![false; rules.len()],
            is_nullable: vec![false; rules.len()],
            terminals: Vec::new(),
        };
        while let Some(index) = ready.pop() {
            writer.is_regular[index] = true;
            writer.is_nullable[index] = writer.choice_is_nullable(&rules[index]);
            for &user in &users[index] {
                num_open[user] -= 1;
                if num_open[user] == 0 {
                    ready.push(user);
                }
            }
        }
        writer
    }

    fn write(mut self, root: usize) -> String {
        let start = Item { atom: Atom::Rule(root), min: 1, max: Some(1) };
        let mut lark = format!("start: {}\n", self.sequence(std::slice::from_ref(&start)));
        for (index, rule) in self.rules.iter().enumerate() {
            let line = if self.is_regular[index] {
                format!("T{index}: {}\n", self.terminal(rule))
            } else {
                format!("r{index}: {}\n", self.choice(rule))
            };
            lark.push_str(&line);
        }
        for (index, terminal) in self.terminals.iter().enumerate() {
            lark.push_str(&format!("X{index}: {terminal}\n"));
        }
        lark
    }

    fn choice_is_nullable(&self, choice: &Choice) -> bool {
        choice.iter().any(|items| self.is_nullable(items))
    }

    fn is_nullable(&self, items: &[Item]) -> bool {
        items.iter().all(|item| {
            item.min == 0
                || match &item.atom {
                    Atom::Text(text) => text.is_empty(),
                    Atom::Class(_) => false,
                    Atom::Rule(index) => self.is_nullable[*index],
                    Atom::Group(choice) => self.choice_is_nullable(choice),
                }
        })
    }

    fn item_is_regular(&self, item: &Item) -> bool {
        match &item.atom {
            Atom::Text(_) | Atom::Class(_) => true,
            Atom::Rule(index) => self.is_regular[*index],
            Atom::Group(choice) => choice.iter().flatten().all(|item| self.item_is_regular(item)),
        }
    }

    /// Alternatives of regular items.
    fn terminal(&self, choice: &Choice) -> String {
        let sequences = choice.iter().map(|items| self.terminal_sequence(items));
        format!("({})", sequences.collect::<Vec<_>>().join(" | "))
    }

    fn terminal_sequence(&self, items: &[Item]) -> String {
        if items.is_empty() {
            return "\"\"".to_owned();
        }
        let text = |item: &Item| {
            let atom = match &item.atom {
                Atom::Text(text) => literal(text),
                Atom::Class(class) => format!("/{class}/"),
                Atom::Rule(index) => format!("T{index}"),
                Atom::Group(choice) => self.terminal(choice),
            };
            atom + &times(item)
        };
        items.iter().map(text).collect::<Vec<_>>().join(" ")
    }

    fn choice(&mut self, choice: &Choice) -> String {
        let sequences: Vec<String> = choice.iter().map(|items| self.sequence(items)).collect();
        sequences.join(" | ")
    }

    /// Neighbours that are regular become one terminal.
    fn sequence(&mut self, items: &[Item]) -> String {
        let mut parts = Vec::new();
        let is_one = |a: &Item, b: &Item| self.item_is_regular(a) && self.item_is_regular(b);
        let runs: Vec<&[Item]> = items.chunk_by(is_one).collect();
        for run in runs {
            let first = &run[0];
            if self.item_is_regular(first) {
                // A terminal is never empty: where it could be, it may be left out.
                let (limit, mark) = if self.is_nullable(run) { (" & /(?s:.+)/", "?") } else { ("", "") };
                parts.push(format!("X{}{mark}", self.terminals.len()));
                self.terminals.push(format!("({}){limit}", self.terminal_sequence(run)));
                continue;
            }
            let atom = match &first.atom {
                Atom::Group(choice) => format!("({})", self.choice(choice)),
                Atom::Rule(index) => format!("r{index}"),
                Atom::Text(_) | Atom::Class(_) => unreachable!("they are regular: this is a bug"),
            };
            parts.push(atom + &times(first));
        }
        if parts.is_empty() { "\"\"".to_owned() } else { parts.join(" ") }
    }
}

fn times(item: &Item) -> String {
    match (item.min, item.max) {
        (1, Some(1)) => String::new(),
        (0, None) => "*".to_owned(),
        (1, None) => "+".to_owned(),
        (0, Some(1)) => "?".to_owned(),
        (min, None) => format!("{{{min},}}"),
        (min, Some(max)) => format!("{{{min},{max}}}"),
    }
}

fn for_each_reference(choice: &Choice, visit: &mut impl FnMut(usize)) {
    for item in choice.iter().flatten() {
        match &item.atom {
            Atom::Rule(index) => visit(*index),
            Atom::Group(choice) => for_each_reference(choice, visit),
            Atom::Text(_) | Atom::Class(_) => {}
        }
    }
}
