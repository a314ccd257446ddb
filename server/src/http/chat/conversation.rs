//! From messages and tools to a prompt, by the model's chat template.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tandem_models::{ChatTemplate, Tokenizer};

use super::messages::normalise;
use crate::http::error::ApiError;
use crate::http::grammars::{ChatForm, GrammarPlan};
use crate::http::intake::Intake;
use crate::http::prompt::{INLINE_TEXT_BYTES, check_text_fits, encode};
use crate::text::answer::{AnswerReader, Dialect, ToolFormat, ToolSet};

/// Whether the answer calls tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::http) enum ToolChoice {
    /// It does not; the model is not told of any.
    None,
    /// The model decides.
    #[default]
    Auto,
    /// It calls one at least.
    Required,
    /// It calls this one.
    Named(String),
}

/// What a chat is about, whatever the protocol.
pub(in crate::http) struct Conversation {
    /// As OpenAI has them: `role`, `content`, `tool_calls`, `tool_call_id`, `reasoning_content`.
    pub(in crate::http) messages: Vec<Map<String, Value>>,
    /// Where `messages[i]` stands in the request, for faults.
    pub(in crate::http) path: &'static str,
    /// `{"type": "function", "function": {...}}` each.
    pub(in crate::http) tools: Vec<Value>,
    pub(in crate::http) tool_choice: ToolChoice,
    /// The beginning of the answer, which the client has already.
    pub(in crate::http) prefill: String,
    /// Further variables of the template.
    pub(in crate::http) variables: Map<String, Value>,
    /// Length of the body: says whether rendering is long work.
    pub(in crate::http) size_bytes: usize,
}

/// A prompt, and how to read its answers.
pub(in crate::http) struct Rendered {
    pub(in crate::http) tokens: Arc<[u32]>,
    /// The prompt as text, without what a forced call adds.
    pub(in crate::http) text: String,
    pub(in crate::http) plan: ReadingPlan,
}

/// How answers to a prompt are read.
#[derive(Clone, Default)]
pub(in crate::http) struct ReadingPlan {
    /// `None`: all is text.
    dialect: Option<Arc<Dialect>>,
    /// The prompt's last characters: reasoning may have begun there.
    prompt_end: String,
    tools: Option<Arc<ToolSet>>,
    /// What the prompt holds of the answer already, and the client does not.
    forced: String,
    /// What both have.
    prefill: String,
    tokenizer: Option<Arc<Tokenizer>>,
}

impl ReadingPlan {
    /// Counts tokens of what was read.
    pub(super) fn tokenizer(&self) -> Option<Arc<Tokenizer>> {
        self.tokenizer.clone()
    }

    /// A reader for one answer. Events of what the prompt holds already are in `begun`.
    pub(super) fn reader(&self, begun: &mut Vec<crate::text::answer::AnswerEvent>) -> AnswerReader {
        let mut reader = match &self.dialect {
            Some(dialect) => dialect.reader(&self.prompt_end, self.tools.as_ref()),
            None => AnswerReader::plain(),
        };
        if !self.prefill.is_empty() {
            reader.push(&self.prefill, begun);
            begun.clear();
        }
        if !self.forced.is_empty() {
            reader.push(&self.forced, begun);
        }
        reader
    }
}

/// A tool in the form that templates know. `parameters` is a JSON schema; absent: no parameters.
pub(in crate::http) fn function_tool(
    name: &str,
    description: Option<&Value>,
    parameters: Option<&Value>,
) -> Value {
    let mut function = Map::new();
    function.insert("name".to_owned(), Value::from(name));
    function.insert("description".to_owned(), description.cloned().unwrap_or_else(|| Value::from("")));
    let none = || json!({ "type": "object", "properties": {} });
    function
        .insert("parameters".to_owned(), parameters.filter(|p| !p.is_null()).cloned().unwrap_or_else(none));
    json!({ "type": "function", "function": function })
}

impl Conversation {
    /// Renders and encodes the prompt.
    ///
    /// # Errors
    /// If the model has no template, the template refuses the messages, a message has the wrong
    /// shape, or the tool choice cannot be kept.
    pub(in crate::http) async fn render(self, intake: &mut Intake<'_>) -> Result<Rendered, ApiError> {
        let (state, served) = (intake.state, intake.served);
        let Some(template) = served.model.chat_template.clone() else {
            let message =
                format!("the model {:?} has no chat template; use /v1/completions", served.model.name);
            return Err(ApiError::invalid("model", message));
        };
        if self.messages.is_empty() {
            let message = format!("{} is empty; it must hold at least one message", self.path);
            return Err(ApiError::invalid(self.path, message));
        }
        self.check_choice(&served.dialect)?;
        let (state_there, lane) = (state.clone(), served.lane);
        let is_long = self.size_bytes > INLINE_TEXT_BYTES;
        let (asked, one_call) = (intake.common.format.clone(), intake.common.one_call);
        let render = move || {
            let served = state_there.served(lane).expect("it was found before: this is a bug");
            let path = self.path;
            let (tools, tool_choice) = (self.tools.clone(), self.tool_choice.clone());
            let (text, mut plan) = self.write(&template, &served.dialect)?;
            plan.tokenizer = Some(served.model.tokenizer.clone());
            let form = ChatForm {
                asked: asked.as_ref(),
                tools: &tools,
                tool_choice: &tool_choice,
                one_call,
                is_forced: !plan.forced.is_empty(),
                prompt: &text,
                is_begun: !plan.prefill.is_empty(),
            };
            let whole = format!("{text}{}{}", plan.prefill, plan.forced);
            // First, as it is the cheapest to find out.
            check_text_fits(path, whole.len(), served, state_there.engine.max_model_len())?;
            let grammar = form.plan(served)?;
            // A forced call is held to its schema, strict or not.
            if grammar.as_ref().is_some_and(GrammarPlan::holds_calls)
                && let Some(tools) = plan.tools.as_mut().and_then(Arc::get_mut)
            {
                tools.hold_all();
            }
            // The template writes the special tokens itself.
            let tokens = encode(&served.model.tokenizer, &whole, false).map(Arc::from)?;
            Ok((Rendered { tokens, text, plan }, grammar))
        };
        let (rendered, grammar) = state.heavy.run_if(is_long, render).await?;
        intake.common.grammar = grammar;
        intake.common.markers = served.dialect.markers().into();
        Ok(rendered)
    }

