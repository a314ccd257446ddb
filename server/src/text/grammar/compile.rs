//! From a grammar's text to what sequences follow, within limits, and the cache of what was compiled.
//!
//! Compiling takes from a fraction of a millisecond to some tens (the limit is llguidance's fuel), and the
//! first grammar of a model builds the token trie: half a second for 150,000 tokens. So it runs on a
//! thread of its own, one at a time, with a stack that the deepest text within the limits cannot exhaust.
//! A mask takes some ten microseconds, seldom more than a millisecond; its limits are reached after about
//! ten.

use std::sync::{Arc, Mutex, OnceLock};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use tandem_engine::Constraint;
use tandem_models::Tokenizer;
use toktrie::{InferenceCapabilities, TokEnv};

use super::cache::Cache;
use super::follow::Follower;
use super::vocabulary::Vocabulary;

/// Longest text: the largest schemas in use have about 100 KB.
pub(super) const MAX_TEXT_BYTES: usize = 256 << 10;

/// Deepest nesting of brackets and negations in a text, counted without regard to what is quoted.
const MAX_NESTING: usize = 512;

/// For compiling: parsers go down a stack frame or several a bracket, in a debug build large ones.
const STACK_BYTES: usize = 256 << 20;

/// What all compiled grammars of a model may take.
const MAX_CACHE_BYTES: usize = 64 << 20;

/// What a grammar takes beside its lexer, which grows with its first steps, and its text's multiple.
const GRAMMAR_BYTES: usize = 64 << 10;

/// Bytes of rules and symbols a byte of text, at most.
const BYTES_A_TEXT_BYTE: usize = 16;

