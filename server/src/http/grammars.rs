//! From what a request asks for to the grammar that its sequences follow: which text it is, for this model
//! and this prompt, and its compiling, away from the async threads and for a bounded time.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::chat::ToolChoice;
use super::error::{ApiError, ErrorKind};
use super::fields::{AskedFormat, fault};
use super::prompt::INLINE_TEXT_BYTES;
use super::state::{AppState, ServedModel};
use crate::text::answer::{DeepSeekCalls, MistralCalls, ToolFormat};
use crate::text::grammar::{
    CallFormat, Calling, Grammar, GrammarError, Grammars, Lead, Piece, Token, ToolShape, answer_text,
    grammar_text,
};

/// How long a request waits for its grammar. Compiling is bounded by itself; this is for a queue of it.
const COMPILE_TIME: Duration = Duration::from_secs(10);

/// The texts of a grammar, best first: the next one is taken if one cannot be compiled.
pub(super) struct GrammarPlan {
    /// Who asks for it.
    param: String,
    texts: Vec<String>,
    /// The first holds the arguments of every tool to its schema.
    holds_calls: bool,
}

impl GrammarPlan {
    /// Of an answer that is nothing but what is asked for. A long form is long work.
    ///
    /// # Errors
    /// If it cannot be written as a grammar.
    pub(super) async fn plain(
        asked: &AskedFormat,
        state: &Arc<AppState>,
        served: &ServedModel,
    ) -> Result<Self, ApiError> {
        let is_long = asked.format.exceeds(INLINE_TEXT_BYTES);
        let (asked, state_there, lane) = (asked.clone(), state.clone(), served.lane);
        let plan = move || {
            let served = state_there.served(lane).expect("it was found before: this is a bug");
            let format = asked.format.spelled_by(&|text| pieces(served, text));
            let text = answer_text(&format).map_err(|error| fault(&asked.param, &error))?;
            Ok(GrammarPlan { param: asked.param, texts: vec![text], holds_calls: false })
        };
        state.heavy.run_if(is_long, plan).await
    }

    /// True if the arguments of every tool are to be what its schema says.
    pub(super) fn holds_calls(&self) -> bool {
        self.holds_calls
    }

    /// The grammar.
    ///
    /// # Errors
    /// The 400 that says what cannot be kept; 503 if others' grammars took too long.
    pub(super) async fn compile(self, served: &ServedModel) -> Result<Arc<Grammar>, ApiError> {
        let mut error = None;
        for text in self.texts {
            match compile(&served.grammars, text).await? {
                Ok(grammar) => return Ok(grammar),
                // Of the first: the others are makeshifts.
                Err(fault) => error = error.or(Some(fault)),
            }
        }
        let error = error.unwrap_or_else(|| GrammarError::Unsupported("there is no grammar".to_owned()));
        Err(fault(&self.param, &error))
    }
}

async fn compile(
    grammars: &Arc<Grammars>,
    text: String,
) -> Result<Result<Arc<Grammar>, GrammarError>, ApiError> {
    if let Some(known) = grammars.known(&text) {
        return Ok(Ok(known));
    }
    let grammars = grammars.clone();
    let job = tokio::task::spawn_blocking(move || grammars.compile(&text));
    match tokio::time::timeout(COMPILE_TIME, job).await {
        Ok(Ok(compiled)) => Ok(compiled),
        Ok(Err(_)) => Err(ApiError::new(ErrorKind::Internal, "compiling the grammar failed")),
        Err(_) => Err(ApiError {
            retry_after: Some(COMPILE_TIME.as_secs() as u32),
            ..ApiError::new(ErrorKind::Busy, "too many grammars are being compiled")
        }),
    }
}

/// What of a chat decides how its answer may look.
pub(super) struct ChatForm<'a> {
    pub(super) asked: Option<&'a AskedFormat>,
    /// In OpenAI's form.
    pub(super) tools: &'a [Value],
    pub(super) tool_choice: &'a ToolChoice,
    pub(super) one_call: bool,
    /// The prompt goes on to begin the call that `tool_choice` asks for.
    pub(super) is_forced: bool,
    /// The rendered prompt, without what a forced call adds.
    pub(super) prompt: &'a str,
    /// The client has the beginning of the answer already.
    pub(super) is_begun: bool,
}

