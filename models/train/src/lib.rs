//! Pretraining and distillation of small coding models.
//!
//! [`train`] makes a tokenizer and a model from a folder of source files; [`distill`] makes a
//! draft for a target. Both write a folder that the server loads as it is. Nothing leaves the
//! machine, and a seed replays a run bit for bit.

mod chat;
mod corpus;
mod distill;
mod error;
mod evaluate;
mod export;
mod folder;
mod generate;
mod model;
mod ops;
mod optim;
mod options;
mod random;
mod report;
mod run;
mod sample;
mod tokenizer;
mod train;

pub use distill::distill;
pub use error::TrainError;
pub use options::{
    Budget, CorpusOptions, DistillOptions, ModelShape, OptimizerKind, RunOptions, SampleMix, Schedule,
    TrainOptions, WeightDtype,
};
pub use report::{CorpusSummary, DistillReport, PairReport, TrainReport};
pub use train::train;