fn limits() -> ParserLimits {
    ParserLimits {
        // At 50,000 a millisecond.
        initial_lexer_fuel: 1_000_000,
        // At 14,000 a millisecond.
        step_lexer_fuel: 100_000,
        // At 20,000 a millisecond.
        step_max_items: 50_000,
        // One or two kilobytes each, for every running sequence.
        max_lexer_states: 20_000,
        max_grammar_size: 250_000,
        // The state of the parser is of no use to a client.
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Why there is no grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The text is wrong, or asks for something that cannot be kept.
    #[error("{0}")]
    Unsupported(String),
    /// The text, or what it stands for, is too large.
    #[error("{0}")]
    TooLarge(String),
}

/// What every sequence of a grammar starts from.
pub(super) struct Template {
    /// Before the first token, its first mask computed.
    pub(super) matcher: Matcher,
    /// The token that stands for the end.
    pub(super) end: u32,
}

/// A compiled grammar.
pub struct Grammar {
    template: Arc<Template>,
    size_bytes: usize,
}

impl Grammar {
    /// The grammar at its beginning, for one sequence.
    pub fn start(&self) -> Box<dyn Constraint> {
        Box::new(Follower::new(self.template.clone()))
    }

    /// About what it takes of memory.
    pub fn size_bytes(&self) -> usize {
        self.size_bytes
    }
}

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammar").field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}

/// The grammars of one model.
pub struct Grammars {
    tokenizer: Arc<Tokenizer>,
    markers: Vec<u32>,
    factory: OnceLock<Result<ParserFactory, GrammarError>>,
    cache: Mutex<Cache>,
    /// Held while something is compiled.
    compiling: Mutex<()>,
}

impl Grammars {
    /// None yet. `markers`: tokens that are control tokens although the tokenizer does not say so.
    pub fn new(tokenizer: Arc<Tokenizer>, markers: &[u32]) -> Self {
        Self::with_cache_bytes(tokenizer, markers, MAX_CACHE_BYTES)
    }

    /// The same, keeping so many bytes of compiled grammars.
    pub fn with_cache_bytes(tokenizer: Arc<Tokenizer>, markers: &[u32], max_cache_bytes: usize) -> Self {
        Grammars {
            tokenizer,
            markers: markers.to_vec(),
            factory: OnceLock::new(),
            cache: Mutex::new(Cache::new(max_cache_bytes)),
            compiling: Mutex::new(()),
        }
    }

    /// The grammar of this text, if it was compiled before.
    pub fn known(&self, text: &str) -> Option<Arc<Grammar>> {
        self.cache.lock().expect("no holder of this lock panics: this is a bug").get(text)
    }

    /// Compiles a text in llguidance's dialect of Lark, and keeps the grammar. Blocks for as long as that
    /// and all that came before takes.
    ///
    /// # Errors
    /// What is wrong with the text, or too much of it.
    pub fn compile(self: &Arc<Self>, text: &str) -> Result<Arc<Grammar>, GrammarError> {
        check_size(text)?;
        let one_at_a_time = self.compiling.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(known) = self.known(text) {
            return Ok(known);
        }
        let (grammars, text): (_, Arc<str>) = (self.clone(), text.into());
        let there = text.clone();
        let job = std::thread::Builder::new().name("grammar".to_owned()).stack_size(STACK_BYTES);
        let compiled = match job.spawn(move || grammars.compile_here(&there)) {
            Ok(thread) => thread.join().map_err(|_| "compiling the grammar failed".to_owned()),
            Err(error) => Err(format!("the grammar's thread did not start: {error}")),
        };
        let grammar = compiled.unwrap_or_else(|reason| Err(GrammarError::Unsupported(reason)))?;
        drop(one_at_a_time);
        let mut cache = self.cache.lock().expect("no holder of this lock panics: this is a bug");
        Ok(cache.insert(text, Arc::new(grammar)))
    }

    fn factory(&self) -> Result<&ParserFactory, GrammarError> {
        let build = || {
            let vocabulary: TokEnv = Arc::new(Vocabulary::new(&self.tokenizer, &self.markers)?);
            let slices = llguidance::earley::SlicedBiasComputer::general_slices();
            let factory = ParserFactory::new(&vocabulary, InferenceCapabilities::default(), &slices);
            let mut factory = factory.map_err(|error| GrammarError::Unsupported(error.to_string()))?;
            factory.quiet();
            *factory.limits_mut() = limits();
            Ok(factory)
        };
        self.factory.get_or_init(build).as_ref().map_err(GrammarError::clone)
    }

    fn compile_here(&self, text: &str) -> Result<Grammar, GrammarError> {
        let factory = self.factory()?;
        let unsupported =
            |error: &dyn std::fmt::Display| GrammarError::Unsupported(reason(&error.to_string()));
        let parser = factory
            .create_parser(TopLevelGrammar::from_lark(text.to_owned()))
            .map_err(|error| unsupported(&format_args!("{error:#}")))?;
        let lexer_bytes = parser.parser.lexer_stats().num_bytes;
        let mut matcher = Matcher::new(Ok(parser));
        let end = factory.tok_env().tok_trie().eos_token();
        // So that each sequence need not compute it.
        let first = matcher.compute_mask().map_err(|error| unsupported(&error))?.first_bit_set();
        if let Some(first) = first.map(|id| id as u32).filter(|&id| id != end) {
            // Speculation goes back; some options of a grammar's forbid that.
            matcher.consume_token(first).map_err(|error| unsupported(&error))?;
            matcher.rollback(1).map_err(|error| unsupported(&error))?;
        }
        let size_bytes = GRAMMAR_BYTES + BYTES_A_TEXT_BYTE * text.len() + 2 * lexer_bytes;
        Ok(Grammar { template: Arc::new(Template { matcher, end }), size_bytes })
    }
}

/// A message of llguidance's: what is wrong, without the lines of the text that it shows.
pub(super) fn reason(message: &str) -> String {
    /// Enough to name a key and a place.
    const MAX_CHARS: usize = 400;
    let first = message.trim().lines().next().unwrap_or_default();
    // The text around a schema is not the client's.
    let first = first.split_once("failed to compile JSON schema: ").map_or(first, |(_, reason)| reason);
    let short: String = first.chars().take(MAX_CHARS).collect();
    match short.as_str() {
        "" => "the grammar cannot be followed".to_owned(),
        _ if short.starts_with("oneOf constraints are not supported") => {
            "alternatives of a oneOf may overlap, which no grammar can exclude; make them exclude each other, or \
             use anyOf"
                .to_owned()
        }
        _ => short,
    }
}

/// Refuses a text that has so many bytes, or so many already.
pub(super) fn check_length(num_bytes: usize) -> Result<(), GrammarError> {
    if num_bytes <= MAX_TEXT_BYTES {
        return Ok(());
    }
    let message = format!("the grammar has {num_bytes} bytes or more; at most {MAX_TEXT_BYTES} are taken");
    Err(GrammarError::TooLarge(message))
}

fn check_size(text: &str) -> Result<(), GrammarError> {
    check_length(text.len())?;
    let (mut depth, mut deepest, mut num_negations) = (0usize, 0, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            b'~' => num_negations += 1,
            b' ' => {}
            _ => num_negations = 0,
        }
        deepest = deepest.max(depth + num_negations);
    }
    if deepest > MAX_NESTING {
        let message = format!("the grammar nests {deepest} deep; at most {MAX_NESTING} are taken");
        return Err(GrammarError::TooLarge(message));
    }
    Ok(())
}