impl ChatForm<'_> {
    /// The grammar of the answer, if it is to have a form.
    ///
    /// # Errors
    /// If the form cannot be promised with this model.
    pub(super) fn plan(&self, served: &ServedModel) -> Result<Option<GrammarPlan>, ApiError> {
        let calling = self.calling(served)?;
        if self.asked.is_none() && calling.is_none() {
            return Ok(None);
        }
        if self.asked.is_some() && self.is_begun {
            let message = "the messages end with the beginning of the answer, to which no form can be given";
            return Err(ApiError::invalid(self.param(), message));
        }
        let lead = self.lead(served);
        let format = self.asked.map(|asked| asked.format.clone().spelled_by(&|text| pieces(served, text)));
        let format = format.as_ref();
        let text = |calling: Option<&Calling>| grammar_text(lead.as_ref(), format, calling);
        let refused = |error: GrammarError| fault(&self.param(), &error);
        // Where nobody was promised the tools' schemas, any object will do if they cannot be kept.
        let loose = calling.clone().filter(|_| !self.tools.iter().any(is_strict)).map(|mut loose| {
            loose.tools.iter_mut().for_each(|tool| tool.is_exact = false);
            loose
        });
        let mut texts = Vec::new();
        let exact = text(calling.as_ref());
        let holds_calls =
            exact.is_ok() && calling.iter().any(|calling| calling.tools.iter().all(|tool| tool.is_exact));
        match (exact, loose) {
            (Ok(exact), None) => texts.push(exact),
            (Ok(exact), Some(loose)) => texts.extend([exact, text(Some(&loose)).map_err(refused)?]),
            (Err(GrammarError::TooLarge(_)), Some(loose)) if self.asked.is_some() => {
                texts.push(text(Some(&loose)).map_err(refused)?);
            }
            (Err(_), Some(loose)) if self.asked.is_none() => {
                // Nor is anybody promised a form, then: the call is as the model writes it.
                let Ok(loose) = text(Some(&loose)) else { return Ok(None) };
                texts.push(loose);
            }
            (Err(error), _) => return Err(refused(error)),
        }
        Ok(Some(GrammarPlan { param: self.param(), texts, holds_calls }))
    }

    fn param(&self) -> String {
        self.asked.map_or_else(|| "tools".to_owned(), |asked| asked.param.clone())
    }

    fn lead(&self, served: &ServedModel) -> Option<Lead> {
        if self.is_begun {
            return None;
        }
        if served.dialect.format() == Some(ToolFormat::Harmony) {
            let [channel, message, end, start] =
                ["<|channel|>", "<|message|>", "<|end|>", "<|start|>"].map(|text| token(served, text));
            return Some(Lead::Channels { channel, message, end, start });
        }
        let (open, close, has_begun) = served.dialect.reasoning(self.prompt)?;
        Some(Lead::Reasoning { open: token(served, open), close: token(served, close), has_begun })
    }

    /// The calls that the answer may have, as far as they are to be held to anything.
    fn calling(&self, served: &ServedModel) -> Result<Option<Calling>, ApiError> {
        let shapes: Vec<ToolShape> = self.tools.iter().map(shape).collect();
        let any_strict = self.tools.iter().any(is_strict);
        let begun = match self.tool_choice {
            ToolChoice::None => return Ok(None),
            ToolChoice::Auto => None,
            _ if !self.is_forced => return Ok(None),
            ToolChoice::Required => Some(None),
            ToolChoice::Named(name) => Some(shapes.iter().position(|shape| shape.name == *name)),
        };
        if shapes.is_empty() || (begun.is_none() && !any_strict && self.asked.is_none()) {
            return Ok(None);
        }
        let calling = call_format(served).map(|format| {
            let is_forced = begun.is_some();
            let tools =
                shapes.into_iter().map(|shape| ToolShape { is_exact: shape.is_exact || is_forced, ..shape });
            Calling { format, tools: tools.collect(), begun, is_parallel: !self.one_call }
        });
        match calling {
            Some(calling) if calling.begun.is_some() || calling.is_marked() => Ok(Some(calling)),
            // As far as the prompt forces it, as it always was.
            _ if begun.is_some() && !any_strict && self.asked.is_none() => Ok(None),
            _ if any_strict => {
                let message = "a tool is strict, and this model's way to call tools cannot be held to a schema \
                    with this tool_choice; leave strict out, or make tool_choice \"required\"";
                Err(ApiError::invalid("tools", message))
            }
            _ => {
                let message = "with this model, an answer of a given form cannot also be a tool call; \
                    make tool_choice \"none\"";
                Err(ApiError::invalid(self.param(), message))
            }
        }
    }
}

