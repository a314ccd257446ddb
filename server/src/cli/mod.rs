//! The command line: what can be said, and which module does it.

mod bench;
mod distill;
mod generate;
mod keys;
mod lanes;
mod pair;
mod passes;
mod quantize;
mod serve;
mod settings;
mod synth;
mod terminal;
mod train;
mod training;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use settings::ServeSettings;

const ABOUT: &str = "\
Self-hosted, low-latency inference server for coding models.

Tandem loads a pair of models: a large one (the target) and a small one distilled from it (the draft). \
One process serves both under three model names:
  fast  the draft alone: ghost text, fill-in-the-middle, small edits
  deep  the target, accelerated by speculative decoding with the draft;
        the output is the target's own, token for token
  auto  picks one of the two for each request

Without a subcommand, `tandem` is `tandem serve`.";

const EXAMPLES: &str = "\
Examples:
  tandem                                     serve the demo pair on http://127.0.0.1:8080
  tandem serve --port 9000 --threads 8
  tandem serve --target ./big --draft ./small --kv-memory 4GiB
  tandem serve --target Qwen/Qwen2.5-Coder-7B-Instruct --draft Qwen/Qwen2.5-Coder-0.5B-Instruct
  tandem generate 'def fibonacci(n):' --max-tokens 64
  tandem bench pair                          measure what speculation gains on this machine
  tandem distill --help                      make a draft for your own target on your own code

Settings can be given as a flag (--draft-tokens 4), as an environment variable (TANDEM_DRAFT_TOKENS=4) \
or in a TOML file named by --config (draft-tokens = 4); a flag beats the environment, the environment \
beats the file.";

#[derive(Parser)]
#[command(
    name = "tandem",
    version,
    about = "Self-hosted, low-latency inference server for coding models",
    long_about = ABOUT,
    after_long_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeSettings,
}

#[derive(Subcommand)]
enum Command {
    /// Serve a pair of models over HTTP (OpenAI-compatible)
    #[command(long_about = serve::LONG_ABOUT, after_long_help = serve::EXAMPLES)]
    Serve(ServeSettings),
    /// Make, list and revoke API keys
    #[command(subcommand, long_about = keys::LONG_ABOUT, after_long_help = keys::EXAMPLES)]
    Keys(keys::KeysCommand),
    /// Show the rules by which `auto` picks a lane, and which of them a request would match
    #[command(long_about = lanes::LONG_ABOUT, after_long_help = lanes::EXAMPLES)]
    Lanes(lanes::LanesArgs),
    /// Generate once in the terminal, streaming
    Generate(generate::GenerateArgs),
    /// Train a tokenizer and a model from scratch on a folder of source files
    Train(train::TrainArgs),
    /// Make a draft for a target: train a small model on the target's own distribution
    Distill(distill::DistillArgs),
    /// Say whether two models work as target and draft, and what the pair would gain
    Pair(pair::PairArgs),
    /// Compare the fast backend with the reference backend on a model's own weights
    Verify(verify::VerifyArgs),
    /// Write a model as a GGUF file with smaller weights
    Quantize(quantize::QuantizeArgs),
    /// Write a model of a real one's shape with random weights, to size hardware with
    Synth(synth::SynthArgs),
    /// Measure this machine
    #[command(subcommand)]
    Bench(bench::BenchCommand),
}

/// Parses the command line and runs what it asks for.
pub(crate) fn run() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command.unwrap_or(Command::Serve(cli.serve)) {
        Command::Serve(settings) => serve::run(&settings),
        Command::Keys(command) => keys::run(&command),
        Command::Lanes(args) => lanes::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Train(args) => train::run(&args),
        Command::Distill(args) => distill::run(&args),
        Command::Pair(args) => pair::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Synth(args) => synth::run(&args),
        Command::Bench(command) => bench::run(&command),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("tandem: {error:#}");
            // Wrong settings exit like a wrong command line does.
            ExitCode::from(if error.is::<crate::config::ConfigError>() { 2 } else { 1 })
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_subcommand_is_serve() {
        let cli = Cli::try_parse_from(["tandem", "--port", "0", "--api-key", "a", "--api-key", "b"]).unwrap();
        assert!(cli.command.is_none());
        assert_eq!(
            cli.serve.flags(),
            [("port", vec!["0".to_owned()]), ("api-key", vec!["a".to_owned(), "b".to_owned()])]
        );
    }

    #[test]
    fn every_setting_is_a_flag_of_serve_and_its_help_says_so() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").expect("serve exists");
        for key in crate::config::keys() {
            let flag = serve.get_arguments().find(|argument| argument.get_long() == Some(key));
            let help = flag.unwrap_or_else(|| panic!("--{key}")).get_help().expect("help").to_string();
            assert!(help.len() > 10, "--{key} wants help, has {help:?}");
        }
    }
}