    fn check_choice(&self, dialect: &Dialect) -> Result<(), ApiError> {
        let named = match &self.tool_choice {
            ToolChoice::None | ToolChoice::Auto => return Ok(()),
            ToolChoice::Required => None,
            ToolChoice::Named(name) => Some(name.as_str()),
        };
        let fault = |message: String| Err(ApiError::invalid("tool_choice", message));
        if self.tools.is_empty() {
            return fault("tool_choice asks for a tool call, and tools holds none".to_owned());
        }
        if let Some(name) = named
            && !self.tools.iter().any(|tool| tool["function"]["name"] == name)
        {
            let names: Vec<String> =
                self.tools.iter().take(16).map(|tool| tool["function"]["name"].to_string()).collect();
            let name: String = name.chars().take(64).collect();
            return fault(format!("tool_choice names {name:?}, which is not in tools: {}", names.join(", ")));
        }
        if dialect.forced("", named).is_none() {
            let message =
                "this model's way to call tools cannot be forced; tool_choice must be \"auto\" or \"none\"";
            return fault(message.to_owned());
        }
        Ok(())
    }

    fn write(
        mut self,
        template: &ChatTemplate,
        dialect: &Arc<Dialect>,
    ) -> Result<(String, ReadingPlan), ApiError> {
        let is_harmony = dialect.format() == Some(ToolFormat::Harmony);
        for (i, message) in self.messages.iter_mut().enumerate() {
            normalise(&format!("{}[{i}]", self.path), message, is_harmony)?;
            if is_harmony {
                reasoning_for_harmony(message);
            }
        }
        let with_tools = self.tool_choice != ToolChoice::None && !self.tools.is_empty();
        let tools = with_tools.then(|| Arc::new(ToolSet::new(&self.tools)));
        for tool in &mut self.tools {
            // The template shows all there is of a tool, and this is not for the model.
            tool["function"].as_object_mut().and_then(|function| function.remove("strict"));
        }
        let messages = Value::Array(self.messages.into_iter().map(Value::Object).collect());
        let listed = with_tools.then(|| Value::Array(self.tools));
        let render = |messages: &Value| template.render(messages, listed.as_ref(), true, &self.variables);
        // Agents put instructions in several messages, and between turns; many templates take one, and first.
        let rendered = render(&messages).or_else(|error| match instructions_first(&messages) {
            Some(joined) => render(&joined).map_err(|_| error),
            None => Err(error),
        });
        let text = rendered.map_err(|error| {
            let message = format!("the model's chat template refused the messages: {error}");
            ApiError::invalid(self.path, message)
        })?;
        let prefill = match self.prefill.trim_end() {
            "" => String::new(),
            begun => dialect.past_reasoning(&text) + begun,
        };
        let forced = match &self.tool_choice {
            _ if !prefill.is_empty() => None,
            ToolChoice::Required => dialect.forced(&text, None),
            ToolChoice::Named(name) => dialect.forced(&text, Some(name)),
            _ => None,
        };
        let prompt_end =
            text.char_indices().rev().nth(63).map_or(text.as_str(), |(at, _)| &text[at..]).to_owned();
        let plan = ReadingPlan {
            dialect: Some(dialect.clone()),
            prompt_end,
            tools,
            forced: forced.unwrap_or_default(),
            prefill,
            tokenizer: None,
        };
        Ok((text, plan))
    }
}

/// The messages with those of the system that begin them joined to one, and later ones as the user's. `None` if
/// that is what they are.
fn instructions_first(messages: &Value) -> Option<Value> {
    let messages = messages.as_array()?;
    let is_system = |message: &Value| message["role"] == "system";
    let num_first = messages.iter().take_while(|message| is_system(message)).count();
    if num_first < 2 && !messages[num_first..].iter().any(is_system) {
        return None;
    }
    let texts: Vec<&str> =
        messages[..num_first].iter().filter_map(|message| message["content"].as_str()).collect();
    let mut turned = Vec::with_capacity(messages.len());
    if num_first > 0 {
        turned.push(json!({ "role": "system", "content": texts.join("\n\n") }));
    }
    for message in &messages[num_first..] {
        let mut message = message.clone();
        if is_system(&message) {
            message["role"] = Value::from("user");
        }
        turned.push(message);
    }
    Some(Value::Array(turned))
}

/// Its template calls reasoning `thinking`, and takes it only beside a call, in the content's place.
fn reasoning_for_harmony(message: &mut Map<String, Value>) {
    let is_bare_call = message.contains_key("tool_calls")
        && message.get("content").is_none_or(|content| content.is_null() || content == "");
    if let Some(reasoning) = message.remove("reasoning_content")
        && is_bare_call
    {
        message.insert("thinking".to_owned(), reasoning);
    }
}
