//! Pretraining and distillation of small coding models.
