//! JSON that arrives in pieces: where a value ends, and calls written as an object with the tool's
//! name and its arguments. O(1) a byte; only names and what comes before them are held.

use super::events::Sink;
use super::input::Input;

/// Finds the end of one object, array or string.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct JsonSpan {
    depth: usize,
    in_string: bool,
    is_escaped: bool,
}

impl JsonSpan {
    /// Bytes of `text` that belong to the value, and whether it ends there. The value's first byte is
    /// one of `{`, `[` and `"`.
    pub(super) fn feed(&mut self, text: &str) -> (usize, bool) {
        for (i, byte) in text.bytes().enumerate() {
            if self.in_string {
                match byte {
                    _ if self.is_escaped => self.is_escaped = false,
                    b'\\' => self.is_escaped = true,
                    b'"' => self.in_string = false,
                    _ => continue,
                }
            } else {
                match byte {
                    b'"' => self.in_string = true,
                    b'{' | b'[' => self.depth += 1,
                    b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                    _ => continue,
                }
            }
            if self.depth == 0 && !self.in_string {
                return (i + 1, true);
            }
        }
        (text.len(), false)
    }
}

/// How far reading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// More text is needed.
    More,
    /// It is read to its end.
    Done,
    /// It is not what it should be.
    Bad,
}

/// What a key stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Name,
    Id,
    Arguments,
    /// `{"type": "function", "function": {...}}`
    Wrapper,
    Other,
}

impl Role {
    fn of(key: &str) -> Role {
        match key {
            "name" => Role::Name,
            "id" | "tool_call_id" => Role::Id,
            "arguments" | "parameters" => Role::Arguments,
            "function" => Role::Wrapper,
            _ => Role::Other,
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Before `{`.
    Open,
    /// Before a key or `}`.
    Key,
    InKey(JsonSpan),
    Colon(Role),
    Value(Role),
    /// Inside an object, an array or a string.
    Span(Role, JsonSpan),
    /// Inside a number or a word.
    Word,
    Done,
}

/// Reads `{"name": "...", "arguments": {...}}`, whatever else is in it and in whatever order.
#[derive(Debug)]
pub(super) struct CallJson {
    state: State,
    /// Wrapping objects that are open.
    num_wrappers: usize,
    /// The string, or the skipped value, being read.
    piece: String,
    id: Option<String>,
    /// The tool's name was read.
    is_started: bool,
    /// Arguments that came before the name.
    early: String,
    has_arguments: bool,
    /// All that was read before the call began: text, if it never does.
    raw: String,
}

impl CallJson {
    pub(super) fn new() -> Self {
        CallJson {
            state: State::Open,
            num_wrappers: 0,
            piece: String::new(),
            id: None,
            is_started: false,
            early: String::new(),
            has_arguments: false,
            raw: String::new(),
        }
    }

    /// True once [`Sink::call_start`] was called.
    pub(super) fn is_started(&self) -> bool {
        self.is_started
    }

    /// What was read, of a call that did not begin.
    pub(super) fn raw(&self) -> &str {
        &self.raw
    }

    /// Reads on. `is_tool` says which names can be called.
    pub(super) fn read(
        &mut self,
        input: &mut Input,
        sink: &mut Sink,
        is_tool: &dyn Fn(&str) -> bool,
    ) -> Step {
        loop {
            let is_spanning = matches!(self.state, State::InKey(_) | State::Span(..));
            if !is_spanning && !self.skip_space(input) {
                return Step::More;
            }
            let Some(next) = input.rest().chars().next() else { return Step::More };
            match (self.state, next) {
                (State::Open, '{') => self.advance(input, State::Key),
                (State::Key, ',') => self.advance(input, State::Key),
                (State::Key, '"') => self.state = State::InKey(JsonSpan::default()),
                (State::Key, '}') => {
                    if self.num_wrappers > 0 {
                        self.num_wrappers -= 1;
                        self.advance(input, State::Key);
                    } else {
                        self.advance(input, State::Done);
                        return self.end(sink);
                    }
                }
                (State::InKey(mut span), _) => {
                    let is_whole = self.collect(input, &mut span);
                    if !is_whole {
                        self.state = State::InKey(span);
                        return Step::More;
                    }
                    let Some(key) = self.string() else { return Step::Bad };
                    self.state = State::Colon(Role::of(&key));
                }
                (State::Colon(role), ':') => self.advance(input, State::Value(role)),
                (State::Value(Role::Wrapper), '{') => {
                    self.num_wrappers += 1;
                    self.advance(input, State::Key);
                }
                (State::Value(Role::Name | Role::Id), '{' | '[') => return Step::Bad,
                (State::Value(role), '{' | '[' | '"') => {
                    // {"function": "name", ...}
                    let role = if role == Role::Wrapper { Role::Name } else { role };
                    self.state = State::Span(role, JsonSpan::default());
                }
                (State::Value(_), _) => self.state = State::Word,
                (State::Word, _) => {
                    let rest = input.rest();
                    let length = rest.find([',', '}', ']', ' ', '\n', '\t', '\r']).unwrap_or(rest.len());
                    let is_whole = length < rest.len();
                    if length == 0 && next == ']' {
                        return Step::Bad;
                    }
                    self.note(input, length);
                    if is_whole {
                        self.state = State::Key;
                    }
                }
                (State::Span(Role::Arguments, mut span), _) => {
                    let is_whole = self.stream_arguments(input, sink, &mut span);
                    self.state = if is_whole { State::Key } else { State::Span(Role::Arguments, span) };
                }
                (State::Span(role, mut span), _) => {
                    if !self.collect(input, &mut span) {
                        self.state = State::Span(role, span);
                        return Step::More;
                    }
                    self.state = State::Key;
                    if !self.take_value(role, sink, is_tool) {
                        return Step::Bad;
                    }
                }
                (State::Done, _) => return Step::Done,
                _ => return Step::Bad,
            }
        }
    }

    fn skip_space(&mut self, input: &mut Input) -> bool {
        let rest = input.rest();
        let length = rest.len() - rest.trim_start().len();
        self.note(input, length);
        !input.is_empty()
    }

    /// Takes so many bytes, and remembers them while the call has not begun.
    fn note<'a>(&mut self, input: &'a mut Input, length: usize) -> &'a str {
        let text = input.take(length);
        if !self.is_started {
            self.raw.push_str(text);
        }
        text
    }

