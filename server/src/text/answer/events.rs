//! What an answer is made of, whatever the model's own spelling and the client's protocol.

/// The next part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerEvent {
    /// More of the answer proper.
    Text(String),
    /// More of the reasoning before it.
    Reasoning(String),
    /// A tool call begins.
    CallStart {
        /// The id that the model gave it, if it did.
        id: Option<String>,
        /// The tool.
        name: String,
    },
    /// More of the call's arguments, which are JSON.
    CallArguments(String),
    /// The call is over. Its arguments are not whole if the answer ended inside it.
    CallEnd,
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AnswerMessage {
    /// The answer proper.
    pub text: String,
    /// The reasoning before it.
    pub reasoning: String,
    /// Tool calls, in order.
    pub calls: Vec<ToolCall>,
}

/// A tool call of a whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ToolCall {
    /// The id that the model gave it, if it did.
    pub id: Option<String>,
    /// The tool.
    pub name: String,
    /// JSON, as the model wrote it.
    pub arguments: String,
}

impl AnswerMessage {
    /// Adds what comes next.
    pub fn absorb(&mut self, event: AnswerEvent) {
        match event {
            AnswerEvent::Text(text) => self.text.push_str(&text),
            AnswerEvent::Reasoning(text) => self.reasoning.push_str(&text),
            AnswerEvent::CallStart { id, name } => {
                self.calls.push(ToolCall { id, name, arguments: String::new() });
            }
            AnswerEvent::CallArguments(json) => {
                if let Some(call) = self.calls.last_mut() {
                    call.arguments.push_str(&json);
                }
            }
            AnswerEvent::CallEnd => {}
        }
    }
}

/// Where formats put what they have read. Joins neighbours; white space beside calls and reasoning is
/// layout and left out.
#[derive(Debug, Default)]
pub(super) struct Sink {
    events: Vec<AnswerEvent>,
    /// White space that is text only if text follows.
    held: String,
    /// Text begins: white space before it is layout.
    is_fresh: bool,
    /// The latest text was reasoning.
    is_reasoning: bool,
    has_calls: bool,
    in_call: bool,
}

impl Sink {
    pub(super) fn text(&mut self, text: &str) {
        self.prose(text, false);
    }

    pub(super) fn reasoning(&mut self, text: &str) {
        self.prose(text, true);
    }

    fn prose(&mut self, text: &str, is_reasoning: bool) {
        let text = if self.is_fresh { text.trim_start() } else { text };
        self.is_reasoning = is_reasoning;
        let solid = text.trim_end().len();
        if solid > 0 {
            self.is_fresh = false;
            let mut piece = std::mem::take(&mut self.held);
            piece.push_str(&text[..solid]);
            match (self.events.last_mut(), is_reasoning) {
                (Some(AnswerEvent::Text(last)), false) | (Some(AnswerEvent::Reasoning(last)), true) => {
                    last.push_str(&piece);
                }
                (_, false) => self.events.push(AnswerEvent::Text(piece)),
                (_, true) => self.events.push(AnswerEvent::Reasoning(piece)),
            }
        }
        self.held.push_str(&text[solid..]);
    }

    /// Reasoning begins or ends.
    pub(super) fn turn(&mut self) {
        self.held.clear();
        self.is_fresh = true;
    }

    pub(super) fn call_start(&mut self, id: Option<String>, name: String) {
        self.call_end();
        self.turn();
        self.has_calls = true;
        self.in_call = true;
        self.events.push(AnswerEvent::CallStart { id, name });
    }

    pub(super) fn arguments(&mut self, json: &str) {
        match self.events.last_mut() {
            _ if json.is_empty() => {}
            Some(AnswerEvent::CallArguments(last)) => last.push_str(json),
            _ => self.events.push(AnswerEvent::CallArguments(json.to_owned())),
        }
    }

    /// Ends a call that is open.
    pub(super) fn call_end(&mut self) {
        if std::mem::take(&mut self.in_call) {
            self.events.push(AnswerEvent::CallEnd);
        }
    }

    /// The answer is over.
    pub(super) fn finish(&mut self) {
        self.call_end();
        let held = std::mem::take(&mut self.held);
        if self.has_calls || self.is_reasoning || held.is_empty() {
            return;
        }
        match self.events.last_mut() {
            Some(AnswerEvent::Text(last)) => last.push_str(&held),
            _ => self.events.push(AnswerEvent::Text(held)),
        }
    }

    pub(super) fn drain(&mut self) -> std::vec::Drain<'_, AnswerEvent> {
        self.events.drain(..)
    }
}
