//! Weights, configuration, tokenizer, chat template and the forward pass.

pub mod backend;
pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod decoder;
pub mod error;
pub mod export;
pub mod family;
mod files;
pub mod generation;
pub mod heads;
pub mod kv_cache;
pub mod model;
pub mod outputs;
pub mod pair;
pub mod rope;
pub mod source;
pub mod synth;
pub mod text;
mod validate;
pub mod verify;
pub mod weights;

pub use backend::{BackendKind, CpuBackend, ReferenceBackend};
pub use batch::ForwardBatch;
pub use checkpoint::Checkpoint;
pub use config::{DecoderConfig, LayerConfig, Rope, RopeScaling};
pub use decoder::{Decoder, load, load_with, load_with_head};
pub use error::ModelError;
pub use family::RopeOverride;
pub use generation::GenerationConfig;
pub use heads::{Head, HeadKind};
pub use model::{Model, WeightMemory};
pub use outputs::{Outputs, Wanted};
pub use pair::{VocabMap, check_pair};
pub use source::{HubOptions, resolve};
pub use tandem_kernels::kv::KvType;
pub use text::{
    ChatTemplate, Detokenizer, FimContext, FimFile, FimFrame, FimOrder, FimTokens, TemplateError, Tokenizer,
};
pub use weights::gguf::FileType;
pub use weights::{Dtype, Packing, Tensor, TensorView, WeightStore};