    fn advance(&mut self, input: &mut Input, state: State) {
        self.note(input, 1);
        self.state = state;
    }

    /// Adds to `piece`; true if the value is whole.
    fn collect(&mut self, input: &mut Input, span: &mut JsonSpan) -> bool {
        let (length, is_whole) = span.feed(input.rest());
        let text = self.note(input, length).to_owned();
        self.piece.push_str(&text);
        is_whole
    }

    fn string(&mut self) -> Option<String> {
        serde_json::from_str(&std::mem::take(&mut self.piece)).ok()
    }

    /// False if the value cannot be what its key says.
    fn take_value(&mut self, role: Role, sink: &mut Sink, is_tool: &dyn Fn(&str) -> bool) -> bool {
        match role {
            Role::Name if !self.is_started => {
                let Some(name) = self.string().filter(|name| !name.is_empty() && is_tool(name)) else {
                    return false;
                };
                self.is_started = true;
                self.raw.clear();
                sink.call_start(self.id.take(), name);
                sink.arguments(&std::mem::take(&mut self.early));
            }
            Role::Id => self.id = self.string(),
            _ => self.piece.clear(),
        }
        true
    }

    fn stream_arguments(&mut self, input: &mut Input, sink: &mut Sink, span: &mut JsonSpan) -> bool {
        // A string holds the arguments' JSON once more encoded; it is read whole.
        let is_string = !self.piece.is_empty() || (input.rest().starts_with('"') && span.is_new());
        let (length, is_whole) = span.feed(input.rest());
        let text = self.note(input, length).to_owned();
        self.has_arguments = true;
        let text = match is_string {
            false => text,
            true => {
                self.piece.push_str(&text);
                if !is_whole {
                    return false;
                }
                self.string().unwrap_or_default()
            }
        };
        if self.is_started {
            sink.arguments(&text)
        } else {
            self.early.push_str(&text)
        }
        is_whole
    }

    fn end(&mut self, sink: &mut Sink) -> Step {
        if !self.is_started {
            return Step::Bad;
        }
        if !self.has_arguments {
            sink.arguments("{}");
        }
        sink.call_end();
        Step::Done
    }
}

impl JsonSpan {
    fn is_new(&self) -> bool {
        self.depth == 0 && !self.in_string
    }
}
