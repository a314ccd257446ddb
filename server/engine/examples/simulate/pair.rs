//! The models of a scenario: a pair, one model alone, or a target with a head that drafts for it; and what is
//! wrong with them.

use tandem_engine::{DraftHead, EngineConfig, Lane, Models, TokenId};
use tandem_models::Model;

use super::rng::Rng;
use crate::common::{
    Fault, FaultKind, HashModel, HeadRecipe, HeadedModel, NUM_LAYERS, Recipe, VOCAB_SIZE, Watch,
};

/// What makes a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ModelSpec {
    pub(crate) recipe: Recipe,
    pub(crate) fault: Option<Fault>,
}

impl ModelSpec {
    fn hash_model(&self) -> HashModel {
        let mut model = HashModel::with_recipe(self.recipe);
        model.fault = self.fault;
        model
    }

    /// The model alone.
    pub(crate) fn build(&self) -> Box<dyn Model> {
        Box::new(self.hash_model())
    }
}

/// The models of a scenario. One at least is there; a head is not without a target, nor beside a draft.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PairSpec {
    pub(crate) target: Option<ModelSpec>,
    pub(crate) draft: Option<ModelSpec>,
    pub(crate) head: Option<HeadRecipe>,
}

impl PairSpec {
    pub(crate) fn random(rng: &Rng) -> Self {
        let memory = if rng.one_in(2) { Some(rng.range(1, 2)) } else { None };
        let target = ModelSpec { recipe: Recipe { stray: 0.0, memory }, fault: None };
        let recipe = Recipe { stray: rng.pick(&[0.0, 1.0, 3.0, 100.0]), memory };
        let draft = ModelSpec { recipe, fault: None };
        let head = HeadRecipe {
            recipe,
            num_outputs: if rng.one_in(3) { rng.range(1, VOCAB_SIZE) } else { VOCAB_SIZE },
            features_after: rng.range(2, NUM_LAYERS),
            fault: None,
        };
        let mut pair = match rng.range(0, 9) {
            0 => PairSpec { target: Some(target), draft: None, head: None },
            1 => PairSpec { target: None, draft: Some(draft), head: None },
            2..=4 => PairSpec { target: Some(target), draft: None, head: Some(head) },
            _ => PairSpec { target: Some(target), draft: Some(draft), head: None },
        };
        if rng.one_in(3) {
            pair.add_fault(rng);
        }
        pair
    }

    fn add_fault(&mut self, rng: &Rng) {
        let kind = match rng.range(0, 2) {
            0 => FaultKind::Poison,
            1 => FaultKind::Error(rng.range(0, NUM_LAYERS)),
            _ => FaultKind::Panic(rng.range(0, NUM_LAYERS)),
        };
        // Not 0, which the measuring passes at start are made of.
        let fault = Some(Fault { token: rng.range(1, VOCAB_SIZE - 1) as TokenId, kind });
        match (&mut self.target, &mut self.draft, &mut self.head) {
            (Some(target), ..) if rng.one_in(2) => target.fault = fault,
            (_, Some(draft), _) => draft.fault = fault,
            (_, _, Some(head)) => head.fault = fault,
            (Some(target), ..) => target.fault = fault,
            _ => {}
        }
    }

    /// The model whose tokens this lane's clients see.
    pub(crate) fn answering(&self, lane: Lane) -> &ModelSpec {
        let model = match lane {
            Lane::Fast => &self.draft,
            Lane::Deep => &self.target,
        };
        model.as_ref().expect("nobody asks a lane that is not there")
    }

    /// True if there is one model, and no head.
    pub(crate) fn is_alone(&self) -> bool {
        self.head.is_none() && (self.target.is_none() || self.draft.is_none())
    }

    /// The fault that is somewhere in it.
    pub(crate) fn fault(&self) -> Option<Fault> {
        let of = |model: Option<ModelSpec>| model.and_then(|model| model.fault);
        of(self.target).or(of(self.draft)).or(self.head.and_then(|head| head.fault))
    }

    /// True if whatever drafts draws what the target does, at every place.
    pub(crate) fn drafts_perfectly(&self, config: &EngineConfig) -> bool {
        let recipe = match (self.draft, self.head) {
            (Some(draft), _) => Some(draft.recipe),
            (_, Some(head)) => Some(head.recipe).filter(|_| head.num_outputs == VOCAB_SIZE),
            _ => None,
        };
        let sees_all = config.vocab_map.is_none() && !matches!(config.draft_head, DraftHead::First(_));
        sees_all && self.fault().is_none() && recipe == self.target.map(|target| target.recipe)
    }

    /// The models, and what a head has to say of what it was given.
    pub(crate) fn build(&self) -> (Models, Watch) {
        let watch = Watch::default();
        let target: Option<Box<dyn Model>> = match (self.target, self.head) {
            (Some(target), Some(head)) => {
                Some(Box::new(HeadedModel::new(target.hash_model(), head, watch.clone())))
            }
            (target, _) => target.map(|target| target.build()),
        };
        (Models { target, draft: self.draft.map(|draft| draft.build()) }, watch)
    }
}
