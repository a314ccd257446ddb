//! What every format of tool calls does.

use super::events::Sink;
use super::input::Input;

/// A model family's way to write text and tool calls.
pub(super) trait Format: Send {
    /// Reads on, as far as the text goes. `is_tool` says which names can be called.
    fn read(&mut self, input: &mut Input, sink: &mut Sink, is_tool: &dyn Fn(&str) -> bool);

    /// The answer is over and all of it was read: gives what was held back.
    fn finish(&mut self, sink: &mut Sink);
}
