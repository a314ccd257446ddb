//! A hostile chat template is stopped, whatever it tries, before it has used much memory or stack.
//! Memory is measured, by counting what the thread under test allocates.

#![allow(unsafe_code, reason = "a counting allocator must implement GlobalAlloc")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use serde_json::{Map, Value, json};
use tandem_models::ChatTemplate;

struct CountingAllocator;

thread_local! {
    static LIVE: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: every call is passed on to `System` with its arguments unchanged, so its guarantees hold.
// The counters are const-initialised thread-locals without destructors: touching them does not allocate.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.set(LIVE.get().saturating_add(layout.size()));
        PEAK.set(PEAK.get().max(LIVE.get()));
        // SAFETY: the caller's promises about `layout` are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.set(LIVE.get().saturating_sub(layout.size()));
        // SAFETY: the caller's promises about `pointer` and `layout` are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Sixteen million bytes may be made, and one value may be in the making.
const PEAK_LIMIT: usize = 64 << 20;

/// Runs `source` to its error; returns the error and the peak of allocated bytes.
fn stopped(source: &str, messages: &Value) -> (String, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    let template = ChatTemplate::from_source(source, None, None).unwrap();
    let result = template.render(messages, None, true, &Map::new());
    let peak = PEAK.get() - before;
    match result {
        Ok(text) => panic!("{source} rendered {} bytes", text.len()),
        Err(error) => (error.to_string(), peak),
    }
}

#[test]
fn doubling_a_string_24_times_is_stopped_early() {
    for (name, body) in [
        ("concat", "{% set ns.s = ns.s ~ ns.s %}"),
        ("add", "{% set ns.s = ns.s + ns.s %}"),
        ("multiply", "{% set ns.s = ns.s * 2 %}"),
        ("join", "{% set ns.s = [ns.s, ns.s] | join %}"),
        ("method", "{% set ns.s = ''.join([ns.s, ns.s]) %}"),
        ("replace", "{% set ns.s = ns.s | replace('x', 'xx') %}"),
        ("replace method", "{% set ns.s = ns.s.replace('x', 'xx') %}"),
        ("format", "{% set ns.s = '{}{}'.format(ns.s, ns.s) %}"),
        ("capture", "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"),
        ("macro", "{% macro m(s) %}{{ s }}{{ s }}{% endmacro %}{% set ns.s = m(ns.s) %}"),
        (
            "filter block",
            "{% set t %}{% filter upper %}{{ ns.s }}{{ ns.s }}{% endfilter %}{% endset %}{% set ns.s = t %}",
        ),
    ] {
        let source = format!(
            "{{% set ns = namespace(s='xxxxxxxxxxxxxxxx') %}}{{% for i in range(24) %}}{body}{{% endfor %}}\
             {{{{ ns.s | length }}}}"
        );
        let (error, peak) = stopped(&source, &json!([]));
        assert!(peak < PEAK_LIMIT, "{name}: {peak} bytes");
        assert!(error.contains("too much text") || error.contains("too long"), "{name}: {error}");
    }
}

#[test]
fn one_step_that_makes_much_of_little_is_refused_before_it_is_made() {
    for source in [
        "{{ 'x' * 100000000 }}",
        "{{ ([1] * 50000000) | length }}",
        "{{ 'x' * 90000000 ~ 'x' * 90000000 ~ 'x' * 90000000 }}",
        "{{ 'x' * 10 ** 8 }}",
        "{{ ('x' * 1000000).replace('x', 'y' * 1000000) }}",
        "{{ ('x' * 1000000) | replace('', 'y' * 1000000) }}",
        "{{ range(100000) | join('y' * 100000) }}",
        "{{ 'a\nb' | indent(1000000000) }}",
        "{{ 'a\nb' | indent(width=1000000000) }}",
        "{{ '{:>1000000000}'.format('x') }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ ('x' * 1000000).split('') | length }}",
        "{{ range(100000) | map('upper') | list }}{{ (['x' * 1000000] * 100000) | map('upper') | list }}",
        "{{ ([['x' * 1000000]] * 100000) | map('join', ',') | list }}",
        "{{ ([range(100000)] * 10000) | map('list') | list }}",
        "{{ 'x' | batch(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
    ] {
        let (error, peak) = stopped(source, &json!([]));
        assert!(peak < PEAK_LIMIT, "{source}: {peak} bytes, {error}");
    }
}

#[test]
fn small_steps_cannot_add_up() {
    let text = "y".repeat(1000);
    for source in [
        format!("{{% for i in range(100000) %}}{text}{{% endfor %}}"),
        format!("{{% set s %}}{{% for i in range(100000) %}}{text}{{% endfor %}}{{% endset %}}"),
        "{% set ns = namespace(l=[]) %}{% for i in range(100000) %}{% set ns.l = ns.l + [i] %}{% endfor %}"
            .into(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = ns.l + ns.l %}{% endfor %}"
            .into(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}\
         {{ ns.l }}"
            .into(),
        "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}{% set ns.l = {'a': ns.l, 'b': ns.l} %}\
         {% endfor %}{{ ns.l | tojson }}"
            .into(),
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}".into(),
    ] {
        let (error, peak) = stopped(&source, &json!([]));
        assert!(peak < PEAK_LIMIT, "{source}: {peak} bytes, {error}");
    }
}