fn is_strict(tool: &Value) -> bool {
    tool["function"]["strict"] == true
}

fn shape(tool: &Value) -> ToolShape {
    let function = &tool["function"];
    ToolShape {
        name: function["name"].as_str().unwrap_or_default().to_owned(),
        parameters: function["parameters"].as_object().cloned().unwrap_or_else(Map::new),
        is_exact: is_strict(tool),
    }
}

/// A mark, cut where this model has control tokens for parts of it.
fn pieces(served: &ServedModel, text: &str) -> Vec<Piece> {
    let (tokenizer, markers) = (&served.model.tokenizer, served.dialect.markers());
    let (mut pieces, mut rest) = (Vec::new(), text);
    // What cannot be encoded is spelled.
    for id in tokenizer.encode(text, false).unwrap_or_default() {
        let name = tokenizer.id_to_token(id).filter(|_| tokenizer.is_special(id) || markers.contains(&id));
        let Some((before, after)) = name.and_then(|name| rest.split_once(name.as_str())) else { continue };
        if !before.is_empty() {
            pieces.push(Piece::Text(before.to_owned()));
        }
        pieces.push(Piece::Token(id));
        rest = after;
    }
    if !rest.is_empty() || pieces.is_empty() {
        pieces.push(Piece::Text(rest.to_owned()));
    }
    pieces
}

fn token(served: &ServedModel, text: &str) -> Token {
    Token { id: served.model.tokenizer.token_to_id(text), text: text.to_owned() }
}

fn call_format(served: &ServedModel) -> Option<CallFormat> {
    let token = |text| token(served, text);
    Some(match served.dialect.format()? {
        ToolFormat::Hermes => CallFormat::Hermes { open: token("<tool_call>"), close: token("</tool_call>") },
        ToolFormat::QwenXml => {
            CallFormat::QwenXml { open: token("<tool_call>"), close: token("</tool_call>") }
        }
        ToolFormat::Granite => CallFormat::List { open: token("<|tool_call|>") },
        ToolFormat::Mistral(MistralCalls::List) => CallFormat::List { open: token("[TOOL_CALLS]") },
        ToolFormat::Mistral(MistralCalls::Named { has_id, has_mark }) => CallFormat::Named {
            open: token("[TOOL_CALLS]"),
            call_id: has_id.then(|| token("[CALL_ID]")),
            arguments: has_mark.then(|| token("[ARGS]")),
        },
        ToolFormat::DeepSeek(spelling) => CallFormat::Section {
            open: token("<｜tool▁calls▁begin｜>"),
            close: token("<｜tool▁calls▁end｜>"),
            call: token("<｜tool▁call▁begin｜>"),
            call_end: token("<｜tool▁call▁end｜>"),
            separator: token("<｜tool▁sep｜>"),
            is_fenced: spelling == DeepSeekCalls::Fenced,
        },
        ToolFormat::Llama => CallFormat::Llama,
        ToolFormat::Harmony => {
            CallFormat::Harmony { constrain: token("<|constrain|>"), message: token("<|message|>") }
        }
    })
}
