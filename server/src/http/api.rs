//! Routes and what is said of them, in one place: whoever adds a path to the router adds it to the OpenAPI document.
//! Requests are described by the types that read them; answers are the protocols' own, whose documents they are.

use std::sync::Arc;

use axum::Router;
use axum::handler::Handler;
use axum::routing::{MethodRouter, delete, get, post};
use utoipa::ToSchema;
use utoipa::openapi::path::{HttpMethod, OperationBuilder, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{AllOfBuilder, Schema, SchemaType};
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, Content, Info, ObjectBuilder, OpenApi, OpenApiBuilder, PathItem, Paths, Ref, RefOr,
    Required, ResponseBuilder, Type,
};

use super::state::AppState;

const JSON: &str = "application/json";

/// What is said of one operation.
pub(super) struct Operation {
    summary: &'static str,
    body: Option<RefOr<Schema>>,
    schemas: Vec<(String, RefOr<Schema>)>,
    /// What an answer can be.
    answers: Vec<&'static str>,
}

impl Operation {
    /// One without a body.
    pub(super) fn new(summary: &'static str) -> Self {
        Operation { summary, body: None, schemas: Vec::new(), answers: vec![JSON] }
    }

    /// Its body is read as both of these.
    pub(super) fn reads<A: ToSchema, B: ToSchema>(mut self) -> Self {
        let (common, own) = (self.named::<A>(), self.named::<B>());
        self.body = Some(AllOfBuilder::new().item(common).item(own).into());
        self
    }

    /// A reference to a type, which is described once.
    fn named<T: ToSchema>(&mut self) -> Ref {
        T::schemas(&mut self.schemas);
        self.schemas.push((T::name().into_owned(), T::schema()));
        Ref::from_schema_name(T::name())
    }

    /// Its answer can be a stream of this type, too.
    pub(super) fn streams(mut self, content_type: &'static str) -> Self {
        self.answers.push(content_type);
        self
    }

    /// Its answer is of this type alone.
    pub(super) fn gives(mut self, content_type: &'static str) -> Self {
        self.answers = vec![content_type];
        self
    }

    fn build(self, tag: &str, path: &str) -> utoipa::openapi::path::Operation {
        let any = || {
            let any: RefOr<Schema> = ObjectBuilder::new().schema_type(SchemaType::AnyValue).into();
            Content::new(Some(any))
        };
        let answers = self.answers.into_iter();
        let answer =
            answers.fold(ResponseBuilder::new(), |answer, content_type| answer.content(content_type, any()));
        let fault = |text: &str| ResponseBuilder::new().description(text).content(JSON, any()).build();
        let mut operation = OperationBuilder::new()
            .tag(tag)
            .summary(Some(self.summary))
            .response("200", answer.description("The answer").build())
            .response("4XX", fault("The request is wrong, or too many wait"))
            .response("5XX", fault("The server's fault, or it is stopping"));
        for name in path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
            let string = ObjectBuilder::new().schema_type(Type::String).build();
            let parameter = ParameterBuilder::new().name(name).parameter_in(ParameterIn::Path);
            operation = operation.parameter(parameter.required(Required::True).schema(Some(string)).build());
        }
        if let Some(body) = self.body {
            let body = RequestBodyBuilder::new().content(JSON, Content::new(Some(body)));
            operation = operation.request_body(Some(body.required(Some(Required::True)).build()));
        }
        operation.build()
    }
}

/// Some of the server's routes.
#[derive(Default)]
pub(super) struct Api {
    router: Router<Arc<AppState>>,
    tag: &'static str,
    paths: Paths,
    schemas: Vec<(String, RefOr<Schema>)>,
}

impl Api {
    /// No routes yet, of this protocol.
    pub(super) fn new(tag: &'static str) -> Self {
        Api { tag, ..Api::default() }
    }

    pub(super) fn get<H, T>(self, path: &str, handler: H, operation: Operation) -> Self
    where
        H: Handler<T, Arc<AppState>>,
        T: 'static,
    {
        self.route(path, HttpMethod::Get, get(handler), operation)
    }

    pub(super) fn post<H, T>(self, path: &str, handler: H, operation: Operation) -> Self
    where
        H: Handler<T, Arc<AppState>>,
        T: 'static,
    {
        self.route(path, HttpMethod::Post, post(handler), operation)
    }

    pub(super) fn delete<H, T>(self, path: &str, handler: H, operation: Operation) -> Self
    where
        H: Handler<T, Arc<AppState>>,
        T: 'static,
    {
        self.route(path, HttpMethod::Delete, delete(handler), operation)
    }

    fn route(
        mut self,
        path: &str,
        method: HttpMethod,
        handler: MethodRouter<Arc<AppState>>,
        mut operation: Operation,
    ) -> Self {
        self.router = self.router.route(path, handler);
        // A name may stretch over several parts of a path; the document has no word for that.
        let path = path.replace("{*", "{");
        self.schemas.append(&mut operation.schemas);
        let item = PathItem::new(method, operation.build(self.tag, &path));
        match self.paths.paths.get_mut(&path) {
            Some(known) => known.merge_operations(item),
            None => drop(self.paths.paths.insert(path, item)),
        }
        self
    }

    /// These and those.
    pub(super) fn merge(mut self, other: Api) -> Self {
        self.router = self.router.merge(other.router);
        self.paths.merge(other.paths);
        self.schemas.extend(other.schemas);
        self
    }

    /// The router, and the document about it.
    pub(super) fn finish(self) -> (Router<Arc<AppState>>, OpenApi) {
        let key = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
        let components =
            ComponentsBuilder::new().schemas_from_iter(self.schemas).security_scheme("key", key).build();
        let mut info = Info::new("Tandem", env!("CARGO_PKG_VERSION"));
        info.description =
            Some("docs/API.md says what the fields mean. Unknown fields are ignored.".to_owned());
        let document = OpenApiBuilder::new()
            .info(info)
            .paths(self.paths)
            .components(Some(components))
            .security(Some([SecurityRequirement::new("key", [] as [&str; 0])]))
            .build();
        (self.router, document)
    }
}