#[test]
fn recursion_is_an_error_and_not_a_stack_overflow() {
    for source in [
        "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.a = [ns] %}{{ ns }}",
        "{% set ns = namespace() %}{% set ns.a = {'x': ns} %}{{ ns | tojson }}",
        "{% set ns = namespace(a=1) %}{% set ns.b = ns | items %}{% set ns.c = dict(x=ns) %}{{ ns }}",
        "{% set ns = namespace() %}{% set v = ns.values() %}{% set ns.a = v %}{% set ns.b = ns %}{{ ns == v }}",
        "{% set a = namespace() %}{% set b = namespace(a=a) %}{% set a.b = b %}{{ a }}",
        "{% set ns = namespace(l=[]) %}{% for i in range(30000) %}{% set ns.l = [ns.l] %}{% endfor %}{{ ns.l }}",
        "{% set ns = namespace(l={}) %}{% for i in range(30000) %}{% set ns.l = {'a': ns.l} %}{% endfor %}",
        "{% set ns = namespace(l=1) %}{% for i in range(30000) %}{% set ns.l = (ns.l, 1) %}{% endfor %}",
        "{% set ns = namespace(l=1) %}{% for i in range(30000) %}{% set ns.l = dict(a=ns.l) %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% include 'chat_template' %}",
    ] {
        let (error, peak) = stopped(source, &json!([]));
        assert!(peak < PEAK_LIMIT, "{source}: {peak} bytes, {error}");
    }
}

/// A lazy view of a namespace, stored in that namespace, would hold itself.
#[test]
fn views_of_a_namespace_are_copies() {
    let source = "{% set ns = namespace(a=1) %}{% set ns.b = ns | items %}{% set ns.c = ns.values() %}\
                  {% set ns.d = [ns.keys()] %}{{ ns.c }}{{ ns == ns }}";
    let template = ChatTemplate::from_source(source, None, None).unwrap();
    let text = template.render(&json!([]), None, true, &Map::new()).unwrap();
    assert_eq!(text, "[1, [('a', 1)]]True");
}

#[test]
fn long_honest_conversations_are_not_limited() {
    let source = "{% set ns = namespace(n=0) %}{% set system = messages | selectattr('role', 'equalto', 'system') | list %}\
                  {% for message in messages %}{% set ns.n = ns.n + 1 %}{{ '<|' + message.role + '|>' }}\
                  {{ message.content | trim | replace('\\r', '') ~ '\\n' }}\
                  {% if 'zzz' in message.content %}{{ message.content.split('zzz')[-1] }}{% endif %}{% endfor %}";
    let content = "word ".repeat(2000);
    let messages: Vec<Value> = (0..1000).map(|_| json!({"role": "user", "content": content})).collect();
    let template = ChatTemplate::from_source(source, None, None).unwrap();
    let text = template.render(&json!(messages), None, true, &Map::new()).unwrap();
    assert_eq!(text.len(), 1000 * ("<|user|>".len() + content.trim().len() + 1));
}
