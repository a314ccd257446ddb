//! What the fields that read more than one shape look like in the OpenAPI document.

use utoipa::openapi::schema::{AdditionalProperties, SchemaType};
use utoipa::openapi::{ArrayBuilder, ObjectBuilder, OneOfBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use super::json::{Entries, Ids, Strings};
use super::{Bounded, Prediction};

fn simple(kind: Type) -> RefOr<Schema> {
    ObjectBuilder::new().schema_type(kind).into()
}

fn any() -> RefOr<Schema> {
    ObjectBuilder::new().schema_type(SchemaType::AnyValue).into()
}

fn list(of: RefOr<Schema>) -> RefOr<Schema> {
    ArrayBuilder::new().items(of).into()
}

fn one_of(shapes: impl IntoIterator<Item = RefOr<Schema>>) -> RefOr<Schema> {
    shapes.into_iter().fold(OneOfBuilder::new(), |one_of, shape| one_of.item(shape)).into()
}

impl PartialSchema for Bounded {
    fn schema() -> RefOr<Schema> {
        any()
    }
}

impl ToSchema for Bounded {
    fn name() -> std::borrow::Cow<'static, str> {
        "Any".into()
    }
}

impl PartialSchema for Strings {
    fn schema() -> RefOr<Schema> {
        one_of([simple(Type::String), list(simple(Type::String))])
    }
}

impl ToSchema for Strings {}

impl PartialSchema for Ids {
    fn schema() -> RefOr<Schema> {
        list(simple(Type::Integer))
    }
}

impl ToSchema for Ids {}

impl PartialSchema for Entries {
    fn schema() -> RefOr<Schema> {
        let numbers = AdditionalProperties::RefOr(simple(Type::Number));
        ObjectBuilder::new().additional_properties(Some(numbers)).into()
    }
}

impl ToSchema for Entries {
    fn name() -> std::borrow::Cow<'static, str> {
        "NumbersByToken".into()
    }
}

fn texts_or_ids() -> RefOr<Schema> {
    let ids = || list(simple(Type::Integer));
    one_of([simple(Type::String), list(simple(Type::String)), ids(), list(ids())])
}

impl PartialSchema for crate::http::embeddings::EmbeddingInput {
    fn schema() -> RefOr<Schema> {
        texts_or_ids()
    }
}

impl ToSchema for crate::http::embeddings::EmbeddingInput {}

impl PartialSchema for crate::http::prompt::PromptField {
    fn schema() -> RefOr<Schema> {
        texts_or_ids()
    }
}

impl ToSchema for crate::http::prompt::PromptField {
    fn name() -> std::borrow::Cow<'static, str> {
        "Prompt".into()
    }
}

impl PartialSchema for Prediction {
    fn schema() -> RefOr<Schema> {
        let content = one_of([simple(Type::String), list(any())]);
        ObjectBuilder::new()
            .property("type", simple(Type::String))
            .property("content", content)
            .required("type")
            .required("content")
            .into()
    }
}

impl ToSchema for Prediction {}
